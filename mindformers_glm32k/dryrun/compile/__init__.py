"""Programs that NPUs would run, compiled on this machine: one process a rank drives upstream's own trainer and stops
once MindSpore's frontend is done. `frontend` alone reaches into MindSpore."""

import importlib

_FACE = {
    "Compiled": "pool",
    "WorkerFailed": "pool",
    "read_layout": "pool",
    "read_batches": "pool",
    "run_workers": "pool",
    "write_strategies": "pool",
}
__all__ = sorted(_FACE)


def __getattr__(name: str):  # lazily: the worker runs as a program, pool must not have imported it before
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FACE[name]}"), name)
