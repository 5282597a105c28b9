"""Flash attention, its gradient and its masks, for whole score matrices.

Letters: B batch, S queries, T keys, N query heads, K key heads (N is a multiple of K), D head size, H = N * D; in the
layouts TND and TH (which prediction uses), T is the number of tokens of all sequences. Precision as the kernel's:
scores and softmax in float32, probabilities and their gradients rounded to the inputs' dtype before a matrix product,
sums in float32.
Source: the docstring of mindspore.ops.flash_attention_score (masks: attn_mask, sparse_mode, pre_tokens, next_tokens);
FlashAttention-2 (arXiv:2307.08691) for the gradient.
"""

from __future__ import annotations

import weakref

import numpy as np

from mindformers_glm32k.dryrun.simulator.operators import Array, Call, as_output, operator, rounded, wide

_LAYOUTS = ("BSH", "BNSD", "SBH", "BSND", "TND", "TH")  # by MindSpore's enum
_FLAT = ("TND", "TH")  # all sequences flattened into one axis
_LANES = 8  # softmax_max and softmax_sum repeat each value
_COMPRESSED = 2048  # side of the mask that stands for a mask of any size in modes 2 to 4
_PREFILL = 128  # side of that mask for the layout TH
_CHECKED = {}  # id -> weak reference: constants known to be such a triangle; the check is slower than short attention


@operator("FlashAttentionScore")
def flash_attention_score(
    call: Call,
    query: Array,
    key: Array,
    value: Array,
    real_shift: None,
    drop_mask: None,
    padding_mask: None,
    attn_mask: Array,
    prefix: None,
    actual_seq_qlen: Array | tuple[int, ...] | None,
    actual_seq_kvlen: Array | tuple[int, ...] | None,
    head_num: int,
    keep_prob: float,
    scale_value: float,
    pre_tokens: int,
    next_tokens: int,
    inner_precise: int,
    input_layout: int,
    sparse_mode: int,
) -> tuple[Array, ...]:
    """softmax(scale * query @ keyᵀ, masked) @ value.

    query, key, value in `input_layout`; attn_mask see `hidden`, for TH `causal_prefill`; actual_seq_*:
    cumulative lengths for TND, each sequence's own for TH, where tokens after the last sequence get zeros; a sequence
    may be empty.
    -> softmax_max, softmax_sum (B, N, S, 8), (T, N, 8) or (T, N * 8) float32, softmax_out (a placeholder),
    attention_out as query.
    """
    call.require(None, real_shift=real_shift, drop_mask=drop_mask, padding_mask=padding_mask, prefix=prefix)
    call.require(1.0, keep_prob=keep_prob)
    layout = _layout(input_layout, _LAYOUTS)
    dtype = call.output[3].dtype
    maximum, total, attention = [], [], []
    for q, k, v, mask in _sequences(layout, head_num, attn_mask, actual_seq_qlen, actual_seq_kvlen, query, key, value):
        scores = _scores(q, k, mask, scale_value, pre_tokens, next_tokens, "TH" if layout == "TH" else sparse_mode)
        largest = scores.max(-1, keepdims=True)
        weights = np.exp(scores - largest)
        sums = weights.sum(-1, keepdims=True)
        maximum.append(np.repeat(largest, _LANES, -1))
        total.append(np.repeat(sums, _LANES, -1))
        attention.append(rounded(weights, dtype) @ _grouped(v, q) / sums)
    tokens = query.shape[0]
    maximum, total = (parts[0] if layout not in _FLAT else _merge(parts, layout, tokens) for parts in (maximum, total))
    return (
        as_output(maximum, call.output[0]),
        as_output(total, call.output[1]),
        _placeholder(call.output[2]),
        as_output(_merge(attention, layout, tokens), call.output[3]),
    )


@operator("FlashAttentionScoreGrad")
def flash_attention_score_grad(
    call: Call,
    query: Array,
    key: Array,
    value: Array,
    dy: Array,
    real_shift: None,
    drop_mask: None,
    padding_mask: None,
    attn_mask: Array,
    softmax_max: Array,
    softmax_sum: Array,
    softmax_in: Array,
    attention_in: Array,
    prefix: None,
    actual_seq_qlen: Array | tuple[int, ...] | None,
    actual_seq_kvlen: Array | tuple[int, ...] | None,
    head_num: int,
    keep_prob: float,
    scale_value: float,
    pre_tokens: int,
    next_tokens: int,
    inner_precise: int,
    input_layout: int,
    sparse_mode: int,
) -> tuple[Array, ...]:
    """Gradient of FlashAttentionScore, with its softmax_max, softmax_sum and attention_out (attention_in).

    -> dq, dk, dv, and a placeholder for the gradient of real_shift.
    """
    call.require(None, real_shift=real_shift, drop_mask=drop_mask, padding_mask=padding_mask, prefix=prefix)
    call.require(1.0, keep_prob=keep_prob)
    layout = _layout(input_layout, _LAYOUTS[:5])
    dtype = call.output[0].dtype
    statistics = _split_statistics(layout, actual_seq_qlen, softmax_max, softmax_sum)
    sequences = _sequences(
        layout, head_num, attn_mask, actual_seq_qlen, actual_seq_kvlen, query, key, value, attention_in, dy
    )
    gradients = []
    for (q, k, v, out, dout, mask), (largest, sums) in zip(sequences, statistics):
        scores = _scores(q, k, mask, scale_value, pre_tokens, next_tokens, sparse_mode)
        weights = np.exp(scores - largest) / sums
        dweights = dout @ _grouped(v, q).swapaxes(-1, -2)
        dscores = rounded(weights * (dweights - np.sum(dout * out, -1, keepdims=True)), dtype)
        gradients.append(
            (
                dscores @ _grouped(k, q) * scale_value,
                _ungrouped(dscores.swapaxes(-1, -2) @ q * scale_value, k),
                _ungrouped(rounded(weights, dtype).swapaxes(-1, -2) @ dout, v),
            )
        )
    results = [
        as_output(_merge(parts, layout, tensor.shape[0]), spec)
        for parts, spec, tensor in zip(zip(*gradients), call.output, (query, key, value))
    ]
    return (*results, _placeholder(call.output[3]))


def _scores(q, k, mask, scale, pre_tokens, next_tokens, sparse_mode):
    """(B, N, S, T) scaled scores, -inf where hidden. sparse_mode "TH": the causal mask of prediction."""
    scores = q @ _grouped(k, q).swapaxes(-1, -2) * scale
    queries, keys = q.shape[2], k.shape[2]
    hide = (
        causal_prefill(mask, queries, keys)
        if sparse_mode == "TH"
        else hidden(mask, sparse_mode, queries, keys, pre_tokens, next_tokens)
    )
    return scores if hide is None else np.where(hide, -np.inf, scores)


def _grouped(x, q):
    """(B, K, T, D) -> (B, N, T, D): each key head for its query heads."""
    return np.repeat(x, q.shape[1] // x.shape[1], 1)


def _ungrouped(gradient, x):
    """(B, N, T, D) -> (B, K, T, D): the sum over the query heads of a key head."""
    batch, heads, length, size = x.shape
    return gradient.reshape(batch, heads, -1, length, size).sum(2)


def _layout(index, known):
    if index not in range(len(known)):
        raise NotImplementedError(f"input_layout {index!r}: only {known} (0 to {len(known) - 1}) are implemented")
    return known[index]


def _sequences(layout, head_num, mask, q_lengths, kv_lengths, query, key, value, *like_query):
    """Yields (B, N or K, S or T, D) arrays of all tensors and the mask: one item, or one a sequence of TND and TH."""
    if layout not in _FLAT and not (q_lengths is None and kv_lengths is None):
        raise NotImplementedError(f"actual_seq_qlen {q_lengths!r}, actual_seq_kvlen {kv_lengths!r} in {layout}")
    size = query.shape[-1] // head_num if layout in ("BSH", "SBH", "TH") else query.shape[-1]
    heads = [_split_heads(wide(tensor), layout, size) for tensor in (query, key, value, *like_query)]
    if heads[0].shape[1] != head_num or head_num % heads[1].shape[1]:
        raise ValueError(
            f"head_num {head_num} for a query of {query.shape} and a key of {key.shape} in the layout {layout}"
        )
    if layout not in _FLAT:
        yield (*heads, mask)
        return
    q_spans, kv_spans = _spans(layout, q_lengths, query), _spans(layout, kv_lengths, key)
    if len(q_spans) != len(kv_spans):
        raise ValueError(f"{len(q_spans)} sequences of queries, {len(kv_spans)} of keys")
    for q_span, kv_span in zip(q_spans, kv_spans):
        if q_span[0] == q_span[1]:
            continue
        if kv_span[0] == kv_span[1]:
            raise ValueError(f"a sequence with queries {q_span} and no keys ({layout})")
        spans = [q_span, kv_span, kv_span] + [q_span] * len(like_query)
        yield (*(tensor[:, :, start:end] for tensor, (start, end) in zip(heads, spans)), mask)


def _spans(layout, lengths, tensor):
    """[(start, end)] of each sequence."""
    ends = np.cumsum(lengths) if layout == "TH" else np.asarray(lengths)
    if ends[-1] > tensor.shape[0] or (layout == "TND" and ends[-1] != tensor.shape[0]):
        raise ValueError(
            f"the sequences of lengths {lengths} ({layout}) end at {ends[-1]}, the tensor has {tensor.shape[0]} tokens"
        )
    starts = np.concatenate([[0], ends[:-1]])
    if (starts > ends).any():
        raise ValueError(f"the sequences of lengths {lengths} ({layout}): one ends before it starts")
    return list(zip(starts.tolist(), ends.tolist()))


_AXES = {"BSH": (0, 2, 1, 3), "BSND": (0, 2, 1, 3), "SBH": (1, 2, 0, 3), "BNSD": (0, 1, 2, 3)}  # to (B, N, S, D)


def _split_heads(x, layout, size):
    """A tensor in its layout -> (B, N, S, D), B = 1 for the flat layouts."""
    if layout in ("BSH", "SBH", "TH"):
        x = x.reshape(*x.shape[:-1], -1, size)
    return x.transpose(1, 0, 2)[None] if layout in _FLAT else x.transpose(_AXES[layout])


def _merge(parts, layout, tokens):
    """Inverse of `_split_heads` and of the split into sequences; zeros after the last sequence, up to `tokens`."""
    x = np.concatenate(parts, 2)
    if layout in _FLAT:
        x = x[0].transpose(1, 0, 2)
        x = np.concatenate([x, np.zeros((tokens - len(x), *x.shape[1:]), x.dtype)])
    else:
        x = x.transpose(np.argsort(_AXES[layout]))
    return x.reshape(*x.shape[:-2], -1) if layout in ("BSH", "SBH", "TH") else x


def _split_statistics(layout, q_lengths, *statistics):
    """(B, N, S, 1) of softmax_max and softmax_sum for each item of `_sequences`."""
    if layout != "TND":
        return [[tensor[..., :1] for tensor in statistics]]
    return [
        [tensor[start:end, :, :1].transpose(1, 0, 2)[None] for tensor in statistics]
        for start, end in _spans(layout, q_lengths, statistics[0])
        if end > start
    ]


def _placeholder(spec):
    """An output that nobody reads."""
    return as_output(np.zeros([max(size, 0) for size in spec.shape]), spec)


def hidden(
    mask: Array | None, sparse_mode: int, queries: int, keys: int, pre_tokens: int, next_tokens: int
) -> Array | None:
    """The mask of scores of S queries and T keys: True where hidden, broadcast to (B, N, S, T).

    Args:
        mask: 1 where a key is hidden: (S, T), (B, 1, S, T) or (B, N, S, T); modes 2 to 4 take the upper triangle of
            2048 x 2048 instead.
        sparse_mode: 0 mask as given (None: no mask), 1 the same without a band, 2 causal from the top left corner,
            3 causal from the bottom right corner, 4 a band from the bottom right corner.
        pre_tokens, next_tokens: the band of modes 0 and 4.

    Raises:
        NotImplementedError: another sparse mode; a mask of mode 0 that shows keys outside of its band.
        ValueError: a mask of another form than its mode takes; a query that sees no key.
    """
    if sparse_mode in (0, 1):
        result = _given(mask, sparse_mode, queries, keys)
        if sparse_mode == 0 and result is not None and (~result & ~_band(queries, keys, pre_tokens, next_tokens)).any():
            raise NotImplementedError(
                f"an attention mask that shows keys outside of pre_tokens {pre_tokens} and next_tokens {next_tokens}"
            )
    elif sparse_mode in (2, 3, 4):
        _check_triangle(mask, _COMPRESSED, f"sparse_mode {sparse_mode}")
        corner = 0 if sparse_mode == 2 else keys - queries
        before = pre_tokens - corner if sparse_mode == 4 else queries
        result = ~_band(queries, keys, before, corner + (next_tokens if sparse_mode == 4 else 0))
    else:
        raise NotImplementedError(f"sparse_mode {sparse_mode}: only 0 to 4 are implemented")
    if result is not None and result.all(-1).any():
        raise ValueError("a query that sees no key")
    return result


def causal_prefill(mask: Array, queries: int, keys: int) -> Array:
    """The (S, T) mask of scores in the layout TH, whose kernel makes a causal mask of any size out of 128 x 128.

    `mask` (128, 128), the upper triangle, is nonzero where a key is hidden (-10000, in bfloat16 1).

    Raises:
        ValueError: another mask; different numbers of queries and keys.
    """
    _check_triangle(mask, _PREFILL, "the layout TH")
    if queries != keys:
        raise ValueError(f"{queries} queries and {keys} keys in the layout TH")
    return ~_band(queries, keys, queries, 0)


def _band(queries, keys, before, after):
    """(S, T) bool: keys from i - before to i + after of query i."""
    distance = np.arange(keys) - np.arange(queries)[:, None]
    return (distance >= -before) & (distance <= after)


def _given(mask, sparse_mode, queries, keys):
    if mask is None:
        if sparse_mode == 1:
            raise ValueError("sparse_mode 1 without a mask")
        return None
    if mask.shape[-2:] != (queries, keys):
        raise ValueError(f"sparse_mode {sparse_mode} with a mask of {mask.shape} for {queries} queries and {keys} keys")
    return mask != 0


def _check_triangle(mask, side, who):
    """Refuses all but an upper triangle, from which the kernels slice the mask of each of their tiles."""
    if mask is None or mask.shape != (side, side):
        raise ValueError(f"{who} takes a mask of {side} x {side}, not {mask if mask is None else mask.shape}")
    known = _CHECKED.get(id(mask))
    if known is not None and known() is mask:
        return
    wrong = (mask != 0) != np.triu(np.ones((side, side), bool), 1)
    if wrong.any():
        index = tuple(int(axis) for axis in np.argwhere(wrong)[0])
        raise ValueError(f"{who} takes the upper triangle as its mask, which differs at {index}")
    if not mask.flags.writeable:
        _CHECKED[id(mask)] = weakref.ref(mask)
