"""The values of a merge: parts joined by MindSpore and compared with every rank's file, one whole tensor at a time."""

from itertools import groupby

import numpy as np

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights import reshard as pieces
from mindformers_glm32k.weights.dtypes import cast
from mindformers_glm32k.weights.merge_plan import FROZEN
from mindformers_glm32k.weights.strategy import slice_of, write_stage
from mindformers_glm32k.weights.tensors import same_bits


def joined_values(plan, names, transformer, work):
    """Joins parameters.

    Args:
        plan (merge_plan.MergePlan): checked.
        names (list[str]): which, in the order wanted.
        transformer (transform.Transformer): MindSpore's process.
        work (pathlib.Path): folder for what lies between.

    Yields:
        tuple[str, numpy.ndarray]: the whole tensor, in the carrier of its dtype.

    Raises:
        InputError: copies that should be equal differ, named with their files.
        transform.TransformFailed: MindSpore failed.
    """
    for (stage, is_cut), group in groupby(
        names, lambda name: (plan.joined[name].stage, plan.joined[name].layout is not None)
    ):
        ranks = plan.ranks(stage)
        if not is_cut:
            for name in group:
                yield name, _equal_copies(plan, name, ranks)
            continue
        costs = {
            name: pieces.stored_bytes(part.shape, part.dtype) * len(ranks)
            for name, part in ((name, plan.files.tensors[ranks[0]][name]) for name in group)
        }
        if not (work / f"stage_{stage}.ckpt").exists():
            write_stage(plan.strategy, stage, work / f"stage_{stage}.ckpt")
        for piece in pieces.pack(costs):
            parts = [[plan.files.tensors[rank][name] for name in piece] for rank in ranks]
            found = pieces.join(transformer, work / "piece", parts, work / f"stage_{stage}.ckpt")
            for name in piece:
                whole = found[name].load() if name in found else np.empty(0)
                _compare(plan, name, whole, ranks)
                yield name, whole


def _compare(plan, name, whole, ranks):
    """Cuts a joined tensor again and compares the parts with the files."""
    joined = plan.joined[name]
    if whole.shape != joined.whole.shape:
        raise InputError(
            f"key {name!r}: MindSpore joined it to {whole.shape}, the strategy gives "
            f"{joined.whole.shape}; check that the strategy files are those of this run"
        )
    agreeing, differing = {}, []
    for rank in ranks:
        tensor = plan.files.tensors[rank][name]
        position = joined.layout.position(rank - ranks[0])
        if same_bits(tensor.load(), slice_of(whole, joined.layout, rank - ranks[0])):
            agreeing.setdefault(position, tensor.file)
        else:
            differing.append((position, tensor.file))
    for position, file in differing:
        if position in agreeing:
            raise InputError(
                f"{file}: key {name!r} is a copy of what {agreeing[position]} holds, but has other "
                "values; one of the two files is damaged or of another run"
            )
    if differing:
        raise InputError(
            f"{differing[0][1]}: key {name!r} has other values than its part of the joined tensor; check "
            "that the strategy files are those of this run"
        )


def _equal_copies(plan, name, ranks):
    tensors = [plan.files.tensors[rank][name] for rank in ranks]
    whole = tensors[0].load()
    for tensor in tensors[1:]:
        if not same_bits(tensor.load(), whole):
            why = (
                FROZEN
                if plan.strategy
                else (
                    "if the parameters are cut, give --src_ckpt_strategy or --config; if "
                    "not, one of the files is damaged or of another run"
                )
            )
            raise InputError(f"{tensor.file}: key {name!r} has other values than in {tensors[0].file}; {why}")
    return whole


def check_frozen(plan, base, name):
    """Checks that the ranks trained on this base: their weights are parts of its.

    Args:
        plan (merge_plan.MergePlan): of the rank files.
        base (dict[str, StoredTensor]): the whole base.
        name (str): a weight in both.

    Raises:
        InputError: a rank holds something else.
    """
    joined, whole = plan.joined[name], base[name].load()
    for rank in plan.ranks(joined.stage):
        tensor = plan.files.tensors[rank][name]
        part = tensor.load()
        expected = cast(whole, base[name].dtype, tensor.dtype)
        if not any(np.array_equal(part, expected[where]) for where in _blocks(expected.shape, part.shape)):
            raise InputError(
                f"{tensor.file}: key {name!r} is no part of it in {base[name].file}: the adapters were "
                "trained on another base; give the checkpoint that the run loaded"
            )


def _blocks(whole, part):
    """Yields the index expressions of all aligned parts of a shape; none where it cannot be cut so."""
    if len(whole) != len(part) or any(size % piece for size, piece in zip(whole, part)):
        return
    counts = [size // piece for size, piece in zip(whole, part)]
    for index in np.ndindex(*counts):
        yield tuple(slice(i * piece, (i + 1) * piece) for i, piece in zip(index, part))
