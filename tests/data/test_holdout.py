"""Documents on one side of a split, and the manifest that scores are judged by."""

import json

import pytest

from mindformers_glm32k.data.holdout import TEST_SETS, Manifest, is_held_out, is_test_set
from mindformers_glm32k.errors import InputError


def test_a_document_falls_on_one_side_by_its_text_and_the_seed_alone():
    documents = [f"document {number}" for number in range(2000)]
    held_out = [document for document in documents if is_held_out(document, 0.1)]
    assert 140 < len(held_out) < 260
    assert all(is_held_out(f"  {document}\n", 0.1) for document in held_out)
    assert set(held_out) < {document for document in documents if is_held_out(document, 0.2)}
    assert set(held_out) != {document for document in documents if is_held_out(document, 0.1, seed=1)}
    assert not any(is_held_out(document, 0.0) for document in documents)


def test_the_names_of_longbench(reference):
    prompts = json.loads((reference / "longbench" / "dataset2prompt.json").read_text(encoding="utf-8"))
    assert set(prompts) == TEST_SETS
    assert is_test_set("trec_e") and not is_test_set("retrieval") and not is_test_set("_e")


def test_a_manifest_knows_trained_samples_by_number_and_by_text(tmp_path):
    manifest = Manifest(0.1, 3)
    manifest.add({"dataset": "qmsum", "_id": "1", "context": "one"}, held_out=False)
    manifest.add({"dataset": "trec", "context": "without a number"}, held_out=False)
    manifest.add({"dataset": "trec", "_id": "2", "context": "two"}, held_out=True)
    manifest.write(tmp_path / "m.json")
    found = Manifest.read(tmp_path / "m.json")
    assert (found.trained, found.held_out) == ({"qmsum": ["1"], "trec": []}, {"trec": ["2"]})
    assert (found.holdout, found.seed) == (0.1, 3)
    assert found.is_contaminated({"dataset": "qmsum_e", "_id": "1", "context": "other"})
    assert found.is_contaminated({"dataset": "qmsum_e", "_id": "9", "context": "one "})
    assert found.is_contaminated({"dataset": "trec", "_id": "9", "context": "without a number"})
    assert not found.is_contaminated({"dataset": "trec", "_id": "2", "context": "two"})
    assert not found.is_contaminated({"dataset": "trec", "context": "three"})


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"version": 2}',
        '{"version": 1, "holdout": 0, "seed": 0, "trained": [], "held_out": {}, "trained_documents": []}',
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path, content):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(InputError, match="m.json: not one that `glm32k preprocess` wrote"):
        Manifest.read(tmp_path / "m.json")
    with pytest.raises(InputError, match="no such file"):
        Manifest.read(tmp_path / "other.json")
