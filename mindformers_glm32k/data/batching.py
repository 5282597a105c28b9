"""From tokens to batches: sequences of fixed length, batches padded to their longest sequence, packed sequences; and
counters of padding and truncation, shared by all worker threads and processes.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np
from mindspore.dataset import Dataset, GeneratorDataset, Sampler

from mindformers_glm32k.data.encode import IGNORED, padded
from mindformers_glm32k.data.packing import COLUMNS, PackedSequences, StreamedSequences
from mindformers_glm32k.data.tokens import TokenizedSamples

UNPACKED_COLUMNS = ["input_ids", "labels"]
WORST = 5  # samples named in a report
_COUNTS = ("samples", "truncated", "dropped", "tokens", "lost")


class PaddingCounter:
    """Counts padding across worker threads and processes; logs its share every `sequences_per_epoch` sequences."""

    def __init__(self, sequences_per_epoch: int, log: Any):
        self._sequences_per_epoch, self._log = sequences_per_epoch, log
        self._counts = multiprocessing.Array("q", 3)  # sequences, tokens, positions; with its lock

    def add(self, sequences: int, tokens: int, positions: int) -> None:
        """Adds the counts of one or more sequences: `tokens` tokens in `positions` positions, padding included."""
        with self._counts.get_lock():
            for index, value in enumerate((sequences, tokens, positions)):
                self._counts[index] += value
            sequences, tokens, positions = self._counts
            ends = sequences >= self._sequences_per_epoch
            if ends:
                self._counts[:] = [0, 0, 0]
        if ends:
            self._log.info(
                "padding: %.1f %% of the positions of %d sequences (%d tokens in %d positions)",
                100 * (1 - tokens / positions),
                sequences,
                tokens,
                positions,
            )


class FixedSequences:
    """Sample index -> input_ids, labels: int32 (length,).

    Args:
        tokens: samples without padding.
        length: tokens of a sequence, padding included.
        pad_id: id of the padding token.
        truncations, padding: the counters to add each sample to; padding is None where sequences stay ragged.
    """

    def __init__(
        self,
        tokens: TokenizedSamples,
        length: int,
        pad_id: int,
        truncations: TruncationCounter,
        padding: PaddingCounter | None,
    ):
        self._tokens, self._length, self._pad_id = tokens, length, pad_id
        self._truncations, self._padding = truncations, padding

    def __call__(self, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sample = int(np.asarray(sample).item())
        encoded = self._tokens[sample]
        self._truncations.add(sample, encoded.tokens_before, encoded.tokens_after)
        return self._columns(encoded)

    def _columns(self, encoded):
        self._padding.add(1, len(encoded.input_ids), self._length)
        return padded(encoded.input_ids, self._length, self._pad_id), padded(encoded.labels, self._length, IGNORED)


class RaggedSequences(FixedSequences):
    """As FixedSequences, but unpadded; BatchPadding pads them batch by batch."""

    def _columns(self, encoded):
        return encoded.input_ids, encoded.labels


class BatchPadding:
    """Pads the sequences of a batch to the longest one, rounded up to a multiple of `multiple`, at most `length`."""

    def __init__(self, multiple: int, length: int, pad_id: int, padding: PaddingCounter):
        self._multiple, self._length, self._pad_id, self._padding = multiple, length, pad_id, padding

    def __call__(
        self, input_ids: list[np.ndarray], labels: list[np.ndarray], _: Any
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        longest = max(1, max(len(ids) for ids in input_ids))
        length = min(-(-longest // self._multiple) * self._multiple, self._length)
        self._padding.add(len(input_ids), sum(len(ids) for ids in input_ids), length * len(input_ids))
        return (
            [padded(ids, length, self._pad_id) for ids in input_ids],
            [padded(encoded, length, IGNORED) for encoded in labels],
        )


def fixed_batches(loader: Dataset, sequences: FixedSequences, config: dict) -> Dataset:
    """Batches of FixedSequences over the loader's samples."""
    return _mapped(loader, sequences, config).batch(config.batch_size, drop_remainder=config.drop_remainder)


def ragged_batches(loader: Dataset, sequences: RaggedSequences, padding: BatchPadding, config: dict) -> Dataset:
    """Batches of RaggedSequences, each batch padded to its own length."""
    return _mapped(loader, sequences, config).batch(
        config.batch_size, drop_remainder=config.drop_remainder, per_batch_map=padding, input_columns=UNPACKED_COLUMNS
    )


def _mapped(loader, sequences, config):
    dataset = loader.map(
        sequences,
        input_columns=["sample"],
        output_columns=UNPACKED_COLUMNS,
        num_parallel_workers=config.num_parallel_workers,
        python_multiprocessing=config.python_multiprocessing,
    )
    return dataset.project(UNPACKED_COLUMNS)


def packed_batches(sequences: PackedSequences, sampler: Sampler, config: dict) -> Dataset:
    """Batches of the packed sequences at the sampler's indices; one worker for a stream, which is read in order."""
    workers = 1 if isinstance(sequences, StreamedSequences) else config.num_parallel_workers
    dataset = GeneratorDataset(
        sequences,
        COLUMNS,
        sampler=sampler,
        num_parallel_workers=workers,
        python_multiprocessing=config.python_multiprocessing and workers > 1,
    )
    return dataset.batch(config.batch_size, drop_remainder=config.drop_remainder)


class TruncationReport:
    """Tokens that one pass over the data loses to truncation. Plain ints: picklable, and mergeable across shards.

    Attributes:
        samples, truncated, dropped: number of samples in total, truncated, and dropped as a whole.
        tokens, lost: tokens before truncation, and tokens lost to it.
        worst: up to WORST samples that lost most: (tokens before, tokens after or 0 if dropped, sample index).
    """

    def __init__(self):
        self.samples = self.truncated = self.dropped = self.tokens = self.lost = 0
        self.worst = []

    def add(self, sample: int, before: int, after: int) -> bool:
        """Counts one sample; returns whether it lost anything.

        Args:
            sample: its index.
            before: its tokens before truncation, answers included.
            after: its tokens after truncation; 0 for a dropped sample.
        """
        self.samples += 1
        self.tokens += before
        if after == before:
            return False
        self.truncated += after > 0
        self.dropped += after == 0
        self.lost += max(before - after, 0)  # tokenizing a truncated text again may add a token
        self._keep_worst([(before, after, sample)])
        return True

    def _keep_worst(self, entries):
        # a set: samples of the next epoch may arrive before all of this one are counted
        by_loss = sorted({*self.worst, *entries}, key=lambda entry: (entry[1] - entry[0], entry[2]))
        self.worst = by_loss[:WORST]

    def text(self, location: Callable[[int], str], truncation: str = "middle") -> str:
        """One paragraph; `location` gives the file and line of a sample."""
        if not self.worst:
            return f"none of {self.samples} samples had to be truncated"
        worst = "; ".join(
            f"{location(sample)}: " + (f"{before} to {after}" if after else f"{before}, left out")
            for before, after, sample in self.worst
        )
        return (
            f"of {self.samples} samples {self.truncated} were truncated (truncation: {truncation}) and "
            f"{self.dropped} left out, {self.lost} of {self.tokens} tokens "
            f"({100 * self.lost / self.tokens:.1f} %); most lost, in tokens: {worst}"
        )

    def _numbers(self):
        """The whole report as list[int] of a fixed length, for shared memory."""
        worst = [number for entry in self.worst for number in entry]
        return [getattr(self, name) for name in _COUNTS] + worst + [-1] * (3 * WORST - len(worst))

    @classmethod
    def _from_numbers(cls, numbers) -> TruncationReport:
        report = cls()
        for name, value in zip(_COUNTS, numbers):
            setattr(report, name, value)
        entries = numbers[len(_COUNTS) :]
        report.worst = [tuple(entries[at : at + 3]) for at in range(0, len(entries), 3) if entries[at] >= 0]
        return report


class TruncationCounter:
    """Counts truncations; warns at the first one and logs a summary after every `samples_per_epoch` samples.

    The counts are in shared memory, so forked worker processes count together.

    Args:
        location: sample index -> its file and line.
        samples_per_epoch: samples after which the counts are logged and reset.
        log: has warning(format, …).
        truncation: the mode, for the message.
    """

    def __init__(self, location: Callable[[int], str], samples_per_epoch: int, log: Any, truncation: str = "middle"):
        self._location, self._log, self._truncation = location, log, truncation
        self._samples_per_epoch = samples_per_epoch
        self._numbers = multiprocessing.Array("q", TruncationReport()._numbers())  # with its lock
        self._warned = multiprocessing.Value("b", 0)

    def add(self, sample: int, before: int, after: int) -> None:
        """Counts one sample; see `TruncationReport.add`."""
        with self._numbers.get_lock():
            report = TruncationReport._from_numbers(list(self._numbers))
            lost = report.add(sample, before, after)
            first = lost and not self._warned.value
            self._warned.value = self._warned.value or first
            epoch_ends = report.samples >= self._samples_per_epoch
            self._numbers[:] = (TruncationReport() if epoch_ends else report)._numbers()
        if first:
            self._log.warning(
                "%s: %s (truncation: %s); a summary follows after each epoch",
                self._location(sample),
                f"truncated from {before} to {after} tokens to fit the sequence"
                if after
                else f"left out, {before} tokens do not fit the sequence",
                self._truncation,
            )
        if epoch_ends and report.worst:
            self._log.warning("%s", report.text(self._location, self._truncation))
