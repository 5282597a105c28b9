"""MindSpore's own transform_checkpoints for few tensors at a time, so that memory and disk do not grow with the model.

`python -m mindformers.tools.transform_ckpt` holds the shards of all ranks in memory, several times over. Here a process
that stays alive calls the same function on one chunk of the tensors after the other, one order per line of input.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mindformers_glm32k.errors import CommandFailed
from mindformers_glm32k.weights.formats import ckpt_frame, read_ckpt
from mindformers_glm32k.weights.tensors import StoredTensor

CHUNK_BYTES = 512 << 20  # of all ranks' shards together; MindSpore needs about four times as much memory
_READ_BYTES = 1 << 20  # divides the 512 MiB slices of a tensor in a .ckpt
_REPLY = "transformed: "


class TransformFailed(CommandFailed):
    """MindSpore could not split or merge; the message quotes its error."""


class Transformer:
    """MindSpore's process; it starts with the first order. What it prints goes to the file `log`."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process = None

    def __enter__(self) -> Transformer:
        return self

    def _start(self):
        with open(self._log, "wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mindformers_glm32k.weights.reshard"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, "GLOG_v": "3"},
            )

    def __exit__(self, *_) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def run(self, source: Path, target: Path, split_by: Path | None = None, merged_from: Path | None = None) -> None:
        """Splits whole tensors for the ranks of a stage, or merges the ranks' shards.

        Args:
            source: folder with rank_0/*.ckpt, or rank_N/*.ckpt of all ranks.
            target: folder to write rank_N/checkpoint_N.ckpt to.
            split_by, merged_from: the stage's strategy file, one of the two.

        Raises:
            TransformFailed: MindSpore raised an error or died.
        """
        if self._process is None:
            self._start()
        order = [source, target, "checkpoint_", merged_from, split_by]
        try:
            self._process.stdin.write(json.dumps([entry and str(entry) for entry in order]) + "\n")
            self._process.stdin.flush()
            reply = ""
            for line in self._process.stdout:
                if line.startswith(_REPLY):
                    reply = line[len(_REPLY) :].strip()
                    break
        except BrokenPipeError:
            reply = ""
        if reply != "done":
            self._process.kill()
            end = self._log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
            raise TransformFailed(
                f"MindSpore's transform_checkpoints failed: {reply or 'the process ended'}"
                + (f"\n{end}" if end else "")
            )


def chunks_of(costs: Mapping[str, int]) -> list[list[str]]:
    """Groups tensors (name -> bytes of all ranks' shards), in order, into chunks of at most CHUNK_BYTES, or of a single
    larger tensor."""
    chunks, filled = [[]], 0
    for name, cost in costs.items():
        if chunks[-1] and filled + cost > CHUNK_BYTES:
            chunks.append([])
            filled = 0
        chunks[-1].append(name)
        filled += cost
    return chunks


def split_chunk(
    transformer: Transformer, work: Path, tensors: Sequence[StoredTensor], strategy: Path
) -> dict[int, Path]:
    """Splits whole tensors with MindSpore, in the folder `work`, by the stage's strategy file.

    Returns:
        By rank in the stage, the .ckpt with its shards.
    """
    shutil.rmtree(work, ignore_errors=True)
    _write_chunk(work / "whole" / "rank_0" / "whole.ckpt", tensors)
    transformer.run(work / "whole", work / "shards", split_by=strategy)
    return {int(path.parent.name[len("rank_") :]): path for path in (work / "shards").glob("rank_*/*.ckpt")}


def merge_chunk(
    transformer: Transformer, work: Path, shards: Sequence[Sequence[StoredTensor]], strategy: Path
) -> dict[str, StoredTensor]:
    """Merges shards, by rank in the stage, with MindSpore, in the folder `work`; returns the whole tensors."""
    shutil.rmtree(work, ignore_errors=True)
    for rank, tensors in enumerate(shards):
        _write_chunk(work / "shards" / f"rank_{rank}" / "shards.ckpt", tensors)
    transformer.run(work / "shards", work / "whole", merged_from=strategy)
    return {tensor.name: tensor for path in (work / "whole").glob("rank_*/*.ckpt") for tensor in read_ckpt(path)}


def _write_chunk(path, tensors):
    """Copies tensors into a small .ckpt; its folder is made."""
    path.parent.mkdir(parents=True)
    with open(path, "wb") as handle:
        for tensor in tensors:
            start = 0
            for before, length in ckpt_frame(*tensor.spec):
                handle.write(before)
                for values in tensor.chunks(_READ_BYTES, start, start + length):
                    handle.write(memoryview(values).cast("B"))
                start += length


def main() -> None:
    """Reads orders from standard input until it is closed."""
    import mindspore

    for line in sys.stdin:
        try:
            mindspore.transform_checkpoints(*json.loads(line))
            reply = "done"
        except Exception as error:  # any error is reported to the process that gave the order
            reply = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(_REPLY + reply, flush=True)


if __name__ == "__main__":
    main()
