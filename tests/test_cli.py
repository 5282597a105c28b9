"""The table of commands; what each command does is tested with its module."""

import configparser
import importlib
import os
import subprocess
import sys
import types

import pytest
from conftest import ROOT

from mindformers_glm32k import cli, commands
from mindformers_glm32k.errors import CommandFailed, InputError


def run_glm32k(*argv, capsys):
    """Exit status and output of `glm32k ARGV`."""
    try:
        status = cli.main(list(argv))
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr()


def command_module(run):
    """A command whose option --size is a number."""
    module = types.ModuleType("command")
    module.__doc__ = "Does things.\n\nMore about it."
    module.add_arguments = lambda parser: parser.add_argument("--size", type=int, required=True)
    module.run = run
    return module


def test_help_lists_every_command(capsys):
    status, output = run_glm32k("--help", capsys=capsys)
    assert status == 0
    for name, (_, help_line) in cli.COMMANDS.items():
        assert name in output.out
        assert help_line in " ".join(output.out.split())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_each_command(name, capsys):
    status, output = run_glm32k(name, "--help", capsys=capsys)
    assert status == 0
    assert f"usage: glm32k {name}" in output.out
    assert output.out.count("--") > 2


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_needs_nothing_heavy(name):
    code = (
        "import sys\nfrom mindformers_glm32k.cli import main\n"
        f"try:\n    main([{name!r}, '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'mindspore', 'mindformers', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join)
def test_help_comes_at_once(argv):
    """Half a second of CPU time, the start of Python included; the best of three: other programs take cores, too."""
    command = [sys.executable, "-m", "mindformers_glm32k", *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
        if seconds[-1] < 0.5:
            break
    assert done.returncode == 0 and "usage: glm32k" in done.stdout, done.stderr
    assert min(seconds) < 0.5


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["--no-such-option"], ["convert", "--no-such-option", "x"]])
def test_usage_errors(argv, capsys):
    status, output = run_glm32k(*argv, capsys=capsys)
    assert status == 2
    assert "usage: glm32k" in output.err


def test_input_errors_end_with_2_and_no_traceback(monkeypatch, capsys):
    def run(args):
        raise InputError(f"size {args.size} is too small; give 5 or more")

    monkeypatch.setitem(sys.modules, "command", command_module(run))
    monkeypatch.setitem(cli.COMMANDS, "things", ("command", "do things"))
    status, output = run_glm32k("things", "--size", "3", capsys=capsys)
    assert status == 2
    assert output.err == "error: size 3 is too small; give 5 or more\n"


def test_what_failed_is_one_line_on_stderr_and_another_status(monkeypatch, capsys):
    def run(args):
        raise CommandFailed("the process ended")

    monkeypatch.setitem(sys.modules, "command", command_module(run))
    monkeypatch.setitem(cli.COMMANDS, "things", ("command", "do things"))
    status, output = run_glm32k("things", "--size", "3", capsys=capsys)
    assert status == 1
    assert output.err == "error: the process ended\n"


def test_other_errors_keep_their_traceback(monkeypatch):
    """A mistake in the program is no bad input."""

    def run(_):
        raise ZeroDivisionError

    monkeypatch.setitem(sys.modules, "command", command_module(run))
    monkeypatch.setitem(cli.COMMANDS, "things", ("command", "do things"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["things", "--size", "3"])


@pytest.mark.parametrize("returned, status", [(None, 0), (0, 0), (1, 1)])
def test_exit_status_is_the_commands(returned, status, capsys):
    module = command_module(lambda args: returned)
    assert commands.run_command(module, "things", ["--size", "3"]) == status
    with pytest.raises(SystemExit) as end:
        commands.run_command(module, "things", ["--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert "usage: things" in output and "Does things." in output and "More about it" not in output


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_is_a_program_of_its_own(name):
    """`python -m MODULE` and `glm32k NAME` are the same."""
    module = importlib.import_module(cli.COMMANDS[name][0])
    done = subprocess.run(
        [sys.executable, "-m", module.__name__, "--help"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_console_commands_exist():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.entry_points"]["console_scripts"].split("\n")
    commands = dict(line.replace(" ", "").split("=") for line in lines if line)
    assert set(commands) == {"glm32k", "run_mindformer"}
    for target in commands.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))
