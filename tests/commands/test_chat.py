"""`glm32k chat` at a pseudo-terminal, with the tiny model: Chinese, documents, Ctrl-C."""

import os
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

pexpect = pytest.importorskip("pexpect")
CONFIG = str(ROOT / "research" / "glm32k" / "predict_glm32k_tiny_cpu.yaml")
LIMIT = 120  # seconds for anything


def arguments(vocabulary, *more):
    return [*("-m", "mindformers_glm32k", "chat", "--config", CONFIG, "--tokenizer", str(vocabulary)), *more]


def surroundings():
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "LANG": "C.UTF-8",
        "PYTHONIOENCODING": "utf-8",
    }


def test_chat_at_a_terminal(small_vocab_file, tmp_path):
    (tmp_path / "文档.txt").write_text("秘密是 42。", encoding="utf-8")
    child = pexpect.spawn(
        sys.executable,
        arguments(small_vocab_file, "--max_new_tokens", "100"),
        env=surroundings(),
        encoding="utf-8",
        timeout=LIMIT,
        dimensions=(40, 120),
        cwd=str(tmp_path),
    )
    try:
        child.expect_exact("256 tokens of context. /help lists the commands")
        child.expect_exact("you>")
        child.send("/file 文x")
        child.send("\x7f档.txt\r")  # the wide character before is still whole
        child.expect(r"文档.txt: \d+ tokens, goes before your next message")
        child.send("你好\r")
        child.expect(r"\[[^\[\]]*tokens, [\d.]+ tokens/s, first after .* s for \d+ tokens, context \d+ of 256\]")
        child.expect_exact("you>")
        child.send("/save 记录.jsonl\r")
        child.expect_exact("saved: 记录.jsonl")
        assert "秘密是 42。\\n\\n你好" in (tmp_path / "记录.jsonl").read_text(encoding="utf-8")
        child.send("/undo\r")
        child.expect_exact("taken back: 秘密是")
        assert stop_an_answer(child)
        child.expect_exact("you>")
        child.sendintr()
        child.expect_exact("leaves)")
        child.send("/context\r")
        child.expect(r"of 256 tokens used, 100 are kept for an answer")
        child.send("/quit\r")
        child.expect(pexpect.EOF)
    finally:
        child.close(force=True)
    assert child.exitstatus == 0
    assert "INFO" in (tmp_path / "output" / "chat" / "chat.log").read_text(encoding="utf-8", errors="replace")


def stop_an_answer(child):
    """Sends questions until Ctrl-C falls into the time of an answer, and not before or behind it; whether it did."""
    for attempt in range(8):
        child.send("again\r")
        child.expect_exact("again")
        time.sleep(0.3 * (attempt + 1))
        child.sendintr()
        found = child.expect([r"\(stopping\)", r"first after", r"leaves\)"])
        if found == 0:
            child.expect(r"\[stopped, |stopped; the question")
            return True
        if found == 1:
            child.expect_exact("leaves)")
    return False


def test_lines_from_a_pipe(small_vocab_file, tmp_path):
    done = subprocess.run(
        [sys.executable, *arguments(small_vocab_file, "--max_new_tokens", "4", "--system", "be kind")],
        input="你好\n/context\n",
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=surroundings(),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "system prompt: " in done.stdout and "of 256 tokens used" in done.stdout
    assert "INFO" not in done.stdout and "you>" not in done.stdout


@pytest.mark.parametrize(
    "change, message",
    [(["--tools", "none.json"], "none.json: cannot be read"), (["--toolz", "x"], "unknown option --toolz")],
)
def test_wrong_options_are_named(small_vocab_file, tmp_path, capfd, change, message):
    from mindformers_glm32k import cli

    assert cli.main(arguments(small_vocab_file, *change)[2:]) == 2
    assert message in capfd.readouterr().err.splitlines()[-1]
