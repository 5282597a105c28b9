"""The train steps of GLM32K: upstream's, with an overflow check that runs on every device, and with a loss that is the mean
over all tokens of the step however the batch is cut.

Upstream adds up the mean losses of micro batches (pipeline, gradient accumulation, interleaved copies): a token of a
micro batch with few labels counts for more, and loss, gradient and clipping depend on the cut. Here every token's share
of the step's loss is computed before the batch is cut.
"""

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


class TokenShares(nn.Cell):
    """Adds each token's share of the step's loss to the inputs of a network that cuts its batch into micro batches.

    The network then returns sums of (share x token loss), which add up to the mean over the whole batch.

    Args:
        network (Cell): the network with its loss, wrapped or not; told not to divide itself.
        divisor (int): what upstream's train step divides the gradients by; the shares are so many times larger.

    Inputs:
        - input_ids, labels (Tensor): (B, S) int32; labels are -100 where nothing is learned.
        - further inputs; a weight for each token where the data set gives one.

    Outputs:
        tuple: the inputs, with the shares (B, S) float32 in the place of the weights.
    """

    def __init__(self, network, divisor):
        super().__init__(auto_prefix=False)
        model = wrappers.innermost_network(network)
        model.weights_are_normalized = True
        self.place = wrappers.index_of_input(network, "input_mask", 2)
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
        if len(inputs) > self.place:
            weights = inputs[self.place]
        else:
            weights = self.cast(self.differs(inputs[1], -100), mstype.float32)
        total = self.sum(weights)
        if self.devices > 1:  # gradients are averaged over devices afterwards
            total = self.sum_over_devices(total.reshape((1,)))[0] / self.devices
        total = ops.maximum(total, self.smallest)  # a batch without labels has no loss, not 0 / 0
        shares = self.scale(weights, self.divisor / total)
        return inputs[: self.place] + (shares,) + inputs[self.place + 1 :]


class GLM32KTrainOneStepCell(MFTrainOneStepCell):
    """One training step: loss, scaled gradients, overflow check, clipping, update.

    A step whose gradients are not finite changes neither weights nor optimizer states; a dynamic loss scale is
    lowered. On devices without upstream's status registers (NPUGetFloatStatusV2) the gradients themselves are
    checked, over all devices that share the batch.

    Args:
        network (Cell): the network with its loss; GLM32KForConditionalGeneration, plain or wrapped.
        optimizer (Optimizer): updates the weights.
        **kwargs: upstream's, e.g. use_clip_grad, max_grad_norm, scale_sense (number, Tensor or a loss scale cell).

    Outputs:
        tuple: loss () (data parallel: the mean over the devices' tokens; times the interleaved copies, by which
        monitors divide it), overflow () bool, loss scale, learning rate, global gradient norm (None without use_clip_grad).
    """

    def __init__(self, network, optimizer, *args, **kwargs):
        super().__init__(network, optimizer, *args, **kwargs)
        config = getattr(wrappers.innermost_network(network), "config", None)
        self.portable = getattr(config, "use_portable_cells", not compat.on_ascend())
        self.check_each = C.HyperMap()
        self.devices = data_parallel_devices()
        if self.devices > 1:
            self.sum_over_devices = P.AllReduce()
        self.one = Tensor(1.0, mstype.float32)
        if self.portable:
            self.loss_and_gradients = LossAndGradients(self.network, self.weights)
            if self.use_clip_grad:
                self.clip_grad_norm = PortableClipGradNorm(max_norm=self.clip_grad_norm.clip_norm.asnumpy().item())
            update_in_place(self.optimizer)
        self.copies = wrappers.interleave_num(network)
        if self.copies > 1:
            self.token_shares = TokenShares(network, 1)

    def construct(self, *inputs):
        if self.copies > 1:
            inputs = self.token_shares(*inputs)
        outputs = super().construct(*inputs)
        if self.copies > 1:
            outputs = (outputs[0] * self.copies,) + outputs[1:]
        if self.devices > 1:
            loss = self.sum_over_devices(outputs[0].reshape((1,)))[0] / self.devices
            outputs = (loss,) + outputs[1:]
        return outputs

    def grads_for_legacy(self, scaling_sens, *inputs):
        """Loss, gradients of loss x scale, and what they are divided by beside the scale (1.8 and later ask here)."""
        if not self.portable or self.calculate_per_token_loss:
            return super().grads_for_legacy(scaling_sens, *inputs)
        loss, gradients = self.loss_and_gradients(scaling_sens, *inputs)
        return loss, gradients, self.grad_scale_factor

    def start_overflow_check(self, pre_cond, compute_input):
        if self.portable:
            return (), compute_input
        return super().start_overflow_check(pre_cond, compute_input)

    def get_overflow_status(self, status, compute_output):
        if not self.portable:
            return super().get_overflow_status(status, compute_output)
        bad = ops.addn(self.check_each(_count_non_finite, compute_output))
        if self.devices > 1:
            bad = self.sum_over_devices(bad.reshape((1,)))[0]
        return bad >= self.one


class GLM32KPipelineTrainOneStepCell(MFPipelineWithLossScaleCell):
    """One training step of a pipeline, or with gradient accumulation; GLM32KTrainer chooses it where upstream's trainer
    chooses MFPipelineWithLossScaleCell.

    Args:
        network (Cell): the network with its loss, wrapped in a PipelineCell or GradAccumulationCell.
        optimizer (Optimizer): updates the weights.
        **kwargs: upstream's, e.g. use_clip_grad, max_grad_norm, scale_sense, micro_batch_num.

    Outputs:
        tuple: loss () x micro batches x interleaved copies (MFLossMonitor and GLM32KMonitor divide it; on the last
        stage, 0 on others), overflow () bool, loss scale, learning rate, global gradient norm (None without use_clip_grad).
    """

    def __init__(self, network, optimizer, *args, **kwargs):
        super().__init__(network, optimizer, *args, **kwargs)
        self.copies = wrappers.interleave_num(network)
        self.shares = not self.calculate_per_token_loss  # else upstream adds up sums and counts itself
        if self.shares:
            self.token_shares = TokenShares(network, self.micro_size)

    @C.add_flags(has_effect=True)
    def construct(self, *inputs):
        if self.shares:
            inputs = self.token_shares(*inputs)
        outputs = super().construct(*inputs)
        if self.copies > 1:
            outputs = (outputs[0] * self.copies,) + outputs[1:]
        return outputs
