"""The one place that knows MindFormers and MindSpore versions and their differences.

Ledger. Every entry: what differs, in which versions, when it can go.

on_ascend            device_target as a plain string; all versions.
default_yaml         where `Trainer(model_name='glm32k')` finds its YAML: upstream's book maps names to files.
"""
import sys
from pathlib import Path

from mindformers_glm32k.errors import InputError


def on_ascend():
    """bool: whether MindSpore's device target is Ascend."""
    import mindspore
    return mindspore.get_context("device_target") == "Ascend"


def default_yaml():
    """str: the YAML that stands for the model's name in MindFormers' book of models.

    It lies in research/glm32k of a checkout, or in the environment's share folder of an installed wheel.
    """
    name = "finetune_glm32k.yaml"
    checkout = Path(__file__).resolve().parents[1] / "research" / "glm32k" / name
    return str(checkout if checkout.is_file() else Path(sys.prefix) / "share" / "mindformers_glm32k" / name)


def portable_argmax(values, axis=-1):
    """argmax of logits for upstream's generator, whose mint.argmax has no CPU kernel in any version.

    Args:
        values (Tensor | numpy.ndarray): (B, V).
        axis (int): the axis.

    Returns:
        Tensor: (B,) int.
    """
    from mindspore import Tensor
    array = values.asnumpy() if isinstance(values, Tensor) else values
    return Tensor(array.argmax(axis))


def check_layout(config):
    """Refuses parallel layouts that the plugin does not build.

    Args:
        config (GLM32KConfig): with its parallel_config.

    Raises:
        InputError: a layout key and what to set instead.
    """
    parallel = config.parallel_config
    if getattr(parallel, "seq_split_num", 1) > 1:
        raise InputError(f"parallel_config.seq_split_num={parallel.seq_split_num}: sequence pipelines are not "
                         "supported; set it to 1 and use context_parallel for long rows")


def innermost_network(network):
    """The model inside the cells that a trainer wraps around it.

    Args:
        network (Cell): the model, or a chain of `network`, `_backbone` or `pet_model` attributes that ends in it.

    Returns:
        Cell
    """
    while True:
        for name in ("network", "_backbone", "pet_model", "lora_model"):
            if hasattr(network, name):
                network = getattr(network, name)
                break
        else:
            return network
