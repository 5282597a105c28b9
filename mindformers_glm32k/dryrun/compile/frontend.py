"""Lets a MindSpore without an NPU plugin compile what an Ascend NPU would run. The only file that touches MindSpore's
private parts.

It acts only in the process that calls `install`, a worker of the dry run.

Ledger of the private parts: what, why, versions known to work, when it goes. Frontend here means: parsing, type
inference, sharding, pipeline split, optimizer sharding, recomputation, insertion and fusion of communication. It is
part of every wheel and needs no device; the entries below only bypass the checks in front of it.

MsContext::seter_       The std::function that refuses a device target whose plugin is not loaded, exported by
                        libmindspore_core.so. Set to empty (32 zero bytes), which accepts any target name.
                        MindSpore 2.7.0, 2.7.2, 2.9.0 (x86-64). Not touched where the Ascend plugin is loaded.
                        Goes when MindSpore compiles for Ascend without CANN (MS_SIMULATION_LEVEL asks for it today).
hccl_test hook          _comm_helper._HCCL_TEST_AVAILABLE and .hccl: MindSpore's own replacement of the communication
                        library in its tests; it answers rank, size and groups. set_hccl_test_avaible lets device_num
                        exceed the devices present. Same versions; goes with the above.
communication.init      does nothing: there are no peers. set_device and set_memory likewise: tensors and cells are
                        built on the CPU, and only `compile` sees Ascend.
_CellGraphExecutor      `compile` is wrapped to switch the target around it and to hand the compiled program to the
                        worker. `get_func_graph_proto(phase, "mind_ir")` gives the program. All versions.
close_shapes            _dynamic_shape_inputs, _set_network_phase and _exec_add_flags of a generating cell: upstream's
                        generator sets dynamic shapes and its own phases. All versions; goes with an option for both.
MS_DEV_PRECOMPILE_ONLY  stops after the frontend; without it the backend is asked for a device.
MS_DEV_DUMP_IR_PASSES   "validate" writes the validated program as text, the only form that has source lines.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mindformers_glm32k.compat import mindspore_version

WORLD_GROUP = "hccl_world_group"
_SETTER = "_ZN9mindspore9MsContext6seter_E"
_SETTER_BYTES = 32  # sizeof(std::function) in libstdc++
_DEVICE_ENTRIES = ("device_target", "device_id", "max_device_memory", "memory_optimize_level", "ascend_config")
_DEVICE_ENTRIES += ("mempool_block_size", "save_graphs", "save_graphs_path")


class FrontendUnavailable(RuntimeError):
    """This MindSpore build does not allow compiling for an NPU that is not there. The message is one sentence."""


def environment(rank: int, world_size: int, dump_folder: Path | None = None) -> dict[str, str]:
    """Environment variables that a worker needs before MindSpore is imported.

    Args:
        rank, world_size: the NPU's rank and the number of NPUs.
        dump_folder: folder for the validated program as text; None: no text.
    """
    dump = {"MS_DEV_DUMP_IR_PASSES": "validate", "MS_DEV_SAVE_GRAPHS": "2", "MS_DEV_SAVE_GRAPHS_PATH": str(dump_folder)}
    return {
        "MS_DEV_PRECOMPILE_ONLY": "1",
        "RANK_ID": str(rank),
        "RANK_SIZE": str(world_size),
        "DEVICE_NUM": str(world_size),
        **(dump if dump_folder else {}),
    }


def install(rank: int, world_size: int, on_compiled: Callable[[object, str, Callable[[], bytes], float], None]) -> None:
    """Prepares this process; call it before mindformers is imported.

    Args:
        rank, world_size: the NPU whose program is compiled, and the number of NPUs.
        on_compiled: gets (cell, phase, program, seconds) after every compile; program() is MindIR.

    Raises:
        FrontendUnavailable: this build lacks the symbol MsContext::seter_.
    """
    if os.environ.get("MS_DEV_PRECOMPILE_ONLY") != "1":
        raise RuntimeError("the environment of `environment` must be set before MindSpore is imported")
    import mindspore
    import mindspore.communication as communication
    from mindspore.communication import management
    from mindspore.nn import cell as cell_module

    if not _plugin_loaded():
        _forget_device_check(mindspore)
    _answer_for_the_cluster(rank, world_size)
    silenced = [(communication, "init"), (management, "init")]
    for module, name in (*silenced, (mindspore, "set_device"), (mindspore.runtime, "set_memory")):
        setattr(module, name, lambda *args, **kwargs: None)
    _keep_cpu_as_target(mindspore)
    executor = cell_module._cell_graph_executor
    _wrap_compile(type(executor), executor._graph_executor, rank, on_compiled)


def input_shapes(dataset: object) -> list[list[int]]:
    """Shapes of one step's inputs from a MindSpore data set, as the compiler must see them: of the global batch, as in
    a run with data sinking."""
    from mindspore.parallel import _utils

    shapes = dataset.output_shapes()
    if _utils._need_to_full():
        return _utils._to_full_shapes(shapes, _utils._get_device_num())
    return shapes


def _plugin_loaded():
    from mindspore._c_expression import MSContext

    return MSContext.get_instance().is_ascend_plugin_loaded()


def _forget_device_check(mindspore):
    library = Path(mindspore.__file__).parent / "lib" / "libmindspore_core.so"
    try:
        setter = (ctypes.c_char * _SETTER_BYTES).in_dll(ctypes.CDLL(str(library)), _SETTER)
    except (OSError, ValueError) as error:
        raise FrontendUnavailable(
            f"MindSpore {mindspore_version()} on {sys.platform} does not let its frontend compile for Ascend without "
            "an Ascend plugin (known to work: 2.7.0 to 2.9.0 for Linux x86-64)."
        ) from error
    ctypes.memset(ctypes.addressof(setter), 0, _SETTER_BYTES)


def _answer_for_the_cluster(rank, world_size):
    """Rank, size and group queries, answered as on `rank` of `world_size`.

    The frontend names a group "<size>-<hash>" and asks its size while it inserts collectives.
    """
    from mindspore.communication import _comm_helper

    groups = {WORLD_GROUP: list(range(world_size))}

    def size(group=WORLD_GROUP):
        group = group or WORLD_GROUP
        return len(groups[group]) if group in groups else int(group.split("-")[0])

    def rank_in(group=WORLD_GROUP):
        members = groups.get(group or WORLD_GROUP, ())
        return members.index(rank) if rank in members else 0

    def create(group, size_or_ranks=None, ranks=None, **named):
        groups[group] = list(ranks or named.get("rank_ids") or size_or_ranks)

    _comm_helper.hccl = types.SimpleNamespace(
        get_rank_id=rank_in,
        get_local_rank_id=lambda group=WORLD_GROUP: rank,
        get_rank_size=size,
        get_local_rank_size=size,
        create_group=create,
        destroy_group=lambda group: groups.pop(group, None),
        get_world_rank_from_group_rank=lambda group, index: groups[group][index],
        get_group_rank_from_world_rank=lambda world_rank, group: groups[group].index(world_rank),
    )
    _comm_helper._HCCL_TEST_AVAILABLE = True
    _comm_helper.GlobalComm.INITED = True


def _keep_cpu_as_target(mindspore):
    """`set_context` without the entries that ask for a device; MindFormers 1.6 to 1.9 pass them from the YAML."""
    from mindspore import context

    original = context.set_context

    def set_context(**entries):
        original(**{name: value for name, value in entries.items() if name not in _DEVICE_ENTRIES})

    context.set_context = mindspore.set_context = set_context
    if "MS_DEV_SAVE_GRAPHS_PATH" in os.environ:
        original(save_graphs=2, save_graphs_path=os.environ["MS_DEV_SAVE_GRAPHS_PATH"])


@contextlib.contextmanager
def _target_ascend() -> Iterator[None]:
    from mindspore._c_expression import MSContext

    instance = MSContext.get_instance()
    instance.set_device_target_inner("Ascend")
    try:
        yield
    finally:
        instance.set_device_target_inner("CPU")


def close_shapes(model: Any, phase: str) -> None:
    """Makes the next compile of a generating model use the static shapes of its call; a phase of its own keeps upstream
    from reusing the program with dynamic shapes."""
    model._dynamic_shape_inputs = None
    model.set_dynamic_inputs = lambda **_: None
    model._set_network_phase(phase)
    model._exec_add_flags = True


def _wrap_compile(executor_class, graph_executor, rank, on_compiled):
    original = executor_class.compile

    def compile_for_ascend(self, cell, *args, phase="predict", **kwargs):
        from mindspore import context
        from mindspore._c_expression import AutoParallelContext

        # build_context leaves global_rank at 0, which gives every process the program of stage 0; setting it resets
        # the flag that lets device_num exceed the devices present
        if context.get_auto_parallel_context("parallel_mode") != "stand_alone":
            context.set_auto_parallel_context(global_rank=rank)
            AutoParallelContext.get_instance().set_hccl_test_avaible(True)
        started = time.monotonic()
        with _target_ascend():
            full_phase, is_new = original(self, cell, *args, phase=phase, **kwargs)
        if is_new:
            on_compiled(
                cell,
                full_phase,
                lambda: graph_executor.get_func_graph_proto(full_phase, "mind_ir"),
                time.monotonic() - started,
            )
        return full_phase, is_new

    executor_class.compile = compile_for_ascend
