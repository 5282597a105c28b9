"""The rows that a rehearsal is executed on."""

import numpy as np

from mindformers_glm32k.data.encode import IGNORED
from mindformers_glm32k.dryrun.compile.pool import read_rows


def make_rows(arguments, one, steps, config, work):
    """Rows of the configuration's data set, or random ones where its files are not there.

    Args:
        arguments (list[str]): run_mindformer's, of one device.
        one (Rehearsed): its program.
        steps (int): how many batches.
        config (dict): merged configuration.
        work (pathlib.Path): for the log.

    Returns:
        tuple[dict[str, numpy.ndarray], str]: by column (steps, rows, …); and in words where they come from.
    """
    words = int(config["model"]["model_config"]["padded_vocab_size"])
    found = read_rows(arguments, steps, work)
    if found is None:
        return random_rows(
            one.columns, one.inputs[0], steps, words
        ), "random tokens, rows with different numbers of labels (the YAML's data or vocabulary are not there)"
    note = "the YAML's data set"
    if any(found[name].max() >= words for name in ("input_ids", "labels")):
        note += f", tokens folded into the {words} words of the small model"
        found["input_ids"] = found["input_ids"] % words
        found["labels"] = np.where(found["labels"] == IGNORED, IGNORED, found["labels"] % words).astype(np.int32)
    return found, note


def random_rows(columns, shape, steps, words, seed=7):
    """Rows of random tokens, each with a prompt of another length.

    Args:
        columns (list[str]): wanted: input_ids, labels, input_mask, position_ids, document_ids.
        shape (list[int]): rows of a step, tokens of a row.
        steps (int): how many batches.
        words (int): size of the vocabulary.
        seed (int): of the random numbers.

    Returns:
        dict[str, numpy.ndarray]: by column (steps, rows, tokens).
    """
    rng = np.random.default_rng(seed)
    rows, length = shape
    ids = rng.integers(3, words, (steps, rows, length)).astype(np.int32)
    labels = np.roll(ids, -1, axis=2)
    prompts = rng.integers(0, length - 4, (steps, rows, 1))
    position = np.broadcast_to(np.arange(length), ids.shape)
    labels = np.where((position < prompts) | (position == length - 1), IGNORED, labels).astype(np.int32)
    half = length // 2
    values = {
        "input_ids": ids,
        "labels": labels,
        "input_mask": (labels != IGNORED).astype(np.float32),
        "position_ids": (position % half).astype(np.int32),
        "document_ids": (position // half).astype(np.int32),
    }
    return {name: values[name] for name in columns}


def input_arrays(rehearsed, rows, step, rank, layout):
    """A rank's inputs of one step: the whole batch, or its data parallel part where the program was compiled for that.

    Args:
        rehearsed (Rehearsed): the program and what it was compiled for.
        rows (dict[str, numpy.ndarray]): by column (steps, rows, …).
        step (int), rank (int): which.
        layout (Layout): of the run.

    Returns:
        list[numpy.ndarray]
    """
    arrays = []
    for name, spec in zip(rehearsed.columns, rehearsed.program.inputs.values()):
        value = rows[name][step]
        parts = len(value) // spec.shape[0]
        if parts > 1:
            in_stage = rank % (layout.world // layout.stages)
            index = in_stage // (layout.world // layout.stages // layout.data_parallel)
            value = value[index * spec.shape[0] : (index + 1) * spec.shape[0]]
        arrays.append(np.ascontiguousarray(value))
    return arrays
