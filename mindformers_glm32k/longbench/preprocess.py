"""Write LongBench as training rows in the AdGen layout, some documents held out.

    glm32k preprocess --data_path DIR_OR_ZIP --output_path OUT --prompt_config_file dataset2prompt.json

writes OUT/longbench_e.jsonl (OUT/longbench.jsonl with --is_longbench_e False): a row holds the whole prompt as
`content`, the answer as `summary`, where in the prompt the document stands as `context_span`, and of the original
dataset, _id, length, language, all_classes and all its answers. OUT/longbench_e.manifest.json says which samples were
trained on. With --holdout the rows of some documents go to OUT/heldout/longbench_e.jsonl, with --tokenizer a picture of
the lengths to OUT/longbench_e_lengths.png. All files are written, or none.
"""

import contextlib
import json
import sys
from pathlib import Path

from mindformers_glm32k.checks import true_or_false
from mindformers_glm32k.data.formats import LongBenchLayout, text_field
from mindformers_glm32k.data.holdout import LOUD, Manifest, is_held_out, is_test_set, manifest_path
from mindformers_glm32k.data.jsonl import ON_ERROR, RAISE, Problems, parse_line
from mindformers_glm32k.data.prompts import PromptTemplates
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path
from mindformers_glm32k.longbench import files as longbench_files
from mindformers_glm32k.longbench.lengths import RowLengths

_KEPT = ("dataset", "_id", "length", "answers", "language", "all_classes")


def add_arguments(parser):
    """Adds the command's options to an argparse parser."""
    parser.add_argument(
        "--data_path",
        default="./data",
        help="folder with LongBench's .jsonl files, or its data.zip as it is. Default %(default)s",
    )
    parser.add_argument(
        "--output_path", default="./", help="folder to write to; made when it is not there. Default %(default)s"
    )
    parser.add_argument(
        "--prompt_config_file",
        default="./dataset2prompt.json",
        help="LongBench's config/dataset2prompt.json. Default %(default)s",
    )
    parser.add_argument(
        "--is_longbench_e",
        type=true_or_false,
        nargs="?",
        const=True,
        default=True,
        metavar="True|False",
        help="take LongBench-E's files, *_e.jsonl, or else all others. Default %(default)s",
    )
    parser.add_argument(
        "--all_answers",
        action="store_true",
        help="a row for each answer that is not blank; else the first answer alone",
    )
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        help="part of the documents that is held out, 0.0 to "
        "0.9; rows of one document are never on both sides. Default %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the documents held out. Default %(default)s")
    parser.add_argument("--tokenizer", help="tokenizer.model, or its folder, to count tokens with")
    parser.add_argument(
        "--on_error",
        choices=ON_ERROR,
        default=RAISE,
        help="damaged lines are fatal, or skipped and reported. Default %(default)s",
    )


def run(args):
    """Writes the files and says what is in them; see the module's docstring.

    Args:
        args (argparse.Namespace): as `add_arguments` declares.

    Raises:
        InputError: wrong options, no files, no prompt for a data set, or a damaged line; nothing is written then.
    """
    if not 0.0 <= args.holdout <= 0.9:
        raise InputError(f"--holdout: {args.holdout} is not within 0.0 and 0.9")
    if args.seed < 0:
        raise InputError(f"--seed: {args.seed} is not a whole number of at least 0")
    layout = LongBenchLayout(PromptTemplates(args.prompt_config_file))
    lengths = RowLengths(_vocabulary(args.tokenizer))
    files, passed_over = longbench_files.find(args.data_path, args.is_longbench_e)
    for line in passed_over:
        print(line)

    folder, name = Path(args.output_path), longbench_files.OUTPUTS[args.is_longbench_e]
    paths = {
        "train": folder / name,
        "heldout": folder / "heldout" / name if args.holdout else None,
        "manifest": manifest_path(folder / name),
        "picture": folder / f"{Path(name).stem}_lengths.png" if args.tokenizer else None,
    }
    manifest = Manifest(args.holdout, args.seed)
    with contextlib.ExitStack() as stack:  # all files or none
        new = {key: stack.enter_context(atomic_path(path)) for key, path in paths.items() if path}
        with contextlib.ExitStack() as opened:
            outputs = {
                key: opened.enter_context(open(new[key], "w", encoding="utf-8"))
                for key in ("train", "heldout")
                if key in new
            }
            problems = _write_rows(files, layout, args, outputs, manifest, lengths)
        if not lengths.rows("train"):
            raise InputError(
                f"no rows to train on: {lengths.rows('heldout')} are held out; take another --seed or a "
                "smaller --holdout"
            )
        manifest.write(new["manifest"])
        if "picture" in new:
            lengths.draw(new["picture"])
    _report(args, paths, lengths, problems, manifest)


def _vocabulary(path):
    if not path:
        return None
    from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

    return Vocabulary(Path(path) / "tokenizer.model" if Path(path).is_dir() else path)


def _write_rows(files, layout, args, outputs, manifest, lengths):
    """Streams all records into the open `outputs` ("train" and, where it is asked for, "heldout").

    Returns:
        list[Problems]: of each file with lines that were skipped.
    """
    from tqdm import tqdm

    for file in files:  # before hours of work: is there a prompt for each file's data set?
        for number, raw, _ in file.lines():
            with contextlib.suppress(_Damaged):
                layout.prompts.template(_record(raw, number)["dataset"])
                break
    all_problems = []
    with tqdm(
        total=sum(file.size for file in files), unit="B", unit_scale=True, desc="rows", disable=None
    ) as progress:  # None: none where the output is no terminal
        for file in files:
            problems, before = Problems(file), 0
            for number, raw, position in file.lines():
                progress.update(position - before)
                before = position
                if raw is not None and not raw.strip():
                    continue
                try:
                    record = _record(raw, number)
                    rows = _rows(record, layout, args.all_answers)
                except InputError as error:
                    problems.add(number, error)
                    if args.on_error == RAISE:
                        raise InputError(f"{problems.text()}. Mend it, or pass --on_error skip") from error
                    continue
                side = "heldout" if is_held_out(record["context"], args.holdout, args.seed) else "train"
                manifest.add(record, side == "heldout")
                for row in rows:
                    outputs[side].write(json.dumps(row, ensure_ascii=False) + "\n")
                    lengths.add(side, row)
            if problems.count:
                all_problems.append(problems)
    return all_problems


class _Damaged(InputError):
    """A line that is no record with a data set's name."""


def _record(raw, number):
    try:
        record = parse_line(raw, first=number == 1)
        text_field(record, "dataset", "LongBench's lines name their data set")
    except InputError as error:
        raise _Damaged(str(error)) from error
    return record


def _rows(record, layout, all_answers):
    """list[dict]: the rows of one record, checked."""
    sample = layout.sample(record)
    if not isinstance(record.get("_id"), (str, int, type(None))):
        raise InputError(f"field '_id' is {type(record['_id']).__name__}; a text or number is needed")
    answers = [sample.answer]
    if all_answers:
        texts = {f"answers[{place}]": answer for place, answer in enumerate(record["answers"])}
        answers = [text_field(texts, name, "answers are texts", may_be_empty=True) for name in texts]
        answers = [answer for answer in answers if answer.strip()]  # nothing can be learnt of a blank one
    kept = {key: record[key] for key in _KEPT if key in record}
    return [
        {"content": sample.prompt, "summary": answer, "context_span": list(sample.context), **kept}
        for answer in answers
    ]


def _report(args, paths, lengths, problems, manifest):
    for found in problems:
        print(f"{found.count} damaged lines skipped: {found.text()}")
    print(lengths.table())
    for key, what in (
        ("train", "rows to train on"),
        ("heldout", "rows held out"),
        ("manifest", "the _ids of both, for the scores"),
        ("picture", "the lengths"),
    ):
        if paths[key]:
            count = f"{lengths.rows(key)} " if key in ("train", "heldout") else ""
            print(f"{paths[key]}: {count}{what}")
    old = paths["train"].parent / "heldout" / paths["train"].name
    if not args.holdout and old.is_file():
        print(f"{old}: not of this run, and its rows are trained on now; remove it")
    print(
        f"Train with: run_mindformer --config research/glm32k/finetune_glm32k.yaml "
        f"--train_dataset_dir {paths['train']} …"
    )
    if not args.holdout and any(is_test_set(name) for name in manifest.trained):
        print(f"\n{LOUD}Pass --holdout 0.1 to keep a tenth of the documents for them.", file=sys.stderr)
    elif args.holdout and not lengths.rows("heldout"):
        print(
            f"\nNO DOCUMENT IS HELD OUT: there are few, and --holdout {args.holdout} took none of them; pass a "
            "larger one, or another --seed.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    from mindformers_glm32k.commands import run_command

    sys.exit(run_command(sys.modules[__name__], "python -m mindformers_glm32k.longbench.preprocess"))
