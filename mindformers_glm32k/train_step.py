"""GLM32KTrainOneStepCell: upstream's train step with an overflow check that runs on every device."""
import mindspore.common.dtype as mstype
from mindspore import Tensor, ops
from mindspore.communication import get_group_size
from mindspore.context import ParallelMode
from mindspore.ops import composite as C
from mindspore.ops import operations as P

from mindformers.wrapper.wrapper import MFTrainOneStepCell

from mindformers_glm32k import compat

_count_non_finite = C.MultitypeFuncGraph("glm32k_count_non_finite")


@_count_non_finite.register("Tensor")
def _tensor_is_non_finite(gradient):
    """1.0 when any element is NaN or infinite, else 0.0."""
    finite = ops.cast(ops.isfinite(ops.cast(gradient, mstype.float32)), mstype.float32)
    return 1.0 - finite.min()


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
        tuple: loss () (data parallel: the mean over the devices' tokens), overflow () bool, loss scale,
        learning rate, global gradient norm (None without use_clip_grad).
    """

    def __init__(self, network, optimizer, *args, **kwargs):
        super().__init__(network, optimizer, *args, **kwargs)
        config = getattr(compat.innermost_network(network), "config", None)
        self.portable = getattr(config, "use_portable_cells", not compat.on_ascend())
        self.check_each = C.HyperMap()
        self.devices = 1
        if self.parallel_mode == ParallelMode.DATA_PARALLEL and get_group_size() > 1:
            self.devices = get_group_size()
            self.sum_over_devices = P.AllReduce()
        self.one = Tensor(1.0, mstype.float32)

    def construct(self, *inputs):
        outputs = super().construct(*inputs)
        if self.devices > 1:
            loss = self.sum_over_devices(outputs[0].reshape((1,)))[0] / self.devices
            outputs = (loss,) + outputs[1:]
        return outputs

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
