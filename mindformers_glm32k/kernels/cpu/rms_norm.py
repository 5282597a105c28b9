"""RMSNorm from elementwise operators, where upstream uses the fused NPU kernel RmsNorm."""

from __future__ import annotations

import mindspore.common.dtype as mstype
from mindspore import Parameter, nn
from mindspore.common.initializer import initializer
from mindspore.ops import operations as P


class RMSNormalization(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (https://arxiv.org/abs/1910.07467).

    The weight (H,) is an input; x and the output are (..., H), of the same float type.
    """

    def __init__(self, eps: float, compute_type: mstype.Type = mstype.float32):
        super().__init__()
        self.eps = float(eps)
        self.compute_type = compute_type
        self.cast = P.Cast()
        self.square = P.Square()
        self.mean = P.ReduceMean(keep_dims=True)
        self.add = P.Add()
        self.rsqrt = P.Rsqrt()
        self.normalize = P.Mul()
        self.scale = P.Mul()
        self.flat = True  # reshape to two axes, on which the kernel of ReduceMean is five times faster

    def construct(self, x, weight):
        dtype = x.dtype
        x = self.cast(x, self.compute_type)
        squares = self.square(x)
        if self.flat:
            mean = self.mean(squares.reshape((-1, x.shape[-1])), -1).reshape(x.shape[:-1] + (1,))
        else:
            mean = self.mean(squares, -1)
        inverse = self.rsqrt(self.add(mean, self.eps))
        y = self.scale(self.normalize(x, inverse), self.cast(weight, self.compute_type))
        return self.cast(y, dtype)

    def shard(self, strategy: tuple[tuple[int, ...]]) -> None:
        """Sets the sharding of x, e.g. ((dp, cp, 1),); the last axis stays whole."""
        tokens = strategy[0]
        self.flat = all(parts == 1 for parts in tokens)  # a reshape would move what is sharded
        for primitive in (self.square, self.mean, self.rsqrt):
            primitive.shard((tokens,))
        self.add.shard((tokens, ()))
        self.normalize.shard((tokens, tokens))
        self.scale.shard((tokens, (1,)))


class RMSNorm(RMSNormalization):
    """The same with the weight as its parameter; names and constructor are those of upstream's ChatGLM2RMSNorm."""

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        param_init_type: mstype.Type = mstype.float32,
        compute_type: mstype.Type = mstype.float32,
    ):
        super().__init__(eps, compute_type)
        # bfloat16 has no initializer on every host; ones are exact in it
        self.weight = Parameter(
            initializer("ones", (dim,), dtype=mstype.float32).init_data().astype(param_init_type)
            if param_init_type == mstype.bfloat16
            else initializer("ones", (dim,), dtype=param_init_type)
        )

    def construct(self, x):
        return super().construct(x, self.weight)
