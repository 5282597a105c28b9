"""Answer a file of prompts or chats, in batches; goes on where it was interrupted."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from mindformers_glm32k.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from mindformers.tools.register import MindFormerConfig

    from mindformers_glm32k.generation.answers import Options
    from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

TAKES_OVERRIDES = True  # options that are not listed here are run_mindformer's

_EXAMPLES = """The input has JSON lines with "prompt" or "messages" (or another field that training data has), or one
prompt a line. The output has one JSON line an answer, in the order of the input when all are there.

  glm32k generate --config predict_glm32k.yaml --load_checkpoint glm32k.ckpt --tokenizer tokenizer.model \\
      --input questions.jsonl --output answers.jsonl

Any other option is run_mindformer's.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.formatter_class, parser.epilog, parser.allow_abbrev = argparse.RawDescriptionHelpFormatter, _EXAMPLES, False
    parser.add_argument("--input", required=True, help="file of prompts or chats")
    parser.add_argument("--output", required=True, help="file of answers; what it has is not answered again")
    add_model_arguments(parser)
    parser.add_argument(
        "--batch_size", type=int, help="prompts answered together. Default: what the cache has room for"
    )
    parser.add_argument(
        "--shard", default="0/1", metavar="K/N", help="of N processes this is number K, from 0. Default %(default)s"
    )
    parser.add_argument("--log", help="file of MindFormers' messages. Default: OUTPUT.log")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `generate` and of `chat`: the model, and how it answers."""
    from mindformers_glm32k.checks import true_or_false

    parser.add_argument("--config", required=True, help="YAML for prediction")
    parser.add_argument("--load_checkpoint", help="checkpoint file or folder. Default: the YAML's, else random weights")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.model, or its folder")
    parser.add_argument("--max_new_tokens", type=int, help="the longest answer. Default: the YAML's")
    parser.add_argument(
        "--on_long_prompt",
        choices=("error", "truncate"),
        default="error",
        help="prompts that do not fit are refused, or their middle is left out. Default %(default)s",
    )
    parser.add_argument(
        "--do_sample", type=true_or_false, metavar="BOOL", help="draw tokens. Default: the YAML's, or as options say"
    )
    parser.add_argument("--temperature", type=float, help="of sampling; 0 is greedy")
    parser.add_argument("--top_k", type=int, help="sample from so many tokens; 0: from all")
    parser.add_argument("--top_p", type=float, help="sample from the tokens that together have this probability")
    parser.add_argument("--repetition_penalty", type=float, help="above 1 repetitions are less probable")
    parser.add_argument("--seed", type=int, default=0, help="of sampling. Default %(default)s")


def run(args: argparse.Namespace) -> int:
    """Answers; returns the exit status."""
    from pathlib import Path

    from mindformers_glm32k.checks import shard_of, whole_number
    from mindformers_glm32k.generation import answers
    from mindformers_glm32k.generation.network import Network, sequences_in_cache
    from mindformers_glm32k.generation.questions import QuestionFile
    from mindformers_glm32k.process import logs_to

    shard = shard_of(args.shard)
    if args.batch_size is not None:
        whole_number(args.batch_size, "--batch_size", 1)
    questions, output = QuestionFile(args.input), Path(args.output)
    if output.is_dir() or (output.exists() and output.samefile(args.input)):
        raise InputError(f"--output {output}: give a file of its own for the answers")
    with logs_to(args.log or f"{args.output}.log") as (_, terminal):
        tokenizer, vocabulary, config = read_model(args)
        options = read_options(args, config)
        if not config.load_checkpoint:
            print("no --load_checkpoint: random weights", file=terminal)
        room = sequences_in_cache(config.model.model_config) or 1
        network = Network(config, args.batch_size or min(room, len(questions)))
        stamp = answers.stamp_of(network, tokenizer, questions, options)
        try:
            done, truncated = answers.answer_file(
                questions, network, vocabulary, options, output, stamp, shard, terminal
            )
        except KeyboardInterrupt:
            print("interrupted; the same command goes on where it stopped", file=terminal)
            return 130
    for line in [*truncated[:5], *([f"and {len(truncated) - 5} more"] if len(truncated) > 5 else [])]:
        print(f"truncated: {line}", file=sys.stderr)
    print(f"{output}: {done} of {len(questions)} answers")
    return 0


def read_model(args: argparse.Namespace) -> tuple[Path, Vocabulary, MindFormerConfig]:
    """Path of the tokenizer, its vocabulary, and the configuration."""
    from pathlib import Path

    from mindformers_glm32k.checks import did_you_mean
    from mindformers_glm32k.run_mindformer import OVERRIDES, read_prediction_config
    from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

    known = {"options", "register_path", *(name for name, *_ in OVERRIDES)}
    for word in args.overrides:
        name = word[2:].partition("=")[0]
        if word.startswith("--") and "." not in name and name not in known:
            near = did_you_mean(f"--{name}", [f"--{option}" for option in vars(args)])
            raise InputError(f"unknown option --{name}{near}; keys of the YAML have dots, --model.model_config.top_k 5")
    file = Path(args.tokenizer)
    file = file / "tokenizer.model" if file.is_dir() else file
    vocabulary = Vocabulary(file)
    return (
        file,
        vocabulary,
        read_prediction_config(["--config", args.config, *args.overrides], args.load_checkpoint, file),
    )


def read_options(args: argparse.Namespace, config: MindFormerConfig) -> Options:
    """The options of answers: what is given, else the YAML's."""
    from mindformers_glm32k.checks import whole_number
    from mindformers_glm32k.generation.answers import Options, room_for_prompts
    from mindformers_glm32k.generation.sampling import sampling_of

    model = config.model.model_config
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    sampling = sampling_of(model, args.do_sample, **{name: getattr(args, name) for name in names})
    longest = args.max_new_tokens if args.max_new_tokens is not None else model.max_new_tokens or 512
    whole_number(longest, "--max_new_tokens", 1)
    room_for_prompts(model.seq_length, longest)
    return Options(longest, sampling, args.on_long_prompt)


if __name__ == "__main__":
    from mindformers_glm32k.commands import run_command

    sys.exit(run_command(sys.modules[__name__], "glm32k generate"))
