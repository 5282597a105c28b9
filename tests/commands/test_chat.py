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
NUM_BLOCKS = ("--model.model_config.num_blocks", "512")


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


@pytest.fixture
def chat_at_a_terminal(small_vocab_file, tmp_path):
    """A function that starts the chat in a pseudo-terminal, with options, and waits for its first prompt."""
    children = []

    def start(*options):
        child = pexpect.spawn(
            sys.executable,
            arguments(small_vocab_file, *options),
            env=surroundings(),
            encoding="utf-8",
            timeout=LIMIT,
            dimensions=(40, 120),
            cwd=str(tmp_path),
        )
        children.append(child)
        child.expect(r"([\d,]+) tokens of context\. /help lists the commands")
        child.expect_exact("you>")
        return child

    yield start
    for child in children:
        child.close(force=True)


def leave(child):
    child.send("/quit\r")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_chat_at_a_terminal(chat_at_a_terminal, tmp_path):
    (tmp_path / "文档.txt").write_text("秘密是 42。", encoding="utf-8")
    child = chat_at_a_terminal("--max_new_tokens", "100")
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
    child.expect_exact("you>")
    child.sendintr()
    child.expect_exact("leaves)")
    child.send("/context\r")
    child.expect(r"of 256 tokens used, 100 are kept for an answer")
    leave(child)
    assert "INFO" in (tmp_path / "output" / "chat" / "chat.log").read_text(encoding="utf-8", errors="replace")


def test_ctrl_c_stops_an_answer(chat_at_a_terminal):
    """The answer to this question has no end: it takes all 4,000 tokens, for which every machine needs a while."""
    child = chat_at_a_terminal("--model.model_config.seq_length", "8192", *NUM_BLOCKS, "--max_new_tokens", "4000")
    for seconds in (0.5, 3):
        child.send("count\r")
        child.expect_exact("\x1b[?2004l")  # the prompt has let go of the terminal
        time.sleep(seconds)
        child.sendintr()
        child.expect_exact("(stopping)")
        child.expect(r"\[stopped, |stopped; the question")
        child.expect_exact("you>")
        child.send("/clear\r")
        child.expect_exact("a new conversation")
        child.expect_exact("you>")
    child.send("/context\r")
    child.expect(r"of 8,192 tokens used, 4,000 are kept for an answer")
    leave(child)


def from_a_pipe(vocabulary, folder, text, *options):
    done = subprocess.run(
        [sys.executable, *arguments(vocabulary, *options)],
        input=text,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=surroundings(),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_room_is_that_of_the_cache(small_vocab_file, tmp_path):
    """Not seq_length: an answer would break off in the middle where the cache has less."""
    options = ("--model.model_config.num_blocks", "8", "--max_new_tokens", "100")
    shown = from_a_pipe(small_vocab_file, tmp_path, "count\n/context\n", *options)
    assert "128 tokens of context" in shown  # 8 blocks of 16
    assert "of 128 tokens used, 100 are kept" in shown and "error" not in shown


def test_lines_from_a_pipe(small_vocab_file, tmp_path):
    shown = from_a_pipe(small_vocab_file, tmp_path, "你好\n/context\n", "--max_new_tokens", "4", "--system", "be kind")
    assert "system prompt: " in shown and "of 256 tokens used" in shown
    assert "INFO" not in shown and "you>" not in shown


@pytest.mark.parametrize(
    "change, message",
    [(["--tools", "none.json"], "none.json: cannot be read"), (["--toolz", "x"], "unknown option --toolz")],
)
def test_wrong_options_are_named(small_vocab_file, tmp_path, capfd, change, message):
    from mindformers_glm32k import cli

    assert cli.main(arguments(small_vocab_file, *change)[2:]) == 2
    assert message in capfd.readouterr().err.splitlines()[-1]
