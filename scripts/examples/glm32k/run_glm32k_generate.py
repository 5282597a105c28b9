"""Answers prompts with a GLM32K checkpoint, all in batches through `generate`; only the answers go to stdout.

MindFormers logs to stdout; its lines, and those of the libraries below it (which come until the process ends), go to
the --log file instead.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TextIO

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.run_mindformer import read_config, run

# the two prompts of ChatGLM3-6B-32K's model card
PROMPTS = ("晚上睡不着应该怎么办", "使用python编写快速排序代码")


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config_path", required=True, help="YAML for prediction, e.g. predict_glm32k.yaml")
    parser.add_argument("--load_checkpoint", required=True, help="checkpoint file, or folder with rank_N subfolders")
    parser.add_argument("--vocab_file", required=True, help="tokenizer.model")
    parser.add_argument("--batch_size", type=int, help="prompts per batch; default: as many as the cache has room for")
    parser.add_argument("--log", default="output/predict/predict.log", help="log file")
    parser.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="prompts, or one file with a prompt a line; default: the two of the model card",
    )
    return parser


def sequences_in_cache(model_config: dict) -> int | None:
    """How many sequences of seq_length tokens the cache's num_blocks x block_size slots hold; None without a cache."""
    if not model_config.use_past:
        return None
    return max(1, model_config.num_blocks * model_config.block_size // model_config.seq_length)


def answer(args: argparse.Namespace) -> list[str]:
    """Reads the configuration and runs the prediction; one answer per prompt."""
    config = read_config(
        [
            "--config",
            args.config_path,
            "--run_mode",
            "predict",
            "--load_checkpoint",
            args.load_checkpoint,
            "--processor.tokenizer.vocab_file",
            args.vocab_file,
        ]
    )
    prompts = [prompt.replace(r"\n", "\n") for prompt in args.prompts or PROMPTS]  # as --predict_data reads them
    config.input_data = prompts if len(prompts) > 1 else prompts[0]
    config.save_file = os.path.join(os.path.dirname(os.path.abspath(args.log)), "text_generation_result.txt")
    model_config = config.model.model_config
    limit = args.batch_size or sequences_in_cache(model_config)
    config.predict_batch_size = model_config.batch_size = min(limit or len(prompts), len(prompts))
    return [text for result in run(config) for text in result["text_generation_text"]]


def take_streams(path: str) -> tuple[TextIO, TextIO]:
    """Sends everything that any library of this process writes to stdout or stderr into the file `path`, until it ends.

    Gives the stdout and the stderr of before.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    kept = tuple(os.fdopen(os.dup(number), "w", encoding="utf-8", buffering=1) for number in (1, 2))
    with open(path, "wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    answers_to, messages_to = take_streams(args.log)
    print(f"answering, log: {args.log}", file=messages_to)
    started = time.perf_counter()
    try:
        answers = answer(args)
    except InputError as error:
        print(f"error: {error}", file=messages_to)
        return 2
    except Exception:
        traceback.print_exc(file=messages_to)
        print(f"error: prediction failed; log: {args.log}", file=messages_to)
        return 1
    for text in answers:
        print(text, file=answers_to)
    print(f"{len(answers)} answers in {time.perf_counter() - started:.1f} s, loading included", file=messages_to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
