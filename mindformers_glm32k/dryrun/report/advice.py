"""Warnings that follow from a report's figures, each with a fix."""

from __future__ import annotations

import re

from mindformers_glm32k.parallel import layers_per_stage

MIB, GIB = 1024**2, 1024**3
_SMALL_CALL = 4 * MIB  # a collective call below this is a scalar, a norm, a bias, or the losses of tokens
_UNBALANCED = 1.15  # the slowest stage's FLOPs against the mean
_UNITS = {"GB": GIB, "MB": MIB}
_WIDTH = {"float32": 4, "float64": 8, "int64": 8, "float16": 2, "bfloat16": 2}


def warnings_of(report: dict, config: dict) -> list[dict]:
    """Warnings about the programs of a report; `config` is the merged configuration.

    Returns:
        {"kind", "what", "fix"} of each; the most expensive kinds first.
    """
    programs = report["programs"]
    model = config["model"]["model_config"]
    found = [
        *_memory(programs, device_memory(config)),
        *_squares(programs, model),
        *_constants(programs),
        *_wide(programs, model),
        *_alone(programs),
        *_balance(programs, config),
    ]
    found += [
        _warning(
            "incomplete",
            f"{_where([program])}: {construct}",
            "Figures of this program may be too low; please report it.",
        )
        for program in programs
        for construct in program["doubts"]
    ]
    return found


def device_memory(config: dict) -> int | None:
    """Bytes that `context.max_device_memory` ("59GB") allows; None where it is unset or cannot be parsed."""
    match = re.fullmatch(r"\s*([\d.]+)\s*(GB|MB)\s*", str((config.get("context") or {}).get("max_device_memory") or ""))
    return int(float(match.group(1)) * _UNITS[match.group(2)]) if match else None


def _warning(kind, what, fix):
    return {"kind": kind, "what": what, "fix": fix}


def _where(programs):
    """ "stages 0, 3" or "rank 5", with the phase of a prediction."""
    phases = {program.get("phase", "train") for program in programs}
    stages = sorted({program["stage"] for program in programs})
    text = f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}"
    return text if phases == {"train"} else f"{' and '.join(sorted(phases, reverse=True))} of {text}"


def device_bytes(program: dict) -> int:
    """Bytes that a program takes in the order of its file (which a pipeline's dependencies enforce) or in MindSpore's
    default order (`context.exec_order` bfs), whichever takes less."""
    return min(program["total_bytes"], program.get("total_bytes_by_order", {}).get("bfs", program["total_bytes"]))


def _memory(programs, limit):
    for program in programs:
        if limit and device_bytes(program) > limit:
            fix = (
                "raise recompute_config.recompute, parallel.enable_parallel_optimizer or "
                "parallel_config.pipeline_stage, or lower model_config.loss_chunk_size"
                if program.get("phase", "train") == "train"
                else "lower model_config.num_blocks or seq_length, or raise parallel_config.model_parallel"
            )
            yield _warning(
                "memory",
                f"{_where([program])}: {device_bytes(program) / GIB:.1f} GiB are needed, "
                f"context.max_device_memory allows {limit / GIB:.1f}",
                fix[0].upper() + fix[1:] + ".",
            )


def _squares(programs, model):
    for shape, dtype, size, where, source in _distinct(programs, "square_tensors"):
        yield _warning(
            "square",
            f"{where}: {dtype} {list(shape)} ({size / GIB:.2f} GiB) grows with the square of the length, from {source}",
            "Set model_config.use_flash_attention: True; with it no such tensor is needed.",
        )


def _constants(programs):
    for shape, dtype, size, where, source in _distinct(programs, "large_constants"):
        yield _warning(
            "constant",
            f"{where}: a constant {dtype} {list(shape)} of {size / MIB:.0f} MiB is part of the program ({source})",
            "Compute it in the program, or make it smaller.",
        )


def _distinct(programs, key):
    """(shape, dtype, bytes, where, source) of the entries under `key`, each once."""
    groups = {}
    for program in programs:
        for item in program.get(key, ()):
            groups.setdefault((tuple(item["shape"]), item["dtype"], item["bytes"], item["source"]), []).append(program)
    for (shape, dtype, size, source), holders in groups.items():
        yield shape, dtype, size, _where(holders), source


def purpose(item: dict) -> str:
    """What a collective is for, in brackets, without the frontend's running numbers; "" where that is only its kind."""
    name = re.sub(r"_\d{6,}$", "", item["purpose"])
    return "" if name == item["kind"] else f" ({name})"


def _collectives(programs, is_meant):
    """(name, dtype, bytes of a step, calls, programs), summed over programs; point to point is one kind."""
    groups = {}
    for program in programs:
        for item in program["collectives"]:
            if is_meant(item):
                boundary = item["kind"] in ("Send", "Receive")
                name = (
                    "Send and Receive between stages"
                    if boundary
                    else f"{item['kind']}{purpose(item)} of the {item['part']}"
                )
                entry = groups.setdefault((name, item["dtype"]), [0, 0, []])
                entry[0] += item["bytes"]
                entry[1] += item["count"]
                entry[2].append(program)
    for (name, dtype), (size, calls, holders) in sorted(groups.items(), key=lambda item: -item[1][0]):
        yield name, dtype, size, calls, holders


def _wide(programs, model):
    compute = str(model.get("compute_dtype") or "float16")

    def is_wide(item):
        return (
            _WIDTH.get(item["dtype"], 0) > _WIDTH.get(compute, 8)
            and item["dtype"].startswith("float")
            and item["bytes"] >= _SMALL_CALL * item["count"]
            and len(item["group_ranks"]) > 1
        )

    for name, dtype, size, calls, holders in _collectives(programs, is_wide):
        fix = (
            f"Let the hidden states leave a stage in {compute} (model_config.residual_dtype: {compute})."
            if name.startswith("Send")
            else f"Communicate before the cast to {dtype}: in {compute} it is half of that."
        )
        verb = "move" if name.startswith("Send") else "moves"
        yield _warning(
            "wide",
            f"{_where(holders)}: {name} {verb} {size / 1e9:.2f} GB a step as {dtype} "
            f"in {calls} calls, the compute dtype is {compute}",
            fix,
        )


def _alone(programs):
    for name, _, size, calls, holders in _collectives(programs, lambda item: len(item["group_ranks"]) == 1):
        fix = (
            "Set recompute_config.recompute_slice_activation: False; it is for model_parallel above 1."
            if "recompute_slice" in name
            else "Give the operator a strategy that does not shard along an axis of one rank."
        )
        yield _warning(
            "alone",
            f"{_where(holders)}: {calls} {name} over groups of one rank copy {size / 1e9:.2f} GB a step for nothing",
            fix,
        )


def _balance(programs, config):
    work = {}
    for program in programs:
        if program.get("phase", "train") == "train":
            work[program["stage"]] = max(work.get(program["stage"], 0), program["flops"])
    stages = sorted(work)
    mean = sum(work.values()) / max(len(work), 1)
    if len(stages) < 2 or max(work.values()) <= _UNBALANCED * mean:
        return
    slowest = max(stages, key=work.get)
    dealt = layers_per_stage(config)
    layers = f", which holds {dealt[0][slowest]} of {sum(dealt[0])} layers," if len(dealt) == 1 else ""
    yield _warning(
        "balance",
        f"stage {slowest}{layers} has {work[slowest] / mean:.2f} times the mean FLOPs of the "
        "stages; the others wait for it",
        "Move layers to other stages with model_config.offset (one number per stage, added to the even share).",
    )
