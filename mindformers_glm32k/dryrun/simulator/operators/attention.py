"""Flash attention and its gradient, for whole score matrices.

Letters: B batch, S queries, T keys, N query heads, K key heads (N is a multiple), D head size, H = N * D; in the
layouts TND and TH (which prediction uses), T is the number of tokens of all sequences. Precision as the kernel's:
scores and softmax in float32, probabilities and their gradients rounded to the inputs' dtype before a matrix product,
sums in float32.
Source: the docstring of mindspore.ops.flash_attention_score; FlashAttention-2 (arXiv:2307.08691) for the gradient.
"""

import numpy as np

from mindformers_glm32k.dryrun.simulator.operators import operator
from mindformers_glm32k.dryrun.simulator.operators.masks import causal_prefill, hidden
from mindformers_glm32k.dryrun.simulator.operators.numeric import as_output, refuse, rounded, wide

_LAYOUTS = ("BSH", "BNSD", "SBH", "BSND", "TND", "TH")  # by MindSpore's number
_FLAT = ("TND", "TH")  # all sequences behind each other
_LANES = 8  # softmax_max and softmax_sum repeat each value


@operator("FlashAttentionScore")
def flash_attention_score(
    call,
    query,
    key,
    value,
    real_shift,
    drop_mask,
    padding_mask,
    attn_mask,
    prefix,
    actual_seq_qlen,
    actual_seq_kvlen,
    head_num,
    keep_prob,
    scale_value,
    pre_tokens,
    next_tokens,
    inner_precise,
    input_layout,
    sparse_mode,
):
    """softmax(scale * query @ keyᵀ, masked) @ value.

    query, key, value in `input_layout`; attn_mask see `masks.hidden`, for TH `masks.causal_prefill`; actual_seq_*:
    cumulative lengths for TND, each sequence's own for TH, where zeros are the answer to what lies behind the last;
    a sequence may have no tokens at all.
    -> softmax_max, softmax_sum (B, N, S, 8), (T, N, 8) or (T, N * 8) float32, softmax_out (a placeholder),
    attention_out as query.
    """
    refuse(
        call,
        real_shift=(real_shift, None),
        drop_mask=(drop_mask, None),
        padding_mask=(padding_mask, None),
        prefix=(prefix, None),
        keep_prob=(keep_prob, 1.0),
    )
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
    maximum, total = (parts[0] if layout not in _FLAT else _join(parts, layout, tokens) for parts in (maximum, total))
    return (
        as_output(maximum, call.output[0]),
        as_output(total, call.output[1]),
        _placeholder(call.output[2]),
        as_output(_join(attention, layout, tokens), call.output[3]),
    )


@operator("FlashAttentionScoreGrad")
def flash_attention_score_grad(
    call,
    query,
    key,
    value,
    dy,
    real_shift,
    drop_mask,
    padding_mask,
    attn_mask,
    softmax_max,
    softmax_sum,
    softmax_in,
    attention_in,
    prefix,
    actual_seq_qlen,
    actual_seq_kvlen,
    head_num,
    keep_prob,
    scale_value,
    pre_tokens,
    next_tokens,
    inner_precise,
    input_layout,
    sparse_mode,
):
    """Gradient of FlashAttentionScore, with its softmax_max, softmax_sum and attention_out (attention_in).

    -> dq, dk, dv, and a placeholder for the gradient of real_shift.
    """
    refuse(
        call,
        real_shift=(real_shift, None),
        drop_mask=(drop_mask, None),
        padding_mask=(padding_mask, None),
        prefix=(prefix, None),
        keep_prob=(keep_prob, 1.0),
    )
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
        as_output(_join(parts, layout, tensor.shape[0]), spec)
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


def _layout(number, known):
    if number not in range(len(known)):
        raise NotImplementedError(f"input_layout {number!r}: only {known} (0 to {len(known) - 1}) are implemented")
    return known[number]


def _sequences(layout, head_num, mask, q_lengths, kv_lengths, query, key, value, *like_query):
    """Yields (B, N or K, S or T, D) arrays of all tensors and the mask: one item, or one a sequence of TND and TH."""
    if layout not in _FLAT and not (q_lengths is None and kv_lengths is None):
        raise NotImplementedError(
            f"actual_seq_qlen {q_lengths!r}, actual_seq_kvlen {kv_lengths!r} in the layout {layout}"
        )
    size = query.shape[-1] // head_num if layout in ("BSH", "SBH", "TH") else query.shape[-1]
    heads = [_apart(wide(tensor), layout, size) for tensor in (query, key, value, *like_query)]
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


def _apart(x, layout, size):
    """A tensor in its layout -> (B, N, S, D), B 1 where all sequences are behind each other."""
    if layout in ("BSH", "SBH", "TH"):
        x = x.reshape(*x.shape[:-1], -1, size)
    return x.transpose(1, 0, 2)[None] if layout in _FLAT else x.transpose(_AXES[layout])


def _join(parts, layout, tokens):
    """Inverse of `_apart` and of the cut into sequences, with zeros up to `tokens` where these do not reach."""
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
