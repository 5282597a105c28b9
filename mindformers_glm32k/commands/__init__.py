"""One module for each command of `glm32k`: `add_arguments(parser)` and `run(args) -> exit status`, both for parsing and
printing only; the rooms below do the work. No module imports anything heavy before `run`, so that help comes at once.

A module with TAKES_OVERRIDES gets the options that it does not know as `args.overrides`; others refuse them.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from types import ModuleType

from mindformers_glm32k.errors import CommandFailed, InputError

__all__ = ["parse_and_run", "run_command"]


def run_command(module: ModuleType, prog: str, argv: Sequence[str] | None = None) -> int:
    """Runs one command module as a program of its own (`python -m MODULE`) and returns the exit status.

    Args:
        module: one with add_arguments and run.
        prog: the name shown in the usage line.
        argv: the arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog=prog, description=module.__doc__.strip().splitlines()[0])
    module.add_arguments(parser)
    return parse_and_run(parser, module, argv)


def parse_and_run(parser: argparse.ArgumentParser, module: ModuleType | None, argv: Sequence[str] | None) -> int:
    """Runs a command with a parser that has its options; errors of the input end in one line and status 2.

    Without a module the parser knows that no command was given, and exits.
    """
    if getattr(module, "TAKES_OVERRIDES", False):
        args, args.overrides = parser.parse_known_args(argv)
    else:
        args = parser.parse_args(argv)
    try:
        return module.run(args) or 0
    except (InputError, CommandFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        print(f"error: {error.filename}: {error.strerror}; give another name", file=sys.stderr)
        return 2
