"""Write a small vocabulary and long-context tasks in the LongBench format.

    glm32k make-data --output_dir DIR

writes DIR/tokenizer.model, DIR/train.jsonl, DIR/eval.jsonl and DIR/dataset2prompt.json. Each record has the fields of
LongBench (input, context, answers, length, dataset, language, all_classes, _id) and, for the AdGen format, the whole
prompt as `content` and the answer as `summary`. The same options give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mindformers_glm32k.commands import run_command
from mindformers_glm32k.errors import InputError

MAX_SEQ_LENGTH = 32768
_RANGES = (
    ("seq_length", 1, MAX_SEQ_LENGTH),
    ("samples", 1, None),
    ("eval_samples", 1, None),
    ("facts", 1, 8),
    ("filler", 0, 0.99),
    ("seed", 0, None),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", required=True, help="folder to write to; made when it is not there")
    parser.add_argument(
        "--seq_length",
        type=int,
        default=256,
        help="tokens of a record, prompt, answer and end token "
        f"together: records come close to it; at most {MAX_SEQ_LENGTH}. Default %(default)s",
    )
    parser.add_argument("--samples", type=int, default=2000, help="records to train on. Default %(default)s")
    parser.add_argument("--eval_samples", type=int, default=40, help="records held out. Default %(default)s")
    parser.add_argument(
        "--facts", type=int, default=4, help="most facts in a context, 1 to 8: more are harder. Default %(default)s"
    )
    parser.add_argument(
        "--filler",
        type=float,
        default=0.5,
        help="share of the context that states no facts, 0.0 to 0.99: more is harder. Default %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="determines vocabulary and records. Default %(default)s")


def run(args: argparse.Namespace) -> int:
    from mindformers_glm32k.data.synthetic import MAX_TARGET_LENGTH, write_task

    folder = Path(args.output_dir)
    _check(args, folder)
    vocabulary_size = write_task(
        folder, args.seq_length, args.samples, args.eval_samples, args.facts, args.filler, args.seed
    )
    print(
        f"""{folder}:
  tokenizer.model      {vocabulary_size} ids, special tokens included
  train.jsonl          {args.samples} records of up to {args.seq_length} tokens
  eval.jsonl           {args.eval_samples} records, none of them in train.jsonl
  dataset2prompt.json  their prompt, for the LongBench format
train on them:
  run_mindformer --config research/glm32k/finetune_glm32k_tiny_cpu.yaml --run_mode finetune \\
      --train_dataset_dir {folder / "train.jsonl"} \\
      --train_dataset.tokenizer.vocab_file {folder / "tokenizer.model"}""",
        end="",
    )
    if args.seq_length != 256:
        print(
            f""" \\
      --model.model_config.seq_length {args.seq_length} \\
      --train_dataset.max_source_length {args.seq_length - MAX_TARGET_LENGTH - 1} \\
      --train_dataset.max_target_length {MAX_TARGET_LENGTH}""",
            end="",
        )
    print()
    return 0


def _check(args, folder):
    problems = []
    if folder.exists() and not folder.is_dir():
        problems.append(f"--output_dir {folder}: is a file; give a folder")
    for name, low, high in _RANGES:
        value = getattr(args, name)
        if not low <= value <= (value if high is None else high):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            problems.append(f"--{name} {value}: must be {limits}")
    if problems:
        raise InputError("; ".join(problems))


if __name__ == "__main__":
    sys.exit(run_command(sys.modules[__name__], "glm32k make-data"))
