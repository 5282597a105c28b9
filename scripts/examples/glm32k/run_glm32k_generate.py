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
from mindformers_glm32k.files import atomic_path
from mindformers_glm32k.generation.answers import room_for_prompts
from mindformers_glm32k.generation.network import Network, sequences_in_cache
from mindformers_glm32k.generation.questions import prompt_ids, read_prompts
from mindformers_glm32k.generation.sampling import sampling_of
from mindformers_glm32k.run_mindformer import read_prediction_config
from mindformers_glm32k.tokenizer.chat_format import answer_ids, answer_text, stop_ids
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

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


def answer(args: argparse.Namespace) -> list[str]:
    """Reads the configuration and answers, as `glm32k generate` does; one answer per prompt."""
    config = read_prediction_config(["--config", args.config_path], args.load_checkpoint, args.vocab_file)
    given = [prompt.replace(r"\n", "\n") for prompt in args.prompts or PROMPTS]  # as --predict_data reads them
    prompts = read_prompts(given if len(given) > 1 else given[0])
    vocabulary, model = Vocabulary(args.vocab_file), config.model.model_config
    longest = model.max_new_tokens or 1
    room = room_for_prompts(model.seq_length, longest)
    ids = [prompt_ids(vocabulary, [{"role": "user", "content": prompt}]) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids):
        if len(tokens) > room:
            raise InputError(
                f"a prompt has {len(tokens)} tokens, {room} fit into seq_length with room for the answer: "
                f"{prompt[:60]!r}…; shorten it or raise seq_length"
            )
    network = Network(config, min(args.batch_size or sequences_in_cache(model) or 1, len(prompts)))
    sampling = sampling_of(model)
    results = []
    for start in range(0, len(ids), network.batch_size):
        batch = range(start, min(start + network.batch_size, len(ids)))
        answers = network.generate(
            [ids[index] for index in batch],
            longest,
            stop_ids(vocabulary),
            sampling=sampling,
            seeds=[sampling.seed_of(f"line {index + 1}") for index in batch],
        )
        texts = [answer_text(vocabulary.decode(answer_ids(vocabulary, one), True)) for one in answers]
        results.append({"text_generation_text": texts})
    folder = os.path.dirname(os.path.abspath(args.log))
    with atomic_path(os.path.join(folder, "text_generation_result.txt")) as temporary:
        temporary.write_text(str(results), encoding="utf-8")
    return [text for result in results for text in result["text_generation_text"]]


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
