"""Who answers prompts: this plugin's generator, behind the same interface as a server's (endpoint.py)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mindformers_glm32k.errors import CommandFailed
from mindformers_glm32k.files import weights_digest
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        key: (data set, sample), which comes back with the answer.
        ids: the prompt as pred.py feeds it.
        text: the same, before the chat format; for servers that take no ids.
        chat: whether the chat format is put around the text.
        max_new_tokens: the longest answer.
        min_new_tokens: the shortest, in which no stop id counts.
        stop_ids: what ends an answer.
    """

    key: tuple[str, str]
    ids: list[int]
    text: str
    chat: bool
    max_new_tokens: int
    min_new_tokens: int
    stop_ids: tuple[int, ...]


class Engine(Protocol):
    """What predict needs.

    Attributes:
        identity: what determines the answers, for the stamp: `engine`, `model` and the engine's options.
        differs: in which ways the answers may differ from pred.py's.
        room: tokens of prompt and answer together; None where it is not known.
        writes: whether this process writes the answers (of several that compute together, one does).
    """

    identity: dict
    differs: list[str]
    room: int | None
    writes: bool

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[tuple[str, str], str]]:
        """Yields (key, answer) of each request, in whatever order they are done."""


class LocalEngine:
    """The model of a YAML, through MindFormers' generator.

    Args:
        config_arguments: as for run_mindformer: --config YAML and overrides.
        checkpoint: file or folder; None: random weights.
        tokenizer_file: tokenizer.model.
        vocabulary: of that file.
        batch_size: prompts that are answered together; None: the YAML's batch_size.

    Raises:
        InputError: as run_mindformer.
    """

    differs: list[str] = []

    def __init__(
        self,
        config_arguments: list[str],
        checkpoint: str | None,
        tokenizer_file: str,
        vocabulary: Vocabulary,
        batch_size: int | None = None,
    ):
        from mindformers_glm32k.run_mindformer import read_config

        more = ["--load_checkpoint", checkpoint] if checkpoint else []
        self._config = read_config(
            [*config_arguments, "--run_mode", "predict", "--processor.tokenizer.vocab_file", tokenizer_file, *more]
        )
        self._vocabulary = vocabulary
        model = self._config.model.model_config
        self.room = model.seq_length
        self._batch_size = batch_size or (model.batch_size if model.use_past else None) or 1
        weights = self._config.load_checkpoint
        self.identity = {
            "engine": "mindformers",
            "model": checkpoint_hash(weights) if weights else f"random weights, seed {self._config.seed}",
            "config": config_hash(model),
        }
        self.writes = int(os.environ.get("RANK_ID", 0)) == 0 or not self._config.use_parallel
        self._network = None

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[tuple[str, str], str]]:
        """Yields (key, answer), batch by batch in the order of the requests."""
        batch: list[Request] = []
        for request in requests:
            if batch and (not _alike(batch[0], request) or len(batch) == self._batch_size):
                yield from self._answer_batch(batch)
                batch = []
            batch.append(request)
        if batch:
            yield from self._answer_batch(batch)

    def _answer_batch(self, batch):
        ids = self.generate(
            [request.ids for request in batch], batch[0].max_new_tokens, batch[0].stop_ids, batch[0].min_new_tokens
        )
        for request, answer in zip(batch, ids):
            yield request.key, self._vocabulary.decode(answer, skip_special_tokens=True)

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, stop_ids: tuple[int, ...], min_new_tokens: int = 0
    ) -> list[list[int]]:
        """The greedy answers' ids, stop ids included, as transformers' generate returns them."""
        import numpy as np

        if self._network is None:
            self._network = self._load()
        longest, pad = max(map(len, prompts)), self._config.model.model_config.pad_token_id or 0
        rows = [row + [pad] * (longest - len(row)) for row in prompts]
        # every compiled program has the shape of a whole batch
        rows += rows[-1:] * (self._batch_size - len(rows) if len(prompts) > 1 else 0)
        options = {"min_new_tokens": min_new_tokens} if min_new_tokens else {}
        outputs = self._network.generate(
            input_ids=np.array(rows, np.int32),
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=pad,
            do_sample=False,
            repetition_penalty=1.0,
            **options,
        )
        return [[int(index) for index in row[len(prompt) :]] for prompt, row in zip(prompts, outputs)]

    def _load(self):
        """The network with its weights, which Trainer.predict builds, loads and checks for a first short answer."""
        import tempfile

        from mindformers import Trainer, build_context

        from mindformers_glm32k.compat import barrier_on_cpu, set_output_path
        from mindformers_glm32k.preflight.run_config import check_config

        config = self._config
        check_config(config, "predict")
        config.model.model_config.max_new_tokens = 1
        config.model.model_config.batch_size = self._batch_size
        set_output_path(config.output_dir)
        build_context(config)
        trainer = Trainer(config)
        with tempfile.TemporaryDirectory() as folder, barrier_on_cpu():
            config.save_file = str(Path(folder) / "first.txt")
            trainer.predict(
                predict_checkpoint=config.load_checkpoint,
                input_data=["a"] * self._batch_size,
                batch_size=self._batch_size,
            )
        network = getattr(getattr(trainer.trainer, "pipeline_task", None), "network", None)
        if network is None:
            raise CommandFailed("MindFormers' Trainer keeps no network after a prediction")
        return network


def _alike(one, other):
    same = ("max_new_tokens", "min_new_tokens", "stop_ids")
    # a least length counts from the longest prompt of a batch, upstream
    return not one.min_new_tokens and all(getattr(one, name) == getattr(other, name) for name in same)


def config_hash(model_config: dict) -> str:
    """A digest of what a YAML's model_config says about the model itself, not about room, batches and sampling."""
    told = sorted((key, str(value)) for key, value in model_config.items() if key not in _NOT_THE_MODEL)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def checkpoint_hash(path: str | Path) -> str:
    """A digest of a checkpoint's bytes: one file, or all weights in a folder with their names."""
    return f"sha256:{weights_digest(Path(path))[:32]}"


_NOT_THE_MODEL = frozenset(
    (
        "batch_size",
        "block_size",
        "checkpoint_name_or_path",
        "do_sample",
        "eos_token_id",
        "is_dynamic",
        "max_new_tokens",
        "num_blocks",
        "repetition_penalty",
        "seq_length",
        "top_k",
        "top_p",
        "use_past",
    )
)
