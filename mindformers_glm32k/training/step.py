"""The train steps of GLM32K: upstream's, with an overflow check that runs on every device, and with a loss that is the
mean over all tokens of the step however the batch is split.

Upstream adds up the mean losses of micro batches (pipeline, gradient accumulation, interleaving): a token of a micro
batch with few labels counts for more, and loss, gradient and clipping depend on the split. Here the loss weights of the
tokens are normalized over the whole batch before it is split.

Legend: B batch, S tokens of a sequence.
"""

from __future__ import annotations

import mindspore.common.dtype as mstype
from mindformers.wrapper.wrapper import MFPipelineWithLossScaleCell, MFTrainOneStepCell
from mindspore import Tensor, nn, ops
from mindspore.ops import composite as C
from mindspore.ops import operations as P

from mindformers_glm32k import compat
from mindformers_glm32k.parallel import data_parallel_devices
from mindformers_glm32k.training import wrappers
from mindformers_glm32k.training.cpu_step import LossAndGradients, PortableClipGradNorm, sum_of, update_in_place

_count_non_finite = C.MultitypeFuncGraph("glm32k_count_non_finite")


@_count_non_finite.register("Tensor")
def _tensor_is_non_finite(gradient):
    """1.0 when any element is NaN or infinite, else 0.0."""
    # the sum is not finite when an element is not, and needs no tensor of the gradient's size
    return 1.0 - ops.cast(ops.isfinite(sum_of(gradient)), mstype.float32)


class TokenWeightNormalizer(nn.Cell):
    """Divides the loss weights of a batch by their sum, for a network that splits the batch into micro batches.

    The network, wrapped or not, is told not to divide by itself: it returns sums of (weight x token loss), which add up
    to the mean over the whole batch. `divisor` is what upstream's train step divides the gradients by; the weights are
    multiplied by it in advance.

    Inputs:
        - input_ids, labels (Tensor): (B, S) int32; labels are -100 where there is no loss.
        - further inputs, among them loss weights (B, S) where the data set has them.

    Outputs:
        tuple: the inputs, with the normalized loss weights (B, S) float32.
    """

    def __init__(self, network: nn.Cell, divisor: int):
        super().__init__(auto_prefix=False)
        wrappers.innermost_network(network).weights_are_normalized = True
        self.index = wrappers.index_of_input(network, "input_mask", 2)
        self.divisor = Tensor(divisor, mstype.float32)
        whole = ((1, 1), ())
        self.differs = P.NotEqual().shard(whole)
        self.cast = P.Cast().shard(((1, 1),))
        self.sum = P.ReduceSum().shard(((1, 1),))
        self.scale = P.Mul().shard(whole)
        self.smallest = Tensor(1e-6, mstype.float32)
        self.devices = data_parallel_devices()
        self.sum_over_devices = P.AllReduce() if self.devices > 1 else None

    def construct(self, *inputs):
        if len(inputs) > self.index:
            loss_weights = inputs[self.index]
        else:
            loss_weights = self.cast(self.differs(inputs[1], -100), mstype.float32)
        total = self.sum(loss_weights)
        if self.devices > 1:  # gradients are averaged over devices afterwards
            total = self.sum_over_devices(total.reshape((1,)))[0] / self.devices
        total = ops.maximum(total, self.smallest)  # a batch without labels has no loss, not 0 / 0
        loss_weights = self.scale(loss_weights, self.divisor / total)
        return inputs[: self.index] + (loss_weights,) + inputs[self.index + 1 :]


class GLM32KTrainOneStepCell(MFTrainOneStepCell):
    """One training step: loss, scaled gradients, overflow check, clipping, update.

    A step whose gradients are not finite changes neither weights nor optimizer states; a dynamic loss scale is
    lowered. On devices without upstream's status registers (NPUGetFloatStatusV2) the gradients themselves are
    checked, over all devices that share the batch.

    The network, plain or wrapped, returns its loss. Gradient accumulation (one device or data parallel) follows
    its GradAccumulationCell: the result equals that of a step on the whole batch. Other arguments are upstream's:
    use_clip_grad, max_grad_norm, scale_sense (a number, a Tensor or a loss scale cell), …

    Outputs:
        tuple: loss () (data parallel: the mean over the devices' tokens; x micro_batch_interleave_num x
        gradient_accumulation_steps, by which the monitors divide it), overflow () bool, loss scale, learning rate,
        gradient norm (None without use_clip_grad).
    """

    def __init__(self, network: nn.Cell, optimizer: nn.Optimizer, *args, **kwargs):
        super().__init__(network, optimizer, *args, **kwargs)
        config = getattr(wrappers.innermost_network(network), "config", None)
        self.portable = getattr(config, "use_portable_cells", not compat.on_ascend())
        self.check_each = C.HyperMap()
        self.devices = data_parallel_devices()
        if self.devices > 1:
            self.sum_over_devices = P.AllReduce()
        self.one = Tensor(1.0, mstype.float32)
        self.interleave_num = wrappers.interleave_num(network)
        split, accumulated = wrappers.accumulation(network)
        self.micro_batches = 1 if self.calculate_per_token_loss else accumulated * self.interleave_num
        if self.portable:
            self.loss_and_gradients = LossAndGradients(split, self.weights, accumulated)
            if self.use_clip_grad:
                self.clip_grad_norm = PortableClipGradNorm(max_norm=self.clip_grad_norm.clip_norm.asnumpy().item())
            update_in_place(self.optimizer)
        if self.micro_batches > 1:
            self.normalize_weights = TokenWeightNormalizer(network, 1)

    def construct(self, *inputs):
        if self.micro_batches > 1:
            inputs = self.normalize_weights(*inputs)
        outputs = super().construct(*inputs)
        if self.micro_batches > 1:
            outputs = (outputs[0] * self.micro_batches,) + outputs[1:]
        if self.devices > 1:
            loss = self.sum_over_devices(outputs[0].reshape((1,)))[0] / self.devices
            outputs = (loss,) + outputs[1:]
        return outputs

    def grads_for_legacy(self, scaling_sens: Tensor, *inputs: Tensor) -> tuple:
        """Loss, gradients of loss x scale, and their divisor beside the scale (called by MindFormers 1.8 and later)."""
        if not self.portable or self.calculate_per_token_loss:
            return super().grads_for_legacy(scaling_sens, *inputs)
        loss, gradients = self.loss_and_gradients(scaling_sens, *inputs)
        return loss, gradients, self.grad_scale_factor

    def start_overflow_check(self, pre_cond: Tensor, compute_input: Tensor) -> tuple:
        """Nothing to clear where the gradients themselves are checked."""
        if self.portable:
            return (), compute_input
        return super().start_overflow_check(pre_cond, compute_input)

    def get_overflow_status(self, status: Tensor, compute_output: tuple) -> Tensor:
        """Whether any of the gradients is not finite, () bool."""
        if not self.portable:
            return super().get_overflow_status(status, compute_output)
        bad = ops.addn(self.check_each(_count_non_finite, compute_output))
        if self.devices > 1:
            bad = self.sum_over_devices(bad.reshape((1,)))[0]
        return bad >= self.one


class GLM32KPipelineTrainOneStepCell(MFPipelineWithLossScaleCell):
    """One training step of a pipeline, or with gradient accumulation; GLM32KTrainer chooses it where upstream's trainer
    chooses MFPipelineWithLossScaleCell.

    The network, wrapped in a PipelineCell or GradAccumulationCell, returns its loss. Arguments and outputs are those of
    GLM32KTrainOneStepCell, but the loss is on the last stage only (0 on others) and x micro batches x
    micro_batch_interleave_num; MFLossMonitor and GLM32KMonitor divide it.
    """

    def __init__(self, network: nn.Cell, optimizer: nn.Optimizer, *args, **kwargs):
        super().__init__(network, optimizer, *args, **kwargs)
        self.interleave_num = wrappers.interleave_num(network)
        self.normalizes = not self.calculate_per_token_loss  # else upstream adds up sums and counts itself
        if self.normalizes:
            self.normalize_weights = TokenWeightNormalizer(network, self.micro_size)

    @C.add_flags(has_effect=True)
    def construct(self, *inputs):
        if self.normalizes:
            inputs = self.normalize_weights(*inputs)
        outputs = super().construct(*inputs)
        if self.interleave_num > 1:
            outputs = (outputs[0] * self.interleave_num,) + outputs[1:]
        return outputs
