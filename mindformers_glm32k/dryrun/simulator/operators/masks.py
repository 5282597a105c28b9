"""Which keys a query does not see, by flash attention's sparse modes.

Source: the docstring of mindspore.ops.flash_attention_score (attn_mask, sparse_mode, pre_tokens, next_tokens).
"""

import weakref

import numpy as np

COMPRESSED = 2048  # side of the mask that stands for a mask of any size in modes 2 to 4
PREFILL = 128  # the same for the layout TH
_RIGHT = {}  # id -> weak reference: constants found to be such a triangle; looking takes longer than short attention


def hidden(mask, sparse_mode, queries, keys, pre_tokens, next_tokens):
    """The mask of scores.

    Args:
        mask (numpy.ndarray | None): 1 where a key is hidden: (S, T), (B, 1, S, T) or (B, N, S, T); modes 2 to 4 take
            the upper triangle of 2048 x 2048 instead.
        sparse_mode (int): 0 mask as given (None: no mask), 1 the same without a band, 2 causal from the top left
            corner, 3 causal from the bottom right corner, 4 a band from the bottom right corner.
        queries (int), keys (int): S, T.
        pre_tokens (int), next_tokens (int): the band that modes 0 and 4 compute.

    Returns:
        numpy.ndarray | None: bool, True where hidden, to be broadcast to (B, N, S, T).

    Raises:
        NotImplementedError: another sparse mode; a mask of mode 0 that shows what lies outside of its band.
        ValueError: the mask has not the form that its mode takes; a query that sees no key.
    """
    if sparse_mode in (0, 1):
        result = _given(mask, sparse_mode, queries, keys)
        if sparse_mode == 0 and result is not None and (~result & ~_band(queries, keys, pre_tokens, next_tokens)).any():
            raise NotImplementedError(
                f"an attention mask that shows keys outside of pre_tokens {pre_tokens} and next_tokens {next_tokens}"
            )
    elif sparse_mode in (2, 3, 4):
        _check_triangle(mask, COMPRESSED, f"sparse_mode {sparse_mode}")
        corner = 0 if sparse_mode == 2 else keys - queries
        before = pre_tokens - corner if sparse_mode == 4 else queries
        result = ~_band(queries, keys, before, corner + (next_tokens if sparse_mode == 4 else 0))
    else:
        raise NotImplementedError(f"sparse_mode {sparse_mode}: only 0 to 4 are implemented")
    if result is not None and result.all(-1).any():
        raise ValueError("a query that sees no key")
    return result


def causal_prefill(mask, queries, keys):
    """The mask of scores in the layout TH, whose kernel makes a causal mask of any size out of 128 x 128.

    Args:
        mask (numpy.ndarray): (128, 128), not 0 (a summand: -10000, or 1 in bfloat16) where a key is hidden: the upper
            triangle.
        queries (int), keys (int): S, T.

    Returns:
        numpy.ndarray: (S, T) bool.

    Raises:
        ValueError: another mask; fewer keys or more keys than queries.
    """
    _check_triangle(mask, PREFILL, "the layout TH")
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
    """The kernels cut their tiles out of such a mask: any other would give something else from tile to tile."""
    if mask is None or mask.shape != (side, side):
        raise ValueError(f"{who} takes a mask of {side} x {side}, not {mask if mask is None else mask.shape}")
    known = _RIGHT.get(id(mask))
    if known is not None and known() is mask:
        return
    wrong = (mask != 0) != np.triu(np.ones((side, side), bool), 1)
    if wrong.any():
        place = tuple(int(index) for index in np.argwhere(wrong)[0])
        raise ValueError(f"{who} takes the upper triangle as its mask, which differs at {place}")
    if not mask.flags.writeable:
        _RIGHT[id(mask)] = weakref.ref(mask)
