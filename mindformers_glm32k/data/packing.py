"""Packing: several documents into one row of fixed length, each with positions, an attention and a weight of its own.

    input_ids     a1 a2 a3 a4 b1 b2 b3 c1 c2 c3 c4 <pad> <pad>      three documents
    labels         ·  · a4  ·  · b3  ·  · c3 c4  ·    ·     ·       as `rows.py` makes them
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

import numpy as np

from mindformers_glm32k.data.encode import IGNORED

COLUMNS = ["input_ids", "labels", "input_mask", "position_ids", "document_ids"]  # the model's own order of inputs
FIRST_WINDOW = 2  # rows; the first ones are there soon
_HELD_BACK = 8  # the emptiest of so many rows of a window waits for the next one's short documents


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


def packed_row(documents, capacity, pad_id, equal_samples=True):
    """The columns of one row.

    Args:
        documents (Sequence[Row]): what lies in it; has input_ids and labels, int32 (length,).
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
