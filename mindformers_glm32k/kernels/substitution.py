"""The cells that take the place of glm2's own while a GLM32K model is constructed.

Upstream's cells refer to the classes of their sub-cells by name. Replacing a sub-cell after construction would lose the
parameter name prefixes, sharding and communication fusion that the constructors set. So the class name is rebound in
the module that uses it, during construction only, and restored afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mindformers.models.glm2 import glm2, glm2_transformer
from mindspore import Tensor, nn

from mindformers_glm32k.config import GLM32KConfig
from mindformers_glm32k.kernels.ascend.chunked_mlp import ChunkedMLP
from mindformers_glm32k.kernels.ascend.flash_attention import CompressedCausalAttention
from mindformers_glm32k.kernels.cpu.paged_attention import NoCache, PagedAttention
from mindformers_glm32k.kernels.cpu.rms_norm import RMSNorm
from mindformers_glm32k.kernels.cpu.tiled_attention import TiledAttention
from mindformers_glm32k.kernels.rotary import RotaryEmbedding

_PORTABLE = ((glm2_transformer, "ChatGLM2RMSNorm", RMSNorm), (glm2_transformer, "FlashAttention", TiledAttention))
_ASCEND = (
    (glm2_transformer, "FlashAttention", CompressedCausalAttention),
    (glm2_transformer, "ChatGLM2MLP", ChunkedMLP),
)


@contextlib.contextmanager
def cells_for(config: GLM32KConfig, backbone: type[nn.Cell]) -> Iterator[None]:
    """Within this context, upstream's glm2 constructors build the cells that `config.cells` asks for, and `backbone`
    in place of ChatGLM2Model."""
    bindings = (_PORTABLE if config.use_portable_cells else _ASCEND) + (
        (glm2, "ChatGLM2Model", backbone),
        (glm2_transformer, "RotaryPosEmb", lambda: RotaryEmbedding(config)),
    )
    if not config.use_past:
        bindings += ((glm2_transformer, "InferAttention", NoCache),)
    elif config.use_portable_cells:
        bindings += ((glm2_transformer, "InferAttention", PagedAttention),)
    originals = [(module, name, getattr(module, name)) for module, name, _ in bindings]
    for module, name, cell in bindings:
        setattr(module, name, cell)
    try:
        yield
    finally:
        for module, name, cell in originals:
            setattr(module, name, cell)


def split_last_axis(x: Tensor, sizes: tuple[int, ...], axis: int) -> tuple[Tensor, ...]:
    """x (..., sum(sizes)) -> one (..., size) per size, by slices, where upstream uses the NPU kernel SplitWithSize.

    `axis` is unused: upstream always passes the last one."""
    parts = ()
    start = 0
    for size in sizes:
        parts += (x[..., start : start + size],)
        start += size
    return parts


def replace_splits(encoder: nn.Cell) -> None:
    """Replaces the split in every layer of ChatGLM2Transformer, once it is built: a split has no parameter names."""
    for layer in encoder.layers:
        for cell, name in ((layer.self_attention, "split_qkv"), (layer.mlp, "split")):
            if hasattr(cell, name):
                delattr(cell, name)
                setattr(cell, name, split_last_axis)
