"""Cells that stand in for parts of upstream's glm2: tiles of tokens on CPU, chunks and compressed masks on Ascend.

`cells_for(config, backbone)` puts them in place while a model is constructed; it is loaded when it is first asked for.

`construct` and `bprop` have no type hints: their inputs and outputs are tensors, whose shapes the class says, and the
graph parser of the oldest MindSpore is not to meet what it need not parse. Shapes are in letters, which each module's
legend explains.
"""

__all__ = ["cells_for"]


def __getattr__(name):
    if name != "cells_for":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mindformers_glm32k.kernels.substitution import cells_for

    return cells_for
