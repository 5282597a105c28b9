"""Programs that NPUs would run, compiled on this machine: one process per rank drives upstream's own trainer and stops
once MindSpore's frontend is done. Only `frontend` touches MindSpore's private parts."""

from mindformers_glm32k.lazy import face

_FACE = {
    "Compiled": "pool",
    "WorkerFailed": "pool",
    "read_layout": "pool",
    "read_batches": "pool",
    "run_workers": "pool",
    "write_strategies": "pool",
}
__all__ = sorted(_FACE)
__getattr__ = face(__name__, _FACE)  # lazily: the worker runs as a program, pool must not have imported it before
