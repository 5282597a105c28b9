"""Prediction simulated: greedy decoding by the compiled programs of all ranks, beside those of one device.

"prefill" reads all prompts, "increment" one more token of each; without a cache, "predict" reads all prompts and the
tokens generated so far. Around the programs this module does what upstream's generator does: it allocates blocks of the
cache to prompts, maps each token's keys and values to a slot, and takes the token with the largest logit.

Letters: B prompts, N tokens to generate, S tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_glm32k.dryrun.analysis.mindir import Program
from mindformers_glm32k.dryrun.simulator import scale_down, state
from mindformers_glm32k.dryrun.simulator.comparison import LOGIT_TOLERANCES, GenerationRun, compare_generation
from mindformers_glm32k.dryrun.simulator.interpreter import RankInterpreter, SimulationError, widen
from mindformers_glm32k.dryrun.simulator.network import Network, run_ranks
from mindformers_glm32k.dryrun.simulator.operators import NUMPY, wide
from mindformers_glm32k.dryrun.simulator.report import write_reports
from mindformers_glm32k.dryrun.simulator.scale_down import Request
from mindformers_glm32k.dryrun.simulator.train import CompiledRank, compile_with_reference, make_watch
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.overrides import set_key
from mindformers_glm32k.parallel import ParallelLayout, check_layout

PREFILL, INCREMENT, PREDICT = "prefill", "increment", "predict"
_PAD = 0  # after the text of a sequence; hidden by the causal mask
_CACHES = ("key_cache", "value_cache")
_KERNELS = "float16"  # compiled dtype of prediction's kernels where everything is simulated in float32


@dataclass
class Decoding:
    """Compiled programs, weights and prompts of a layout."""

    layout: ParallelLayout
    programs: list[CompiledRank]  # by rank
    one: CompiledRank  # of one device
    whole: dict[str, np.ndarray]  # whole weights, the caches left out
    prompts: list[np.ndarray]  # int32
    count: int  # tokens to generate
    dtype: str  # in which everything is computed

    def run(self, traces: Sequence[str] = ()) -> dict:
        """Decodes with the programs of all ranks and with one device's: results and seconds, for execution.json."""
        alone = self.layout.world == 1
        reference = generate([self.one], self.whole, self.prompts, self.count, traces if alone else ())
        result = reference if alone else generate(self.programs, self.whole, self.prompts, self.count, traces)
        return {
            "execution_seconds": round(result.seconds, 1),
            "execution_seconds_one_device": round(reference.seconds, 1),
            **compare_generation(result, reference, LOGIT_TOLERANCES[self.dtype]),
        }


def simulate(request: Request, config: dict) -> dict:
    """`simulator.simulate` of prediction with the merged configuration `config`; at most max_new_tokens tokens."""
    decoding, header = prepare(request, config)
    report = {**header, **decoding.run(request.traces)}
    write_reports(report, request.output)
    return report


def prepare(request: Request, config: dict, prompts: Sequence[Sequence[int]] | None = None) -> tuple[Decoding, dict]:
    """Compiles the programs (prefill and increment, or predict) of all ranks and of one device.

    `prompts` see `scale_down.check_prompts`; random ones by default. Errors are those of `simulator.simulate`.

    Returns:
        The decoding, ready to run; and its header in execution.json.
    """
    started = time.monotonic()
    count, load_checkpoint, precision = request.steps, request.load_checkpoint, request.precision
    if config["run_mode"] != "predict":
        raise InputError(f"--execute: run_mode {config['run_mode']} cannot be simulated; predict and finetune can")
    small = scale_down.plan(config, request.scaled_down, load_checkpoint)
    config = copy.deepcopy(config)
    for key, (_, value) in small.changes.items():
        set_key(config, key, value, f"--{key}")
    check_layout(config)
    if prompts is None:
        prompts, source = scale_down.make_prompts(config, count), "random tokens"
    else:
        prompts, source = scale_down.check_prompts(prompts, config, count), "given"
    arguments = [*request.arguments, *small.overrides]
    kernels = _KERNELS if precision == "float32" and config["model"]["model_config"].get("use_past") else None
    if precision != "config":
        arguments += scale_down.precision_overrides(precision, kernels)
    layout = ParallelLayout.from_config(config)
    request.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".work_", dir=request.output) as folder:
        work = Path(folder).resolve()
        one_arguments = [*arguments, *scale_down.one_device_overrides(1)]
        (one,), programs = compile_with_reference(arguments, one_arguments, layout, work, request.output)
        seconds = round(time.monotonic() - started, 1)
        weights = {name: value for name, value in one.state.items() if not _is_cache(name)}
        if kernels:
            weights = {name: wide(value) for name, value in weights.items()}
        whole = state.initial_weights(load_checkpoint, weights, config, work)
    precision_text = precision
    if kernels:
        precision_text += (
            f" (kernels of prediction take 16 bits only: compiled in {kernels}, run with {precision} in its place, "
            "which leaves shards and collectives as they are)"
        )
        for compiled in {id(item): item for item in [one, *programs]}.values():
            compiled.phases = {name: widen(program) for name, program in compiled.phases.items()}
    dtype = precision if precision != "config" else config["model"]["model_config"].get("compute_dtype", "float16")
    header = {
        "world_size": layout.world,
        "layout": layout.describe(),
        "config": str(request.config_file),
        "shrunk": small.changes,
        "precision": precision,
        "precision_text": precision_text,
        "prompts": [ids.tolist() for ids in prompts],
        "prompt_lengths": [len(ids) for ids in prompts],
        "prompts_text": source,
        "weights": str(load_checkpoint or "random, seed 0"),
        "compile_seconds": seconds,
    }
    return Decoding(layout, programs, one, whole, prompts, count, dtype), header


def generate(
    programs: Sequence[CompiledRank],
    whole: state.State,
    prompts: list[np.ndarray],
    count: int,
    traces: Sequence[str] = (),
) -> GenerationRun:
    """Decodes `count` tokens after each of B prompts (int32) with the programs of all ranks of one pipeline stage.

    `whole` are the whole parameters, the caches left out; `traces` see `make_watch`.
    """
    started = time.monotonic()
    network = Network(len(programs))
    generators = []
    for rank, compiled in enumerate(programs):
        values = {}
        for program in compiled.phases.values():
            weights = _without_caches(program)
            values.update(state.shard(weights, rank, compiled.layouts, whole, compiled.state))
        generator = CachedGenerator if PREFILL in compiled.phases else UncachedGenerator
        generators.append(generator(compiled.phases, rank, network, values, make_watch(traces)))
    results = run_ranks(generators, network, [[(prompts, count)] * len(programs)])[0]
    interpreters = [generator.interpreters for generator in generators]
    seconds = time.monotonic() - started
    return GenerationRun(interpreters, *map(list, zip(*results)), network.unread(), seconds)


class Blocks:
    """Allocates the cache's `blocks` blocks of `size` tokens to B prompts, at most `width` to each: the next free one
    whenever a prompt's last block is full."""

    def __init__(self, prompts: int, width: int, size: int, blocks: int):
        self.width, self.size, self.blocks = width, size, blocks
        self.dealt = 0
        self.tables = [[] for _ in range(prompts)]
        self.lengths = [0] * prompts

    def extend(self, counts: Sequence[int]) -> np.ndarray:
        """Slots for `counts` new tokens of the prompts: (sum of counts) int32, numbered over all blocks.
        SimulationError when the cache, or a prompt's table, is full."""
        slots = []
        for prompt, count in enumerate(counts):
            table, start = self.tables[prompt], self.lengths[prompt]
            end = start + count
            while len(table) * self.size < end:
                if self.dealt == self.blocks or len(table) == self.width:
                    raise SimulationError(
                        f"prompt {prompt} of {end} tokens does not fit: the cache has {self.blocks} "
                        f"blocks of {self.size} tokens, {self.width} at most of a prompt"
                    )
                table.append(self.dealt)
                self.dealt += 1
            self.lengths[prompt] = end
            slots += [table[index // self.size] * self.size + index % self.size for index in range(start, end)]
        return np.array(slots, np.int32)

    def table(self) -> np.ndarray:
        """(B, width) int32, the blocks of each prompt in order, -1 behind them."""
        return np.array([table + [-1] * (self.width - len(table)) for table in self.tables], np.int32)


class CachedGenerator:
    """One rank: "prefill" and "increment" over the same weights (`values`, the caches left out) and caches."""

    def __init__(
        self, phases: Mapping[str, Program], rank: int, network: Network, values: state.State, watch: Callable | None
    ):
        caches = {
            name: np.zeros(spec.shape, NUMPY[spec.dtype])
            for program in phases.values()
            for name, spec in program.parameters.values()
            if _is_cache(name)
        }
        prefill = RankInterpreter(phases[PREFILL], rank, network, {**values, **caches}, watch)
        shared = {**values, **caches, **prefill.parameters}
        self.interpreters = {
            PREFILL: prefill,
            INCREMENT: RankInterpreter(phases[INCREMENT], rank, network, shared, watch),
        }
        self.blocks, self.block_size = next(
            parameter.value.shape[:2] for name, parameter in prefill.parameters.items() if _is_cache(name)
        )

    def run(self, task: tuple[list[np.ndarray], int]) -> tuple[np.ndarray, np.ndarray]:
        """Decodes greedily: tokens (B, N) int32 and logits (N, B, V).

        `task`: (prompts: B arrays of int32, in all as long as the compiled program's input; N).
        """
        prompts, count = task
        interpreter = self.interpreters[PREFILL]
        width = _input(interpreter.program, "block_tables").shape[1]
        blocks = Blocks(len(prompts), width, self.block_size, self.blocks)
        ids, tokens, logits = np.concatenate(prompts)[None], [], []
        counts = [len(prompt) for prompt in prompts]
        for index in range(count):
            interpreter.step = index  # a step is a token, whichever program computes it
            slots = blocks.extend(counts)
            logits.append(
                _logits(
                    interpreter,
                    len(prompts),
                    input_ids=ids.astype(np.int32),
                    slot_mapping=slots,
                    block_tables=blocks.table(),
                    batch_valid_length=np.array([blocks.lengths], np.int32),
                )
            )
            tokens.append(logits[-1].argmax(-1).astype(np.int32))
            interpreter, ids, counts = self.interpreters[INCREMENT], tokens[-1][:, None], [1] * len(prompts)
        return np.stack(tokens, 1), np.stack(logits)


class UncachedGenerator:
    """One rank: "predict" reads whole sequences for each token."""

    def __init__(
        self, phases: Mapping[str, Program], rank: int, network: Network, values: state.State, watch: Callable | None
    ):
        self.interpreters = {PREDICT: RankInterpreter(phases[PREDICT], rank, network, values, watch)}

    def run(self, task: tuple[list[np.ndarray], int]) -> tuple[np.ndarray, np.ndarray]:
        """Decodes greedily; see `CachedGenerator.run`."""
        prompts, count = task
        interpreter = self.interpreters[PREDICT]
        sequences = np.full(_input(interpreter.program, "input_ids").shape, _PAD, np.int32)  # (B, S)
        ends = np.array([len(prompt) for prompt in prompts])
        for sequence, prompt in zip(sequences, prompts):
            sequence[: len(prompt)] = prompt
        each, tokens, logits = np.arange(len(prompts)), [], []
        for _ in range(count):
            result = _logits(interpreter, sequences.size, input_ids=sequences)
            logits.append(result.reshape(*sequences.shape, -1)[each, ends - 1])  # (B * S, V) -> (B, V)
            tokens.append(logits[-1].argmax(-1).astype(np.int32))
            inside = ends < sequences.shape[1]  # the last generated token is not read
            sequences[each[inside], ends[inside]] = tokens[-1][inside]
            ends += 1
        return np.stack(tokens, 1), np.stack(logits)


def _logits(interpreter, count, **inputs):
    """The logits of a program: (count, V)."""
    names = [name.rsplit(":", 1)[-1] for name in interpreter.program.main.inputs]
    if set(names) != set(inputs):
        raise SimulationError(f"rank {interpreter.rank}: the program's inputs are {names}, known are {sorted(inputs)}")
    result = interpreter.run([inputs[name] for name in names])
    result = result[0] if isinstance(result, tuple) else result
    if result.ndim != 2 or len(result) != count:
        raise SimulationError(f"rank {interpreter.rank}: logits of {list(result.shape)}, for {count} tokens")
    return result


def _is_cache(name):
    """Whether a parameter is a cache of keys or values."""
    return name.endswith(_CACHES)


def _without_caches(program):
    """The program without the caches, which are zeros at the start on every rank."""
    parameters = {node: entry for node, entry in program.parameters.items() if not _is_cache(entry[0])}
    return Program(program.main, program.graphs, parameters, program.inputs)


def _input(program, name):
    return next(spec for node, spec in program.inputs.items() if node.endswith(f":{name}"))
