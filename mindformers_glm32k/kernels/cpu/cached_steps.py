"""The calls of cached generation on CPU: a chunk of one prompt's tokens, or the newest token of every prompt.

Shapes are static, which is faster than dynamic ones, and the tiles of the cache to read are inputs: a few programs (one
per chunk size, one per number of prompts) serve every length. The padding of a chunk goes into a spare cache block.

Legend: see paged_attention; H hidden size, V vocabulary, N cache blocks of a tile. Large chunks (more than PREFILL_TILE
tokens) are tiles of their own in prefill; wide tiles (of TILES_PER_WIDE tiles or fewer) are read in decode.
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
DECODE_TILE = 1024  # keys of a tile; smaller tiles read less beyond the last token
TILES_PER_WIDE = 4  # full tiles that are read as one: a kernel of one tile takes longer to start than to run


class _Program(nn.Cell):
    """One compiled program; without auto_prefix the parameters of `transformer` keep their names."""

    def __init__(self, transformer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.transformer = transformer
        # MindSpore finds the program of this phase by name, without checking the arguments again: saves 3 ms a call
        self.phase = "increment"
        self.set_train(False)


class _Step(_Program):
    """The layers for a chunk or for newest tokens; `with_logits` the output layer, too.

    Inputs:
        ids, positions (Tensor): (B, C) int32.
        order, count, wide_start, wide_end (Tensor): see batch_valid_length of PagedAttention; rows: its slot_mapping.
        tables (Tensor): (J, B, G, N) int32, the blocks of each tile, g * blocks + b for block b of head g.
        wide_tables (Tensor): (W, B, G, N of a wide tile) int32, those of each wide tile.
        last (Tensor): () int32, the index in the chunk of the token whose hidden states are returned.

    Outputs:
        Tensor: logits (B, V) float32; without them hidden states (1, H) of one token, and () float32, NaN where
            attention of any token is.
    """

    def __init__(self, transformer: nn.Cell, block_size: int, with_logits: bool, any_scores: bool):
        super().__init__(transformer)
        self.block_size, self.with_logits, self.any_scores = block_size, with_logits, any_scores
        self.sum, self.gather = P.ReduceSum(), P.Gather()

    def construct(self, ids, positions, order, count, wide_start, wide_end, tables, wide_tables, rows, last):
        tiles = (order, count, self._rows(wide_tables), wide_start, wide_end, self.any_scores)
        hidden = self.transformer(ids, tiles, self._rows(tables), rows, None, positions)
        hidden = hidden.reshape((-1, hidden.shape[-1]))  # (B, C, H) -> (B*C, H)
        if self.with_logits:
            return ops.cast(self.transformer.output_layer(hidden), mstype.float32)
        return self.gather(hidden, last.reshape((1,)), 0), self.sum(ops.cast(hidden[:, :1], mstype.float32))

    def _rows(self, tables):
        """The cache rows (J, B, G, K) of blocks (J, B, G, N)."""
        rows = ops.expand_dims(tables * self.block_size, 4) + arange(self.block_size)  # (J, B, G, N, block_size)
        return rows.reshape(tables.shape[:3] + (-1,))  # (J, B, G, K)


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
        chunks: sizes of a prefill call in tokens, at least one of them <= PREFILL_TILE.
        any_scores: whether prefill takes PagedAttention's slower softmax; set by the first prompt that needs it.
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
        """The programs compiled so far: ("chunk", "decode" or "logits", prompts, tokens of each, any_scores)."""
        return set(self._programs)

    def prefill(self, ids: np.ndarray, lengths: np.ndarray, tables: np.ndarray) -> np.ndarray:
        """Logits (B, V) float32 of each prompt's last token; ids (B, S), block tables (B, blocks) as upstream's."""
        hidden = [self._fill(prompt[:length], table) for prompt, length, table in zip(ids, lengths, tables)]
        program = self._program("logits", len(hidden), 1, True)
        return program(Tensor.from_numpy(np.concatenate(hidden))).asnumpy()

    def decode(self, ids: np.ndarray, lengths: np.ndarray, tables: np.ndarray) -> np.ndarray:
        """Logits (B, V) float32 of the newest tokens `ids` (B,); `lengths` (B,) count all tokens up to these."""
        positions = np.asarray(lengths, np.int32).reshape(-1, 1) - 1
        program = self._program("decode", len(ids), 1, True)  # so few scores that any_scores costs no time
        ids = np.asarray(ids).reshape(-1, 1)
        per_wide = max(TILES_PER_WIDE // len(ids), 1)  # of all prompts, more tiles would leave the processor's cache
        return program(*self._inputs(ids, positions, positions, tables, DECODE_TILE, per_wide)).asnumpy()

    def compile_prefill(self, table: np.ndarray) -> None:
        """Compiles the prefill programs that have not run yet, on padding alone: no later prompt waits for it."""
        for size in self.chunks:
            if ("chunk", 1, size, self.any_scores) not in self._programs:
                self._run_chunk(np.zeros(0, np.int32), 0, size, table)

    def _fill(self, ids, table):
        """Writes keys and values of a prompt's `ids` (S,) into the cache; hidden states (1, H) of the last token."""
        self.compile_prefill(table)
        large = [size for size in self.chunks if self._prefill_tile(size) == size > PREFILL_TILE]
        sizes = [size for size in self.chunks if size not in large]
        for start, size, kept in chunks_of(len(ids), sizes, self._tile(PREFILL_TILE), large):
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
        """`tokens` rounded down to whole blocks, at least one."""
        return max(tokens // self._block_size, 1) * self._block_size

    def _prefill_tile(self, chunk):
        """Tokens of a tile in the prefill of chunks of `chunk` tokens."""
        return chunk if chunk > PREFILL_TILE and chunk % self._block_size == 0 else self._tile(PREFILL_TILE)

    def _inputs(self, ids, positions, kept, tables, tile, per_wide=1):
        """The tensors of a call, see _Step; `kept` (B, C) are positions, -1 for padding; `per_wide` tiles, of `tile`
        tokens each, make a wide one."""
        size, spare = self._block_size, self._blocks - 1
        batch, groups = len(tables), len(self._heads)
        width = self._tile(tile)
        per_tile = width // size
        tiles = -(-self._seq_length // width)
        tiles = -(-tiles // per_wide) * per_wide
        used = max(int(kept.max()) // width + 1, 1)
        order, wide_range = tiles_to_read(used, batch, per_wide if 1 < per_wide < tiles else used + 1)
        blocks = np.full((batch, tiles * per_tile), spare, np.int32)
        known = min(tables.shape[1], used * per_tile)
        blocks[:, :known] = np.where(tables[:, :known] < 0, spare, tables[:, :known])
        slots = blocks[np.arange(batch)[:, None], np.maximum(kept, 0) // size] * size + kept % size
        slots = np.where(kept < 0, spare * size, slots)  # (B, C)
        rows = slots[:, :, None] + self._heads * (self._blocks * size)  # (B, C, G)
        blocks = blocks[:, None] + self._heads.reshape(-1, 1) * self._blocks  # (B, G, J * N)
        tile_blocks = blocks.reshape(batch, groups, tiles, per_tile).transpose(2, 0, 1, 3)  # (J, B, G, N)
        wide_blocks = (
            blocks.reshape(batch, groups, -1, per_wide * per_tile).transpose(2, 0, 1, 3)  # (W, B, G, N of a wide tile)
            if per_wide > 1
            else np.zeros((1, batch, groups, 1))  # a placeholder, never read
        )
        visits = np.zeros(tiles, np.int32)
        visits[: len(order)] = order
        positions = np.minimum(positions, self._seq_length - 1)
        last = int(np.argmax(kept[0]))
        arrays = (ids, positions, visits, len(order), *wide_range, tile_blocks, wide_blocks, rows.reshape(-1), last)
        return [Tensor.from_numpy(np.ascontiguousarray(array, np.int32).reshape(np.shape(array))) for array in arrays]


def tiles_to_read(used: int, prompts: int, per_wide: int) -> tuple[list[int], tuple[int, int]]:
    """Indices of tiles, in reading order, and a range of wide tiles of `per_wide` tiles each: in all `used` tiles once.

    Every query sees the first key of the first tile: of one prompt its last tile, of several prompts tile 0.
    """
    if prompts == 1:
        whole = (used - 1) // per_wide
        return [used - 1, *range(whole * per_wide, used - 1)], (0, whole)
    whole = max(used // per_wide, 1)
    return [*range(min(per_wide, used)), *range(whole * per_wide, used)], (1, whole)


def chunks_of(
    length: int, sizes: Sequence[int], tile: int, large: Sequence[int] = ()
) -> Iterator[tuple[int, int, int]]:
    """(start, size, tokens without padding) of the chunks of `length` tokens; no chunk lies across tiles.
    First sizes of `large`, tiles of their own, while less than the smallest of `sizes` is padding; then the largest of
    `sizes` while it is full; then the sizes with the least padding."""
    start = 0
    while start < length:
        left = length - start
        size = max((size for size in large if start % size == 0 and size < left + min(sizes)), default=0)
        if not size:
            left = min(left, tile - start % tile)
            size = min(sizes, key=lambda size: (-(-left // size) * size, -size)) if left < max(sizes) else max(sizes)
        yield start, size, min(size, left)
        start += min(size, left)
