"""`glm32k COMMAND`: finds the command's module, parses its options, calls it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from mindformers_glm32k.commands import parse_and_run

# name -> (module, one line of help); the interface of these modules: see commands/__init__.py
COMMANDS = {
    "make-data": (
        "mindformers_glm32k.commands.make_data",
        "write a small vocabulary and long-context tasks in the LongBench layout",
    ),
    "preprocess": (
        "mindformers_glm32k.commands.preprocess",
        "write LongBench as training records in the AdGen layout, some documents held out",
    ),
    "generate": (
        "mindformers_glm32k.commands.generate",
        "answer a file of prompts or chats, in batches; goes on where it was interrupted",
    ),
    "chat": ("mindformers_glm32k.commands.chat", "talk to the model at the terminal: history, documents, tools"),
    "longbench": (
        "mindformers_glm32k.commands.longbench",
        "predict LongBench's samples, score the answers, report them beside published scores and other runs",
    ),
    "inspect": (
        "mindformers_glm32k.commands.inspect",
        "print training sequences as the model sees them, and compare their prompts with what prediction feeds",
    ),
    "check": (
        "mindformers_glm32k.commands.check",
        "say all that is wrong with a run before it starts: YAML, data, checkpoint, layout; mend the YAML",
    ),
    "convert": ("mindformers_glm32k.commands.convert", "convert a Hugging Face checkpoint to a MindSpore one"),
    "dryrun": (
        "mindformers_glm32k.commands.dryrun",
        "compile the program of every NPU on this machine and report its memory, traffic and work",
    ),
    "strategy": (
        "mindformers_glm32k.commands.strategy",
        "write the parallel strategy files of all NPUs, without an NPU",
    ),
    "split": (
        "mindformers_glm32k.commands.split",
        "shard a whole checkpoint for every NPU of a layout and check the shards",
    ),
    "merge": (
        "mindformers_glm32k.commands.merge",
        "merge the checkpoints of all NPUs into one file, LoRA adapters too, and check it",
    ),
    "export": (
        "mindformers_glm32k.commands.export",
        "write a folder that vLLM and transformers serve, from a checkpoint or those of all NPUs",
    ),
}


def _build_parser(chosen):
    parser = argparse.ArgumentParser(prog="glm32k", description="ChatGLM3-6B-32K on MindFormers.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, help_line) in COMMANDS.items():
        command = commands.add_parser(name, help=help_line, description=help_line[0].upper() + help_line[1:] + ".")
        if name == chosen:  # importing only its module keeps --help fast
            importlib.import_module(module).add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command `glm32k`; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    chosen = next((word for word in argv if not word.startswith("-")), None)
    parser = _build_parser(chosen)
    module = importlib.import_module(COMMANDS[chosen][0]) if chosen in COMMANDS else None
    return parse_and_run(parser, module, argv)


if __name__ == "__main__":
    sys.exit(main())
