"""The one place that knows MindFormers and MindSpore versions and their differences.

Ledger: what differs or stands in the way, where, why we act, and when the entry can go. Nothing of MindFormers is
changed on disk; names that are rebound at run time are restored afterwards.

| entry | what and why | versions | can go |
|---|---|---|---|
| set_output_path | moved from mindformers.tools to mindformers.utils.file_utils in 1.8 | 1.6 | with 1.6 |
| checkpoint_path | 1.9 moves load_checkpoint to checkpoint.load_path | 1.9 | with 1.8 |
| portable_argmax | the generator's mint.argmax has no CPU kernel; replaced in our model | all | with a kernel |
| barrier_on_cpu | Barrier has no CPU kernel; replaced by an all-reduce during CPU runs | 1.6 to 2.0; 2.1 waits at
  mint.distributed.barrier, which has a CPU kernel | with 2.0 |
| run_mode_restored | build_context leaves RUN_MODE in the environment; a later trainer that finds "predict" there sets
  no global batch size | all | when it is an argument |
| check_buildable | sequence pipelines are not supported; no bfloat16 kernels on CPU | all | with kernels |
| kernels/substitution.py | names rebound while a model is constructed, to replace S x S masks, NPU-only kernels and
  unsharded operators of upstream's glm2 | all | with cells that take their parts as arguments |
| kernels/ascend/flash_attention.py | upstream's glm2 has FlashAttention's sparse modes 0 and 3 only, and shards a mask
  of four axes only | all | with sparse_mode 2 upstream |
| kernels/cpu/blocks.py | scatter kernels can write in place into any tensor, but their Python classes accept
  Parameters only | all | with operators that write in place in graph mode |
| training/cpu_step.py | AdamW takes twenty operators a parameter, and the loss and the gradient a forward pass each,
  with no option against it in 1.6 | all | when the compiler joins loops, and with a fused AdamW on CPU |
| training/step.py | the overflow check reads NPU status registers (NPUGetFloatStatusV2) | all | with a check that
  runs everywhere |
| finetune_glm32k_cp8.yaml | check_rules warns that glm2 repeats KV heads for ulysses_cp, then raises all the same;
  hybrid_cp of full degree is the same layout | all | when it no longer raises |
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mindformers_glm32k.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from mindformers import PretrainedConfig
    from mindformers.tools.register import MindFormerConfig
    from mindspore import Tensor


def on_ascend() -> bool:
    """Whether MindSpore's device target is Ascend."""
    import mindspore

    return mindspore.get_context("device_target") == "Ascend"


def host_versions() -> list[str]:
    """The versions of MindSpore and MindFormers, without importing them."""
    return [importlib.metadata.version(name) for name in ("mindspore", "mindformers")]


def mindspore_version() -> str:
    """MindSpore's version, for messages; features are detected from its modules, not from this number."""
    import mindspore

    return mindspore.__version__


def config_folder() -> Path:
    """The folder of the shipped YAMLs and the register hook: research/glm32k of a checkout or, for an installed wheel,
    in the environment's share folder."""
    checkout = Path(__file__).resolve().parents[1] / "research" / "glm32k"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "mindformers_glm32k"


def portable_argmax(values: Tensor | np.ndarray, axis: int = -1) -> Tensor:
    """argmax (B,) of logits (B, V) for upstream's generator, whose mint.argmax has no CPU kernel in any version."""
    from mindspore import Tensor

    array = values.asnumpy() if isinstance(values, Tensor) else values
    return Tensor(array.argmax(axis))


def check_buildable(config: PretrainedConfig) -> None:
    """Refuses a GLM32KConfig, with its parallel_config, that the plugin or the device cannot run.

    Raises:
        InputError: the key and what to set instead.
    """
    parallel = config.parallel_config
    if getattr(parallel, "seq_split_num", 1) > 1:
        raise InputError(
            f"parallel_config.seq_split_num={parallel.seq_split_num}: sequence pipelines are not "
            "supported; set it to 1 and use context_parallel for long sequences"
        )
    from mindspore import dtype

    if config.use_portable_cells and not on_ascend():
        for name in ("param_init_type", "compute_dtype", "layernorm_compute_type", "residual_dtype", "rotary_dtype"):
            if getattr(config, name) == dtype.bfloat16:
                raise InputError(
                    f"model_config.{name}=bfloat16: MindSpore has no bfloat16 MatMul, Gather or Softmax "
                    "on CPU; use float32 or float16"
                )


def set_output_path(path: str) -> None:
    """Tells MindFormers where outputs go. Its function is in mindformers.tools in 1.6, in utils.file_utils from 1.8."""
    try:
        from mindformers.utils.file_utils import set_output_path as upstream
    except ImportError:
        from mindformers.tools.utils import set_output_path as upstream
    upstream(path)


def checkpoint_path(config: MindFormerConfig) -> str | None:
    """The checkpoint that a run loads: `load_checkpoint`, which 1.9 moves to `checkpoint.load_path`."""
    section = config.get("checkpoint")
    return (section.get("load_path") if section else None) or config.get("load_checkpoint") or None


def set_checkpoint_path(config: MindFormerConfig, path: str) -> None:
    """Sets the path that `checkpoint_path` returns, under every key that MindFormers may read."""
    config.load_checkpoint = path
    if config.get("checkpoint"):
        config.checkpoint.load_path = path


@contextlib.contextmanager
def run_mode_restored() -> Iterator[None]:
    """Clears RUN_MODE on entry and restores it on exit: build_context sets it for predictions and evaluations, and a
    later trainer that finds it, in this process or a child, takes its own run for a prediction."""
    before = os.environ.pop("RUN_MODE", None)
    try:
        yield
    finally:
        os.environ.pop("RUN_MODE", None)
        if before is not None:
            os.environ["RUN_MODE"] = before


@contextlib.contextmanager
def barrier_on_cpu() -> Iterator[None]:
    """While open, MindFormers' barriers are all-reduces on CPU, where the operator Barrier has no kernel.

    MindFormers (1.6 to 2.0) waits at comm_func.barrier while processes load or save checkpoints; 2.1 waits at
    mint.distributed.barrier, which runs on CPU as it is. Outside CPU runs of several processes nothing is touched.
    """
    import mindspore
    from mindspore.communication import GlobalComm, comm_func, get_group_size

    if mindspore.get_context("device_target") != "CPU" or not GlobalComm.INITED or get_group_size() == 1:
        yield
        return
    upstream = comm_func.barrier

    def barrier(group=GlobalComm.WORLD_COMM_GROUP):
        mindspore.ops.AllReduce(group=group)(mindspore.Tensor([1.0], mindspore.float32)).asnumpy()

    # resuming calls comm_func.barrier, loading and saving call the names they imported
    users = [
        comm_func,
        *(
            module
            for name, module in sys.modules.items()
            if name.startswith("mindformers.") and getattr(module, "barrier", None) is upstream
        ),
    ]
    for module in users:
        module.barrier = barrier
    try:
        yield
    finally:
        for module in users:
            module.barrier = upstream


# MindFormers -> the MindSpore versions that the plugin has been tried with, and the release of CANN that upstream's
# installation page of that version names
TRIED_TOGETHER = {
    "1.6": (("2.7",), "8.2"),
    "1.7": (("2.7",), "8.3"),
    "1.8": (("2.7",), "8.5"),
    "1.9": (("2.9",), "9.0"),
    "2.0": (("2.10",), None),
    "2.1": (("2.10", "2.11"), None),
}


def version_problems() -> list[tuple[str, str, str]]:
    """(what, found, what to do) for versions of MindFormers, MindSpore, Python and CANN that do not go together."""
    import mindformers

    found = []
    host, runtime = ".".join(mindformers.__version__.split(".")[:2]), mindspore_version()
    if host not in TRIED_TOGETHER:
        found.append(("MindFormers", mindformers.__version__, f"tried are {', '.join(TRIED_TOGETHER)}"))
    elif ".".join(runtime.split(".")[:2]) not in TRIED_TOGETHER[host][0]:
        wanted = " or ".join(TRIED_TOGETHER[host][0])
        found.append(
            ("MindSpore", runtime, f"MindFormers {mindformers.__version__} goes with MindSpore {wanted}; install that")
        )
    if not (3, 9) <= sys.version_info[:2] <= (3, 12):
        found.append(("Python", ".".join(map(str, sys.version_info[:3])), "use Python 3.9 to 3.12"))
    cann, named = cann_version(), TRIED_TOGETHER.get(host, (None, None))[1]
    if cann and named and cann != named:
        found.append(("CANN", cann, f"MindFormers {mindformers.__version__} goes with CANN {named}"))
    return found


def cann_version() -> str | None:
    """The release of the CANN toolkit on this machine, such as "8.2"; None where none is found."""
    home = os.environ.get("ASCEND_TOOLKIT_HOME") or "/usr/local/Ascend/ascend-toolkit/latest"
    for path in sorted(Path(home).glob("*/ascend_toolkit_install.info")):
        match = re.search(r"^version=(\d+\.\d+)", path.read_text(encoding="utf-8", errors="replace"), re.M)
        if match:
            return match[1]
    return None


def pynative_is_upstreams() -> bool:
    """Whether `context.mode: 1` chooses MindFormers' PyNative trainer (2.0 on), which has no glm2."""
    import mindformers

    return int(mindformers.__version__.split(".")[0]) >= 2


def host_config_classes() -> tuple[dict[str, type], ModuleType]:
    """MindFormers' config classes by YAML section, and its module `config_args` (arguments of MindSpore's contexts),
    which moved from mindformers.trainer to mindformers.core in 1.8."""
    from mindformers.tools.register.template import CONFIG_NAME_TO_CLASS

    try:
        from mindformers.core import config_args
    except ImportError:
        from mindformers.trainer import config_args
    return CONFIG_NAME_TO_CLASS, config_args
