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
DECODE_TILE = 1024  # smaller tiles read less beyond the last token
WIDE = 4  # tiles that are read as one where all hold tokens: a kernel of one tile takes longer to start than to run


class _Program(nn.Cell):
    """One compiled program; `transformer` keeps its parameters' names, for this cell is part of no network."""

    def __init__(self, transformer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.transformer = transformer
        # MindSpore looks this phase's program up by its name, without checking the arguments again: 3 ms a call
        self.phase = "increment"
        self.set_train(False)


class _Step(_Program):
    """The layers.

    Inputs:
        ids, positions (Tensor): (B, C) int32.
        order, count, wide_start, wide_end (Tensor), rows (Tensor): see PagedAttention.
        tables, wide (Tensor): (J, B, G, N), (W, B, G, their N) int32, the blocks of each tile: block b of head g is
            g * blocks + b.
        last (Tensor): () int32, the token of a chunk whose hidden states are wanted.

    Outputs:
        Tensor: logits (B, V) float32; of a prefill chunk hidden states (1, H) of one token, and () float32, NaN where
            attention of any token is.
    """

    def __init__(self, transformer: nn.Cell, block_size: int, with_logits: bool, any_scores: bool):
        super().__init__(transformer)
        self.block_size, self.with_logits, self.any_scores = block_size, with_logits, any_scores
        self.sum, self.gather = P.ReduceSum(), P.Gather()

    def construct(self, ids, positions, order, count, wide_start, wide_end, tables, wide, rows, last):
        tiles = (order, count, self._rows(wide), wide_start, wide_end, self.any_scores)
        hidden = self.transformer(ids, tiles, self._rows(tables), rows, None, positions)
        hidden = hidden.reshape((-1, hidden.shape[-1]))  # (B, C, H) -> (B*C, H)
        if self.with_logits:
            return ops.cast(self.transformer.output_layer(hidden), mstype.float32)
        return self.gather(hidden, last.reshape((1,)), 0), self.sum(ops.cast(hidden[:, :1], mstype.float32))

    def _rows(self, tables):
        """The cache's rows (J, B, G, K) of blocks (J, B, G, N)."""
        rows = ops.expand_dims(tables * self.block_size, 4) + arange(self.block_size)  # (J, B, G, N, block_size)
        return rows.reshape(tables.shape[:3] + (-1,))


class _Logits(_Program):
    """The output layer: hidden states (B, H) -> logits (B, V) float32."""

    def construct(self, hidden):
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
        self._programs: dict[tuple, _Program] = {}
        self.any_scores = False
        self._seq_length, self._block_size = config.seq_length, config.block_size
        self._blocks = config.num_blocks + 1  # the last one is the spare
        self._heads = np.arange(config.multi_query_group_num, dtype=np.int32)

    @property
    def programs(self) -> set[tuple[str, int, int, bool]]:
        """What has run and need not be compiled: "chunk", "decode" or "logits", prompts, tokens of each, whether for
        any scores."""
        return set(self._programs)

    def prefill(self, ids: np.ndarray, lengths: np.ndarray, tables: np.ndarray) -> np.ndarray:
        """Logits (B, V) float32 of each prompt's last token; ids (B, S), tables (B, blocks) as upstream's."""
        hidden = [self._fill(prompt[:length], table) for prompt, length, table in zip(ids, lengths, tables)]
        program = self._program("logits", len(hidden), 1, True)
        return program(Tensor.from_numpy(np.concatenate(hidden))).asnumpy()

    def decode(self, ids: np.ndarray, lengths: np.ndarray, tables: np.ndarray) -> np.ndarray:
        """Logits (B, V) float32 of the newest tokens `ids` (B,), whose prompts have `lengths` tokens with them."""
        positions = np.asarray(lengths, np.int32).reshape(-1, 1) - 1
        program = self._program("decode", len(ids), 1, True)  # few scores: what holds decoding is elsewhere
        ids = np.asarray(ids).reshape(-1, 1)
        wide = max(WIDE // len(ids), 1)  # of several prompts a tile is so much larger, and leaves the processor's cache
        return program(*self._inputs(ids, positions, positions, tables, DECODE_TILE, wide)).asnumpy()

    def compile_prefill(self, table: np.ndarray) -> None:
        """Compiles what prefill has not run yet, on tokens that are not kept, so that no later prompt waits for it."""
        for size in self.chunks:
            if ("chunk", 1, size, self.any_scores) not in self._programs:
                self._run_chunk(np.zeros(0, np.int32), 0, size, table)

    def _fill(self, ids, table):
        """Writes keys and values of all `ids` (S,); hidden states (1, H) of the last one."""
        self.compile_prefill(table)
        wide = [size for size in self.chunks if self._prefill_tile(size) == size > PREFILL_TILE]
        sizes = [size for size in self.chunks if size not in wide]
        for start, size, kept in chunks_of(len(ids), sizes, self._tile(PREFILL_TILE), wide):
            hidden = self._run_chunk(ids[start : start + kept], start, size, table)
        return hidden.asnumpy()

    def _run_chunk(self, ids, start, size, table):
        positions = np.arange(start, start + size, dtype=np.int32).reshape(1, -1)
        kept = np.where(np.arange(size) < len(ids), positions, -1)
        ids = np.pad(ids, (0, size - len(ids))).reshape(1, -1)
        inputs = self._inputs(ids, positions, kept, table.reshape(1, -1), self._prefill_tile(size))
        hidden, total = self._program("chunk", 1, size, self.any_scores)(*inputs)
        if not self.any_scores and np.isnan(total.asnumpy()):
            self.any_scores = True  # a model whose scores differ so much once will do so again
            hidden, _ = self._program("chunk", 1, size, True)(*inputs)
        return hidden

    def _program(self, kind, batch, tokens, any_scores):
        key = (kind, batch, tokens, any_scores)
        if key not in self._programs:
            self._programs[key] = (
                _Logits(self._transformer)
                if kind == "logits"
                else _Step(self._transformer, self._block_size, kind == "decode", any_scores)
            )
        return self._programs[key]

    def _tile(self, tokens):
        """Tokens of a tile: whole blocks."""
        return max(tokens // self._block_size, 1) * self._block_size

    def _prefill_tile(self, chunk):
        """Tokens of a tile for chunks of that size."""
        return chunk if chunk > PREFILL_TILE and chunk % self._block_size == 0 else self._tile(PREFILL_TILE)

    def _inputs(self, ids, positions, kept, tables, tile, wide=1):
        """The tensors of a call; `kept` are positions, -1 where a token only fills up a chunk. `wide` tiles may be read
        as one."""
        size, spare = self._block_size, self._blocks - 1
        batch, groups = len(tables), len(self._heads)
        width = self._tile(tile)
        per_tile = width // size
        tiles = -(-self._seq_length // width)
        tiles = -(-tiles // wide) * wide
        used = max(int(kept.max()) // width + 1, 1)
        order, wide_range = tiles_to_read(used, batch, wide if 1 < wide < tiles else used + 1)
        blocks = np.full((batch, tiles * per_tile), spare, np.int32)
        known = min(tables.shape[1], used * per_tile)
        blocks[:, :known] = np.where(tables[:, :known] < 0, spare, tables[:, :known])
        slots = blocks[np.arange(batch)[:, None], np.maximum(kept, 0) // size] * size + kept % size
        slots = np.where(kept < 0, spare * size, slots)  # (B, C)
        rows = slots[:, :, None] + self._heads * (self._blocks * size)  # (B, C, G)
        blocks = blocks[:, None] + self._heads.reshape(-1, 1) * self._blocks  # (B, G, J * N)
        small = blocks.reshape(batch, groups, tiles, per_tile).transpose(2, 0, 1, 3)  # (J, B, G, N)
        large = (
            blocks.reshape(batch, groups, -1, wide * per_tile).transpose(2, 0, 1, 3)  # (W, B, G, their N)
            if wide > 1
            else np.zeros((1, batch, groups, 1))  # is not read
        )
        visits = np.zeros(tiles, np.int32)
        visits[: len(order)] = order
        positions = np.minimum(positions, self._seq_length - 1)
        last = int(np.argmax(kept[0]))
        arrays = (ids, positions, visits, len(order), *wide_range, small, large, rows.reshape(-1), last)
        return [Tensor.from_numpy(np.ascontiguousarray(array, np.int32).reshape(np.shape(array))) for array in arrays]


def tiles_to_read(used: int, prompts: int, wide: int) -> tuple[list[int], tuple[int, int]]:
    """Tiles, the first of them one whose first key every query sees, and a range of wide tiles of `wide` tiles each:
    together all of `used` tiles, each once.

    That first tile is the last one of a single prompt, whose newest token it holds, and of several prompts the first.
    """
    if prompts == 1:
        whole = (used - 1) // wide
        return [used - 1, *range(whole * wide, used - 1)], (0, whole)
    whole = max(used // wide, 1)
    return [*range(min(wide, used)), *range(whole * wide, used)], (1, whole)


def chunks_of(length: int, sizes: Sequence[int], tile: int, wide: Sequence[int] = ()) -> Iterator[tuple[int, int, int]]:
    """(start, size, tokens in it) of the chunks of `length` tokens, none of which lies across tiles: sizes that are
    tiles of their own, `wide`, while they are filled but for less than the smallest of `sizes`, then the largest of
    `sizes` while it is, then those that fill up least."""
    start = 0
    while start < length:
        left = length - start
        size = max((size for size in wide if start % size == 0 and size < left + min(sizes)), default=0)
        if not size:
            left = min(left, tile - start % tile)
            size = min(sizes, key=lambda size: (-(-left // size) * size, -size)) if left < max(sizes) else max(sizes)
        yield start, size, min(size, left)
        start += min(size, left)
