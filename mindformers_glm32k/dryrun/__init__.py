"""What every NPU of a layout would run, compiled, read and simulated on this machine; all imported at first use."""

import importlib

_FACE = {
    "dry_run": "programs.dry_run",
    "compare": "report.compare.compare",
    "write_strategies": "compile.pool.write_strategies",
    "simulate": "simulator.simulate",
}
__all__ = sorted(_FACE)


def __getattr__(name: str):
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, function = _FACE[name].rpartition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), function)
