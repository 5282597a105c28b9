"""Three ways from tokens to batches: rows of fixed length, batches padded to their longest row, packed rows."""
import itertools
import multiprocessing
import threading

import numpy as np
from mindspore.dataset import GeneratorDataset

from mindformers_glm32k.data.order import EpochSampler, StreamSampler, sample_order
from mindformers_glm32k.data.packing import COLUMNS, pack, packed_row, split_to_multiple
from mindformers_glm32k.data.rows import IGNORED
from mindformers_glm32k.data.tokens import in_order
from mindformers_glm32k.errors import InputError

ROW_COLUMNS = ["input_ids", "labels"]


class PaddingCounter:
    """Counts padding in all worker threads and processes; says the share of it after each epoch's worth of rows.

    Args:
        rows_per_epoch (int): rows of this rank.
        log: has info(format, …).
    """

    def __init__(self, rows_per_epoch, log):
        self._rows_per_epoch, self._log = rows_per_epoch, log
        self._counts = multiprocessing.Array("q", 3)  # rows, tokens, positions; with its lock

    def add(self, rows, tokens, positions):
        """Counts rows (int) that have so many positions (int) in all, and tokens (int) in them."""
        with self._counts.get_lock():
            for place, value in enumerate((rows, tokens, positions)):
                self._counts[place] += value
            rows, tokens, positions = self._counts
            ends = rows >= self._rows_per_epoch
            if ends:
                self._counts[:] = [0, 0, 0]
        if ends:
            self._log.info("padding: %.1f %% of the positions of %d rows (%d tokens in %d positions)",
                           100 * (1 - tokens / positions), rows, tokens, positions)


class FixedRows:
    """Sample number -> input_ids, labels: int32 (row length,).

    Args:
        tokens (TokenizedSamples): rows without padding.
        length (int): row length.
        pad_id (int): the token of padding.
        cuts (CutCounter), padding (PaddingCounter | None): told of each row.
    """

    def __init__(self, tokens, length, pad_id, cuts, padding):
        self._tokens, self._length, self._pad_id = tokens, length, pad_id
        self._cuts, self._padding = cuts, padding

    def __call__(self, sample):
        sample = int(np.asarray(sample).item())
        row = self._tokens[sample]
        self._cuts.add(sample, row.tokens_before, row.tokens_after)
        return self._columns(row)

    def _columns(self, row):
        self._padding.add(1, len(row.input_ids), self._length)
        return padded(row.input_ids, self._length, self._pad_id), padded(row.labels, self._length, IGNORED)


class RaggedRows(FixedRows):
    """As FixedRows, without padding: that comes with the batch."""

    def _columns(self, row):
        return row.input_ids, row.labels


class BatchPadding:
    """Pads the rows of a batch to its longest one, rounded up.

    Args:
        multiple (int): row lengths are multiples of it ...
        length (int): ... and at most this.
        pad_id (int): the token of padding.
        padding (PaddingCounter): told of each batch.
    """

    def __init__(self, multiple, length, pad_id, padding):
        self._multiple, self._length, self._pad_id, self._padding = multiple, length, pad_id, padding

    def __call__(self, input_ids, labels, _):
        longest = max(1, max(len(ids) for ids in input_ids))
        length = min(-(-longest // self._multiple) * self._multiple, self._length)
        self._padding.add(len(input_ids), sum(len(ids) for ids in input_ids), length * len(input_ids))
        return ([padded(ids, length, self._pad_id) for ids in input_ids],
                [padded(row, length, IGNORED) for row in labels])


def padded(values, length, filler):
    """np.ndarray: int32 (length,), the values with the filler behind them."""
    row = np.full(length, filler, np.int32)
    row[:len(values)] = values
    return row


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

    def columns(self, samples, rows):
        """The columns of the row that holds these samples (list[int]), whose tokens are `rows` (list[Row])."""
        for sample, row in zip(samples, rows):
            self._cuts.add(sample, row.tokens_before, row.tokens_after)
        self._padding.add(1, sum(len(row.input_ids) for row in rows), self._capacity)
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

    def __getitem__(self, row):
        start = int(self._ends[row - 1]) if row else 0
        samples = self._samples[start:int(self._ends[row])].tolist()
        return self.columns(samples, [self.tokens[sample] for sample in samples])


class StreamedRows(PackedRows):
    """Rows packed while they are asked for: pass after pass over this rank's share of the documents.

    In pass p rank r of n has the places r, r + n, r + 2n, … of the order that seed and p make: each document is in one
    row of one rank, once in each pass. Rows are asked for by place, from 0 on; going back begins anew. When a resumed
    run skips rows, the documents in them are looked up in the token cache or, without one, tokenized again.

    Args:
        window (int): documents that are packed together.
        shuffle (bool), seed (int): determine the order.
        shard_id (int), num_shards (int): this rank.
        threads (int): that tokenize ahead of what is asked for.
        others: as PackedRows.
    """

    def __init__(self, window, shuffle, seed, shard_id, num_shards, threads, *others):
        super().__init__(*others)
        self._window, self._shuffle, self._seed = window, shuffle, seed
        self._shard_id, self._num_shards, self._threads = shard_id, num_shards, threads
        self._rows, self._next = None, 0
        self._lock = threading.Lock()

    def __len__(self):
        return 1 << 40  # MindSpore compares places with it; there is no end

    def __getitem__(self, place):
        with self._lock:
            if self._rows is None or place < self._next:
                self._rows, self._next = self._stream(), 0
            while self._next < place:
                next(self._rows)
                self._next += 1
            self._next += 1
            samples, rows = next(self._rows)
        return self.columns(samples, [self.tokens[sample] if row is None else row
                                      for sample, row in zip(samples, rows)])

    def _stream(self):
        for number in itertools.count():
            order = sample_order(len(self.tokens), self._shuffle, self._seed, number)
            held, empty = {}, True
            seed = (self._seed, number, self._shard_id) if self._shuffle else None
            for samples in pack(self._documents(order, held), self._capacity, self._window, seed):
                yield samples, [held.pop(sample) for sample in samples]
                empty = False
            if empty:
                raise InputError("packing: every sample was left out by the truncation; see the log")

    def _documents(self, order, held):
        """(sample, tokens) in order. Rows that a cache has are not kept in memory meanwhile."""
        def tokenize(sample):
            row = self.tokens[sample]
            return sample, len(row.input_ids), None if self.tokens.cache else row

        known = self.tokens.cache.lengths_of if self.tokens.cache else None

        def look_up(sample):
            length = int(known(np.array([sample]))[0]) if known else -1
            return tokenize(sample) if length < 0 else (sample, length, None)

        mine = map(int, order[self._shard_id::self._num_shards])
        for sample, length, row in in_order(look_up, mine, self._threads, ahead=self._window):
            if length:
                held[sample] = row
            else:
                dropped = self.tokens[sample] if row is None else row
                self._cuts.add(sample, dropped.tokens_before, 0)
            yield sample, length


def fixed_batches(loader, rows, config):
    """Batches of FixedRows over the loader's sample numbers."""
    return _mapped(loader, rows, config).batch(config.batch_size, drop_remainder=config.drop_remainder)


def ragged_batches(loader, rows, padding, config):
    """Batches of RaggedRows, padded each to a length of its own."""
    return _mapped(loader, rows, config).batch(config.batch_size, drop_remainder=config.drop_remainder,
                                               per_batch_map=padding, input_columns=ROW_COLUMNS)


def _mapped(loader, rows, config):
    dataset = loader.map(rows, input_columns=["sample"], output_columns=ROW_COLUMNS,
                         num_parallel_workers=config.num_parallel_workers,
                         python_multiprocessing=config.python_multiprocessing)
    return dataset.project(ROW_COLUMNS)


def planned_batches(rows, order, config):
    """Batches of PlannedRows.

    Args:
        rows (PlannedRows): the rows.
        order (dict): shuffle, seed, num_shards, shard_id.
        config: batch_size, drop_remainder, num_parallel_workers, python_multiprocessing.
    """
    dataset = GeneratorDataset(rows, COLUMNS, sampler=EpochSampler(len(rows), **order),
                               num_parallel_workers=config.num_parallel_workers,
                               python_multiprocessing=config.python_multiprocessing)
    return dataset.batch(config.batch_size, drop_remainder=config.drop_remainder)


def streamed_batches(rows, rows_per_epoch, config):
    """Batches of StreamedRows; `rows_per_epoch` (int) are those of one rank."""
    dataset = GeneratorDataset(rows, COLUMNS, sampler=StreamSampler(rows_per_epoch), python_multiprocessing=False)
    return dataset.batch(config.batch_size, drop_remainder=config.drop_remainder)


def plan_rows(tokens, capacity, window, order, batch, threads):
    """Packs all documents, for which all lengths are needed.

    Args:
        tokens (TokenizedSamples): the documents.
        capacity (int): tokens of a row.
        window (int): documents that are packed together.
        order (dict): shuffle, seed, num_shards, shard_id.
        batch (int): rows of a batch of one rank; the number of rows is made a multiple of those of all ranks.
        threads (int): that tokenize.

    Returns:
        tuple[list[list[int]], np.ndarray]: samples of each row; tokens of each sample, 0 where it is left out.
    """
    shards = order["num_shards"]
    lengths = tokens.all_lengths(threads, start=len(tokens) * order["shard_id"] // shards)
    samples = sample_order(len(tokens), order["shuffle"], order["seed"], 0)
    rows = list(pack(zip(samples.tolist(), lengths[samples].tolist()), capacity, window,
                     order["seed"] if order["shuffle"] else None))
    if not rows:
        raise InputError("packing: every sample was left out by the truncation; see the log")
    return split_to_multiple(rows, batch * shards), lengths
