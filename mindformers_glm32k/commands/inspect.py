"""Print training sequences as the model sees them, and compare their prompts with what prediction feeds."""

from __future__ import annotations

import argparse
import sys

from mindformers_glm32k.commands import run_command
from mindformers_glm32k.errors import InputError

TAKES_OVERRIDES = True  # options that are not listed here are run_mindformer's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML of the run, as for run_mindformer")
    parser.add_argument(
        "-n",
        "--rows",
        type=int,
        default=3,
        help="sequences to print, from the first of the first epoch on. Default %(default)s",
    )
    parser.add_argument("--dataset", choices=("train", "eval"), default="train", help="which data set. Default train")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="colours, or [weight|text]; by default colours on a terminal",
    )
    parser.add_argument("--whole", action="store_true", help="print all tokens, not only both ends of long stretches")
    parser.epilog = (
        "Any other option is run_mindformer's: --train_dataset_dir FILE, --train_dataset.packing True, "
        "--num_samples 100, …"
    )


def run(args: argparse.Namespace) -> int:
    from mindformers_glm32k.data.dataset import check_vocabulary, first_sequences
    from mindformers_glm32k.data.render import SequenceText, TokenText
    from mindformers_glm32k.generation.prompts import ChatPromptTokenizer
    from mindformers_glm32k.run_mindformer import read_config

    if args.rows < 1:
        raise InputError(f"-n {args.rows}: at least one sequence is needed")
    config = read_config(["--config", args.config, *args.overrides])
    section, model = f"{args.dataset}_dataset", config.model.model_config
    kind = (config.get(f"{section}_task") or {}).get("type")
    if kind != "GLM32KDataset":
        raise InputError(f"{section}_task.type: {kind!r} is not GLM32KDataset, whose sequences can be printed")
    sequences, samples, tokenizer = first_sequences(config[section])
    check_vocabulary(tokenizer, model.padded_vocab_size)
    color = sys.stdout.isatty() if args.color == "auto" else args.color == "always"
    tokens = TokenText(tokenizer.vocabulary, color, args.whole)
    fed = ChatPromptTokenizer(tokenizer.vocab_file, longest_prompt=1 << 40)
    longest_prompt = model.seq_length - (model.get("max_new_tokens") or 1)
    text = SequenceText(
        samples, tokens, tokenizer, lambda prompt: fed([prompt])["input_ids"][0], longest_prompt, model.seq_length
    )
    print(tokens.legend())
    for path, layout, records in samples.files():
        print(f"{path}: {records} records, layout {layout}")
    for note in samples.left_out() + samples.unused():
        print(note)
    for number, sequence in zip(range(1, args.rows + 1), sequences):
        print("\n" + text.write(number, *sequence))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(sys.modules[__name__], "glm32k inspect"))
