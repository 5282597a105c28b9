"""Rehearsal: the programs of all ranks compiled and executed on this machine, beside that of one device."""

import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mindformers_glm32k.dryrun.analysis.mindir import read_program
from mindformers_glm32k.dryrun.compile.pool import read_layout, run_workers
from mindformers_glm32k.dryrun.compile.strategy import strategy_file
from mindformers_glm32k.dryrun.compile.worker import STATE_FILE
from mindformers_glm32k.dryrun.simulator import checkpoints, operators, state
from mindformers_glm32k.dryrun.simulator import scale_down as shrink
from mindformers_glm32k.dryrun.simulator.comparison import TOLERANCES, NoiseWatch, compare_parameters, disagreements
from mindformers_glm32k.dryrun.simulator.interpreter import Machine
from mindformers_glm32k.dryrun.simulator.network import Network
from mindformers_glm32k.dryrun.simulator.report import write_reports
from mindformers_glm32k.dryrun.simulator.rows import input_arrays, make_rows
from mindformers_glm32k.dryrun.simulator.world import run_world
from mindformers_glm32k.files import copy_atomically
from mindformers_glm32k.weights.parameters import plain_name
from mindformers_glm32k.weights.strategy import ParameterLayout, read_strategy

_JOBS = 2  # programs compiled at the same time


@dataclass
class Rehearsed:
    """Programs of a rank that are ready to be executed.

    Args:
        state (dict[str, numpy.ndarray]): initial values that its process left.
        layouts (dict[str, ParameterLayout]): of its stage; {} for one device.
        inputs (list[list[int]]): shapes of the inputs that it was compiled for.
        columns (list[str]): names of these inputs.
        phases (dict[str, Program]): all that were compiled: "train", or of prediction "prefill" and "increment".
    """

    state: dict
    layouts: dict
    inputs: list
    columns: list
    phases: dict

    @property
    def program(self):
        """Program: of training, or the last one of prediction."""
        return list(self.phases.values())[-1]


@dataclass
class Result:
    """What an execution gave.

    Args:
        machines (list[Machine]): by rank.
        outputs (list[list]): per step and rank.
        unread (list[str]): messages that nobody received.
        seconds (float): it took.
        noise (dict[str, numpy.ndarray]): elements of weights whose gradients are rounding noise, of one device.
    """

    machines: list
    outputs: list
    unread: list = field(default_factory=list)
    seconds: float = 0.0
    noise: dict = field(default_factory=dict)


def execute(config_file, overrides, output, steps, load_checkpoint=None, shrunk=None, precision="float32", traces=()):
    """Compiles the programs of all ranks and of one device, executes them on the same rows, compares, and writes
    execution.json, execution.md, the strategy files and each rank's checkpoint.

    Args:
        config_file (str): YAML of a training run, or of prediction: see `execute_prediction`.
        overrides (list[str]): run_mindformer's other options.
        output (pathlib.Path): folder of the results.
        steps (int): optimizer steps, or tokens to generate.
        load_checkpoint (str | None): whole checkpoint to start from; by default random weights.
        shrunk (bool | None): whether the model is made small; by default where it is large.
        precision (str): dtype of everything, or "config": as the YAML has it.
        traces (sequence of str): operators or parameters whose values are printed.

    Returns:
        dict: execution.json, see `execution.report`.

    Raises:
        InputError: the configuration cannot be rehearsed.
        ExecutionError, NetworkError: the programs cannot be executed to the end.
        WorkerFailed: a program was not compiled.
    """
    started = time.monotonic()
    arguments = ["--config", str(Path(config_file).resolve()), *overrides]
    _, config = read_layout(arguments)
    if shrink.predicts(config):
        from mindformers_glm32k.dryrun.simulator import generate as execute_prediction

        return execute_prediction.execute(
            config_file, overrides, output, steps, load_checkpoint, shrunk, precision, traces, config=config
        )
    small = shrink.plan(config, shrunk, load_checkpoint)
    arguments += [*small.overrides, *shrink.schedule_overrides(config)]
    if precision != "config":
        arguments += shrink.precision_overrides(precision)
    layout, config = read_layout(arguments)
    one_arguments = [*arguments, *shrink.one_device_overrides(layout.global_batch_size)]
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".work_", dir=output) as folder:
        work = Path(folder).resolve()
        one, programs = compile_beside_one_device(arguments, one_arguments, layout, work, output)
        compiled = time.monotonic() - started
        rows, source = make_rows(one_arguments, one[0], steps, config, work)
        whole = (
            checkpoints.load_weights(load_checkpoint, one[0].state, config, work)
            if load_checkpoint
            else state.random_weights(one[0].state)
        )
        for file in (work / "strategy").glob("ckpt_strategy_rank_*.ckpt"):
            copy_atomically(file, output / "strategy" / file.name)
    beta = float((config["optimizer"].get("betas") or (0.9,))[0])
    reference = run(one, layout.on_one_device(), whole, rows, beta=beta)
    result = run(programs, layout, whole, rows, traces, announce=True) if layout.world > 1 else reference
    report = {
        "world_size": layout.world,
        "layout": layout.describe(),
        "config": config_file,
        "shrunk": small.changes,
        "precision": precision,
        "rows": source,
        "rows_per_step": layout.global_batch_size,
        "weights": str(load_checkpoint or "random, seed 0"),
        "compile_seconds": round(compiled, 1),
        "execution_seconds": round(result.seconds, 1),
        "execution_seconds_one_device": round(reference.seconds, 1),
    }
    report.update(compare(result, reference, programs, layout, config))
    for machine in result.machines:
        checkpoints.save(machine, output / "checkpoint", steps)
    write_reports(report, output)
    return report


def compile_beside_one_device(arguments, one_arguments, layout, work, output):
    """Compiles the programs of a layout and of one device; logs go to `log/` below the output, whatever happens.

    Args:
        arguments (list[str]), one_arguments (list[str]): run_mindformer's, of the two.
        layout (Layout): of the configuration.
        work (pathlib.Path): folder for intermediate files.
        output (pathlib.Path): folder of the results.

    Returns:
        tuple[list[Rehearsed], list[Rehearsed]]: of one device (one item), and by rank.
    """
    try:
        one = compile_all(one_arguments, layout.on_one_device(), work / "one")
        return one, compile_all(arguments, layout, work) if layout.world > 1 else one
    finally:
        for log in (*work.glob("log_rank_*.txt"), *work.glob("one/log_rank_*.txt")):
            copy_atomically(log, output / "log" / (log.name if log.parent == work else "log_one_device.txt"))


def compile_all(arguments, layout, work):
    """Compiles the programs of all ranks and reads what their processes left.

    Args:
        arguments (list[str]): run_mindformer's.
        layout (Layout): of the configuration.
        work (pathlib.Path): folder for logs and intermediate files.

    Returns:
        list[Rehearsed]: by rank.
    """
    found = {}
    (work / "strategy").mkdir(parents=True, exist_ok=True)

    def gather(compiled):
        record, folder = compiled.record, compiled.folder
        strategy = strategy_file(folder, compiled.rank)
        rehearsed = found[compiled.rank] = Rehearsed(
            dict(np.load(folder / STATE_FILE)),
            {},
            record.get("inputs"),
            record.get("columns"),
            {entry["phase"]: read_program(folder / entry["file"]) for entry in record["programs"]},
        )
        rehearsed.layouts = _layouts(rehearsed.program, strategy, record.get("layouts") or {})
        if strategy.exists():
            shutil.copyfile(strategy, work / "strategy" / strategy.name)
        shutil.rmtree(folder)

    run_workers(range(layout.world), layout, work, arguments, on_done=gather, jobs=_JOBS, to_execute=True)
    return [found[rank] for rank in range(layout.world)]


def _layouts(program, strategy, compiled):
    """The layouts of a stage: of its strategy file, and of frozen weights, which MindSpore cuts and does not put there.

    Args:
        program (Program): a rank's.
        strategy (pathlib.Path): the file; may be missing.
        compiled (dict[str, dict]): how the compiler cuts each parameter, before the optimizer cuts it again, and its whole
            shape.

    Returns:
        dict[str, ParameterLayout]
    """
    layouts = read_strategy(strategy) if strategy.exists() else {}
    for name, spec in program.parameters.values():
        if name in layouts or name not in compiled or not spec.shape:
            continue
        matrix = tuple(compiled[name]["dev_matrix"])
        cut = tuple(
            tuple(axis for axis in (axes if isinstance(axes, list) else [axes]) if axis != -1)
            for axes in compiled[name]["tensor_map"]
        )
        left = ParameterLayout(matrix, cut).slice_shape(compiled[name]["shape"])
        layouts[name] = ParameterLayout(matrix, cut, left[0] // spec.shape[0])
    return layouts


def run(programs, layout, whole, rows, traces=(), announce=False, beta=0.9):
    """Executes the programs of a layout.

    Args:
        programs (list[Rehearsed]): by rank.
        layout (Layout): their layout.
        whole (dict[str, numpy.ndarray]): whole parameters before the first step.
        rows (dict[str, numpy.ndarray]): by column (steps, rows, …).
        traces (sequence of str): what is printed, see `make_watch`.
        announce (bool): whether steps are reported on standard error.
        beta (float): of the optimizer's first moment.

    Returns:
        Result
    """
    network = Network(layout.world)
    machines = []
    for rank, rehearsed in enumerate(programs):
        in_stage = rank - layout.ranks_of(layout.stage_of(rank))[0]
        values = state.cut(rehearsed.program, in_stage, rehearsed.layouts, whole, rehearsed.state)
        machines.append(Machine(rehearsed.program, rank, network, values, make_watch(traces)))
    count = len(next(iter(rows.values())))
    batches = [
        [input_arrays(rehearsed, rows, step, rank, layout) for rank, rehearsed in enumerate(programs)]
        for step in range(count)
    ]
    started = time.monotonic()

    noise = NoiseWatch(beta)

    def say(rank, step):
        if layout.world == 1:
            noise.after_step(machines[0].parameters)
        if announce and rank == layout.world - 1:
            took = time.monotonic() - started
            print(
                f"step {step + 1} of {count} executed, {took:.0f} s; about {took / (step + 1) * (count - step - 1):.0f} s "
                "left",
                file=sys.stderr,
                flush=True,
            )

    outputs = run_world(machines, network, batches, say)
    return Result(machines, outputs, network.unread(), time.monotonic() - started, noise.masks)


def make_watch(traces):
    """A watch for `Machine` that prints values.

    Args:
        traces (sequence of str): names of operators ("MatMul", or a part of the scope, "layers.0/self_attention"), or of
            parameters ("query_key_value.weight": what is assigned to it).

    Returns:
        callable | None
    """
    if not traces:
        return None

    def watch(rank, step, node, value):
        spec = node.output[0] if isinstance(node.output, tuple) and node.output else node.output
        names = (node.op, node.instance, getattr(spec, "parameter", None) or "")
        if not any(trace in names or trace in node.scope or (names[2] and trace in names[2]) for trace in traces):
            return
        for number, array in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(array, np.ndarray) and array.size:
                flat = array.reshape(-1)
                text = np.array2string(flat[:4], precision=6, separator=", ")
                floats = array.astype(np.float64)
                print(
                    f"trace: step {step + 1} rank {rank} {node.op} {node.scope or names[2]} "
                    f"output {number} {array.dtype}{list(array.shape)} first {text} mean {floats.mean():.6g} "
                    f"largest {np.abs(floats).max():.6g}",
                    flush=True,
                )

    return watch


def compare(result, reference, programs, layout, config):
    """Compares a layout's execution with one device's.

    Args:
        result (Result), reference (Result): of the layout, of one device.
        programs (list[Rehearsed]): of the layout.
        layout (Layout): it.
        config (dict): merged configuration.

    Returns:
        dict: the part of execution.json that holds results.
    """
    factor = layout.micro_batches * int(config.get("micro_batch_interleave_num") or 1)
    accumulate = int((config.get("runner_config") or {}).get("gradient_accumulation_steps") or 1)
    factor *= accumulate if layout.stages == 1 else 1
    steps = [_step(ranks, one[0], layout, factor) for ranks, one in zip(result.outputs, reference.outputs)]
    shapes = {name: parameter.value.shape for name, parameter in reference.machines[0].parameters.items()}
    one_device = {name: parameter.value for name, parameter in reference.machines[0].parameters.items()}
    stages = range(layout.stages)
    layouts = [programs[layout.ranks_of(stage)[0]].layouts for stage in stages]
    whole, unequal = state.join(result.machines, [layout.ranks_of(stage) for stage in stages], layouts, shapes)
    differences = compare_parameters(whole, one_device, reference.noise)
    dtype = config["model"]["model_config"]["compute_dtype"]
    problems = disagreements(steps, differences, unequal, result.unread, TOLERANCES[dtype])
    missing = sorted(set(shapes) - set(whole))
    problems += [f"{name} is held by no rank" for name in missing]
    weights = [item for item in differences if plain_name(item.name) == item.name]
    moments = [item for item in differences if plain_name(item.name) != item.name]
    counted = {
        (kind, machine.rank): count
        for machine in result.machines
        for kind, count in operators.collectives_of(machine.executed).items()
    }
    return {
        "agrees": not problems,
        "problems": problems,
        "tolerance": vars(TOLERANCES[dtype]),
        "steps": steps,
        "largest_weight_difference": max((item.largest for item in weights), default=0.0),
        "largest_weight_difference_relative": max((item.relative for item in weights), default=0.0),
        "largest_moment_difference_relative": max((item.relative for item in moments), default=0.0),
        "largest_differences": [vars(item) for item in differences[:10]],
        "elements_left_out_as_noise": sum(item.noise for item in weights),
        "unequal_copies": {name: {"ranks": ranks, "largest": largest} for name, (ranks, largest) in unequal.items()},
        "non_finite": _first_of_steps(result.machines),
        "non_finite_one_device": _first_of_steps(reference.machines),
        "collectives": [
            {"kind": kind, "rank": rank, "count": count} for (kind, rank), count in sorted(counted.items())
        ],
    }


def _first_of_steps(machines):
    """Of each step the operator that was the first on any rank to make something not finite."""
    events = sorted((item for machine in machines for item in machine.non_finite), key=lambda item: item.when)
    first = {}
    for item in events:
        first.setdefault(
            item.step, {"step": item.step + 1, "rank": item.rank, "place": item.place, "output": item.output}
        )
    return [first[step] for step in sorted(first)]


def _step(ranks, one, layout, factor):
    """One step of execution.json from the programs' results: loss, overflow, loss scale, learning rate, norm."""
    last = layout.ranks_of(layout.stages - 1)
    losses = [_number(ranks[rank][0]) / factor for rank in last]
    norms = [_number(output[4]) if len(output) > 4 else None for output in ranks]
    step = {
        "loss": losses[0],
        "loss_one_device": _number(one[0]),
        "grad_norm": norms[0],
        "grad_norm_one_device": _number(one[4]) if len(one) > 4 else None,
        "learning_rate": _number(ranks[0][3]),
        "learning_rate_one_device": _number(one[3]),
        "loss_scale": _number(ranks[0][2]),
        "loss_scale_one_device": _number(one[2]),
        "overflow": any(bool(np.all(output[1])) for output in ranks),
        "overflow_one_device": bool(np.all(one[1])),
    }
    if any(loss != losses[0] and not (np.isnan(loss) and np.isnan(losses[0])) for loss in losses):
        step["loss_differs"] = losses
    if any(norm != norms[0] for norm in norms) and np.isfinite(norms[0]):
        step["grad_norm_differs"] = norms
    return step


def _number(value):
    return None if value is None else float(np.asarray(value).reshape(-1)[0])
