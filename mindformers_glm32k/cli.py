"""`glm32k COMMAND`: finds the command's module, parses its options, calls it."""

import argparse
import importlib
import sys

from mindformers_glm32k.errors import CommandFailed, InputError

# name -> (module, one line of help). A module has add_arguments(parser) and run(args) -> exit status, and
# imports nothing heavy before run: `glm32k --help` and `glm32k COMMAND --help` answer at once.
COMMANDS = {
    "make-data": (
        "mindformers_glm32k.commands.make_data",
        "write a small vocabulary and long-context tasks in the LongBench layout",
    ),
    "preprocess": (
        "mindformers_glm32k.longbench.preprocess",
        "write LongBench as training rows in the AdGen layout, some documents held out",
    ),
    "inspect": (
        "mindformers_glm32k.commands.inspect",
        "print training rows as the model sees them, and compare their prompts with what prediction feeds",
    ),
    "convert": ("mindformers_glm32k.commands.convert", "convert a Hugging Face checkpoint to a MindSpore one"),
    "dryrun": (
        "mindformers_glm32k.commands.dryrun",
        "compile the program of every NPU on this machine and report its memory, traffic and work",
    ),
    "strategy": (
        "mindformers_glm32k.dryrun.compile.strategy",
        "write the parallel strategy files of all NPUs, without an NPU",
    ),
    "split": (
        "mindformers_glm32k.weights.split",
        "cut a whole checkpoint for every NPU of a layout and check the parts",
    ),
    "merge": (
        "mindformers_glm32k.commands.merge",
        "join the checkpoints of all NPUs into one file, LoRA adapters too, and check it",
    ),
}


def _build_parser(chosen):
    parser = argparse.ArgumentParser(prog="glm32k", description="ChatGLM3-6B-32K on MindFormers.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, help_line) in COMMANDS.items():
        command = commands.add_parser(name, help=help_line, description=help_line[0].upper() + help_line[1:] + ".")
        if name == chosen:  # only the module of the chosen command is imported
            importlib.import_module(module).add_arguments(command)
    return parser


def run_command(module, prog, argv=None):
    """Runs one command module as a program of its own (`python -m MODULE`).

    Args:
        module: a module with add_arguments(parser) and run(args).
        prog (str): the name shown in the usage line.
        argv (list[str] | None): the arguments; those of the process by default.

    Returns:
        int: the exit status.
    """
    parser = argparse.ArgumentParser(prog=prog, description=module.__doc__.strip().splitlines()[0])
    module.add_arguments(parser)
    return _call(module.run, _parse(parser, module, argv))


def _parse(parser, module, argv):
    """A module with TAKES_OVERRIDES gets the options it does not know as `args.overrides`; to others they are errors."""
    if not getattr(module, "TAKES_OVERRIDES", False):
        return parser.parse_args(argv)
    args, args.overrides = parser.parse_known_args(argv)
    return args


def _call(run, args):
    try:
        return run(args) or 0
    except (InputError, CommandFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def main(argv=None):
    """Entry point of the console command `glm32k`; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    chosen = next((word for word in argv if not word.startswith("-")), None)
    parser = _build_parser(chosen)
    module = importlib.import_module(COMMANDS[chosen][0]) if chosen in COMMANDS else None
    args = _parse(parser, module, argv)
    return _call(module.run, args)


if __name__ == "__main__":
    sys.exit(main())
