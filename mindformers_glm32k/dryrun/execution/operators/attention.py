"""Flash attention and its gradient, for whole score matrices.

Letters: B batch, S queries, T keys, N query heads, K key heads (N is a multiple), D head size, H = N * D; in the layout TND, T is the
number of tokens of all sequences. Precision as the kernel's: scores and softmax in float32, probabilities and their
gradients rounded to the inputs' dtype before a matrix product, sums in float32.
Source: the docstring of mindspore.ops.flash_attention_score; FlashAttention-2 (arXiv:2307.08691) for the gradient.
"""
import numpy as np

from mindformers_glm32k.dryrun.execution.operators import operator
from mindformers_glm32k.dryrun.execution.operators.masks import hidden
from mindformers_glm32k.dryrun.execution.operators.numeric import as_output, refuse, rounded, wide

_LAYOUTS = ("BSH", "BNSD", "SBH", "BSND", "TND")  # by MindSpore's number
_LANES = 8  # softmax_max and softmax_sum repeat each value


@operator("FlashAttentionScore")
def flash_attention_score(call, query, key, value, real_shift, drop_mask, padding_mask, attn_mask, prefix, actual_seq_qlen,
                          actual_seq_kvlen, head_num, keep_prob, scale_value, pre_tokens, next_tokens, inner_precise,
                          input_layout, sparse_mode):
    """softmax(scale * query @ keyᵀ, masked) @ value.

    query, key, value in `input_layout`, attn_mask see `masks.hidden`; actual_seq_* the cumulative lengths of TND.
    -> softmax_max, softmax_sum (B, N, S, 8) or (T, N, 8) float32, softmax_out (a placeholder), attention_out as query.
    """
    refuse(call, real_shift=(real_shift, None), drop_mask=(drop_mask, None), padding_mask=(padding_mask, None),
           prefix=(prefix, None), keep_prob=(keep_prob, 1.0))
    layout = _layout(input_layout)
    dtype = call.output[3].dtype
    maximum, total, attention = [], [], []
    for q, k, v, mask in _sequences(layout, head_num, attn_mask, actual_seq_qlen, actual_seq_kvlen, query, key, value):
        scores = _scores(q, k, mask, scale_value, pre_tokens, next_tokens, sparse_mode)
        largest = scores.max(-1, keepdims=True)
        weights = np.exp(scores - largest)
        sums = weights.sum(-1, keepdims=True)
        maximum.append(np.repeat(largest, _LANES, -1))
        total.append(np.repeat(sums, _LANES, -1))
        attention.append(rounded(weights, dtype) @ _grouped(v, q) / sums)
    statistics = [as_output(_join_statistics(parts, layout), spec) for parts, spec in zip((maximum, total), call.output)]
    return (*statistics, _placeholder(call.output[2]), as_output(_join(attention, layout), call.output[3]))


@operator("FlashAttentionScoreGrad")
def flash_attention_score_grad(call, query, key, value, dy, real_shift, drop_mask, padding_mask, attn_mask, softmax_max,
                               softmax_sum, softmax_in, attention_in, prefix, actual_seq_qlen, actual_seq_kvlen, head_num,
                               keep_prob, scale_value, pre_tokens, next_tokens, inner_precise, input_layout, sparse_mode):
    """Gradient of FlashAttentionScore, with its softmax_max, softmax_sum and attention_out (attention_in) -> dq, dk, dv, and a
    placeholder for the gradient of real_shift."""
    refuse(call, real_shift=(real_shift, None), drop_mask=(drop_mask, None), padding_mask=(padding_mask, None),
           prefix=(prefix, None), keep_prob=(keep_prob, 1.0))
    layout = _layout(input_layout)
    dtype = call.output[0].dtype
    statistics = _split_statistics(layout, actual_seq_qlen, softmax_max, softmax_sum)
    gradients = []
    for (q, k, v, out, dout, mask), (largest, sums) in zip(
            _sequences(layout, head_num, attn_mask, actual_seq_qlen, actual_seq_kvlen, query, key, value, attention_in, dy),
            statistics):
        scores = _scores(q, k, mask, scale_value, pre_tokens, next_tokens, sparse_mode)
        weights = np.exp(scores - largest) / sums
        dweights = dout @ _grouped(v, q).swapaxes(-1, -2)
        dscores = rounded(weights * (dweights - np.sum(dout * out, -1, keepdims=True)), dtype)
        gradients.append((dscores @ _grouped(k, q) * scale_value,
                          _ungrouped(dscores.swapaxes(-1, -2) @ q * scale_value, k),
                          _ungrouped(rounded(weights, dtype).swapaxes(-1, -2) @ dout, v)))
    results = [as_output(_join(parts, layout), spec) for parts, spec in zip(zip(*gradients), call.output)]
    return (*results, _placeholder(call.output[3]))


def _scores(q, k, mask, scale, pre_tokens, next_tokens, sparse_mode):
    """(B, N, S, T) scaled scores, -inf where hidden."""
    scores = q @ _grouped(k, q).swapaxes(-1, -2) * scale
    hide = hidden(mask, sparse_mode, q.shape[2], k.shape[2], pre_tokens, next_tokens)
    return scores if hide is None else np.where(hide, -np.inf, scores)


def _grouped(x, q):
    """(B, K, T, D) -> (B, N, T, D): each key head for its query heads."""
    return np.repeat(x, q.shape[1] // x.shape[1], 1)


def _ungrouped(gradient, x):
    """(B, N, T, D) -> (B, K, T, D): the sum over the query heads of a key head."""
    batch, heads, length, size = x.shape
    return gradient.reshape(batch, heads, -1, length, size).sum(2)


def _layout(number):
    if number not in range(len(_LAYOUTS)):
        raise NotImplementedError(f"input_layout {number!r}: only {_LAYOUTS} (0 to 4) are implemented")
    return _LAYOUTS[number]


def _sequences(layout, head_num, mask, q_ends, kv_ends, query, key, value, *like_query):
    """Yields (B, N or K, S or T, D) arrays of all tensors and the mask: one item, or one a sequence of TND."""
    if layout != "TND" and not (q_ends is None and kv_ends is None):
        raise NotImplementedError(f"actual_seq_qlen {q_ends!r}, actual_seq_kvlen {kv_ends!r} in the layout {layout}")
    size = query.shape[-1] // head_num if layout in ("BSH", "SBH") else query.shape[-1]
    heads = [_apart(wide(tensor), layout, size) for tensor in (query, key, value, *like_query)]
    if heads[0].shape[1] != head_num or head_num % heads[1].shape[1]:
        raise ValueError(f"head_num {head_num} for a query of {query.shape} and a key of {key.shape} in the layout {layout}")
    if layout != "TND":
        yield (*heads, mask)
        return
    for (q_start, q_end), (kv_start, kv_end) in zip(_spans(q_ends, query), _spans(kv_ends, key)):
        spans = [(q_start, q_end), (kv_start, kv_end), (kv_start, kv_end)] + [(q_start, q_end)] * len(like_query)
        yield (*(tensor[:, :, start:end] for tensor, (start, end) in zip(heads, spans)), mask)


def _spans(ends, tensor):
    """[(start, end)] of each sequence, from cumulative lengths."""
    ends = [int(end) for end in ends]
    if ends[-1] != tensor.shape[0]:
        raise ValueError(f"the sequences' lengths end at {ends[-1]}, the tensor has {tensor.shape[0]} tokens")
    return list(zip([0, *ends[:-1]], ends))


def _apart(x, layout, size):
    """A tensor in its layout -> (B, N, S, D)."""
    if layout in ("BSH", "SBH"):
        x = x.reshape(*x.shape[:2], -1, size)
    if layout == "TND":
        return x.transpose(1, 0, 2)[None]
    return x.transpose({"BSH": (0, 2, 1, 3), "SBH": (1, 2, 0, 3), "BSND": (0, 2, 1, 3), "BNSD": (0, 1, 2, 3)}[layout])


def _join(parts, layout):
    """Inverse of `_apart` and of the cut into sequences."""
    x = np.concatenate(parts, 2)
    if layout == "TND":
        return x[0].transpose(1, 0, 2)
    x = x.transpose({"BSH": (0, 2, 1, 3), "SBH": (2, 0, 1, 3), "BSND": (0, 2, 1, 3), "BNSD": (0, 1, 2, 3)}[layout])
    return x.reshape(*x.shape[:2], -1) if layout in ("BSH", "SBH") else x


def _join_statistics(parts, layout):
    return _join(parts, layout) if layout == "TND" else parts[0]


def _split_statistics(layout, q_ends, *statistics):
    """(B, N, S, 1) of softmax_max and softmax_sum for each item of `_sequences`."""
    if layout != "TND":
        return [[tensor[..., :1] for tensor in statistics]]
    return [[tensor[start:end, :, :1].transpose(1, 0, 2)[None] for tensor in statistics]
            for start, end in _spans(q_ends, statistics[0])]


def _placeholder(spec):
    """An output that nobody reads."""
    return as_output(np.zeros([max(size, 0) for size in spec.shape]), spec)
