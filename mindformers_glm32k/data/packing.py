"""Packing: several documents into one row of fixed length, each with positions, an attention and a weight of its own.

    input_ids     a1 a2 a3 a4 b1 b2 b3 c1 c2 c3 c4 <pad> <pad>      three documents
    labels         ·  · a4  ·  · b3  ·  · c3 c4  ·    ·     ·       as `encode.py` makes them
    input_mask     0  0  1  0  0  1  0  0 .5 .5  0    0     0       weight of each position in the loss
    position_ids   0  1  2  3  0  1  2  0  1  2  3    0     1       restart with each document
    document_ids   0  0  0  0  1  1  1  2  2  2  2    3     3       a token attends within its document only

The model's loss is sum(w * l) / sum(w), both sums taken over all rows of a step, on all devices. With w = 1 / n for
each of the n learnt tokens of a sample, sum(w * l) adds up the samples' mean losses and sum(w) counts the samples, so
the loss is

    (1 / samples) * sum over samples of (1 / n) * sum over its learnt tokens of l

the mean over the samples of the step: a sample counts alike whether its answer is long or short, in whichever row and
on whichever device it lies, and whatever lies beside it. LongAlign (Bai et al. 2024) makes samples count alike by
weights that hold the number of packs and of samples in the batch, which a data worker would have to know of all
devices; here the denominator that the model computes does that. A constant factor in w would cancel.
"""

import itertools
import os
import threading

import numpy as np

from mindformers_glm32k.data.encode import IGNORED
from mindformers_glm32k.data.loader import sample_order
from mindformers_glm32k.data.tokens import in_order
from mindformers_glm32k.errors import InputError

COLUMNS = ["input_ids", "labels", "input_mask", "position_ids", "document_ids"]  # the model's own order of inputs
FIRST_WINDOW = 2  # rows; the first ones are there soon
_HELD_BACK = 8  # the emptiest of so many rows of a window waits for the next one's short documents
_TOGETHER = 4  # documents of a stream that one call tokenizes
_AHEAD = 2  # calls that are begun before their documents are asked for


def first_fit(lengths, capacity, most=None):
    """Puts documents into rows, longest first, each into the first row that has room.

    Args:
        lengths (Sequence[int]): tokens of each document, 1 <= length <= capacity.
        capacity (int): tokens of a row.
        most (int | None): documents of a row; None: as many as it has room for.

    Returns:
        list[list[int]]: places in `lengths`, row by row.

    Raises:
        ValueError: a length out of bounds.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not lie between 1 and {capacity}")
    room = np.full(len(lengths), capacity, np.int64)
    rows, used = [], 0
    for place in np.argsort(-lengths, kind="stable"):
        fits = room[:used] >= lengths[place]
        row = int(fits.argmax()) if used else 0
        if not used or not fits[row]:
            row, used = used, used + 1
            rows.append([])
        rows[row].append(int(place))
        room[row] = 0 if len(rows[row]) == most else room[row] - lengths[place]
    return rows


def pack(documents, capacity, window, seed=None, most=None):
    """Packs a stream of documents, a window of them at a time; each is in one row and in one only.

    Windows grow from FIRST_WINDOW rows' worth of documents to `window` rows'. The emptiest eighth of a window's rows
    is taken apart again and packed with the next window.

    Args:
        documents (Iterable[tuple[int, int]]): number and length of each document, 0 <= length <= capacity; those of
            length 0 (left out by the truncation) are in no row.
        capacity (int): tokens of a row.
        window (int): the documents of so many full rows are sorted at once, >= 1; the more, the fuller the rows.
        seed: rows leave a window in an order that depends on it; None: those with the earliest documents first.
        most (int | None): documents of a row; None: as many as it has room for.

    Yields:
        list[int]: numbers of the documents of a row, in the stream's order.
    """
    documents = ((place, number, length) for place, (number, length) in enumerate(documents) if length)
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
        rows = [
            sorted(waiting[place] for place in row)
            for row in first_fit([length for _, _, length in waiting], capacity, most)
        ]
        waiting = []
        if more:
            rows.sort(key=lambda row: (-sum(length for _, _, length in row), row))
            kept = len(rows) - (-(-len(rows) // _HELD_BACK) if len(rows) > 1 else 0)
            waiting = [document for row in rows[kept:] for document in row]
            rows = rows[:kept]
        rows.sort()
        for row in rows if rng is None else (rows[place] for place in rng.permutation(len(rows))):
            yield [number for _, number, _ in row]
        if not more:
            return
        size = min(2 * size, window)


def split_to_multiple(rows, multiple):
    """Splits rows with several documents until there are a multiple of so many, so that no rank goes without one.

    Args:
        rows (list[list[int]]): rows of documents.
        multiple (int): >= 1.

    Returns:
        list[list[int]]: the rows; empty ones at the end where there are too few documents.
    """
    rows = list(rows)
    fullest = sorted(range(len(rows)), key=lambda place: (-len(rows[place]), place))
    missing = -len(rows) % multiple
    while missing:
        split = [place for place in fullest[:missing] if len(rows[place]) > 1]
        if not split:
            return rows + [[] for _ in range(missing)]
        for place in split:
            half = (len(rows[place]) + 1) // 2
            rows.append(rows[place][half:])
            rows[place] = rows[place][:half]
        missing -= len(split)
        fullest = sorted(range(len(rows)), key=lambda place: (-len(rows[place]), place))
    return rows


def packed_sequence(documents, capacity, pad_id, equal_samples=True):
    """The columns of one row.

    Args:
        documents (Sequence[EncodedSample]): what lies in it; has input_ids and labels, int32 (length,).
        capacity (int): tokens of the row, at least those of the documents together.
        pad_id (int): the token behind the last document.
        equal_samples (bool): weights that make samples count alike; False: tokens.

    Returns:
        tuple[np.ndarray, ...]: COLUMNS, each of shape (capacity,), int32, and input_mask float32.
    """
    input_ids = np.full(capacity, pad_id, np.int32)
    labels = np.full(capacity, IGNORED, np.int32)
    position_ids = np.empty(capacity, np.int32)
    document_ids = np.full(capacity, len(documents), np.int32)
    input_mask = np.zeros(capacity, np.float32)
    end = 0
    for number, document in enumerate(documents):
        start, end = end, end + len(document.input_ids)
        input_ids[start:end] = document.input_ids
        labels[start:end] = document.labels
        position_ids[start:end] = np.arange(end - start)
        document_ids[start:end] = number
        learnt = labels[start:end] != IGNORED
        input_mask[start:end] = learnt / np.float32(max(learnt.sum(), 1) if equal_samples else 1)
    position_ids[end:] = np.arange(capacity - end)
    return input_ids, labels, input_mask, position_ids, document_ids


class PackedSequences:
    """Rows of several documents by number, or without an end; what `GeneratorDataset` draws from.

    Args:
        tokens (TokenizedSamples): the documents.
        capacity (int): tokens of a row.
        pad_id (int): the token of padding.
        equal_samples (bool): whether samples count alike in the loss, or tokens.
        cuts (TruncationCounter), padding (PaddingCounter): told of each row.
    """

    def __init__(self, tokens, capacity, pad_id, equal_samples, cuts, padding):
        self.tokens, self._capacity, self._pad_id = tokens, capacity, pad_id
        self._equal_samples, self._cuts, self._padding = equal_samples, cuts, padding

    def __getitem__(self, place):
        samples, rows = self.documents(place)
        for sample, row in zip(samples, rows):
            self._cuts.add(sample, row.tokens_before, row.tokens_after)
        self._padding.add(1, sum(len(row.input_ids) for row in rows), self._capacity)
        return self.columns(rows)

    def documents(self, place):
        """tuple[list[int], list[EncodedSample]]: the samples in the row at a place, and their tokens."""
        raise NotImplementedError

    def columns(self, rows):
        """tuple[np.ndarray, ...]: the columns of a row with these documents (list[EncodedSample]); see `packed_sequence`."""
        return packed_sequence(rows, self._capacity, self._pad_id, self._equal_samples)


class PlannedSequences(PackedSequences):
    """Rows whose documents are known beforehand.

    Args:
        plan (list[list[int]]): samples of each row.
        lengths (np.ndarray): tokens of each sample, as they were planned.
        others: as PackedSequences.
    """

    def __init__(self, plan, lengths, *others):
        super().__init__(*others)
        self._samples = np.fromiter(itertools.chain.from_iterable(plan), np.int64)
        self._ends = np.cumsum([len(row) for row in plan])
        self._lengths = lengths

    def __len__(self):
        return len(self._ends)

    def documents(self, place):
        start = int(self._ends[place - 1]) if place else 0
        samples = self._samples[start : int(self._ends[place])].tolist()
        rows = [self.tokens[sample] for sample in samples]
        for sample, row in zip(samples, rows):
            if len(row.input_ids) != self._lengths[sample]:
                raise InputError(
                    f"{self.tokens.samples.location(sample)}: {len(row.input_ids)} tokens, and {self._lengths[sample]} "
                    "when rows were planned; has the file changed? Start again, with the lengths in .glm32k_cache "
                    "removed if they are damaged"
                )
        return samples, rows


class StreamedSequences(PackedSequences):
    """Rows packed while they are asked for: pass after pass over this rank's share of the documents.

    In pass p rank r of n has the places r, r + n, r + 2n, … of the order that seed and p make: each document is in one
    row of one rank, once in each pass. Rows are asked for by place, from 0 on; going back begins anew. When a resumed
    run skips rows, the documents in them are tokenized again.

    Args:
        window (int): the documents of so many full rows are packed together.
        most (int | None): documents of a row; None: as many as it has room for.
        shuffle (bool), seed (int): determine the order.
        shard_id (int), num_shards (int): this rank.
        threads (int): that tokenize ahead of what is asked for.
        others: as PackedSequences.
    """

    def __init__(self, window, most, shuffle, seed, shard_id, num_shards, threads, *others):
        super().__init__(*others)
        self._window, self._most, self._shuffle, self._seed = window, most, shuffle, seed
        self._shard_id, self._num_shards, self._threads = shard_id, num_shards, threads
        self._rows, self._next, self._process = None, 0, None
        self._lock = threading.Lock()

    def __len__(self):
        return 1 << 40  # MindSpore compares places with it; there is no end

    def documents(self, place):
        with self._lock:
            if place < self._next or self._process != os.getpid():  # a forked worker has no threads of its parent
                self._rows, self._next, self._process = self._stream(), 0, os.getpid()
            while self._next < place:
                next(self._rows)
                self._next += 1
            self._next += 1
            return next(self._rows)

    def _stream(self):
        for number in itertools.count():
            order = sample_order(len(self.tokens), self._shuffle, self._seed, number)
            held, empty = {}, True
            seed = (self._seed, number, self._shard_id) if self._shuffle else None
            for samples in pack(self._documents(order, held), self._capacity, self._window, seed, self._most):
                yield samples, [held.pop(sample) for sample in samples]
                empty = False
            if empty:
                raise InputError("packing: every sample was left out by the truncation; see the log")

    def _documents(self, order, held):
        """(sample, tokens) in order, for `pack`; what it waits with lies in `held`."""
        mine = order[self._shard_id :: self._num_shards]
        parts = (mine[at : at + _TOGETHER].tolist() for at in range(0, len(mine), _TOGETHER))
        for found in in_order(
            lambda samples: [(sample, self.tokens[sample]) for sample in samples], parts, self._threads, ahead=_AHEAD
        ):
            for sample, row in found:
                if len(row.input_ids):
                    held[sample] = row
                else:
                    self._cuts.add(sample, row.tokens_before, 0)
                yield sample, len(row.input_ids)


def plan_sequences(lengths, capacity, window, order, batch, most=None):
    """Packs all documents of an epoch.

    Args:
        lengths (np.ndarray): tokens of each sample, 0 where it is left out.
        capacity (int): tokens of a row.
        window (int): the documents of so many full rows are packed together.
        order (dict): shuffle, seed, num_shards, shard_id.
        batch (int): rows of a batch of one rank; the number of rows is made a multiple of those of all ranks.
        most (int | None): documents of a row; None: as many as it has room for.

    Returns:
        list[list[int]]: samples of each row.
    """
    samples = sample_order(len(lengths), order["shuffle"], order["seed"], 0)
    documents = zip(samples.tolist(), lengths[samples].tolist())
    rows = list(pack(documents, capacity, window, order["seed"] if order["shuffle"] else None, most))
    if not rows:
        raise InputError("packing: every sample was left out by the truncation; see the log")
    return split_to_multiple(rows, batch * order["num_shards"])
