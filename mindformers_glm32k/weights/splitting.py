"""Cut a whole checkpoint for every NPU of a layout, before the cluster is booked, and check the result."""

import json
import os
from pathlib import Path

from tqdm import tqdm

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import flush, require_space, work_folder
from mindformers_glm32k.weights import reshard as pieces
from mindformers_glm32k.weights.checkpoint import open_source
from mindformers_glm32k.weights.conversion import convert
from mindformers_glm32k.weights.formats.ckpt import frame, read_ckpt
from mindformers_glm32k.weights.loading import is_huggingface
from mindformers_glm32k.weights.parameters import raw_bytes
from mindformers_glm32k.weights.split_plan import make_plan
from mindformers_glm32k.weights.strategy import read_stages, slice_of, write_stage
from mindformers_glm32k.weights.tensors import same_bits
from mindformers_glm32k.weights.transform import Transformer

REPORT = "split.report.json"


def split(checkpoint, output, strategy, sizes=None, progress=False):
    """Cuts a whole checkpoint with MindSpore's transform_checkpoints and compares every part with its own cut.

    Args:
        checkpoint (str | os.PathLike): the whole checkpoint, under MindFormers' names or a Hugging Face folder;
            optimizer states are cut too where both the checkpoint and the strategy have them.
        output (str | os.PathLike): folder to make.
        strategy (str | os.PathLike): folder of strategy files, or a merged one.
        sizes (sizes.Sizes | None): of the model; None takes them from the tensors.
        progress (bool): whether to show progress bars.

    Returns:
        dict: the report, as written to OUTPUT/split.report.json.

    Raises:
        InputError: what the checkpoint or the strategy lacks; nothing is left behind.
        transform.TransformFailed: MindSpore failed.
    """
    output, stages = Path(output), read_stages(strategy)
    refuse_existing(output)
    with work_folder(output) as work:
        whole = checkpoint
        if is_huggingface(checkpoint):
            fused = [
                any(mark in name for layouts in stages for name in layouts)
                for mark in (".query_key_value.weight", ".dense_h_to_4h.weight")
            ]
            whole = work / "converted" / "model.ckpt"
            convert(checkpoint, whole, qkv_concat=fused[0], mlp_concat=fused[1], progress=progress)
        plan = make_plan(open_source(whole), stages, sizes)
        costs = [{name: plan.cost(name, layout) for name, layout in layouts.items()} for layouts in plan.stages]
        largest = max(cost for costs_of_stage in costs for cost in costs_of_stage.values())
        require_space(output, sum(sum(each.values()) for each in costs) + 2 * max(largest, pieces.PIECE_BYTES))
        result = work / "result"
        _cut(plan, costs, strategy, work, result, progress)
        _check(plan, result, progress)
        _add_strategy(strategy, plan, result / "strategy")
        report = _report(checkpoint, plan)
        (result / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(result, output)
    return report


def refuse_existing(output):
    """Raises InputError when `output` is a file, or a folder with something in it."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists already; remove it or give the name of a new folder")


def part_file(folder, rank):
    """pathlib.Path: where a rank's part lies: a run looks for the newest .ckpt of rank_N."""
    return folder / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"


def _cut(plan, costs, strategy, work, result, progress):
    total = sum(sum(each.values()) for each in costs)
    with (
        Transformer(work / "log") as transformer,
        tqdm(total=total, unit="B", unit_scale=True, desc="split", disable=not progress) as bar,
    ):
        for rank in range(plan.world):
            part_file(result, rank).parent.mkdir(parents=True)
        for stage in range(len(plan.stages)):
            write_stage(strategy, stage, work / "stage.ckpt")
            for names in pieces.pack(costs[stage]):
                parts = pieces.cut(
                    transformer, work / "piece", [plan.tensors[name] for name in names], work / "stage.ckpt"
                )
                for rank in range(plan.devices):
                    # a .ckpt is a list of parameters: one file behind the other is a .ckpt again
                    with open(part_file(result, stage * plan.devices + rank), "ab") as file:
                        file.write(parts[rank].read_bytes())
                    parts[rank].unlink()
                bar.update(sum(costs[stage][name] for name in names))
    for rank in range(plan.world):
        with open(part_file(result, rank), "ab") as file:
            for counter in plan.counters:
                for before, _ in frame(counter.name, counter.shape, counter.dtype):
                    file.write(before + raw_bytes(counter))
        flush(part_file(result, rank))


def _check(plan, result, progress):
    """Compares every part of the finished files with the cut that the layout describes, computed here."""
    found = [{tensor.name: tensor for tensor in read_ckpt(part_file(result, rank))} for rank in range(plan.world)]
    counters = {counter.name for counter in plan.counters}
    bar = tqdm(total=len(plan.stages) and sum(map(len, plan.stages)), desc="verify", disable=not progress)
    with bar:
        for stage, layouts in enumerate(plan.stages):
            ranks = range(stage * plan.devices, (stage + 1) * plan.devices)
            for rank in ranks:
                if set(found[rank]) != set(layouts) | counters:
                    wrong = sorted(set(found[rank]) ^ (set(layouts) | counters))
                    raise _differs(rank, f"key {wrong[0]!r} is missing or left over ({len(wrong)} such keys)")
            for name, layout in layouts.items():
                whole = plan.tensors[name].load()
                for rank in ranks:
                    part, expected = found[rank][name], slice_of(whole, layout, rank - ranks[0])
                    if (part.shape, part.dtype) != (expected.shape, plan.tensors[name].dtype):
                        raise _differs(
                            rank,
                            f"key {name!r} is {part.dtype} {part.shape}, the layout gives "
                            f"{plan.tensors[name].dtype} {expected.shape}",
                        )
                    if not same_bits(part.load(), expected):
                        raise _differs(rank, f"key {name!r} has other values than its part of the whole tensor")
                bar.update()


def _differs(rank, what):
    return InputError(
        f"rank_{rank}: {what}: MindSpore's cut and the strategy disagree, nothing was written. Check "
        "that the strategy files are those of this MindSpore version (`glm32k strategy`)"
    )


def _add_strategy(strategy, plan, folder):
    """The strategy belongs to the parts: who merges them again finds it there."""
    folder.mkdir()
    for rank in range(plan.world):
        write_stage(strategy, rank // plan.devices, folder / f"ckpt_strategy_rank_{rank}.ckpt")


def _report(checkpoint, plan):
    names = [name for layouts in plan.stages for name in layouts]
    return {
        "checkpoint": str(checkpoint),
        "ranks": plan.world,
        "stages": len(plan.stages),
        "parameters": len(names),
        "optimizer_states": any(name.startswith("adam_") for name in names),
        "counters": [counter.name for counter in plan.counters],
        "left_out": plan.left_out,
        "shapes": [
            {name: list(layout.slice_shape(plan.tensors[name].shape)) for name, layout in layouts.items()}
            for layouts in plan.stages
        ],
    }
