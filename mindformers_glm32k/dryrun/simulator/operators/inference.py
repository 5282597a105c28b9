"""What prediction with a cache adds: rotary embedding, writing into the paged cache, attention over it.

Letters: B prompts, T tokens of the call, N query heads, K key heads, D head size. MindSpore documents these kernels by
shapes only; what they compute follows from how mindformers' InferAttention and PagedAttentionMgr feed them.
"""

from __future__ import annotations

import numpy as np

from mindformers_glm32k.dryrun.simulator.operators import (
    Array,
    Call,
    Parameter,
    as_output,
    operator,
    plain,
    rounded,
    wide,
)


@operator("ApplyRotaryPosEmb")
def apply_rotary_pos_emb(
    call: Call, query: Array, key: Array, cos: Array, sin: Array, lengths: Array, cos_format: int
) -> tuple[Array, ...]:
    """x * cos + turned(x) * sin for query (…, T, N * D) and key (…, T, K * D), float32 rounded once.

    cos, sin (rows, D): in decode (one token a prompt) a row per token, in prefill a table that every prompt of
    `lengths` (B) reads from its start; tokens after the last prompt stay as they are. cos_format 2 turns halves:
    (-x2, x1), 3 turns pairs: (-x[2i+1], x[2i]) (mindformers' RotaryPosEmbMode: rotate_half, interleaved).
    """
    if cos_format not in (2, 3):
        raise NotImplementedError(f"ApplyRotaryPosEmb with cos_format {cos_format}: only 2 and 3 are implemented")
    tokens = int(np.prod(query.shape[:-1]))
    rows = _rows(lengths, tokens, cos.shape[0])
    return tuple(
        as_output(_rotate(x, wide(cos)[rows], wide(sin)[rows], cos_format), spec)
        for x, spec in zip((query, key), call.output)
    )


def _rows(lengths, tokens, table):
    """For each token that belongs to a prompt: its row of the table."""
    lengths = [int(length) for length in lengths.reshape(-1)]
    if tokens == len(lengths) == table:
        return np.arange(tokens)
    if sum(lengths) > tokens or max(lengths) > table:
        raise ValueError(f"prompts of {lengths} tokens in a call of {tokens}, with {table} rows of angles")
    return np.concatenate([np.arange(length) for length in lengths])


def _rotate(x, cos, sin, cos_format):
    size = cos.shape[-1]
    heads = wide(x).reshape(-1, x.shape[-1] // size, size)  # (T, N, D)
    turning = heads[: len(cos)]
    if cos_format == 2:
        first, second = np.split(turning, 2, -1)
        turned = np.concatenate([-second, first], -1)
    else:
        turned = np.stack([-turning[..., 1::2], turning[..., ::2]], -1).reshape(turning.shape)
    result = turning * cos[:, None] + turned * sin[:, None]
    return np.concatenate([result, heads[len(cos) :]]).reshape(x.shape)


@operator("ReshapeAndCache", in_place=True)
def reshape_and_cache(
    call: Call, key: Array, value: Array, key_cache: Parameter, value_cache: Parameter, slots: Array, monad: None = None
) -> Array:
    """Writes key and value (…, T, K * D) into key_cache and value_cache (blocks, block, K, D) at `slots` (T), numbered
    over all blocks; -1 writes nothing. -> key."""
    slots = plain(slots).reshape(-1)
    size = int(np.prod(key_cache.value.shape[:2]))
    if ((slots < -1) | (slots >= size)).any():
        raise IndexError(f"a slot of {slots.tolist()} in a cache of {size}")
    for cache, rows in ((key_cache, plain(key)), (value_cache, plain(value))):
        flat = cache.value.reshape(size, -1).copy()
        flat[slots[slots >= 0]] = rows.reshape(len(slots), -1)[slots >= 0]
        cache.value = flat.reshape(cache.value.shape)
    return plain(key)


@operator("PagedAttention")
def paged_attention(
    call: Call,
    query: Array,
    key_cache: Array,
    value_cache: Array,
    block_tables: Array,
    context_lens: Array,
    antiquant_scale: None,
    antiquant_offset: None,
    attn_mask: Array,
    q_seq_lens: None,
    alibi_mask: None,
    head_num: int,
    scale_value: float,
    kv_head_num: int,
    kv_cache_quant_mode: int,
    mask_mode: int,
    mla_v_dim: int,
) -> Array:
    """softmax(scale_value * query @ keysᵀ) @ values of one token a prompt.

    query (B, 1, N * D); caches (blocks, block, K, D); block_tables (B, n) the blocks of each prompt in order;
    context_lens (B) each prompt's tokens, the current one included. Probabilities in float32, rounded to the query's
    dtype before the product with values.
    Source: mindspore's docstring of PagedAttention.
    """
    call.require(None, antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset)
    call.require(None, attn_mask=attn_mask, q_seq_lens=q_seq_lens, alibi_mask=alibi_mask)
    call.require(0, kv_cache_quant_mode=kv_cache_quant_mode, mask_mode=mask_mode, mla_v_dim=mla_v_dim)
    block, kv_heads, size = key_cache.shape[1:]
    lengths = [int(length) for length in context_lens.reshape(-1)]
    if kv_heads != kv_head_num or query.size != len(lengths) * head_num * size:
        raise ValueError(f"a query of {query.shape} for {len(lengths)} prompts, {head_num} and {kv_head_num} heads")
    results = []
    for row, table, length in zip(query.reshape(len(lengths), kv_heads, -1, size), block_tables, lengths):
        blocks = table[: -(-length // block)]
        if len(blocks) * block < length or (blocks < 0).any():
            raise IndexError(f"a prompt of {length} tokens in the blocks {table.tolist()} of {block}")
        keys, values = (
            wide(cache[blocks]).reshape(-1, kv_heads, size)[:length].transpose(1, 0, 2)
            for cache in (key_cache, value_cache)
        )  # (K, length, D)
        scores = wide(row) @ keys.swapaxes(-1, -2) * scale_value  # (K, N / K, length)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        results.append(rounded(weights, call.output.dtype) @ values / weights.sum(-1, keepdims=True))
    return as_output(np.stack(results).reshape(query.shape), call.output)
