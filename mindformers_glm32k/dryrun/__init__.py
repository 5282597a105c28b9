"""The programs of every NPU of a layout, compiled, analyzed and simulated on this machine; imported at first use."""

from mindformers_glm32k.lazy import face

_FACE = {
    "dry_run": "programs",
    "compare": "report.compare",
    "write_strategies": "compile.pool",
    "simulate": "simulator",
    "search_layouts": "search",
}
__all__ = sorted(_FACE)
__getattr__ = face(__name__, _FACE)
