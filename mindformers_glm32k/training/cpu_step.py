"""What a train step does differently on portable cells: one forward pass instead of two, gradient norms summed axis by
axis, and an optimizer update in place.

Upstream's train step runs the network for the loss and again inside the gradient; on NPUs the compiler merges the two,
but it does not merge loops. Upstream's AdamW takes some twenty operators per parameter; on CPU each of them makes a
tensor of the parameter's size, in all 2.6 GB for the two vocabulary matrices of 65024 x 512.
"""

from __future__ import annotations

import mindspore.common.dtype as mstype
from mindformers.core.clip_grad import ClipGradNorm, apply_global_norm
from mindformers.core.optim.adamw import AdamW
from mindspore import ParameterTuple, Tensor, nn, ops
from mindspore.ops import composite as C
from mindspore.ops import functional as F
from mindspore.ops import operations as P

_square_sum = C.MultitypeFuncGraph("glm32k_square_sum")


def sum_of(x: Tensor) -> Tensor:
    """Sum () of all elements of a tensor of one axis or more, in float32.

    One axis after the other: MindSpore's CPU kernel takes thirty times as long for all axes of a matrix at once.
    """
    return ops.cast(x, mstype.float32).reshape((-1, x.shape[-1])).sum(-1).sum()


@_square_sum.register("Tensor")
def _square_sum_of_tensor(gradient):
    return sum_of(ops.square(gradient))


class _ScaledLoss(nn.Cell):
    """(loss * scale, loss) of a network."""

    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, scale, *inputs):
        loss = self.network(*inputs)
        return loss * ops.cast(scale, loss.dtype), loss


class LossAndGradients(nn.Cell):
    """The loss of a network and the gradients of (loss * scale), by one forward pass.

    With `micro_batches` > 1 the batch is split along its first axis, and losses and gradients of the micro batches
    are added up. Each starts after the gradients of the one before, so that only its activations are in memory.

    Inputs:
        scale (Tensor): the loss scale ().
        *inputs (Tensor): inputs of the network, which returns the loss ().

    Outputs:
        tuple: loss (), tuple of the weights' gradients, not divided by the scale.
    """

    def __init__(self, network: nn.Cell, weights: ParameterTuple, micro_batches: int = 1):
        super().__init__(auto_prefix=False)
        self.function = ops.value_and_grad(_ScaledLoss(network), None, weights, has_aux=True)
        self.micro_batches = micro_batches
        self.each = C.HyperMap()

    def construct(self, scale, *inputs):
        (_, loss), gradients = self.function(scale, *self.part(inputs, 0))
        for i in range(1, self.micro_batches):
            (_, more), further = self.function(F.depend(scale, gradients), *self.part(inputs, i))
            loss = loss + more
            gradients = self.each(F.add, gradients, further)
        return loss, gradients

    def part(self, inputs: tuple, i: int) -> tuple:
        """Micro batch i of the inputs: (B, …) each -> (B / micro batches, …)."""
        if self.micro_batches == 1:
            return inputs
        parts = ()
        for x in inputs:
            size = x.shape[0] // self.micro_batches
            parts += (x[i * size : (i + 1) * size],)
        return parts


class PortableClipGradNorm(ClipGradNorm):
    """Upstream's ClipGradNorm with `sum_of`; the same inputs and outputs."""

    def construct(self, x):
        norm = ops.sqrt(F.addn(self.hyper_map(_square_sum, x))).reshape((1,))
        divisor = ops.maximum(norm, self.clip_norm)
        return self.hyper_map(F.partial(apply_global_norm, self.clip_norm, divisor), x), norm


class InPlaceAdamW(AdamW):
    """Upstream's AdamW, whose update is MindSpore's kernel AdamWeightDecay; see `update_in_place`.

    The kernel knows no bias correction. With c1 = 1 - beta1^t and c2 = 1 - beta2^t it is in the learning rate
    (lr sqrt(c2) / c1), in epsilon (eps sqrt(c2)) and out of the weight decay (wd c1 / sqrt(c2)).
    """

    def construct(self, gradients):
        weight_decay, rate = self.get_weight_decay(), self.get_lr()
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        step = F.depend(self.global_step, gradients).reshape(())
        step = ops.cast(step, mstype.float32)
        beta1, beta2 = self.beta1.reshape(()), self.beta2.reshape(())
        first = 1.0 - ops.pow(beta1, step)
        second = ops.sqrt(1.0 - ops.pow(beta2, step))
        updated = ()
        for i in range(len(self.exp_avg)):
            rate_i = rate[i] if self.is_group_lr else rate
            decay_i = weight_decay[i] if self.is_group else weight_decay
            done = self.update(
                self._parameters[i],
                self.exp_avg[i],
                self.exp_avg_sq[i],
                ops.cast(rate_i, mstype.float32).reshape(()) * second / first,
                beta1,
                beta2,
                self.eps.reshape(()) * second,
                decay_i * first / second,
                gradients[i],
            )
            updated += (done[0],)
        return updated


def update_in_place(optimizer: nn.Optimizer) -> None:
    """Makes upstream's AdamW update its parameters in place, where the kernel supports them: all float32, no sharding.

    Parameters, states, their names and settings stay; another optimizer is left as it is.
    """
    if type(optimizer) is not AdamW or optimizer.use_parallel or not all(optimizer.optim_filter):
        return
    if any(parameter.dtype != mstype.float32 for parameter in optimizer.parameters):
        return
    optimizer.__class__ = InPlaceAdamW
    optimizer.update = P.AdamWeightDecay()
