"""A whole checkpoint split for every rank of a layout: by MindSpore, then compared with shards taken here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import flush, require_space, work_folder
from mindformers_glm32k.weights import reshard
from mindformers_glm32k.weights.checkpoint import Source, open_source, raise_problems, weights_in
from mindformers_glm32k.weights.config_json import check_agreement
from mindformers_glm32k.weights.conversion import convert
from mindformers_glm32k.weights.finding import config_of
from mindformers_glm32k.weights.formats import ckpt_frame, read_ckpt
from mindformers_glm32k.weights.loading import is_huggingface
from mindformers_glm32k.weights.names import (
    ADAPTER,
    COUNTER,
    SCRATCH_PREFIX,
    STATE,
    STATE_PREFIXES,
    WEIGHT,
    ModelDims,
    dims_from_tensors,
    kind_of,
)
from mindformers_glm32k.weights.strategy import ShardSpec, read_stages, stage_devices, write_stage
from mindformers_glm32k.weights.tensors import ITEM_SIZE, StoredTensor, same_bits, stored_bytes

REPORT = "split.report.json"
_OTHER_MODEL = "the checkpoint and the strategy are of different models or layouts (num_layers, qkv_concat, LoRA)"


def split(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    strategy: str | os.PathLike,
    dims: ModelDims | None = None,
    progress: bool = False,
    model_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Splits a whole checkpoint with MindSpore's transform_checkpoints and compares every shard with one taken here;
    returns the report, as written to OUTPUT/split.report.json.

    Args:
        checkpoint: the whole checkpoint, under MindFormers' names or a Hugging Face folder; optimizer states are split
            too where both the checkpoint and the strategy have them.
        output: folder to make.
        strategy: folder of strategy files, or a merged one.
        dims: of the model; None takes them from the tensors.
        progress: whether to show progress bars.
        model_config: the run's; the config beside the checkpoint must agree with it in fields that shapes do not show.

    Raises:
        InputError: the checkpoint or the strategy is incomplete, or they do not match; nothing is left behind.
        TransformFailed: MindSpore failed.
    """
    output, stages = Path(output), read_stages(strategy)
    refuse_existing(output)
    known = config_of(checkpoint)
    if model_config is not None:
        check_agreement(known, model_config, "model.model_config of the run")
    with work_folder(output) as work:
        whole = checkpoint
        if is_huggingface(checkpoint):
            fused = [
                any(mark in name for specs in stages for name in specs)
                for mark in (".query_key_value.weight", ".dense_h_to_4h.weight")
            ]
            whole = work / "converted" / "model.ckpt"
            convert(checkpoint, whole, qkv_concat=fused[0], mlp_concat=fused[1], progress=progress)
        plan = _make_plan(open_source(whole), stages, dims)
        costs = [{name: plan.cost(name, spec) for name, spec in specs.items()} for specs in plan.stages]
        largest = max(cost for costs_of_stage in costs for cost in costs_of_stage.values())
        require_space(output, sum(sum(each.values()) for each in costs) + 2 * max(largest, reshard.CHUNK_BYTES))
        result = work / "result"
        _split(plan, costs, strategy, work, result, progress)
        _check(plan, result, progress)
        (result / "strategy").mkdir()  # kept beside the shards: merging them again needs it
        for rank in range(plan.world):
            write_stage(strategy, rank // plan.devices, result / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt")
        report = {**_report(checkpoint, plan), "huggingface_config": known and known.fields}
        (result / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(result, output)
    return report


def refuse_existing(output: Path) -> None:
    """Raises InputError when `output` is a file, or a folder with something in it."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists already; remove it or give the name of a new folder")


@dataclass
class _Plan:
    """Which tensors are sharded for which stage.

    Args:
        tensors: the whole tensors, by name.
        stages: by stage, the layouts of its tensors.
        devices: ranks of a stage.
        counters: entries that every rank gets as they are.
        left_out: names in the checkpoint that no rank needs or the strategy does not know.
    """

    tensors: dict[str, StoredTensor]
    stages: list[dict[str, ShardSpec]]
    devices: int
    counters: list[StoredTensor]
    left_out: list[str]

    @property
    def world(self) -> int:
        return self.devices * len(self.stages)

    def cost(self, name: str, spec: ShardSpec) -> int:
        """Bytes of all ranks' shards of a tensor."""
        tensor = self.tensors[name]
        return stored_bytes(tensor.shape, tensor.dtype) // prod(spec.counts) * self.devices


def _make_plan(source: Source, stages: list[dict[str, ShardSpec]], dims: ModelDims | None) -> _Plan:
    """Checks every tensor of a whole checkpoint against the strategy before anything is written.

    Adapters are not required of a checkpoint that has none: a LoRA run starts from its base.

    Raises:
        InputError: one message names all that is missing, left over, of another shape, or cannot be sharded.
    """
    tensors = source.tensors
    dims = dims or dims_from_tensors(weights_in(tensors))
    known = {name: spec for specs in stages for name, spec in specs.items()}
    prefixes = tuple(
        prefix
        for prefix in STATE_PREFIXES
        if prefix != SCRATCH_PREFIX
        and all(any(name.startswith(prefix) for name in names) for names in (tensors, known))
    )
    kinds = (WEIGHT, ADAPTER) if any(kind_of(name) == ADAPTER for name in tensors) else (WEIGHT,)
    wanted = {name for name in known if kind_of(name) in kinds or name.startswith(prefixes)}
    wanted |= {name for name in known if name.startswith(SCRATCH_PREFIX) and name in tensors}
    problems = [f"{source.path}: missing: {name!r}" for name in known if name in wanted and name not in tensors]
    counters, left_out = [], []
    for name, tensor in tensors.items():
        kind = kind_of(name)
        if name in wanted:
            problems += _misfits(tensor, known[name], dims)
        elif kind == COUNTER:
            counters.append(tensor)
        elif kind in (None, STATE):
            left_out.append(name)
        else:
            problems.append(f"{tensor.file}: key {name!r} is left over: the strategy has no such parameter")
    try:
        raise_problems(source.path, problems)
    except InputError as error:
        raise InputError(f"{error}\n{_OTHER_MODEL}, or the file is incomplete") from None
    chosen = [{name: specs[name] for name in tensors if name in specs and name in wanted} for specs in stages]
    return _Plan(tensors, chosen, stage_devices(stages), counters, left_out)


def _misfits(tensor, spec, dims):
    """What is wrong with a tensor: its dtype, its shape, or that it cannot be sharded."""
    if tensor.dtype not in ITEM_SIZE:
        yield f"{tensor.file}: key {tensor.name!r} has dtype {tensor.dtype}, {', '.join(ITEM_SIZE)} can be sharded"
    elif not dims.fits(tensor.name, tensor.shape):
        yield f"{tensor.file}: key {tensor.name!r} has shape {tensor.shape}, expected {dims.shape_of(tensor.name)}"
    else:
        try:
            spec.shard_shape(tensor.shape)
        except InputError as error:
            yield f"{tensor.file}: key {tensor.name!r}: {error}"


def _shard_file(folder, rank):
    """Where a rank's shards lie: a run looks for the newest .ckpt of rank_N."""
    return folder / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"


def _split(plan, costs, strategy, work, result, progress):
    total = sum(sum(each.values()) for each in costs)
    with (
        reshard.Transformer(work / "log") as transformer,
        tqdm(total=total, unit="B", unit_scale=True, desc="split", disable=not progress) as bar,
    ):
        for rank in range(plan.world):
            _shard_file(result, rank).parent.mkdir(parents=True)
        for stage in range(len(plan.stages)):
            write_stage(strategy, stage, work / "stage.ckpt")
            for names in reshard.chunks_of(costs[stage]):
                tensors = [plan.tensors[name] for name in names]
                shards = reshard.split_chunk(transformer, work / "chunk", tensors, work / "stage.ckpt")
                for rank in range(plan.devices):
                    # a .ckpt is a list of parameters: concatenated files are a .ckpt again
                    with open(_shard_file(result, stage * plan.devices + rank), "ab") as file:
                        file.write(shards[rank].read_bytes())
                    shards[rank].unlink()
                bar.update(sum(costs[stage][name] for name in names))
    for rank in range(plan.world):
        with open(_shard_file(result, rank), "ab") as file:
            for counter in plan.counters:
                for before, _ in ckpt_frame(*counter.spec):
                    file.write(before + counter.raw_bytes())
        flush(_shard_file(result, rank))


def _check(plan, result, progress):
    """Compares every shard of the finished files with the slice of the whole tensor that the layout describes."""
    found = [{tensor.name: tensor for tensor in read_ckpt(_shard_file(result, rank))} for rank in range(plan.world)]
    counters = {counter.name for counter in plan.counters}
    with tqdm(total=sum(map(len, plan.stages)), desc="verify", disable=not progress) as bar:
        for stage, specs in enumerate(plan.stages):
            ranks = range(stage * plan.devices, (stage + 1) * plan.devices)
            for rank in ranks:
                wrong = sorted(set(found[rank]) ^ (set(specs) | counters))
                if wrong:
                    raise _differs(rank, f"key {wrong[0]!r} is missing or left over ({len(wrong)} such keys)")
            for name, spec in specs.items():
                whole, dtype = plan.tensors[name].load(), plan.tensors[name].dtype
                for rank in ranks:
                    shard, expected = found[rank][name], spec.shard_of(whole, rank - ranks[0])
                    if (shard.shape, shard.dtype) != (expected.shape, dtype):
                        raise _differs(
                            rank,
                            f"key {name!r} is {shard.dtype} {shard.shape}, the layout gives {dtype} {expected.shape}",
                        )
                    if not same_bits(shard.load(), expected):
                        raise _differs(rank, f"key {name!r} has other values than its shard of the whole tensor")
                bar.update()


def _differs(rank, what):
    return InputError(
        f"rank_{rank}: {what}: MindSpore's shards and the strategy disagree, nothing was written. Check "
        "that the strategy files are those of this MindSpore version (`glm32k strategy`)"
    )


def _report(checkpoint, plan):
    names = [name for specs in plan.stages for name in specs]
    return {
        "checkpoint": str(checkpoint),
        "ranks": plan.world,
        "stages": len(plan.stages),
        "parameters": len(names),
        "optimizer_states": any(kind_of(name) == STATE and not name.startswith(SCRATCH_PREFIX) for name in names),
        "counters": [counter.name for counter in plan.counters],
        "left_out": plan.left_out,
        "shapes": [
            {name: list(spec.shard_shape(plan.tensors[name].shape)) for name, spec in specs.items()}
            for specs in plan.stages
        ],
    }
