"""Who answers prompts: this plugin's generator, behind the same interface as a server's (endpoint.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from mindformers_glm32k.generation.network import Network
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
        from mindformers_glm32k.run_mindformer import read_prediction_config

        config = read_prediction_config(config_arguments, checkpoint, tokenizer_file)
        self._network = Network(config, batch_size)
        self._vocabulary = vocabulary
        self.room, self.identity, self.writes = self._network.room, self._network.identity, self._network.writes
        self.generate = self._network.generate

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[tuple[str, str], str]]:
        """Yields (key, answer), batch by batch in the order of the requests."""
        batch: list[Request] = []
        for request in requests:
            if batch and (not _alike(batch[0], request) or len(batch) == self._network.batch_size):
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


def _alike(one, other):
    same = ("max_new_tokens", "min_new_tokens", "stop_ids")
    # a least length counts from the longest prompt of a batch, upstream
    return not one.min_new_tokens and all(getattr(one, name) == getattr(other, name) for name in same)
