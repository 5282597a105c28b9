"""LongBench as training records in the AdGen format, some documents held out.

A record of the output holds the whole prompt as `content`, the answer as `summary`, where in the prompt the document
stands as `context_span`, and of the original dataset, _id, length, language, all_classes and all its answers. A
manifest says which samples were trained on. All files are written, or none.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from mindformers_glm32k.data.formats import LongBenchLayout, text_field
from mindformers_glm32k.data.jsonl import RAISE, Problems, parse_line
from mindformers_glm32k.data.longbench import LOUD, Manifest, PromptTemplates, is_held_out, is_test_set, manifest_path
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path
from mindformers_glm32k.longbench.files import OUTPUTS, DataFile
from mindformers_glm32k.longbench.lengths import RecordLengths

KEPT_FIELDS = ("dataset", "_id", "length", "answers", "language", "all_classes")
_MOST_HELD_OUT = 0.9


@dataclass(frozen=True)
class Preprocessed:
    """The files written, and what was found on the way.

    Attributes:
        paths: "train" and "manifest", and "heldout" and "picture" where they were asked for.
        lengths: of all records.
        problems: of each file with lines that were skipped.
        manifest: the samples of both sides.
        outdated: file of records held out by an earlier run, now in the training data; None without one.
    """

    paths: dict[str, Path]
    lengths: RecordLengths
    problems: list[Problems]
    manifest: Manifest
    outdated: Path | None

    def warnings(self) -> list[str]:
        """What makes LongBench scores of a model trained on this split unreliable."""
        holdout = self.manifest.holdout
        if not holdout and any(map(is_test_set, self.manifest.trained)):
            return [f"{LOUD}Pass --holdout 0.1 to keep a tenth of the documents for them."]
        if holdout and not self.lengths.records("heldout"):
            return [
                f"NO DOCUMENT IS HELD OUT: there are few, and --holdout {holdout} took none of them; pass a larger "
                "one, or another --seed."
            ]
        return []


def preprocess(
    files: list[DataFile],
    output_path: str | os.PathLike,
    prompt_config_file: str | os.PathLike,
    is_longbench_e: bool = True,
    all_answers: bool = False,
    holdout: float = 0.0,
    seed: int = 0,
    tokenizer: str | os.PathLike | None = None,
    on_error: str = RAISE,
) -> Preprocessed:
    """Writes the records of LongBench's files for training.

    Args:
        files: what `find` returns.
        output_path: the folder to write to: longbench_e.jsonl (longbench.jsonl), its manifest, with `holdout`
            heldout/longbench_e.jsonl, with `tokenizer` a picture of the lengths.
        prompt_config_file: LongBench's dataset2prompt.json.
        is_longbench_e: determines the names of the output files.
        all_answers: a record for each answer that is not blank; else the first answer alone.
        holdout: fraction of the documents that is held out, 0.0 to 0.9.
        seed: of the choice of documents, >= 0.
        tokenizer: tokenizer.model, or its folder, to count tokens with.
        on_error: "raise", or "skip" for damaged lines, which are reported then.

    Raises:
        InputError: wrong options, no prompt for a data set, or a damaged line; nothing is written then.
    """
    if not 0.0 <= holdout <= _MOST_HELD_OUT:
        raise InputError(f"--holdout: {holdout} is not within 0.0 and {_MOST_HELD_OUT}")
    if seed < 0:
        raise InputError(f"--seed: {seed} is not a whole number of at least 0")
    layout = LongBenchLayout(PromptTemplates(prompt_config_file))
    lengths, manifest = RecordLengths(_vocabulary(tokenizer)), Manifest(holdout, seed)
    target = Path(output_path) / OUTPUTS[is_longbench_e]
    held_out_target = target.parent / "heldout" / target.name
    paths = {"train": target, "manifest": manifest_path(target)}
    if holdout:
        paths["heldout"] = held_out_target
    if tokenizer:
        paths["picture"] = target.with_name(f"{target.stem}_lengths.png")
    with contextlib.ExitStack() as stack:  # all files or none
        new = {key: stack.enter_context(atomic_path(path)) for key, path in paths.items()}
        with contextlib.ExitStack() as opened:
            outputs = {
                side: opened.enter_context(open(new[side], "w", encoding="utf-8"))
                for side in ("train", "heldout")
                if side in new
            }
            problems = _write_records(files, layout, all_answers, on_error, outputs, manifest, lengths)
        if not lengths.records("train"):
            raise InputError(
                f"no records to train on: {lengths.records('heldout')} are held out; take another --seed or a "
                "smaller --holdout"
            )
        manifest.write(new["manifest"])
        if "picture" in new:
            lengths.draw(new["picture"])
    outdated = held_out_target if not holdout and held_out_target.is_file() else None
    return Preprocessed(paths, lengths, problems, manifest, outdated)


def _vocabulary(path):
    if not path:
        return None
    from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

    return Vocabulary(Path(path) / "tokenizer.model" if Path(path).is_dir() else path)


def _write_records(files, layout, all_answers, on_error, outputs, manifest, lengths):
    """Streams all records into the open `outputs`; returns the Problems of each file with lines that were skipped."""
    from tqdm import tqdm

    for file in files:  # a data set without a prompt is refused before hours of work
        for number, raw, _ in file.lines():
            with contextlib.suppress(_Damaged):
                layout.prompts.template(_parsed(raw, number)["dataset"])
                break
    all_problems = []
    with tqdm(
        total=sum(file.size for file in files), unit="B", unit_scale=True, desc="records", disable=None
    ) as progress:  # disable=None: no bar where the output is no terminal
        for file in files:
            problems, before = Problems(file), 0
            for number, raw, position in file.lines():
                progress.update(position - before)
                before = position
                if raw is not None and not raw.strip():
                    continue
                try:
                    source = _parsed(raw, number)
                    records = _training_records(source, layout, all_answers)
                except InputError as error:
                    problems.add(number, error)
                    if on_error == RAISE:
                        raise InputError(f"{problems.text()}. Mend it, or pass --on_error skip") from error
                    continue
                side = "heldout" if is_held_out(source["context"], manifest.holdout, manifest.seed) else "train"
                manifest.add(source, side == "heldout")
                for record in records:
                    outputs[side].write(json.dumps(record, ensure_ascii=False) + "\n")
                    lengths.add(side, record)
            if problems.count:
                all_problems.append(problems)
    return all_problems


class _Damaged(InputError):
    """A line that is no record, or names no data set."""


def _parsed(raw, number):
    try:
        record = parse_line(raw, first=number == 1)
        text_field(record, "dataset", "LongBench's lines name their data set")
    except InputError as error:
        raise _Damaged(str(error)) from error
    return record


def _training_records(record, layout, all_answers):
    """The training records of one LongBench record; InputError where a field is unusable."""
    sample = layout.sample(record)
    if not isinstance(record.get("_id"), (str, int, type(None))):
        raise InputError(f"field '_id' is {type(record['_id']).__name__}; a text or number is needed")
    answers = [sample.answer]
    if all_answers:
        texts = {f"answers[{index}]": answer for index, answer in enumerate(record["answers"])}
        answers = [text_field(texts, name, "answers are texts", may_be_empty=True) for name in texts]
        answers = [answer for answer in answers if answer.strip()]  # nothing to learn in a blank one
    kept = {key: record[key] for key in KEPT_FIELDS if key in record}
    return [
        {"content": sample.prompt, "summary": answer, "context_span": list(sample.context), **kept}
        for answer in answers
    ]
