"""Packed rows by number: planned for a whole epoch, or packed while they are asked for."""

import itertools
import os
import threading

import numpy as np

from mindformers_glm32k.data.packing import pack, packed_row, split_to_multiple
from mindformers_glm32k.data.sampler import sample_order
from mindformers_glm32k.data.tokens import in_order
from mindformers_glm32k.errors import InputError

_TOGETHER = 4  # documents of a stream that one call tokenizes
_AHEAD = 2  # calls that are begun before their documents are asked for


class PackedRows:
    """Rows of several documents by number, or without an end; what `GeneratorDataset` draws from.

    Args:
        tokens (TokenizedSamples): the documents.
        capacity (int): tokens of a row.
        pad_id (int): the token of padding.
        equal_samples (bool): whether samples count alike in the loss, or tokens.
        cuts (CutCounter), padding (PaddingCounter): told of each row.
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
        """tuple[list[int], list[Row]]: the samples in the row at a place, and their tokens."""
        raise NotImplementedError

    def columns(self, rows):
        """tuple[np.ndarray, ...]: the columns of a row with these documents (list[Row]); see `packed_row`."""
        return packed_row(rows, self._capacity, self._pad_id, self._equal_samples)


class PlannedRows(PackedRows):
    """Rows whose documents are known beforehand.

    Args:
        plan (list[list[int]]): samples of each row.
        others: as PackedRows.
    """

    def __init__(self, plan, *others):
        super().__init__(*others)
        self._samples = np.fromiter(itertools.chain.from_iterable(plan), np.int64)
        self._ends = np.cumsum([len(row) for row in plan])

    def __len__(self):
        return len(self._ends)

    def documents(self, place):
        start = int(self._ends[place - 1]) if place else 0
        samples = self._samples[start : int(self._ends[place])].tolist()
        return samples, [self.tokens[sample] for sample in samples]


class StreamedRows(PackedRows):
    """Rows packed while they are asked for: pass after pass over this rank's share of the documents.

    In pass p rank r of n has the places r, r + n, r + 2n, … of the order that seed and p make: each document is in one
    row of one rank, once in each pass. Rows are asked for by place, from 0 on; going back begins anew. When a resumed
    run skips rows, the documents in them are looked up in the token cache or, without one, tokenized again.

    Args:
        window (int): the documents of so many full rows are packed together.
        most (int | None): documents of a row; None: as many as it has room for.
        shuffle (bool), seed (int): determine the order.
        shard_id (int), num_shards (int): this rank.
        threads (int): that tokenize ahead of what is asked for.
        others: as PackedRows.
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
            samples, rows = next(self._rows)
        return samples, [self.tokens[sample] if row is None else row for sample, row in zip(samples, rows)]

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
        """(sample, tokens) in order. Rows that a cache has are not kept in memory meanwhile."""
        cache = self.tokens.cache

        def look_up(samples):
            lengths = cache.lengths_of(samples) if cache else np.full(len(samples), -1)
            found = []
            for sample, length in zip(samples.tolist(), lengths.tolist()):
                row = self.tokens[sample] if length < 0 else None
                found.append((sample, length if row is None else len(row.input_ids), None if cache else row))
            return found

        mine = order[self._shard_id :: self._num_shards]
        parts = (mine[at : at + _TOGETHER] for at in range(0, len(mine), _TOGETHER))
        for found in in_order(look_up, parts, self._threads, ahead=_AHEAD):
            for sample, length, row in found:
                if length:
                    held[sample] = row
                else:
                    self._cuts.add(sample, self.tokens[sample].tokens_before, 0)
                yield sample, length


def plan_rows(tokens, capacity, window, order, batch, threads, most=None):
    """Packs all documents, for which all lengths are needed.

    Args:
        tokens (TokenizedSamples): the documents.
        capacity (int): tokens of a row.
        window (int): the documents of so many full rows are packed together.
        order (dict): shuffle, seed, num_shards, shard_id.
        batch (int): rows of a batch of one rank; the number of rows is made a multiple of those of all ranks.
        threads (int): that tokenize.
        most (int | None): documents of a row; None: as many as it has room for.

    Returns:
        tuple[list[list[int]], np.ndarray]: samples of each row; tokens of each sample, 0 where it is left out.
    """
    shards = order["num_shards"]
    lengths = tokens.all_lengths(threads, start=len(tokens) * order["shard_id"] // shards)
    samples = sample_order(len(tokens), order["shuffle"], order["seed"], 0)
    rows = list(
        pack(
            zip(samples.tolist(), lengths[samples].tolist()),
            capacity,
            window,
            order["seed"] if order["shuffle"] else None,
            most,
        )
    )
    if not rows:
        raise InputError("packing: every sample was left out by the truncation; see the log")
    return split_to_multiple(rows, batch * shards), lengths
