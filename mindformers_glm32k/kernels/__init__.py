"""Cells that stand in for parts of upstream's glm2: tiles of tokens on CPU, chunks and compressed masks on Ascend.

`cells_for(config, backbone)` puts them in place while a model is constructed; it is loaded when it is first asked for.

`construct` and `bprop` have no type hints: their inputs and outputs are tensors, whose shapes the class says, and the
graph parser of the oldest MindSpore is not to meet what it need not parse. Shapes are in letters, which each module's
legend explains.
"""

from mindformers_glm32k.lazy import face

_FACE = {"cells_for": "substitution"}
__all__ = list(_FACE)
__getattr__ = face(__name__, _FACE)
