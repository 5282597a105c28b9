"""Three ways from tokens to batches: rows of fixed length, batches padded to their longest row, packed rows."""

import multiprocessing

import numpy as np
from mindspore.dataset import GeneratorDataset

from mindformers_glm32k.data.encode import IGNORED, padded
from mindformers_glm32k.data.packing import COLUMNS, StreamedSequences

UNPACKED_COLUMNS = ["input_ids", "labels"]


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


class FixedSequences:
    """Sample number -> input_ids, labels: int32 (row length,).

    Args:
        tokens (TokenizedSamples): rows without padding.
        length (int): row length.
        pad_id (int): the token of padding.
        cuts (TruncationCounter), padding (PaddingCounter | None): told of each row.
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


class RaggedSequences(FixedSequences):
    """As FixedSequences, without padding: that comes with the batch."""

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
    """Batches of FixedSequences over the loader's sample numbers."""
    return _mapped(loader, rows, config).batch(config.batch_size, drop_remainder=config.drop_remainder)


def ragged_batches(loader, rows, padding, config):
    """Batches of RaggedSequences, padded each to a length of its own."""
    return _mapped(loader, rows, config).batch(
        config.batch_size, drop_remainder=config.drop_remainder, per_batch_map=padding, input_columns=UNPACKED_COLUMNS
    )


def _mapped(loader, rows, config):
    dataset = loader.map(
        rows,
        input_columns=["sample"],
        output_columns=UNPACKED_COLUMNS,
        num_parallel_workers=config.num_parallel_workers,
        python_multiprocessing=config.python_multiprocessing,
    )
    return dataset.project(UNPACKED_COLUMNS)


def packed_batches(rows, sampler, config):
    """Batches of PlannedSequences or StreamedSequences at the places that the sampler names. A stream has one reader."""
    workers = 1 if isinstance(rows, StreamedSequences) else config.num_parallel_workers
    dataset = GeneratorDataset(
        rows,
        COLUMNS,
        sampler=sampler,
        num_parallel_workers=workers,
        python_multiprocessing=config.python_multiprocessing and workers > 1,
    )
    return dataset.batch(config.batch_size, drop_remainder=config.drop_remainder)


WORST = 5  # rows named in a report
_COUNTS = ("rows", "cut", "dropped", "tokens", "lost")


class TruncationReport:
    """What one pass over the data had to cut. Plain numbers: it can be pickled, and reports of parts be merged.

    Attributes:
        rows (int), cut (int), dropped (int): rows in all, cut ones, and ones left out as a whole.
        tokens (int), lost (int): tokens before any cut, and those that were cut or left out.
        worst (list[tuple[int, int, int]]): of the rows that lost most, at most WORST: tokens before, tokens after
            (0 when left out), number of the sample.
    """

    def __init__(self):
        self.rows = self.cut = self.dropped = self.tokens = self.lost = 0
        self.worst = []

    def add(self, sample, before, after):
        """Counts one row; returns whether it lost anything.

        Args:
            sample (int): its number.
            before (int): tokens of the whole row without a cut, answers included.
            after (int): tokens that are left of them; 0 for a row that is left out.
        """
        self.rows += 1
        self.tokens += before
        if after == before:
            return False
        self.cut += after > 0
        self.dropped += after == 0
        self.lost += max(before - after, 0)  # tokenizing a cut text again may give a token more
        self._keep_worst([(before, after, sample)])
        return True

    def merge(self, other):
        """Adds the counts of another report."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._keep_worst(other.worst)

    def _keep_worst(self, entries):
        # once each: the rows of an epoch may come while those of the one before are still counted
        by_loss = sorted({*self.worst, *entries}, key=lambda entry: (entry[1] - entry[0], entry[2]))
        self.worst = by_loss[:WORST]

    def text(self, place, truncation="middle"):
        """The report as one paragraph.

        Args:
            place (Callable[[int], str]): file and line of a sample's number.
            truncation (str): the way in which rows were cut.

        Returns:
            str
        """
        if not self.worst:
            return f"none of {self.rows} rows had to be cut"
        worst = "; ".join(
            f"{place(sample)}: " + (f"{before} to {after}" if after else f"{before}, left out")
            for before, after, sample in self.worst
        )
        return (
            f"of {self.rows} rows {self.cut} were cut (truncation: {truncation}) and {self.dropped} left out, "
            f"{self.lost} of {self.tokens} tokens ({100 * self.lost / self.tokens:.1f} %); most lost, in tokens: "
            f"{worst}"
        )

    def _numbers(self):
        """list[int] of a fixed length: all there is, for shared memory."""
        worst = [number for entry in self.worst for number in entry]
        return [getattr(self, name) for name in _COUNTS] + worst + [-1] * (3 * WORST - len(worst))

    @classmethod
    def _from_numbers(cls, numbers):
        report = cls()
        for name, value in zip(_COUNTS, numbers):
            setattr(report, name, value)
        entries = numbers[len(_COUNTS) :]
        report.worst = [tuple(entries[at : at + 3]) for at in range(0, len(entries), 3) if entries[at] >= 0]
        return report


class TruncationCounter:
    """Counts cuts; warns at the first one and sums up after every epoch's worth of rows.

    The counts lie in shared memory: worker processes that are forked from this one count together.

    Args:
        place (Callable[[int], str]): file and line of a sample's number.
        rows_per_epoch (int): rows after which to sum up and start again.
        log: has warning(format, …).
        truncation (str): the way in which rows are cut, for the message.
    """

    def __init__(self, place, rows_per_epoch, log, truncation="middle"):
        self._place, self._log, self._truncation = place, log, truncation
        self._rows_per_epoch = rows_per_epoch
        self._numbers = multiprocessing.Array("q", TruncationReport()._numbers())  # with its lock
        self._warned = multiprocessing.Value("b", 0)

    def add(self, sample, before, after):
        """Counts one row; see `TruncationReport.add`."""
        with self._numbers.get_lock():
            report = TruncationReport._from_numbers(list(self._numbers))
            lost = report.add(sample, before, after)
            first = lost and not self._warned.value
            self._warned.value = self._warned.value or first
            epoch_ends = report.rows >= self._rows_per_epoch
            self._numbers[:] = (TruncationReport() if epoch_ends else report)._numbers()
        if first:
            self._log.warning(
                "%s: %s (truncation: %s); a summary follows after each epoch",
                self._place(sample),
                f"cut from {before} to {after} tokens to fit the row"
                if after
                else f"left out, {before} tokens do not fit the row",
                self._truncation,
            )
        if epoch_ends and report.worst:
            self._log.warning("%s", report.text(self._place, self._truncation))
