"""Training simulated: the programs of all ranks compiled and run on this machine, beside that of one device."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_glm32k.data.encode import IGNORED
from mindformers_glm32k.dryrun.analysis.mindir import Program, read_program
from mindformers_glm32k.dryrun.compile.pool import read_batches, read_layout, run_workers, strategy_file
from mindformers_glm32k.dryrun.compile.worker import STATE_FILE
from mindformers_glm32k.dryrun.simulator import scale_down, state
from mindformers_glm32k.dryrun.simulator.comparison import NoiseWatch, TrainingRun, compare_training
from mindformers_glm32k.dryrun.simulator.interpreter import RankInterpreter
from mindformers_glm32k.dryrun.simulator.network import Network, run_ranks
from mindformers_glm32k.dryrun.simulator.report import write_reports
from mindformers_glm32k.dryrun.simulator.scale_down import Request
from mindformers_glm32k.files import copy_atomically
from mindformers_glm32k.parallel import ParallelLayout
from mindformers_glm32k.weights.strategy import ShardSpec, read_strategy

_JOBS = 2  # programs compiled at the same time
Sequences = Mapping[str, np.ndarray]  # by column (steps, sequences, tokens)


@dataclass
class CompiledRank:
    """Programs of a rank that are ready to be run."""

    state: dict[str, np.ndarray]  # initial values that its worker wrote
    layouts: dict[str, ShardSpec]  # of its stage; {} for one device
    inputs: list[list[int]]  # shapes that it was compiled for
    columns: list[str]  # names of these inputs
    phases: dict[str, Program]  # "train", or of prediction "prefill" and "increment", or "predict"

    @property
    def program(self) -> Program:
        """The program of training, or the last one of prediction."""
        return list(self.phases.values())[-1]


def simulate(request: Request, config: dict) -> dict:
    """`simulator.simulate` of a training run whose merged configuration is `config`."""
    started = time.monotonic()
    output, steps, load_checkpoint = request.output, request.steps, request.load_checkpoint
    small = scale_down.plan(config, request.scaled_down, load_checkpoint)
    arguments = [*request.arguments, *small.overrides, *scale_down.schedule_overrides(config)]
    if request.precision != "config":
        arguments += scale_down.precision_overrides(request.precision)
    layout, config = read_layout(arguments)
    one_arguments = [*arguments, *scale_down.one_device_overrides(layout.global_batch_size)]
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".work_", dir=output) as folder:
        work = Path(folder).resolve()
        one, programs = compile_with_reference(arguments, one_arguments, layout, work, output)
        compiled = time.monotonic() - started
        sequences, source = read_sequences(one_arguments, one[0], steps, config, work)
        whole = state.initial_weights(load_checkpoint, one[0].state, config, work)
        for file in (work / "strategy").glob("ckpt_strategy_rank_*.ckpt"):
            copy_atomically(file, output / "strategy" / file.name)
    beta = float((config["optimizer"].get("betas") or (0.9,))[0])
    reference = run(one, layout.on_one_device(), whole, sequences, beta=beta)
    result = run(programs, layout, whole, sequences, request.traces, announce=True) if layout.world > 1 else reference
    report = {
        "world_size": layout.world,
        "layout": layout.describe(),
        "config": request.config_file,
        "shrunk": small.changes,
        "precision": request.precision,
        "rows": source,
        "rows_per_step": layout.global_batch_size,
        "weights": str(load_checkpoint or "random, seed 0"),
        "compile_seconds": round(compiled, 1),
        "execution_seconds": round(result.seconds, 1),
        "execution_seconds_one_device": round(reference.seconds, 1),
    }
    report.update(compare(result, reference, programs, layout, config))
    for interpreter in result.interpreters:
        state.save(interpreter, output / "checkpoint", steps)
    write_reports(report, output)
    return report


def compile_with_reference(
    arguments: list[str], one_arguments: list[str], layout: ParallelLayout, work: Path, output: Path
) -> tuple[list[CompiledRank], list[CompiledRank]]:
    """Compiles the programs of one device (`one_arguments`; a list of one) and of a layout (by rank), in the folder
    `work`; logs go to `log/` below the output, also after a failure."""
    try:
        one = compile_ranks(one_arguments, layout.on_one_device(), work / "one")
        return one, compile_ranks(arguments, layout, work) if layout.world > 1 else one
    finally:
        for log in (*work.glob("log_rank_*.txt"), *work.glob("one/log_rank_*.txt")):
            copy_atomically(log, output / "log" / (log.name if log.parent == work else "log_one_device.txt"))


def compile_ranks(arguments: list[str], layout: ParallelLayout, work: Path) -> list[CompiledRank]:
    """Compiles the programs of all ranks in the folder `work` and reads the workers' files, by rank."""
    found = {}
    (work / "strategy").mkdir(parents=True, exist_ok=True)

    def read(compiled):
        record, folder = compiled.record, compiled.folder
        strategy = strategy_file(folder, compiled.rank)
        ready = found[compiled.rank] = CompiledRank(
            dict(np.load(folder / STATE_FILE)),
            {},
            record.get("inputs"),
            record.get("columns"),
            {entry["phase"]: read_program(folder / entry["file"]) for entry in record["programs"]},
        )
        ready.layouts = _layouts(ready.program, strategy, record.get("layouts") or {})
        if strategy.exists():
            shutil.copyfile(strategy, work / "strategy" / strategy.name)
        shutil.rmtree(folder)

    run_workers(range(layout.world), layout, work, arguments, on_done=read, jobs=_JOBS, for_simulation=True)
    return [found[rank] for rank in range(layout.world)]


def _layouts(program, strategy, compiled):
    """The layouts of a stage: of its strategy file, and of frozen weights, which MindSpore shards but leaves out.

    `compiled` says how the compiler shards each parameter, before the optimizer shards it again, and its whole shape.
    """
    layouts = read_strategy(strategy) if strategy.exists() else {}
    for name, spec in program.parameters.values():
        if name in layouts or name not in compiled or not spec.shape:
            continue
        matrix = tuple(compiled[name]["dev_matrix"])
        tensor_map = tuple(
            tuple(axis for axis in (axes if isinstance(axes, list) else [axes]) if axis != -1)
            for axes in compiled[name]["tensor_map"]
        )
        left = ShardSpec(matrix, tensor_map).shard_shape(compiled[name]["shape"])
        layouts[name] = ShardSpec(matrix, tensor_map, left[0] // spec.shape[0])
    return layouts


def run(
    programs: Sequence[CompiledRank],
    layout: ParallelLayout,
    whole: state.State,
    sequences: Sequences,
    traces: Sequence[str] = (),
    announce: bool = False,
    beta: float = 0.9,
) -> TrainingRun:
    """Runs the programs of a layout, by rank, from the whole parameters before the first step.

    `traces` see `make_watch`; `announce` reports steps on standard error; `beta` is AdamW's, of the first moment.
    """
    network = Network(layout.world)
    interpreters = []
    for rank, compiled in enumerate(programs):
        rank_in_stage = rank - layout.ranks_of(layout.stage_of(rank))[0]
        values = state.shard(compiled.program, rank_in_stage, compiled.layouts, whole, compiled.state)
        interpreters.append(RankInterpreter(compiled.program, rank, network, values, make_watch(traces)))
    count = len(next(iter(sequences.values())))
    batches = [
        [rank_inputs(compiled, sequences, step, rank, layout) for rank, compiled in enumerate(programs)]
        for step in range(count)
    ]
    started = time.monotonic()
    noise = NoiseWatch(beta)

    def after_step(rank, step):
        if layout.world == 1:
            noise.after_step(interpreters[0].parameters)
        if announce and rank == layout.world - 1:
            took = time.monotonic() - started
            left = took / (step + 1) * (count - step - 1)
            text = f"step {step + 1} of {count} simulated, {took:.0f} s; about {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)

    outputs = run_ranks(interpreters, network, batches, after_step)
    return TrainingRun(interpreters, outputs, network.unread(), time.monotonic() - started, noise.masks)


def compare(
    result: TrainingRun, reference: TrainingRun, programs: Sequence[CompiledRank], layout: ParallelLayout, config: dict
) -> dict:
    """`compare_training` of the run of a layout's `programs` (by rank)."""
    layouts = [programs[layout.ranks_of(stage)[0]].layouts for stage in range(layout.stages)]
    return compare_training(result, reference, layouts, layout, config)


def make_watch(traces: Sequence[str]) -> Callable | None:
    """A watch for `RankInterpreter` that prints values.

    `traces` are names of operators ("MatMul", or a part of the scope, "layers.0/self_attention"), or of parameters
    ("query_key_value.weight": what is assigned to it).
    """
    if not traces:
        return None

    def watch(rank, step, node, value):
        spec = node.output[0] if isinstance(node.output, tuple) and node.output else node.output
        names = (node.op, node.instance, getattr(spec, "parameter", None) or "")
        if not any(trace in names or trace in node.scope or (names[2] and trace in names[2]) for trace in traces):
            return
        for index, array in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(array, np.ndarray) and array.size:
                first = np.array2string(array.reshape(-1)[:4], precision=6, separator=", ")
                floats = array.astype(np.float64)
                print(
                    f"trace: step {step + 1} rank {rank} {node.op} {node.scope or names[2]} "
                    f"output {index} {array.dtype}{list(array.shape)} first {first} mean {floats.mean():.6g} "
                    f"largest {np.abs(floats).max():.6g}",
                    flush=True,
                )

    return watch


def read_sequences(
    arguments: list[str], one: CompiledRank, steps: int, config: dict, work: Path
) -> tuple[dict[str, np.ndarray], str]:
    """Sequences of the configuration's data set, or random ones where its files are missing; and a phrase that says so.

    `arguments` are run_mindformer's of one device, `one` its program; the log goes to the folder `work`.
    """
    vocab_size = int(config["model"]["model_config"]["padded_vocab_size"])
    found = read_batches(arguments, steps, work)
    if found is None:
        note = "random tokens, sequences with different numbers of labels (the YAML's data or vocabulary are not there)"
        return random_sequences(one.columns, one.inputs[0], steps, vocab_size), note
    note = "the YAML's data set"
    if any(found[name].max() >= vocab_size for name in ("input_ids", "labels")):
        note += f", tokens folded into the small model's vocabulary of {vocab_size}"
        found["input_ids"] = found["input_ids"] % vocab_size
        found["labels"] = np.where(found["labels"] == IGNORED, IGNORED, found["labels"] % vocab_size).astype(np.int32)
    return found, note


def random_sequences(
    columns: Sequence[str], shape: Sequence[int], steps: int, vocab_size: int, seed: int = 7
) -> dict[str, np.ndarray]:
    """Sequences of random tokens, each with a prompt of another length; `shape` is (sequences of a step, tokens).

    Columns are input_ids, labels, input_mask, position_ids and document_ids.
    """
    rng = np.random.default_rng(seed)
    batch, length = shape
    ids = rng.integers(3, vocab_size, (steps, batch, length)).astype(np.int32)
    labels = np.roll(ids, -1, axis=2)
    prompts = rng.integers(0, length - 4, (steps, batch, 1))
    position = np.broadcast_to(np.arange(length), ids.shape)
    labels = np.where((position < prompts) | (position == length - 1), IGNORED, labels).astype(np.int32)
    half = length // 2
    values = {
        "input_ids": ids,
        "labels": labels,
        "input_mask": (labels != IGNORED).astype(np.float32),
        "position_ids": (position % half).astype(np.int32),
        "document_ids": (position // half).astype(np.int32),
    }
    return {name: values[name] for name in columns}


def rank_inputs(
    compiled: CompiledRank, sequences: Sequences, step: int, rank: int, layout: ParallelLayout
) -> list[np.ndarray]:
    """A rank's inputs of one step: the whole batch, or its data parallel shard where it was compiled for that."""
    arrays = []
    for name, spec in zip(compiled.columns, compiled.program.inputs.values()):
        value = sequences[name][step]
        if len(value) // spec.shape[0] > 1:
            ranks_of_stage = layout.world // layout.stages
            index = rank % ranks_of_stage // (ranks_of_stage // layout.data_parallel)
            value = value[index * spec.shape[0] : (index + 1) * spec.shape[0]]
        arrays.append(np.ascontiguousarray(value))
    return arrays
