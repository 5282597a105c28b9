"""Rehearsal of prediction: greedy decoding by the programs of all ranks, beside those of one device."""
import copy
import tempfile
import time
from pathlib import Path

import numpy as np

from mindformers_glm32k.dryrun import shrink
from mindformers_glm32k.dryrun.execute import compile_all, make_watch
from mindformers_glm32k.dryrun.execution import checkpoints, states
from mindformers_glm32k.dryrun.execution.generation import generate, is_cache
from mindformers_glm32k.dryrun.execution.generation_comparison import TOLERANCES, compare
from mindformers_glm32k.dryrun.execution.generation_report import write_reports
from mindformers_glm32k.dryrun.execution.precision import widen, widen_values
from mindformers_glm32k.dryrun.layout import layout_of
from mindformers_glm32k.dryrun.layout_checks import check_layout
from mindformers_glm32k.dryrun.strategy import copy_atomically
from mindformers_glm32k.dryrun.workers import read_layout
from mindformers_glm32k.errors import InputError

_KERNELS = "float16"  # what the kernels of prediction are compiled for where everything is computed in float32
_LOWEST_WORD = 3  # of random prompts: behind padding and the end of a text


def execute(config_file, overrides, output, count, load_checkpoint=None, shrunk=None, precision="float32", traces=(),
            prompts=None, config=None):
    """Compiles the prefill and increment programs of all ranks and of one device, decodes the same prompts greedily with
    both, compares, and writes execution.json and execution.md.

    Args:
        config_file (str): YAML for prediction, with use_past.
        overrides (list[str]): run_mindformer's other options.
        output (pathlib.Path): folder of the results.
        count (int): tokens to generate, at most max_new_tokens.
        load_checkpoint (str | None): whole checkpoint; by default random weights.
        shrunk (bool | None): whether the model is made small; by default where it is large.
        precision (str): dtype of everything, or "config": as the YAML has it.
        traces (sequence of str): operators or parameters whose values are printed.
        prompts (list | None): batch_size sequences of token ids, on average seq_length - max_new_tokens long: the program
            holds all of them in one row; by default random ones.
        config (dict | None): merged configuration, where it has been read already.

    Returns:
        dict: execution.json, see `execution.generation_report`.

    Raises:
        InputError: the configuration cannot be rehearsed, or prompts do not fit it.
        ExecutionError, NetworkError: the programs cannot be executed to the end.
        WorkerFailed: a program was not compiled.
    """
    started = time.monotonic()
    arguments = ["--config", str(Path(config_file).resolve()), *overrides]
    if config is None:
        _, config = read_layout(arguments)
    _check_mode(config)
    small = shrink.plan(config, shrunk, load_checkpoint)
    config = _changed(config, small.changes)
    check_layout(config)
    prompts, source = make_prompts(config, count) if prompts is None else (check_prompts(prompts, config, count), "given")
    arguments += small.overrides
    if precision != "config":
        arguments += shrink.precision_overrides(precision, _KERNELS if precision == "float32" else None)
    layout, one_layout = layout_of(config), layout_of({**config, "use_parallel": False})
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".work_", dir=output) as folder:
        work = Path(folder).resolve()
        try:
            one = compile_all([*arguments, *shrink.one_device_overrides(1)], one_layout, work / "one")
            programs = compile_all(arguments, layout, work) if layout.world > 1 else one
        finally:
            for log in (*work.glob("log_rank_*.txt"), *work.glob("one/log_rank_*.txt")):
                copy_atomically(log, output / "log" / (log.name if log.parent == work else "log_one_device.txt"))
        compiled = time.monotonic() - started
        whole = whole_weights(one[0], precision, load_checkpoint, config, work)
    if precision == "float32":
        for rehearsed in {id(item): item for item in [*one, *programs]}.values():
            rehearsed.phases = {name: widen(program) for name, program in rehearsed.phases.items()}
    reference, one_seconds = _timed(one, whole, prompts, count)
    result, seconds = _timed(programs, whole, prompts, count, lambda: make_watch(traces)) \
        if layout.world > 1 or traces else (reference, one_seconds)
    dtype = precision if precision != "config" else config["model"]["model_config"].get("compute_dtype", "float16")
    report = {
        "world_size": layout.world, "layout": layout.describe(), "config": str(config_file), "shrunk": small.changes,
        "precision": precision, "precision_text": precision_text(precision), "prompts": [ids.tolist() for ids in prompts],
        "prompt_lengths": [len(ids) for ids in prompts], "prompts_text": source,
        "weights": str(load_checkpoint or "random, seed 0"), "compile_seconds": round(compiled, 1),
        "execution_seconds": round(seconds, 1), "execution_seconds_one_device": round(one_seconds, 1),
        **compare(result, reference, TOLERANCES[dtype])}
    write_reports(report, output)
    return report


def make_prompts(config, count, seed=7):
    """Prompts of random tokens; with several, every other one is longer and its neighbour shorter.

    Args:
        config (dict): merged configuration.
        count (int): tokens to generate.
        seed (int): of the random numbers.

    Returns:
        tuple[list[numpy.ndarray], str]: int32 arrays; and what they are, in words.

    Raises:
        InputError: more tokens than max_new_tokens.
    """
    rows, length, answer = _sizes(config, count)
    more = min(answer - count, length // 2)
    lengths = [length] * rows
    for row in range(0, rows - 1, 2):
        lengths[row], lengths[row + 1] = length - more, length + more
    rng = np.random.default_rng(seed)
    words = int(config["model"]["model_config"]["padded_vocab_size"])
    return [rng.integers(_LOWEST_WORD, words, size).astype(np.int32) for size in lengths], "random tokens"


def check_prompts(prompts, config, count):
    """Prompts as int32 arrays.

    Raises:
        InputError: they do not fit the programs that the configuration asks for.
    """
    rows, length, answer = _sizes(config, count)
    words = int(config["model"]["model_config"]["padded_vocab_size"])
    prompts = [np.asarray(ids, np.int32).reshape(-1) for ids in prompts]
    lengths = [len(ids) for ids in prompts]
    if len(prompts) != rows:
        raise InputError(f"{len(prompts)} prompts: model_config.batch_size is {rows}")
    if sum(lengths) != rows * length or max(lengths) + count > length + answer or min(lengths) < 1:
        raise InputError(f"prompts of {lengths} tokens: seq_length - max_new_tokens is {length}, they must be as long on "
                         f"average and leave room for {count} tokens")
    if any(((ids < 0) | (ids >= words)).any() for ids in prompts):
        raise InputError(f"prompts hold tokens outside of the {words} words of model_config.padded_vocab_size")
    return prompts


def whole_weights(one, precision, load_checkpoint, config, work):
    """dict[str, numpy.ndarray]: weights of one device, the caches left out: a checkpoint's or random ones."""
    state = {name: value for name, value in one.state.items() if not is_cache(name)}
    if precision == "float32":
        state = widen_values(state)
    if load_checkpoint:
        return checkpoints.load_weights(load_checkpoint, state, config, work)
    return states.random_weights(state)


def precision_text(precision):
    """str: what was computed in which dtype."""
    if precision != "float32":
        return precision
    return (f"float32 (kernels of prediction take 16 bits only: compiled in {_KERNELS}, executed with float32 in its place, "
            "which leaves cuts and collectives as they are)")


def _check_mode(config):
    model = config["model"]["model_config"]
    if config["run_mode"] != "predict":
        raise InputError(f"--execute: run_mode {config['run_mode']} cannot be executed; predict and finetune can")
    if not model.get("use_past"):
        raise InputError("--execute: model_config.use_past is false; prediction is executed with a cache only: set it true, "
                         "and is_dynamic, too")


def _sizes(config, count):
    """(prompts, average tokens of a prompt, max_new_tokens)."""
    model = config["model"]["model_config"]
    answer = int(model.get("max_new_tokens") or 1)
    length, rows = int(model["seq_length"]) - answer, int(model.get("batch_size") or 1)
    if count > answer:
        raise InputError(f"--execute {count}: model_config.max_new_tokens is {answer}; ask for fewer tokens or raise it")
    if length < 1:
        raise InputError(f"model_config.max_new_tokens={answer}: no room for a prompt in seq_length={model['seq_length']}; "
                         "lower the one or raise the other")
    return rows, length, answer


def _changed(config, changes):
    """The configuration with a plan's changes, by dotted keys."""
    config = copy.deepcopy(config)
    for key, (_, value) in changes.items():
        *path, last = key.split(".")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    return config


def _timed(programs, whole, prompts, count, watch=lambda: None):
    started = time.monotonic()
    result = generate(programs, whole, prompts, count, watch)
    return result, time.monotonic() - started
