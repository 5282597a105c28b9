"""Rehearsal of prediction: greedy decoding by the programs of all ranks, beside those of one device."""

import copy
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mindformers_glm32k.dryrun.compile.pool import read_layout
from mindformers_glm32k.dryrun.simulator import checkpoints, state
from mindformers_glm32k.dryrun.simulator import scale_down as shrink
from mindformers_glm32k.dryrun.simulator.generation import generate, is_cache
from mindformers_glm32k.dryrun.simulator.generation_comparison import TOLERANCES, compare
from mindformers_glm32k.dryrun.simulator.generation_report import write_reports
from mindformers_glm32k.dryrun.simulator.precision import widen, widen_values
from mindformers_glm32k.dryrun.simulator.prompts import check_prompts, make_prompts
from mindformers_glm32k.dryrun.simulator.train import compile_beside_one_device, make_watch
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.overrides import set_key
from mindformers_glm32k.parallel import ParallelLayout, check_layout

_KERNELS = "float16"  # what the kernels of prediction are compiled for where everything is computed in float32


@dataclass
class Rehearsal:
    """Compiled programs, weights and prompts.

    Args:
        layout (Layout): of `programs`.
        programs (list[Rehearsed]): by rank.
        one (Rehearsed): of one device.
        whole (dict[str, numpy.ndarray]): whole weights, the caches left out.
        prompts (list[numpy.ndarray]): int32.
        count (int): tokens to generate.
        dtype (str): of what is computed.
    """

    layout: object
    programs: list
    one: object
    whole: dict
    prompts: list
    count: int
    dtype: str

    def run(self, traces=()):
        """Decodes with the programs of all ranks and with one device's.

        Args:
            traces (sequence of str): operators or parameters whose values are printed.

        Returns:
            dict: results and seconds, for execution.json.
        """
        alone = self.layout.world == 1
        reference, one_seconds = self._generate([self.one], traces if alone else ())
        result, seconds = (reference, one_seconds) if alone else self._generate(self.programs, traces)
        return {
            "execution_seconds": round(seconds, 1),
            "execution_seconds_one_device": round(one_seconds, 1),
            **compare(result, reference, TOLERANCES[self.dtype]),
        }

    def _generate(self, programs, traces):
        started = time.monotonic()
        result = generate(programs, self.whole, self.prompts, self.count, lambda: make_watch(traces))
        return result, time.monotonic() - started


def execute(
    config_file,
    overrides,
    output,
    count,
    load_checkpoint=None,
    shrunk=None,
    precision="float32",
    traces=(),
    prompts=None,
    config=None,
):
    """Compiles the programs (prefill and increment, or predict) of all ranks and of one device, decodes the same prompts
    greedily with both, compares, and writes execution.json and execution.md.

    Args:
        config_file (str): YAML for prediction.
        overrides (list[str]): run_mindformer's other options.
        output (pathlib.Path): folder of the results.
        count (int): tokens to generate, at most max_new_tokens.
        load_checkpoint (str | None): whole checkpoint; by default random weights.
        shrunk (bool | None): whether the model is made small; by default where it is large.
        precision (str): dtype of everything, or "config": as the YAML has it.
        traces (sequence of str): operators or parameters whose values are printed.
        prompts (list | None): see `check_prompts`; by default random ones.
        config (dict | None): merged configuration, where it has been read already.

    Returns:
        dict: execution.json, see `execution.generation_report`.

    Raises:
        InputError: the configuration cannot be rehearsed, or prompts do not fit it.
        ExecutionError, NetworkError: the programs cannot be executed to the end.
        WorkerFailed: a program was not compiled.
    """
    rehearsal, header = prepare(
        config_file, overrides, output, count, load_checkpoint, shrunk, precision, prompts, config
    )
    report = {**header, **rehearsal.run(traces)}
    write_reports(report, output)
    return report


def prepare(
    config_file,
    overrides,
    output,
    count,
    load_checkpoint=None,
    shrunk=None,
    precision="float32",
    prompts=None,
    config=None,
):
    """Compiles the programs; arguments and errors of `execute`.

    Returns:
        tuple[Rehearsal, dict]: what can be executed; and what execution.json says of it.
    """
    started = time.monotonic()
    arguments = ["--config", str(Path(config_file).resolve()), *overrides]
    if config is None:
        _, config = read_layout(arguments)
    if config["run_mode"] != "predict":
        raise InputError(f"--execute: run_mode {config['run_mode']} cannot be executed; predict and finetune can")
    small = shrink.plan(config, shrunk, load_checkpoint)
    config = _changed(config, small.changes)
    check_layout(config)
    if prompts is None:
        prompts, source = make_prompts(config, count), "random tokens"
    else:
        prompts, source = check_prompts(prompts, config, count), "given"
    arguments += small.overrides
    kernels = _KERNELS if precision == "float32" and config["model"]["model_config"].get("use_past") else None
    if precision != "config":
        arguments += shrink.precision_overrides(precision, kernels)
    layout = ParallelLayout.from_config(config)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".work_", dir=output) as folder:
        work = Path(folder).resolve()
        one, programs = compile_beside_one_device(
            arguments, [*arguments, *shrink.one_device_overrides(1)], layout, work, output
        )
        seconds = round(time.monotonic() - started, 1)
        whole = whole_weights(one[0], kernels, load_checkpoint, config, work)
    if kernels:
        for rehearsed in {id(item): item for item in [*one, *programs]}.values():
            rehearsed.phases = {name: widen(program) for name, program in rehearsed.phases.items()}
    dtype = precision if precision != "config" else config["model"]["model_config"].get("compute_dtype", "float16")
    header = {
        "world_size": layout.world,
        "layout": layout.describe(),
        "config": str(config_file),
        "shrunk": small.changes,
        "precision": precision,
        "precision_text": precision_text(precision, kernels),
        "prompts": [ids.tolist() for ids in prompts],
        "prompt_lengths": [len(ids) for ids in prompts],
        "prompts_text": source,
        "weights": str(load_checkpoint or "random, seed 0"),
        "compile_seconds": seconds,
    }
    return Rehearsal(layout, programs, one[0], whole, prompts, count, dtype), header


def whole_weights(one, kernels, load_checkpoint, config, work):
    """dict[str, numpy.ndarray]: weights of one device, the caches left out: a checkpoint's or random ones."""
    values = {name: value for name, value in one.state.items() if not is_cache(name)}
    if kernels:
        values = widen_values(values)
    if load_checkpoint:
        return checkpoints.load_weights(load_checkpoint, values, config, work)
    return state.random_weights(values)


def precision_text(precision, kernels):
    """str: what was computed in which dtype."""
    if not kernels:
        return precision
    return (
        f"{precision} (kernels of prediction take 16 bits only: compiled in {kernels}, executed with {precision} in its "
        "place, which leaves cuts and collectives as they are)"
    )


def _changed(config, changes):
    """The configuration with a plan's changes, by dotted keys."""
    config = copy.deepcopy(config)
    for key, (_, value) in changes.items():
        set_key(config, key, value, f"--{key}")
    return config
