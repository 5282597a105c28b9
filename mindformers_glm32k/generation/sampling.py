"""Sampling of tokens that depends on a prompt's own seed alone, not on its batch, its index there or the device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mindformers_glm32k.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; greedy by default.

    Attributes:
        temperature: divides the logits, >= 0; 0 is greedy. Applied before top_k and top_p, as in transformers.
        top_k: only the k most probable tokens; 0: all.
        top_p: only the most probable tokens that together reach p, 0 < p <= 1.
        repetition_penalty: > 0, for tokens already in the sequence, as in transformers; for greedy answers, too.
        seed: of the run; that of a prompt is derived from it and the prompt's key.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, right, what in (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0"),
            ("seed", 0 <= self.seed < 2**63, "0 or more"),
        ):
            if not right:
                raise InputError(f"--{name} {getattr(self, name)}: must be {what}")

    @property
    def is_random(self) -> bool:
        return self.temperature > 0 and self.top_k != 1

    def stamp(self) -> dict[str, Any]:
        """The settings that determine the answers."""
        return asdict(self) if self.is_random else {"repetition_penalty": self.repetition_penalty}

    def seed_of(self, key: str) -> int:
        """The seed of the prompt with this key."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}\n{key}".encode()).digest()[:8], "little")

    def draw(self, logits: np.ndarray, random: np.random.Generator) -> int:
        """The id of a token drawn from logits (V,)."""
        scores = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scores, kind="stable")[: self.top_k or None]  # most probable first
        weights = np.exp(scores[order] - scores[order[0]])
        ends = np.cumsum(weights / weights.sum())
        kept = int(np.searchsorted(ends, self.top_p)) + 1 if self.top_p < 1 else len(order)
        weights = weights[:kept]
        place = np.searchsorted(np.cumsum(weights), random.random() * weights.sum(), side="right")
        return int(order[min(place, len(weights) - 1)])

    def processors(self, seeds: Sequence[int]) -> Any:
        """MindFormers' list of logits processors for a batch with these seeds: all but the drawn token is masked, so
        that the generator's greedy choice finds it."""
        from mindformers.generation import LogitsProcessorList
        from mindformers.generation.logits_process import LogitsProcessor

        randoms = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]

        def drawn(scores: np.ndarray, rows: Sequence[int]) -> np.ndarray:
            masked = np.full_like(scores, np.finfo(np.float16).min)
            for index, row in enumerate(rows):
                masked[index, self.draw(scores[index], randoms[row])] = 0
            return masked

        class Draw(LogitsProcessor):
            """Upstream calls it for one sequence at a time, in threads, or in its other mode for the whole batch."""

            def process_np(self, logits: np.ndarray, sequence_ids: np.ndarray) -> np.ndarray:
                if len(sequence_ids) == len(randoms):
                    return drawn(logits, range(len(randoms)))
                # sequence_ids is a view of the batch's ids: its offset there gives the sequence's index
                batch = sequence_ids.base
                offset = sequence_ids.__array_interface__["data"][0] - batch.__array_interface__["data"][0]
                return drawn(logits, [offset // sequence_ids.strides[0]])

            def process_ms(self, logits: Any, sequence_ids: Any, **kwargs: Any) -> Any:
                from mindspore import Tensor

                return Tensor(drawn(logits.asnumpy(), range(len(randoms))))

        processors = LogitsProcessorList()
        processors.append(Draw())
        return processors


def sampling_of(model_config: Any, do_sample: bool | None = None, **given: Any) -> Sampling:
    """The settings given (None: not given), else those of a YAML's model_config."""
    given = {name: value for name, value in given.items() if value is not None}
    names = ("temperature", "top_k", "top_p")
    random = bool(model_config.do_sample) or any(name in given for name in names) if do_sample is None else do_sample
    # a YAML that decodes greedily says top_k: 1, which is not meant for sampling
    written = {name: model_config.get(name) for name in names if model_config.do_sample}
    settings = {"temperature": 1.0, **{name: value for name, value in written.items() if value is not None}, **given}
    if not random:
        settings = {name: value for name, value in settings.items() if name not in names}
    return Sampling(**{"repetition_penalty": model_config.repetition_penalty or 1.0, **settings})
