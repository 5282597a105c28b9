"""Three ways from tokens to batches: rows of fixed length, batches padded to their longest row, packed rows."""

import multiprocessing

import numpy as np
from mindspore.dataset import GeneratorDataset

from mindformers_glm32k.data.dataset_config import ROW_COLUMNS
from mindformers_glm32k.data.encode import IGNORED, padded
from mindformers_glm32k.data.packed_rows import StreamedRows
from mindformers_glm32k.data.packing import COLUMNS


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
            self._log.info(
                "padding: %.1f %% of the positions of %d rows (%d tokens in %d positions)",
                100 * (1 - tokens / positions),
                rows,
                tokens,
                positions,
            )


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
        return (
            [padded(ids, length, self._pad_id) for ids in input_ids],
            [padded(row, length, IGNORED) for row in labels],
        )


def fixed_batches(loader, rows, config):
    """Batches of FixedRows over the loader's sample numbers."""
    return _mapped(loader, rows, config).batch(config.batch_size, drop_remainder=config.drop_remainder)


def ragged_batches(loader, rows, padding, config):
    """Batches of RaggedRows, padded each to a length of its own."""
    return _mapped(loader, rows, config).batch(
        config.batch_size, drop_remainder=config.drop_remainder, per_batch_map=padding, input_columns=ROW_COLUMNS
    )


def _mapped(loader, rows, config):
    dataset = loader.map(
        rows,
        input_columns=["sample"],
        output_columns=ROW_COLUMNS,
        num_parallel_workers=config.num_parallel_workers,
        python_multiprocessing=config.python_multiprocessing,
    )
    return dataset.project(ROW_COLUMNS)


def packed_batches(rows, sampler, config):
    """Batches of PlannedRows or StreamedRows at the places that the sampler names. A stream has one reader."""
    workers = 1 if isinstance(rows, StreamedRows) else config.num_parallel_workers
    dataset = GeneratorDataset(
        rows,
        COLUMNS,
        sampler=sampler,
        num_parallel_workers=workers,
        python_multiprocessing=config.python_multiprocessing and workers > 1,
    )
    return dataset.batch(config.batch_size, drop_remainder=config.drop_remainder)
