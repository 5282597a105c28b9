"""Files and folders of samples."""

import gzip
import json
import os
import resource

import pytest

from mindformers_glm32k.data.formats import Chat, Text
from mindformers_glm32k.data.sources import SampleSource, data_files
from mindformers_glm32k.errors import InputError

LINE = json.dumps({"content": "q", "summary": "a"}) + "\n"


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def adgen(*numbers):
    return [{"content": f"q{number}", "summary": f"a{number}"} for number in numbers]


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    write(tmp_path / "b.jsonl", *adgen(3, 4))
    write(tmp_path / "a.jsonl", *adgen(0, 1, 2))
    write(tmp_path / "other.json", {"no": "data"})
    write(tmp_path / ".a.x7.tmp.jsonl", *adgen(9))  # left behind by a program that was killed while it wrote a.jsonl
    source = SampleSource(tmp_path)
    assert [source[index].prompt for index in range(len(source))] == ["q0", "q1", "q2", "q3", "q4"]
    assert source.location(4) == f"{tmp_path / 'b.jsonl'}, line 2"
    assert [(layout, size) for _, layout, size in source.files()] == [("adgen", 3), ("adgen", 2)]
    with pytest.raises(IndexError):
        source[5]


def test_num_samples_takes_the_first(tmp_path):
    path = write(tmp_path / "a.jsonl", *adgen(*range(5)))
    assert [SampleSource(path, num_samples=2)[index].answer for index in range(2)] == ["a0", "a1"]
    assert len(SampleSource(path, num_samples=2)) == 2 and len(SampleSource(path, num_samples=99)) == 5


def test_layouts_may_differ_from_file_to_file(tmp_path):
    prompts = write(tmp_path / "prompts.json", {"qa": "{context} {input}"})
    record = {"input": "why?", "context": "because", "answers": ["a"], "dataset": "qa"}
    write(tmp_path / "a.jsonl", *adgen(0))
    write(tmp_path / "b.jsonl", record)
    source = SampleSource(tmp_path, prompt_config_file=prompts)
    assert [sample.prompt for sample in (source[0], source[1])] == ["q0", "because why?"]
    both = write(tmp_path / "c.jsonl", {**record, **adgen(7)[0]})
    assert SampleSource(both, prompt_config_file=prompts)[0].prompt == "q7"
    assert SampleSource(both, prompt_config_file=prompts, layout="longbench")[0].prompt == "because why?"


def test_chats_and_plain_text_are_found_by_their_fields(tmp_path):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write(tmp_path / "a.jsonl", {"messages": chat})
    write(tmp_path / "b.jsonl", {"text": "once"})
    write(tmp_path / "c.jsonl", {"conversations": chat, "tools": ["t"]})
    source = SampleSource(tmp_path)
    assert [layout for _, layout, _ in source.files()] == ["chat", "text", "chat"]
    assert source[1] == Text("once") and source[0] == Chat(source[2].messages[1:])


def test_damaged_lines_are_skipped_and_told_by_file(tmp_path):
    path = write(tmp_path / "a.jsonl", {"content": "q"}, *adgen(0, 1))
    write(tmp_path / "b.jsonl", *adgen(2))
    with pytest.raises(InputError, match="a.jsonl: line 1: has the fields 'content'"):
        SampleSource(tmp_path)
    source = SampleSource(tmp_path, on_error="skip")
    assert [source[index].prompt for index in range(3)] == ["q0", "q1", "q2"]
    assert source.location(0) == f"{path}, line 2"
    [problem] = source.problems()
    assert problem.startswith(f"1 of 3 lines are damaged and skipped: {path}: line 1: column 'summary' is missing")


def test_the_reference_set_is_read_whole(reference):
    source = SampleSource(
        reference / "longbench" / "data", prompt_config_file=reference / "longbench" / "dataset2prompt.json"
    )
    records = [
        json.loads(line)
        for path in sorted((reference / "longbench" / "data").glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert len(source) == len(records) > 0
    for index, record in enumerate(records):
        sample = source[index]
        assert sample.answer == record["answers"][0]
        assert sample.prompt[slice(*sample.context)] == record["context"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dataset_dir": None}, "no path given.*--train_dataset_dir"),
        ({"dataset_dir": "nothing.jsonl"}, "nothing.jsonl: no such file"),
        ({"dataset_dir": "folder"}, "no \\*.jsonl in this folder, found readme.txt"),
        ({"dataset_dir": "wrong.jsonl"}, "wrong.jsonl: line 1: has the fields 'a'"),
        ({"dataset_dir": "wrong.jsonl", "layout": "adgen"}, "wrong.jsonl: line 1: column 'content' is missing"),
        ({"dataset_dir": "later.jsonl"}, "later.jsonl: line 2: column 'summary' is missing"),
        ({"dataset_dir": "longbench.jsonl"}, "prompt_config_file"),
        ({"dataset_dir": "longbench.jsonl", "prompt_config_file": "none.json"}, "prompt file none.json: no such file"),
    ],
)
def test_what_is_wrong_is_named(working_directory, arguments, message):
    (working_directory / "folder").mkdir()
    (working_directory / "folder" / "readme.txt").write_text("x")
    write(working_directory / "wrong.jsonl", {"a": 1})
    write(working_directory / "later.jsonl", *adgen(0), {"content": "q"})
    write(working_directory / "longbench.jsonl", {"input": "", "context": "c", "answers": ["a"], "dataset": "qa"})
    with pytest.raises(InputError, match=message):
        SampleSource(**arguments)


def test_mixtures_with_sub_folders_are_read_and_the_rest_is_named(tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "heldout").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("a.jsonl", "B.JSONL", "c.json", "sub/deep/d.jsonl", "heldout/e.jsonl", ".hidden/f.jsonl", ".g.jsonl"):
        (tmp_path / name).write_text(LINE)
    (tmp_path / "h.json.gz").write_bytes(gzip.compress(f"[{LINE}]".encode()))
    (tmp_path / "dataset_info.json").write_text('{"a": {"file_name": "a.jsonl"}}')
    (tmp_path / "i.csv").write_text("content,summary\n")
    source = SampleSource(tmp_path)
    read = [path[len(str(tmp_path)) + 1 :] for path, _, _ in source.files()]
    assert read == ["B.JSONL", "a.jsonl", "c.json", "h.json.gz", "sub/deep/d.jsonl"] and len(source) == 5
    [line] = source.left_out()
    assert line.startswith("3 files are passed over") and "i.csv (no data by its name)" in line
    assert "heldout (held out from training)" in line and "dataset_info.json (" in line and "has the fields 'a'" in line


def test_files_for_evaluation_are_not_trained_on(tmp_path):
    for name in ("train.json", "dev.json", "more.jsonl"):
        (tmp_path / name).write_text(LINE)
    found, passed_over = data_files(tmp_path)
    assert [path.name for path in found] == ["more.jsonl", "train.json"] and len(passed_over) == 1
    assert [path.name for path in data_files(tmp_path, for_evaluation=True)[0]] == ["dev.json", "more.jsonl"]
    (tmp_path / "train.json").unlink()
    assert [path.name for path in data_files(tmp_path)[0]] == ["dev.json", "more.jsonl"], "a folder of tests alone"


def test_folders_and_last_words_say_what_is_for_evaluation(tmp_path):
    for name in ("train/a.jsonl", "test/a.jsonl", "more/news_train.jsonl", "more/news_test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LINE)

    def read(for_evaluation):
        found, passed_over = data_files(tmp_path, for_evaluation)
        return [[str(path.relative_to(tmp_path)) for path in paths] for paths in (found, dict(passed_over))]

    train, test = ["more/news_train.jsonl", "train/a.jsonl"], ["more/news_test.jsonl", "test/a.jsonl"]
    assert read(False) == [train, ["test", "more/news_test.jsonl"]]
    assert read(True) == [test, ["train", "more/news_train.jsonl"]]


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.jsonl").write_text(LINE)
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "data" / "twin").symlink_to(tmp_path / "disk")
    (tmp_path / "data" / "sub" / "up").symlink_to(tmp_path / "data")
    found, passed_over = data_files(tmp_path / "data")
    assert [str(path.relative_to(tmp_path)) for path in found] == ["data/link/a.jsonl"]
    names = {path.name for path, reason in passed_over if reason == "a link to a folder that is read already"}
    assert names == {"twin", "up"}


def test_compressed_files_beside_what_came_out_of_them_are_not_read_twice(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz", "b.jsonl.gz", "c.ndjson"):
        (tmp_path / name).write_bytes(gzip.compress(LINE.encode()) if name.endswith("gz") else LINE.encode())
    source = SampleSource(tmp_path)
    assert len(source) == 3 and "a.jsonl.gz (compressed, and a.jsonl lies beside it)" in source.left_out()[0]


def test_names_that_lead_nowhere(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(InputError, match="a.jsonl: is a link to gone.jsonl, which is not there"):
        SampleSource(tmp_path)
    with pytest.raises(InputError, match="xx: File name too long"):
        SampleSource(tmp_path / ("x" * 300))


def test_a_folder_without_data_says_why(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04")
    (tmp_path / "b.json").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="found a.zip: no data by its name; b.json: is a zip archive"):
        SampleSource(tmp_path)


def test_more_files_than_a_process_may_open(tmp_path):
    for number in range(300):
        (tmp_path / f"{number:03}.jsonl").write_text(LINE.replace("q", f"q{number}"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    already_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (already_open + 100, limits[1]))
    try:
        source = SampleSource(tmp_path)
        assert [source[index].prompt for index in range(300)] == [f"q{number}" for number in range(300)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_text(LINE)
    whole = os.scandir

    def refusing(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match="sub: cannot be listed .Permission denied"):
        data_files(tmp_path)
