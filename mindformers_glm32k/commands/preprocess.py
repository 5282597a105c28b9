"""Write LongBench as training records in the AdGen layout, some documents held out.

    glm32k preprocess --data_path DIR_OR_ZIP --output_path OUT --prompt_config_file dataset2prompt.json

writes OUT/longbench_e.jsonl (OUT/longbench.jsonl with --is_longbench_e False) and OUT/longbench_e.manifest.json, which
says which samples were trained on. With --holdout the records of some documents go to OUT/heldout/longbench_e.jsonl,
with --tokenizer a picture of the lengths to OUT/longbench_e_lengths.png. All files are written, or none.
"""

from __future__ import annotations

import argparse
import sys

from mindformers_glm32k.checks import true_or_false
from mindformers_glm32k.commands import run_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def option(name, text, **settings):
        parser.add_argument(name, help=text, **settings)

    option(
        "--data_path",
        "folder with LongBench's .jsonl files, or its data.zip as it is. Default %(default)s",
        default="./data",
    )
    option("--output_path", "folder to write to; made when it is not there. Default %(default)s", default="./")
    option(
        "--prompt_config_file",
        "LongBench's config/dataset2prompt.json. Default %(default)s",
        default="./dataset2prompt.json",
    )
    option(
        "--is_longbench_e",
        "take LongBench-E's files, *_e.jsonl, or else all others. Default %(default)s",
        type=true_or_false,
        nargs="?",
        const=True,
        default=True,
        metavar="True|False",
    )
    option(
        "--all_answers", "a record for each answer that is not blank; else the first answer alone", action="store_true"
    )
    option(
        "--holdout",
        "part of the documents that is held out, 0.0 to 0.9; records of one document are never on both sides. "
        "Default %(default)s",
        type=float,
        default=0.0,
    )
    option("--seed", "chooses the documents held out. Default %(default)s", type=int, default=0)
    option("--tokenizer", "tokenizer.model, or its folder, to count tokens with")
    option(
        "--on_error",
        "damaged lines are fatal, or skipped and reported. Default %(default)s",
        choices=("raise", "skip"),
        default="raise",
    )


def run(args: argparse.Namespace) -> int:
    from mindformers_glm32k.longbench.files import find
    from mindformers_glm32k.longbench.preprocess import preprocess

    files, passed_over = find(args.data_path, args.is_longbench_e)
    for line in passed_over:
        print(line)
    done = preprocess(
        files,
        args.output_path,
        args.prompt_config_file,
        args.is_longbench_e,
        args.all_answers,
        args.holdout,
        args.seed,
        args.tokenizer,
        args.on_error,
    )
    for found in done.problems:
        print(f"{found.count} damaged lines skipped: {found.text()}")
    print(done.lengths.table())
    for key, what in (
        ("train", f"{done.lengths.records('train')} records to train on"),
        ("heldout", f"{done.lengths.records('heldout')} records held out"),
        ("manifest", "the _ids of both, for the scores"),
        ("picture", "the lengths"),
    ):
        if key in done.paths:
            print(f"{done.paths[key]}: {what}")
    if done.outdated:
        print(f"{done.outdated}: not of this run, and its records are trained on now; remove it")
    print(
        f"Train with: run_mindformer --config research/glm32k/finetune_glm32k.yaml "
        f"--train_dataset_dir {done.paths['train']} …"
    )
    for warning in done.warnings():
        print(f"\n{warning}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(sys.modules[__name__], "glm32k preprocess"))
