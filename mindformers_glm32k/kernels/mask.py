"""Causal masks as cheap expressions of positions.

Upstream casts a boolean S x S constant to uint8 and multiplies it by -10000; where the product is computed in
uint8 it wraps around, masked scores are raised instead of lowered, and tokens see the future without an error.
These masks are float from the start and are never stored at construction.

Legend: B batch, Q queries, K keys.
"""

from __future__ import annotations

import mindspore.common.dtype as mstype
from mindspore import Tensor, ops

MASKED = -1.0e30  # added to a float32 score, whose softmax weight then underflows to exactly 0


def hides(query_position: Tensor, key_position: Tensor) -> Tensor:
    """Which keys a query must not see: (Q,) and (K,) integers -> (Q, K) bool, true where the key is later."""
    return ops.expand_dims(key_position, 0) > ops.expand_dims(query_position, 1)


def differs(query_document: Tensor, key_document: Tensor) -> Tensor:
    """Which keys belong to another document than the query: (B, Q) and (B, K) integers -> (B, Q, K) bool."""
    return ops.expand_dims(key_document, 1) != ops.expand_dims(query_document, 2)


def causal_bias(query_position: Tensor, key_position: Tensor) -> Tensor:
    """The causal mask as an additive float32 bias (Q, K) of the scores: 0 where visible, MASKED where hidden."""
    return ops.cast(hides(query_position, key_position), mstype.float32) * MASKED
