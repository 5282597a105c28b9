"""The calls of cached generation on CPU: a chunk of one prompt's tokens, or the newest token of every prompt.

Shapes are static, which is faster than open ones, and how much of the cache holds tokens is an input: a few programs
(one per chunk size, one per number of prompts) serve every length. What fills up a chunk goes into a spare block.

Legend: see paged_attention; H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn, ops

from mindformers_glm32k.config import GLM32KConfig

CHUNKS = (512, 128)  # tokens of a prefill call, largest first
PREFILL_TILE = 512  # keys of a tile; 256 to 1024 differ little where every tile holds tokens
DECODE_TILE = 1024  # larger tiles are fewer, smaller ones read less beyond the last token


class _Step(nn.Cell):
    """One call; `transformer` keeps its parameters' names, for this cell is part of no network.

    Inputs:
        ids, positions (Tensor): (B, C) int32.
        first, end (Tensor), tables (Tensor), rows (Tensor): see PagedAttention.

    Outputs:
        Tensor: logits (B, V) float32, or of a prefill chunk one element of the hidden states.
    """

    def __init__(self, transformer: nn.Cell, with_logits: bool):
        super().__init__(auto_prefix=False)
        self.transformer = transformer
        self.with_logits = with_logits
        # MindSpore looks this phase's program up by its name, without checking the arguments again: 3 ms a call
        self.phase = "increment"
        self.set_train(False)

    def construct(self, ids, positions, first, end, tables, rows):
        hidden = self.transformer(ids, (first, end), tables, rows, None, positions)
        if not self.with_logits:
            return hidden.reshape((-1,))[:1]
        hidden = hidden.reshape((-1, hidden.shape[-1]))  # (B, 1, H) -> (B, H)
        return ops.cast(self.transformer.output_layer(hidden), mstype.float32)


class CachedSteps:
    """Prefill and decode of a network with PagedAttention.

    Args:
        transformer: embedding, encoder and output layer, as GLM32KModel.
        config: of the network.

    Attributes:
        chunks: tokens that a prefill call may have, largest first.
    """

    def __init__(self, transformer: nn.Cell, config: GLM32KConfig):
        self.chunks = CHUNKS
        self._transformer = transformer
        self._steps: dict[tuple, _Step] = {}
        self._seq_length, self._block_size = config.seq_length, config.block_size
        self._blocks = config.num_blocks + 1  # the last one is the spare
        self._heads = np.arange(config.multi_query_group_num, dtype=np.int32)

    def prefill(self, ids: np.ndarray, lengths: np.ndarray, tables: np.ndarray) -> np.ndarray:
        """Logits (B, V) float32 of each prompt's last token; ids (B, S), tables (B, blocks) as upstream's."""
        for prompt, length, table in zip(ids, lengths, tables):
            self._fill(prompt[: length - 1], table)
        return self.decode(ids[np.arange(len(ids)), lengths - 1], lengths, tables)

    def decode(self, ids: np.ndarray, lengths: np.ndarray, tables: np.ndarray) -> np.ndarray:
        """Logits (B, V) float32 of the newest tokens `ids` (B,), whose prompts have `lengths` tokens with them."""
        positions = np.asarray(lengths, np.int32).reshape(-1, 1) - 1
        step = self._step(True, len(ids), 1)
        ids = np.asarray(ids).reshape(-1, 1)
        return step(*self._inputs(ids, positions, positions, tables, DECODE_TILE)).asnumpy()

    def compile_prefill(self, table: np.ndarray) -> None:
        """Compiles what prefill has not run yet, on tokens that are not kept, so that no later prompt waits for it."""
        for size in self.chunks:
            if (False, 1, size) not in self._steps:
                self._run_chunk(np.zeros(0, np.int32), 0, size, table)

    def _fill(self, ids, table):
        """Writes keys and values of all `ids` (S,)."""
        if len(ids):
            self.compile_prefill(table)
        for start, size in chunks_of(len(ids), self.chunks):
            self._run_chunk(ids[start : start + size], start, size, table)

    def _run_chunk(self, ids, start, size, table):
        positions = np.arange(start, start + size, dtype=np.int32).reshape(1, -1)
        kept = np.where(np.arange(size) < len(ids), positions, -1)
        ids = np.pad(ids, (0, size - len(ids))).reshape(1, -1)
        step = self._step(False, 1, size)
        step(*self._inputs(ids, positions, kept, table.reshape(1, -1), PREFILL_TILE))

    def _step(self, with_logits, batch, tokens):
        key = (with_logits, batch, tokens)
        if key not in self._steps:
            self._steps[key] = _Step(self._transformer, with_logits)
        return self._steps[key]

    def _inputs(self, ids, positions, kept, tables, tile):
        """The tensors of a call; `kept` are positions, -1 where a token only fills up a chunk."""
        size, spare = self._block_size, self._blocks - 1
        per_tile = max(tile // size, 1)
        tiles = -(-self._seq_length // (per_tile * size))
        width = per_tile * size
        used = max(-(-(int(kept.max()) + 1) // width), 1)
        first = int(positions.min()) // width
        blocks = np.full((len(tables), tiles * per_tile), spare, np.int32)
        known = min(tables.shape[1], used * per_tile)
        blocks[:, :known] = np.where(tables[:, :known] < 0, spare, tables[:, :known])
        slots = blocks[np.arange(len(tables))[:, None], np.maximum(kept, 0) // size] * size + kept % size
        slots = np.where(kept < 0, spare * size, slots)  # (B, C)
        rows = slots[:, :, None] + self._heads * (self._blocks * size)  # (B, C, G)
        blocks = blocks.reshape(len(tables), tiles, per_tile).transpose(1, 0, 2)[:, :, None]  # (J, B, 1, N)
        blocks = blocks + self._heads.reshape(-1, 1) * self._blocks  # (J, B, G, N)
        positions = np.minimum(positions, self._seq_length - 1)
        arrays = (ids, positions, first, used, blocks, rows.reshape(-1))
        return [Tensor.from_numpy(np.ascontiguousarray(array, np.int32).reshape(np.shape(array))) for array in arrays]


def chunks_of(length: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, size) of the chunks of `length` tokens: the largest while they are full, then those that fill up least;
    the last one may reach beyond the end."""
    start = 0
    while start < length:
        left = length - start
        size = min(sizes, key=lambda size: (-(-left // size) * size, -size)) if left < max(sizes) else max(sizes)
        yield start, size
        start += size
