"""Documents on one side of a split, and the manifest that scores are judged by; prompt templates: the same text as
str.format, the place of the context, and errors."""

import json

import pytest

from mindformers_glm32k.data.longbench import TEST_SETS, Manifest, PromptTemplates, is_held_out, is_test_set
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


def templates(tmp_path, content):
    path = tmp_path / "dataset2prompt.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return PromptTemplates(path)


def test_the_context_is_found_in_the_prompt(tmp_path):
    prompts = templates(tmp_path, {"qa": "Read {{this}}:\n{context}\nQ: {input}"})
    record = {"dataset": "qa", "context": "a {text} b", "input": "why {context}?"}
    text, (start, stop) = prompts.render(record)
    assert text == "Read {this}:\na {text} b\nQ: why {context}?"
    assert text[start:stop] == "a {text} b"


def test_without_a_context_all_of_the_prompt_is_context(tmp_path):
    text, span = templates(tmp_path, {"qa": "Q: {input}"}).render({"dataset": "qa", "input": "why?"})
    assert (text, span) == ("Q: why?", (0, 7))


def test_longbench_e_takes_the_prompt_of_the_data_set_it_comes_from(tmp_path):
    record = {"dataset": "qa_e", "input": "x"}
    assert templates(tmp_path, {"qa": "1 {input}"}).render(record)[0] == "1 x"
    assert templates(tmp_path, {"qa": "1 {input}", "qa_e": "2 {input}"}).render(record)[0] == "2 x"


def test_longbenchs_own_prompts_render_as_str_format(reference):
    path = reference / "longbench" / "dataset2prompt.json"
    prompts = PromptTemplates(path)
    for name, template in json.loads(path.read_text(encoding="utf-8")).items():
        record = {"dataset": name, "context": "C {0} 长\n", "input": "I {input}"}
        text, (start, stop) = prompts.render(record)
        assert text == template.format(**record)
        assert text[start:stop] == record["context"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[]", "a JSON object is needed"),
        ({"qa": 3}, "'qa' is int"),
        ({"qa": "{context"}, "wrong brace"),
        ({"qa": "{}"}, "the field {}"),
        ({"qa": "{context.real}"}, "the field {context.real}"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, message):
    with pytest.raises(InputError, match="dataset2prompt.json.*" + message):
        templates(tmp_path, content)


def test_an_unknown_data_set_is_named_with_those_there_are(tmp_path):
    with pytest.raises(InputError, match="no prompt for the data set 'trec'.*qa"):
        templates(tmp_path, {"qa": "{input}"}).render({"dataset": "trec", "input": ""})


def test_a_field_that_the_record_does_not_have_is_named(tmp_path):
    with pytest.raises(InputError, match="'title' is missing"):
        templates(tmp_path, {"qa": "{title}"}).render({"dataset": "qa"})
