"""Cells that stand in for parts of upstream's glm2: tiles of tokens on CPU, chunks and compressed masks on Ascend.

`cells_for(config, backbone)` puts them in place while a model is constructed; it is imported on first use.

`construct` and `bprop` have no type hints: inputs and outputs are tensors, with shapes in the class docstring, and
hints would be one more thing that the graph parser of the oldest MindSpore must parse. The legend of each module
explains its shape letters.
"""

from mindformers_glm32k.lazy import face

_FACE = {"cells_for": "substitution"}
__all__ = list(_FACE)
__getattr__ = face(__name__, _FACE)
