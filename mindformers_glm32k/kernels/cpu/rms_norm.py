"""RMSNorm from elementwise operators, where upstream uses the fused NPU kernel RmsNorm."""

import mindspore.common.dtype as mstype
from mindspore import Parameter, nn
from mindspore.common.initializer import initializer
from mindspore.ops import operations as P


class RMSNorm(nn.Cell):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis (https://arxiv.org/abs/1910.07467).

    Same parameter name (`weight`), shape and constructor as upstream's ChatGLM2RMSNorm.

    Args:
        dim (int): size of the last axis.
        eps (float): added to the mean square.
        param_init_type: dtype of the weight.
        compute_type: dtype of the computation.

    Inputs:
        x (Tensor): (..., dim), any float type.

    Outputs:
        Tensor: shape and dtype of x.
    """

    def __init__(self, dim, eps=1e-6, param_init_type=mstype.float32, compute_type=mstype.float32):
        super().__init__()
        # bfloat16 has no initializer on every host; ones are exact in it
        self.weight = Parameter(
            initializer("ones", (dim,), dtype=mstype.float32).init_data().astype(param_init_type)
            if param_init_type == mstype.bfloat16
            else initializer("ones", (dim,), dtype=param_init_type)
        )
        self.eps = float(eps)
        self.compute_type = compute_type
        self.cast = P.Cast()
        self.square = P.Square()
        self.mean = P.ReduceMean(keep_dims=True)
        self.add = P.Add()
        self.rsqrt = P.Rsqrt()
        self.normalize = P.Mul()
        self.scale = P.Mul()

    def construct(self, x):
        dtype = x.dtype
        x = self.cast(x, self.compute_type)
        inverse = self.rsqrt(self.add(self.mean(self.square(x), -1), self.eps))
        y = self.scale(self.normalize(x, inverse), self.cast(self.weight, self.compute_type))
        return self.cast(y, dtype)

    def shard(self, strategy):
        """Sharding of x, e.g. ((dp, cp, 1),); the last axis stays whole."""
        rows = strategy[0]
        for primitive in (self.square, self.mean, self.rsqrt):
            primitive.shard((rows,))
        self.add.shard((rows, ()))
        self.normalize.shard((rows, rows))
        self.scale.shard((rows, (1,)))
