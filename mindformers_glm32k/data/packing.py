"""Packing: several documents in one sequence of fixed length, each with positions, attention and weights of its own.

    input_ids     a1 a2 a3 a4 b1 b2 b3 c1 c2 c3 c4 <pad> <pad>      three documents
    labels         ·  · a4  ·  · b3  ·  · c3 c4  ·    ·     ·       as `encode.py` makes them
    input_mask     0  0  1  0  0  1  0  0 .5 .5  0    0     0       weight of each position in the loss
    position_ids   0  1  2  3  0  1  2  0  1  2  3    0     1       restart with each document
    document_ids   0  0  0  0  1  1  1  2  2  2  2    3     3       a token attends within its document only

The model's loss is sum(w * l) / sum(w), both sums taken over all sequences of a step, on all devices. With w = 1 / n
for each of a sample's n tokens in the loss, sum(w * l) adds up the samples' mean losses and sum(w) counts the samples,
so the loss is

    (1 / samples) * sum over samples of (1 / n) * sum over its tokens in the loss of l

the mean over the samples of the step: a sample counts alike whether its answer is long or short, whichever sequence and
device it is on, and whatever it is packed with. LongAlign (Bai et al. 2024) makes samples count alike by weights that
contain the numbers of packs and samples in the batch, which a data worker would have to know for all devices; here the
model's denominator replaces them. A constant factor in w cancels.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mindformers_glm32k.data.encode import IGNORED, EncodedSample
from mindformers_glm32k.data.loader import sample_order
from mindformers_glm32k.data.tokens import TokenizedSamples, in_order
from mindformers_glm32k.errors import InputError

COLUMNS = ["input_ids", "labels", "input_mask", "position_ids", "document_ids"]  # the model's own order of inputs
FIRST_WINDOW = 2  # sequences; small, so that the first ones are ready soon
_HELD_BACK = 8  # one in so many sequences of a window, the emptiest ones, is packed again with the next window
_TOGETHER = 4  # documents of a stream that one call tokenizes
_AHEAD = 2  # calls submitted before their documents are needed


def first_fit(lengths: Sequence[int], capacity: int, max_documents: int | None = None) -> list[list[int]]:
    """First-fit decreasing: documents, longest first, each go into the first sequence that has room.

    Args:
        lengths: tokens of each document; ValueError where one does not lie between 1 and `capacity`.
        capacity: tokens of a sequence.
        max_documents: most documents of a sequence; None: no limit.

    Returns:
        indices of `lengths`, sequence by sequence.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not lie between 1 and {capacity}")
    room = np.full(len(lengths), capacity, np.int64)
    sequences, used = [], 0
    for index in np.argsort(-lengths, kind="stable"):
        fits = room[:used] >= lengths[index]
        sequence = int(fits.argmax()) if used else 0
        if not used or not fits[sequence]:
            sequence, used = used, used + 1
            sequences.append([])
        sequences[sequence].append(int(index))
        room[sequence] = 0 if len(sequences[sequence]) == max_documents else room[sequence] - lengths[index]
    return sequences


def pack(
    documents: Iterable[tuple[int, int]], capacity: int, window: int, seed: Any = None, max_documents: int | None = None
) -> Iterator[list[int]]:
    """Packs a stream of documents, a window of them at a time; each is in exactly one sequence.

    Windows grow from FIRST_WINDOW sequences' worth of documents to `window` sequences'. The emptiest eighth of a
    window's sequences is taken apart again and packed with the next window.

    Args:
        documents: (sample, length) of each, 0 <= length <= capacity tokens; those of length 0 (dropped by the
            truncation) are in no sequence.
        capacity: tokens of a sequence.
        window: documents worth this many full sequences are sorted at once, >= 1; more of them leave less padding.
        seed: shuffles the sequences of each window; None: those with the earliest documents come first.
        max_documents: most documents of a sequence; None: no limit.

    Yields:
        the samples of a sequence, in the stream's order.
    """
    documents = ((index, sample, length) for index, (sample, length) in enumerate(documents) if length)
    rng = None if seed is None else np.random.default_rng(seed)
    size, waiting = min(FIRST_WINDOW, window), []
    while True:
        tokens = sum(length for _, _, length in waiting)
        more = False
        for document in documents:
            more = True
            waiting.append(document)
            tokens += document[2]
            if tokens >= size * capacity:
                break
        waiting.sort()
        sequences = [
            sorted(waiting[index] for index in sequence)
            for sequence in first_fit([length for _, _, length in waiting], capacity, max_documents)
        ]
        waiting = []
        if more:
            sequences.sort(key=lambda sequence: (-sum(length for _, _, length in sequence), sequence))
            kept = len(sequences) - (-(-len(sequences) // _HELD_BACK) if len(sequences) > 1 else 0)
            waiting = [document for sequence in sequences[kept:] for document in sequence]
            sequences = sequences[:kept]
        sequences.sort()
        for sequence in sequences if rng is None else (sequences[index] for index in rng.permutation(len(sequences))):
            yield [sample for _, sample, _ in sequence]
        if not more:
            return
        size = min(2 * size, window)


def split_to_multiple(sequences: list[list[int]], multiple: int) -> list[list[int]]:
    """Splits sequences with several documents until their number is a multiple of `multiple`, so that all ranks get
    equally many; adds empty sequences at the end where there are too few documents.
    """
    sequences = list(sequences)
    fullest = sorted(range(len(sequences)), key=lambda index: (-len(sequences[index]), index))
    missing = -len(sequences) % multiple
    while missing:
        split = [index for index in fullest[:missing] if len(sequences[index]) > 1]
        if not split:
            return sequences + [[] for _ in range(missing)]
        for index in split:
            half = (len(sequences[index]) + 1) // 2
            sequences.append(sequences[index][half:])
            sequences[index] = sequences[index][:half]
        missing -= len(split)
        fullest = sorted(range(len(sequences)), key=lambda index: (-len(sequences[index]), index))
    return sequences


def packed_sequence(
    documents: Sequence[EncodedSample], capacity: int, pad_id: int, equal_samples: bool = True
) -> tuple[np.ndarray, ...]:
    """COLUMNS of one sequence, each (capacity,): input_mask float32, the others int32.

    Args:
        documents: those of the sequence, in order.
        capacity: tokens of the sequence, >= those of all documents.
        pad_id: id of the padding token.
        equal_samples: whether the weights make samples count alike in the loss; else tokens do.
    """
    input_ids = np.full(capacity, pad_id, np.int32)
    labels = np.full(capacity, IGNORED, np.int32)
    position_ids = np.empty(capacity, np.int32)
    document_ids = np.full(capacity, len(documents), np.int32)
    input_mask = np.zeros(capacity, np.float32)
    end = 0
    for index, document in enumerate(documents):
        start, end = end, end + len(document.input_ids)
        input_ids[start:end] = document.input_ids
        labels[start:end] = document.labels
        position_ids[start:end] = np.arange(end - start)
        document_ids[start:end] = index
        loss_mask = labels[start:end] != IGNORED
        input_mask[start:end] = loss_mask / np.float32(max(loss_mask.sum(), 1) if equal_samples else 1)
    position_ids[end:] = np.arange(capacity - end)
    return input_ids, labels, input_mask, position_ids, document_ids


class PackedSequences:
    """Packed sequences by index, planned or as an endless stream: the source of a `GeneratorDataset`.

    Args:
        tokens: the encoded documents.
        capacity: tokens of a sequence.
        pad_id: id of the padding token.
        equal_samples: whether samples count alike in the loss; else tokens do.
        truncations, padding: the TruncationCounter and PaddingCounter to add each sequence to.
    """

    def __init__(
        self, tokens: TokenizedSamples, capacity: int, pad_id: int, equal_samples: bool, truncations: Any, padding: Any
    ):
        self.tokens, self._capacity, self._pad_id = tokens, capacity, pad_id
        self._equal_samples, self._truncations, self._padding = equal_samples, truncations, padding

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        samples, documents = self.documents(index)
        for sample, document in zip(samples, documents):
            self._truncations.add(sample, document.tokens_before, document.tokens_after)
        self._padding.add(1, sum(len(document.input_ids) for document in documents), self._capacity)
        return self.columns(documents)

    def documents(self, index: int) -> tuple[list[int], list[EncodedSample]]:
        """The samples in a sequence, and their tokens."""
        raise NotImplementedError

    def columns(self, documents: list[EncodedSample]) -> tuple[np.ndarray, ...]:
        """The columns of a sequence with these documents; see `packed_sequence`."""
        return packed_sequence(documents, self._capacity, self._pad_id, self._equal_samples)


class PlannedSequences(PackedSequences):
    """Sequences that are planned before the first step, from the lengths of all samples.

    Args:
        plan: samples of each sequence.
        lengths: tokens of each sample, int32 (samples,), as in the plan.
        others: as PackedSequences.
    """

    def __init__(self, plan: list[list[int]], lengths: np.ndarray, *others: Any):
        super().__init__(*others)
        self._samples = np.fromiter(itertools.chain.from_iterable(plan), np.int64)
        self._ends = np.cumsum([len(sequence) for sequence in plan])
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._ends)

    def documents(self, index: int) -> tuple[list[int], list[EncodedSample]]:
        start = int(self._ends[index - 1]) if index else 0
        samples = self._samples[start : int(self._ends[index])].tolist()
        documents = [self.tokens[sample] for sample in samples]
        for sample, document in zip(samples, documents):
            if len(document.input_ids) != self._lengths[sample]:
                raise InputError(
                    f"{self.tokens.samples.location(sample)}: {len(document.input_ids)} tokens, and "
                    f"{self._lengths[sample]} when sequences were planned; has the file changed? Start again, with the "
                    "lengths in .glm32k_cache removed if they are damaged"
                )
        return samples, documents


class StreamedSequences(PackedSequences):
    """Sequences packed on demand: pass after pass over this rank's share of the documents.

    In pass p, rank r of n takes positions r, r + n, r + 2n, … of the order given by seed and p: each document is in one
    sequence of one rank per pass. Indices must ascend from 0; a smaller one restarts the stream. When a resumed run
    skips sequences, the documents in them are tokenized again.

    Args:
        window: see `pack`.
        max_documents: most documents of a sequence; None: no limit.
        order: shuffle, seed, num_shards, shard_id.
        threads: number of threads that tokenize ahead.
        others: as PackedSequences.
    """

    def __init__(self, window: int, max_documents: int | None, order: dict, threads: int, *others: Any):
        super().__init__(*others)
        self._window, self._max_documents, self._order, self._threads = window, max_documents, order, threads
        self._sequences, self._next, self._process = None, 0, None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return 1 << 40  # endless; MindSpore checks that indices are below it

    def documents(self, index: int) -> tuple[list[int], list[EncodedSample]]:
        with self._lock:
            if index < self._next or self._process != os.getpid():  # a forked worker does not inherit threads
                self._sequences, self._next, self._process = self._stream(), 0, os.getpid()
            while self._next < index:
                next(self._sequences)
                self._next += 1
            self._next += 1
            return next(self._sequences)

    def _stream(self):
        shuffle, seed, rank = self._order["shuffle"], self._order["seed"], self._order["shard_id"]
        for epoch in itertools.count():
            samples = sample_order(len(self.tokens), shuffle, seed, epoch)[rank :: self._order["num_shards"]]
            held, empty = {}, True
            stream, seeds = self._documents(samples, held), (seed, epoch, rank) if shuffle else None
            for packed in pack(stream, self._capacity, self._window, seeds, self._max_documents):
                yield packed, [held.pop(sample) for sample in packed]
                empty = False
            if empty:
                raise InputError("packing: every sample was left out by the truncation; see the log")

    def _documents(self, samples, held):
        """Yields (sample, number of tokens) in order, for `pack`; `held` keeps the documents that are not packed
        yet."""
        parts = (samples[start : start + _TOGETHER].tolist() for start in range(0, len(samples), _TOGETHER))
        for found in in_order(
            lambda part: [(sample, self.tokens[sample]) for sample in part], parts, self._threads, ahead=_AHEAD
        ):
            for sample, document in found:
                if len(document.input_ids):
                    held[sample] = document
                else:
                    self._truncations.add(sample, document.tokens_before, 0)
                yield sample, len(document.input_ids)


def plan_sequences(
    lengths: np.ndarray, capacity: int, window: int, order: dict, batch: int, max_documents: int | None = None
) -> list[list[int]]:
    """Packs all documents of an epoch; returns the samples of each sequence. InputError where every sample is dropped.

    Args:
        lengths: tokens of each sample, int32 (samples,); 0 where it is dropped.
        capacity: tokens of a sequence.
        window: see `pack`.
        order: shuffle, seed, num_shards, shard_id.
        batch: sequences of one rank's batch; the plan has a multiple of the global batch.
        max_documents: most documents of a sequence; None: no limit.
    """
    samples = sample_order(len(lengths), order["shuffle"], order["seed"], 0)
    documents = zip(samples.tolist(), lengths[samples].tolist())
    sequences = list(pack(documents, capacity, window, order["seed"] if order["shuffle"] else None, max_documents))
    if not sequences:
        raise InputError("packing: every sample was left out by the truncation; see the log")
    return split_to_multiple(sequences, batch * order["num_shards"])
