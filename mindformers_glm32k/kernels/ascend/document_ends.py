"""Where the documents of packed rows end, as flash attention's variable-length form takes it.

    document_ids   0 0 0 0 1 1 1 2 2 2 2 3 3      three documents and padding, five places
    ends           4 7 11 13 13                   of the row; the next row's follow, counted on

The kernel takes cumulative lengths over all rows of a device; places that no document fills have no tokens
(https://www.hiascend.com/document/detail/zh/canncommercial/800/apiref/aolapi/context/aclnnFlashAttentionVarLenScore.md:
a length of 0 is allowed for queries and keys together).

Legend: B rows, S tokens of a row, K places of a row.
"""

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import operations as P

from mindformers_glm32k.parallel import one_program


@ops.constexpr
def least_ends(rows, length, places, parts):
    """What the ends are at least, and what is added to them.

    Args:
        rows (int): B; length (int): S; places (int): K.
        parts (int): devices that share the rows.

    Returns:
        tuple[Tensor]: (1, K) float32, S for the last place, so that no token is left out; (B, 1) float32, the tokens of
        the device's rows before.
    """
    least = np.zeros((1, places), np.float32)
    least[0, -1] = length
    before = np.arange(rows, dtype=np.float32).reshape(rows, 1) % (rows // parts) * length
    return Tensor(least), Tensor(before)


class DocumentEnds(nn.Cell):
    """Cumulative lengths of the documents of packed rows, without a tensor of S x S.

    Args:
        places (int): K, documents of a row and one for padding.
        data (int): rows are cut over so many devices.

    Inputs:
        document_ids (Tensor): (B, S) int32, rising along the row from 0, below K.

    Outputs:
        Tensor: (B * K,) int64.
    """

    def __init__(self, places, data):
        super().__init__()
        self.places = places
        self.parts = data if one_program() else 1
        self.numbers = Tensor(np.arange(places, dtype=np.int32).reshape(1, 1, places))
        self.expand = P.ExpandDims().shard(((data, 1),))
        self.not_after = P.LessEqual().shard(((data, 1, 1), (1, 1, 1)))
        self.as_number = P.Cast().shard(((data, 1, 1),))
        self.count = P.ReduceSum().shard(((data, 1, 1),))
        self.at_least = P.Maximum().shard(((data, 1), (1, 1)))
        self.shift = P.Add().shard(((data, 1), (data, 1)))
        self.as_end = P.Cast().shard(((data, 1),))

    def construct(self, document_ids):
        rows, length = document_ids.shape
        least, before = least_ends(rows, length, self.places, self.parts)
        inside = self.not_after(self.expand(document_ids, 2), self.numbers)  # (B, S, K)
        # float32 counts exactly up to 2**24, more than any row has
        ends = self.count(self.as_number(inside, mstype.float32), 1)  # (B, K)
        ends = self.shift(self.at_least(ends, least), before)
        return self.as_end(ends, mstype.int64).reshape((-1,))
