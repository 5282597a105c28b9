"""The samples to predict: finding them in a folder or zip file, this process's share of them, and the ids of their
prompts, as LongBench's pred.py feeds them to chatglm3-6b-32k."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_glm32k.checks import whole_number
from mindformers_glm32k.data.jsonl import parse_line
from mindformers_glm32k.data.longbench import PromptTemplate, is_test_set, plain_name
from mindformers_glm32k.data.truncation import halves
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.longbench import files as longbench_files
from mindformers_glm32k.tokenizer import chat_format as chat

# Few-shot tasks and code completion: pred.py feeds the prompt itself, not a chat turn.
WITHOUT_CHAT_FORMAT = frozenset(("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"))


@dataclass(frozen=True)
class Entry:
    """One sample, not yet read.

    Attributes:
        file: the file that has it.
        line: its number in the file, from 1.
        dataset: its data set, in LongBench-E with `_e`: the name of the file of predictions.
        key: its `_id` as text, or a digest where it has none.
    """

    file: longbench_files.DataFile
    line: int
    dataset: str
    key: str


def scan(path: str | Path, datasets: list[str] | None = None) -> list[Entry]:
    """Finds all samples in the order of files and lines; duplicates are left out.

    Args:
        path: a folder of .jsonl files, LongBench's data.zip, or one .jsonl file.
        datasets: names to take, `trec` or `trec_e`; all by default.

    Raises:
        InputError: no data, a damaged line, a data set that is not there.
    """
    entries: dict[tuple[str, str], Entry] = {}
    for file in _find(Path(path)):
        for number, record in _records(file):
            name = dataset_name(file, number, record)
            entries.setdefault((name, sample_key(record)), Entry(file, number, name, sample_key(record)))
    found = list(dict.fromkeys(entry.dataset for entry in entries.values()))
    for name in datasets or ():
        if name not in found:
            raise InputError(f"--datasets {name}: not in {path}, which has {', '.join(found)}")
    return [entry for entry in entries.values() if not datasets or entry.dataset in datasets]


def read(entries: list[Entry]) -> Iterator[tuple[Entry, dict]]:
    """Reads the samples in the order of their lines, one at a time."""
    for file in dict.fromkeys(entry.file for entry in entries):
        wanted = {entry.line: entry for entry in entries if entry.file == file}
        last = max(wanted)
        for number, record in _records(file):
            if number in wanted:
                yield wanted[number], record
            if number == last:
                break


def counts(entries: list[Entry]) -> dict[str, int]:
    """Samples by data set."""
    result: dict[str, int] = {}
    for entry in entries:
        result[entry.dataset] = result.get(entry.dataset, 0) + 1
    return result


def limited(entries: list[Entry], limit: int | None) -> list[Entry]:
    """At most `limit` samples, the same number of each data set as far as it has them.

    The choice depends on the keys alone, and a smaller limit gives a subset of a larger one's: predictions continue
    when the limit is raised.
    """
    if limit is None or limit >= len(entries):
        return entries
    by_dataset: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: hashlib.sha256(entry.key.encode()).digest()):
        by_dataset.setdefault(entry.dataset, []).append(entry)
    chosen: set[Entry] = set()
    for rank in range(max(map(len, by_dataset.values()))):
        for name in sorted(by_dataset):
            if rank < len(by_dataset[name]) and len(chosen) < limit:
                chosen.add(by_dataset[name][rank])
    return [entry for entry in entries if entry in chosen]


def shard(entries: list[Entry], number: int, count: int) -> list[Entry]:
    """Every `count`-th sample, from number `number` on (from 0)."""
    return entries[number::count]


def sample_key(record: dict) -> str:
    """The `_id` as text, or a digest of the record."""
    if record.get("_id") is not None:
        return str(record["_id"])
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:24]


def dataset_name(file: longbench_files.DataFile, number: int, record: dict) -> str:
    """The data set of a record, with `_e` for LongBench-E, where only the file's name has it."""
    name = record.get("dataset")
    if not isinstance(name, str) or not name or name.startswith(".") or {"/", "\0"} & {*name} or len(name) > 80:
        raise InputError(f"{file}: line {number}: field 'dataset' is {name!r}; the name of a data set is needed")
    if file.stem.endswith("_e") and is_test_set(name):
        return f"{plain_name(name)}_e"
    return name


def _records(file):
    for number, raw, _ in file.lines():
        if raw is not None and not raw.strip():
            continue
        try:
            record = parse_line(raw, first=number == 1)
        except InputError as error:
            raise InputError(f"{file}: line {number}: {error}") from error
        yield number, record


def _find(path):
    """All files of LongBench and LongBench-E."""
    if path.is_file() and path.suffix != ".zip":
        return [longbench_files.DataFile(path, None, path.stat().st_size)]
    found, errors = [], []
    for is_longbench_e in (False, True):
        try:
            found += longbench_files.find(path, is_longbench_e)[0]
        except InputError as error:
            errors.append(error)
    if not found:
        raise InputError(str(errors[0]).replace("--data_path", "--data"))
    return sorted(found, key=lambda file: file.stem)


def build_prompt_ids(sample: dict, prompt_template: str, tokenizer: Any, max_length: int) -> list[int]:
    """The prompt of one LongBench sample, which generation continues.

    The order of the steps matters and is pred.py's: the prompt is formatted and tokenized without special tokens;
    above `max_length` tokens, the first and last max_length // 2 are decoded, joined and tokenized again (to a few
    tokens more or less); the chat format, or for WITHOUT_CHAT_FORMAT only `[gMASK] sop`, comes after the truncation.

    Args:
        sample: a line of LongBench's data: `dataset` and the texts that the template names.
        prompt_template: the data set's template of dataset2prompt.json, in str.format's syntax.
        tokenizer: a GLM32KTokenizer.
        max_length: tokens of the formatted prompt, >= 2; 31500 in LongBench's model2maxlen.json for this model.

    Raises:
        InputError: no `dataset`, a field that the template needs and the sample lacks, or a wrong template.
    """
    whole_number(max_length, "max_length", 2)
    name = sample.get("dataset")
    if not isinstance(name, str) or not name:
        raise InputError(f"field 'dataset' is {name!r}; the name of a LongBench data set is needed")
    prompt, _ = PromptTemplate(prompt_template, f"the prompt of {name!r}").render(sample)
    vocabulary = tokenizer.vocabulary
    ids = vocabulary.encode(prompt)
    if len(ids) > max_length:
        prompt = halves(ids, max_length // 2, vocabulary.decode)
        ids = vocabulary.encode(prompt)
    if plain_name(name) in WITHOUT_CHAT_FORMAT:
        return chat.prefix_ids(vocabulary) + ids
    return chat.conversation_ids(vocabulary, [{"role": "user", "content": prompt}], add_generation_prompt=True)
