"""Fixtures shared by all tests: a temporary working directory and the reference data."""

import logging
import os
import random
import sys
from pathlib import Path

import pytest
import sentencepiece
from dryrun.programs import pipeline, report  # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT.parent / "shared" / "reference"

# MindFormers' logger keeps the captured stream of the test that imported it first, and complains when it is closed.
logging.raiseExceptions = False


# What MindFormers sets for the whole process, and processes that a test starts would take over: the run mode of a
# prediction, and an option that MindSpore prints when it finds it.
LEFT_BEHIND = ("RUN_MODE", "MS_ALLOC_CONF")


def launchers_environment():
    """Environment variables for runs that a launcher starts: its processes import this tree and log below their own
    folder, and msrun's `python` is the one that runs the tests, though its environment need not be activated."""
    own = {"LOCAL_DEFAULT_PATH", "REGISTER_PATH", "LOG_MF_PATH"}
    kept = {name: value for name, value in os.environ.items() if name not in own}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**kept, "PYTHONPATH": str(ROOT), "PATH": path}


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    """MindFormers writes output/, rank_0/ and the like into the current folder: every test gets its own, and what a
    trainer sets for the whole process, MindSpore's context of parallel runs and RUN_MODE, as it was."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in LEFT_BEHIND:  # afterwards: the next module's fixtures start before any fixture of a test
        os.environ.pop(name, None)
    if "mindspore" in sys.modules:
        sys.modules["mindspore"].reset_auto_parallel_context()


@pytest.fixture(scope="session")
def reference():
    """The folder of golden data made by the published model, tokenizer and LongBench code."""
    if not REFERENCE.is_dir():
        pytest.skip("the reference data (../shared/reference, seen from the project's root) is not on this machine")
    return REFERENCE


@pytest.fixture(scope="session")
def train_vocabulary(tmp_path_factory):
    """A function that trains a sentencepiece vocabulary of some 400 pieces and returns its file; takes the trainer's
    options. As in the published one, any byte can be spelled and no text is normalised."""

    def train(**options):
        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 7))) for _ in range(300)]
        lines = [" ".join(rng.choices(words, k=8)) + " \u7684\u662f\uff0c 0123456789 <>|/[]\n" for _ in range(200)]
        path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
        with open(path, "wb") as target:
            sentencepiece.SentencePieceTrainer.train(
                **{
                    "sentence_iterator": iter(lines),
                    "model_writer": target,
                    "vocab_size": 400,
                    "model_type": "bpe",
                    "byte_fallback": True,
                    "normalization_rule_name": "identity",
                    "remove_extra_whitespaces": False,
                    "minloglevel": 2,
                    **options,
                }
            )
        return path

    return train


@pytest.fixture(scope="session")
def small_vocab_file(train_vocabulary):
    """A small vocabulary's file; only to be read."""
    return train_vocabulary()
