"""Names inside files that lead elsewhere: `..`, absolute ones, links. Nothing outside is read as a part, or written."""

import io
import json
import stat
import zipfile

import pytest

from mindformers_glm32k.cli import main
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.longbench import samples
from mindformers_glm32k.weights.checkpoint import open_source
from tests.fuzz.guard import watched

RECORD = {"input": "a?", "context": "b c", "answers": ["d"], "length": 3, "dataset": "qasper", "language": "en",
    "all_classes": None, "_id": "x"}  # fmt: skip


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname", "..", "sub/a.safetensors", "a\0b", ""])
def test_an_index_names_files_of_its_own_folder(name, tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "secret.safetensors", folder / "sub" / "a.safetensors"):
        path.write_bytes(b"not weights")
    index = {"metadata": {}, "weight_map": {"transformer.a.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with watched(folder) as found, pytest.raises(InputError) as caught:
        open_source(folder)
    assert "model.safetensors.index.json" in str(caught.value) and not found


@pytest.mark.parametrize("name", ["../../up.jsonl", "/tmp/glm32k-absolute.jsonl", "data/../../up.jsonl"])
def test_members_of_a_zip_are_never_unpacked_to_their_names(name, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        archive.writestr(name, json.dumps(RECORD))
    with watched(folder) as found:
        (entry,) = samples.scan(folder / "data.zip")
    assert entry.dataset == "qasper" and not found
    with watched(folder) as found:
        options = ["--data_path", str(folder / "data.zip"), "--output_path", str(folder / "out")]
        assert main(["preprocess", *options]) in (0, 2)
    assert not found and sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_link_in_a_zip_is_no_data(tmp_path):
    (tmp_path / "secret.jsonl").write_text(json.dumps(RECORD), encoding="utf-8")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("qasper.jsonl")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(tmp_path / "secret.jsonl"))
    (tmp_path / "data.zip").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="qasper.jsonl: line 1: "):
        samples.scan(tmp_path / "data.zip")


@pytest.mark.parametrize("name", ["../../up", "/tmp/glm32k", "a/b", "..", ".hidden", "a\0b", "a" * 300, "", 3])
def test_a_data_set_is_no_path(name, tmp_path):
    """Predictions are written to DATASET.jsonl."""
    (tmp_path / "a.jsonl").write_text(json.dumps({**RECORD, "dataset": name}), encoding="utf-8")
    with pytest.raises(InputError, match="the name of a data set is needed"):
        samples.scan(tmp_path / "a.jsonl")
