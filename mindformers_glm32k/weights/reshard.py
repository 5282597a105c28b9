"""Few tensors at a time: what is cut or joined together, so that memory and disk do not grow with the model."""

import shutil

from mindformers_glm32k.weights.dtypes import item_size
from mindformers_glm32k.weights.formats.ckpt import frame, read_ckpt
from mindformers_glm32k.weights.tensors import element_count

PIECE_BYTES = 512 << 20  # of all ranks' parts together; MindSpore needs about four times as much memory
_CHUNK_BYTES = 1 << 20  # divides the 512 MiB at which a .ckpt breaks a tensor


def stored_bytes(shape, dtype):
    """Bytes of the values of a tensor."""
    return element_count(shape) * item_size(dtype)


def pack(costs, limit=None):
    """Deals tensors into pieces, in order.

    Args:
        costs (dict[str, int]): name -> bytes of all ranks' parts.
        limit (int | None): bytes of a piece, unless a single tensor has more; PIECE_BYTES by default.

    Returns:
        list[list[str]]
    """
    limit = PIECE_BYTES if limit is None else limit
    pieces, filled = [[]], 0
    for name, cost in costs.items():
        if pieces[-1] and filled + cost > limit:
            pieces.append([])
            filled = 0
        pieces[-1].append(name)
        filled += cost
    return pieces


def write_piece(path, tensors):
    """Copies tensors into a small .ckpt.

    Args:
        path (pathlib.Path): the file; its folder is made.
        tensors (list[StoredTensor]): where they lie.
    """
    path.parent.mkdir(parents=True)
    with open(path, "wb") as handle:
        for tensor in tensors:
            start = 0
            for before, length in frame(tensor.name, tensor.shape, tensor.dtype):
                handle.write(before)
                for values in tensor.chunks(_CHUNK_BYTES, start, start + length):
                    handle.write(memoryview(values).cast("B"))
                start += length


def cut(transformer, work, tensors, strategy):
    """Cuts whole tensors with MindSpore.

    Args:
        transformer (transform.Transformer): MindSpore's process.
        work (pathlib.Path): folder for this piece; whoever calls removes it.
        tensors (list[StoredTensor]): whole.
        strategy (pathlib.Path): the stage's strategy file.

    Returns:
        dict[int, pathlib.Path]: by rank in the stage, the .ckpt with its parts.
    """
    shutil.rmtree(work, ignore_errors=True)
    write_piece(work / "whole" / "rank_0" / "whole.ckpt", tensors)
    transformer.run(work / "whole", work / "parts", cut_by=strategy)
    return {int(path.parent.name[len("rank_") :]): path for path in (work / "parts").glob("rank_*/*.ckpt")}


def join(transformer, work, parts, strategy):
    """Joins the parts of a stage's ranks with MindSpore.

    Args:
        transformer (transform.Transformer): MindSpore's process.
        work (pathlib.Path): folder for this piece; whoever calls removes it.
        parts (list[list[StoredTensor]]): by rank in the stage.
        strategy (pathlib.Path): the stage's strategy file.

    Returns:
        dict[str, StoredTensor]: the whole tensors.
    """
    shutil.rmtree(work, ignore_errors=True)
    for rank, tensors in enumerate(parts):
        write_piece(work / "parts" / f"rank_{rank}" / "parts.ckpt", tensors)
    transformer.run(work / "parts", work / "whole", joined_from=strategy)
    return {tensor.name: tensor for path in (work / "whole").glob("rank_*/*.ckpt") for tensor in read_ckpt(path)}
