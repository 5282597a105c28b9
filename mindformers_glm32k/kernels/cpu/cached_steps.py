"""The calls of cached generation on CPU: a chunk of one prompt's tokens, or the newest token of every prompt.

Shapes are static, which is faster than open ones, and how much of the cache holds tokens is an input: a few programs
(one per chunk size, one per number of prompts) serve every length. What fills up a chunk goes into a spare block.

Legend: see paged_attention; H hidden size, V vocabulary, N cache blocks of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import operations as P

from mindformers_glm32k.config import GLM32KConfig
from mindformers_glm32k.kernels.cpu.blocks import arange

CHUNKS = (1024, 512, 128)  # tokens of a prefill call, largest first
PREFILL_TILE = 512  # keys of a tile; a larger chunk has tiles of its own size, whose products are a tenth faster
DECODE_TILE = 1024  # larger tiles are fewer, smaller ones read less beyond the last token


class _Step(nn.Cell):
    """One call; `transformer` keeps its parameters' names, for this cell is part of no network.

    Inputs:
        ids, positions (Tensor): (B, C) int32.
        own, start, end (Tensor), rows (Tensor): see PagedAttention.
        tables (Tensor): (J, B, G, N) int32, the blocks of each tile: block b of head g is g * blocks + b.

    Outputs:
        Tensor: logits (B, V) float32, or of a prefill chunk () float32, NaN where attention of a token is.
    """

    def __init__(self, transformer: nn.Cell, block_size: int, with_logits: bool, any_scores: bool):
        super().__init__(auto_prefix=False)
        self.transformer = transformer
        self.block_size, self.with_logits, self.any_scores = block_size, with_logits, any_scores
        self.sum = P.ReduceSum()
        # MindSpore looks this phase's program up by its name, without checking the arguments again: 3 ms a call
        self.phase = "increment"
        self.set_train(False)

    def construct(self, ids, positions, own, start, end, tables, rows):
        count, batch, groups, _ = tables.shape
        tables = ops.expand_dims(tables * self.block_size, 4) + arange(self.block_size)
        tables = tables.reshape((count, batch, groups, -1))  # (J, B, G, N, 1) -> (J, B, G, K)
        hidden = self.transformer(ids, (own, start, end, self.any_scores), tables, rows, None, positions)
        hidden = hidden.reshape((-1, hidden.shape[-1]))  # (B, C, H) -> (B*C, H)
        if not self.with_logits:
            return self.sum(ops.cast(hidden[:, :1], mstype.float32))
        return ops.cast(self.transformer.output_layer(hidden), mstype.float32)


class CachedSteps:
    """Prefill and decode of a network with PagedAttention.

    Args:
        transformer: embedding, encoder and output layer, as GLM32KModel.
        config: of the network.

    Attributes:
        chunks: tokens that a prefill call may have, one size of at most PREFILL_TILE among them.
        any_scores: whether prefill takes the slower attention; set by the first prompt that needs it.
    """

    def __init__(self, transformer: nn.Cell, config: GLM32KConfig):
        self.chunks = tuple(size for size in CHUNKS if size <= config.seq_length) or CHUNKS[-1:]
        self._transformer = transformer
        self._steps: dict[tuple, _Step] = {}
        self.any_scores = False
        self._seq_length, self._block_size = config.seq_length, config.block_size
        self._blocks = config.num_blocks + 1  # the last one is the spare
        self._heads = np.arange(config.multi_query_group_num, dtype=np.int32)

    @property
    def programs(self) -> set[tuple[bool, int, int, bool]]:
        """What has run and need not be compiled: whether with logits, prompts, tokens of each, whether for any
        scores."""
        return set(self._steps)

    def prefill(self, ids: np.ndarray, lengths: np.ndarray, tables: np.ndarray) -> np.ndarray:
        """Logits (B, V) float32 of each prompt's last token; ids (B, S), tables (B, blocks) as upstream's."""
        for prompt, length, table in zip(ids, lengths, tables):
            self._fill(prompt[: length - 1], table)
        return self.decode(ids[np.arange(len(ids)), lengths - 1], lengths, tables)

    def decode(self, ids: np.ndarray, lengths: np.ndarray, tables: np.ndarray) -> np.ndarray:
        """Logits (B, V) float32 of the newest tokens `ids` (B,), whose prompts have `lengths` tokens with them."""
        positions = np.asarray(lengths, np.int32).reshape(-1, 1) - 1
        step = self._step(True, len(ids), 1, True)  # few scores: what holds decoding is elsewhere
        ids = np.asarray(ids).reshape(-1, 1)
        return step(*self._inputs(ids, positions, positions, tables, DECODE_TILE)).asnumpy()

    def compile_prefill(self, table: np.ndarray) -> None:
        """Compiles what prefill has not run yet, on tokens that are not kept, so that no later prompt waits for it."""
        for size in self.chunks:
            if (False, 1, size, self.any_scores) not in self._steps:
                self._run_chunk(np.zeros(0, np.int32), 0, size, table)

    def _fill(self, ids, table):
        """Writes keys and values of all `ids` (S,)."""
        if len(ids):
            self.compile_prefill(table)
        wide = [size for size in self.chunks if self._prefill_tile(size) == size > PREFILL_TILE]
        sizes = [size for size in self.chunks if size not in wide]
        for start, size, kept in chunks_of(len(ids), sizes, self._tile(PREFILL_TILE), wide):
            self._run_chunk(ids[start : start + kept], start, size, table)

    def _run_chunk(self, ids, start, size, table):
        positions = np.arange(start, start + size, dtype=np.int32).reshape(1, -1)
        kept = np.where(np.arange(size) < len(ids), positions, -1)
        ids = np.pad(ids, (0, size - len(ids))).reshape(1, -1)
        inputs = self._inputs(ids, positions, kept, table.reshape(1, -1), self._prefill_tile(size))
        total = self._step(False, 1, size, self.any_scores)(*inputs).asnumpy()
        if not self.any_scores and np.isnan(total):
            self.any_scores = True  # a model whose scores differ so much once will do so again
            self._step(False, 1, size, True)(*inputs)

    def _step(self, with_logits, batch, tokens, any_scores):
        key = (with_logits, batch, tokens, any_scores)
        if key not in self._steps:
            self._steps[key] = _Step(self._transformer, self._block_size, with_logits, any_scores)
        return self._steps[key]

    def _tile(self, tokens):
        """Tokens of a tile: whole blocks."""
        return max(tokens // self._block_size, 1) * self._block_size

    def _prefill_tile(self, chunk):
        """Tokens of a tile for chunks of that size."""
        return chunk if chunk > PREFILL_TILE and chunk % self._block_size == 0 else self._tile(PREFILL_TILE)

    def _inputs(self, ids, positions, kept, tables, tile):
        """The tensors of a call; `kept` are positions, -1 where a token only fills up a chunk."""
        size, spare = self._block_size, self._blocks - 1
        width = self._tile(tile)
        per_tile = width // size
        tiles = -(-self._seq_length // width)
        used = max(int(kept.max()) // width + 1, 1)
        bounds = (used - 1, 0, used - 1) if len(tables) == 1 else (0, 1, used)
        blocks = np.full((len(tables), tiles * per_tile), spare, np.int32)
        known = min(tables.shape[1], used * per_tile)
        blocks[:, :known] = np.where(tables[:, :known] < 0, spare, tables[:, :known])
        slots = blocks[np.arange(len(tables))[:, None], np.maximum(kept, 0) // size] * size + kept % size
        slots = np.where(kept < 0, spare * size, slots)  # (B, C)
        rows = slots[:, :, None] + self._heads * (self._blocks * size)  # (B, C, G)
        blocks = blocks.reshape(len(tables), tiles, per_tile).transpose(1, 0, 2)[:, :, None]  # (J, B, 1, N)
        blocks = blocks + self._heads.reshape(-1, 1) * self._blocks  # (J, B, G, N)
        positions = np.minimum(positions, self._seq_length - 1)
        arrays = (ids, positions, *bounds, blocks, rows.reshape(-1))
        return [Tensor.from_numpy(np.ascontiguousarray(array, np.int32).reshape(np.shape(array))) for array in arrays]


def chunks_of(length: int, sizes: Sequence[int], tile: int, wide: Sequence[int] = ()) -> Iterator[tuple[int, int, int]]:
    """(start, size, tokens in it) of the chunks of `length` tokens, none of which lies across tiles: sizes that are
    tiles of their own, `wide`, while they are filled, then the largest of `sizes` while it is, then those that fill up
    least."""
    start = 0
    while start < length:
        left = length - start
        size = max((size for size in wide if start % size == 0 and size <= left), default=0)
        if not size:
            left = min(left, tile - start % tile)
            size = min(sizes, key=lambda size: (-(-left // size) * size, -size)) if left < max(sizes) else max(sizes)
        yield start, size, min(size, left)
        start += min(size, left)
