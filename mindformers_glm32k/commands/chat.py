"""Talk to the model at the terminal: history, documents, tools; /help lists the commands."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from mindformers_glm32k.commands.generate import add_model_arguments, read_model, read_options
from mindformers_glm32k.process import INTERRUPT, logs_to, pass_on_interrupts

TAKES_OVERRIDES = True  # options that are not listed here are run_mindformer's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.allow_abbrev = False
    add_model_arguments(parser)
    parser.add_argument("--system", default="", help="the system prompt")
    parser.add_argument("--tools", metavar="FILE", help="tools that the model may call, a JSON list")
    parser.add_argument("--log", default="output/chat/chat.log", help="file of MindFormers' messages")
    parser.epilog = "Any other option is run_mindformer's. Input is edited with prompt_toolkit where it is installed."


def run(args: argparse.Namespace) -> int:
    """Talks; returns the exit status."""
    blocked = sys.stdin.isatty() and pass_on_interrupts()  # before the imports: see there
    from mindformers_glm32k.generation.conversation import read_document
    from mindformers_glm32k.generation.network import Network
    from mindformers_glm32k.generation.terminal import COMMANDS, Chat

    @contextlib.contextmanager
    def quiet() -> Iterator[TextIO]:
        with logs_to(args.log) as (out, _):
            yield out

    read = _reader(COMMANDS, _interruptible if blocked else lambda read: read)  # before the terminal is set aside
    with quiet() as out:
        _, vocabulary, config = read_model(args)
        options = read_options(args, config)
        network = Network(config, batch_size=1)
        chat = Chat(network, vocabulary, options, read, sys.stdout, quiet)
        chat.conversation.system = args.system
        if args.tools:
            chat.conversation.set_tools(read_document(args.tools))
        what = config.load_checkpoint or "random weights (no --load_checkpoint)"
        print(f"loading {what}; messages go to {args.log}", file=out, flush=True)
        network.load()
    print(f"{network.room:,} tokens of context. /help lists the commands, /quit leaves.", flush=True)
    chat.run()
    return 0


def _reader(commands: tuple[str, ...], interruptible: Callable) -> Callable[[str], str]:
    """Reads a line: with prompt_toolkit at a terminal, else plainly."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.completion import WordCompleter
        except ImportError:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401, input() edits lines with it
            return interruptible(input)
        completer = WordCompleter(list(commands), sentence=True)
        return PromptSession(completer=completer, complete_while_typing=False).prompt

    def plain(_prompt: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    return interruptible(plain)


def _interruptible(read: Callable[[str], str]) -> Callable[[str], str]:
    """A plain read that Ctrl-C ends. (prompt_toolkit reads the key itself; its threads must not take the signal.)"""

    def read_line(prompt: str) -> str:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which MindSpore may have replaced
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPT)
        try:
            return read(prompt)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPT)

    return read_line


if __name__ == "__main__":
    from mindformers_glm32k.commands import run_command

    sys.exit(run_command(sys.modules[__name__], "glm32k chat"))
