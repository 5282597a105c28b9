"""The checkpoints of all ranks merged into one file, LoRA adapters too, and compared with every rank's shards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import copy_atomically, require_space, work_folder
from mindformers_glm32k.weights import reshard
from mindformers_glm32k.weights.checkpoint import open_source
from mindformers_glm32k.weights.config_json import check_agreement
from mindformers_glm32k.weights.finding import config_of
from mindformers_glm32k.weights.lora import pairs_of, write_adapter
from mindformers_glm32k.weights.merge_plan import FROZEN, MergePlan
from mindformers_glm32k.weights.names import (
    ADAPTER,
    STATE,
    WEIGHT,
    ModelDims,
    dims_from_tensors,
    in_model_order,
    key_of,
    kind_of,
)
from mindformers_glm32k.weights.peft import add_product
from mindformers_glm32k.weights.rank_files import choose
from mindformers_glm32k.weights.strategy import read_stages, stage_devices, write_stage
from mindformers_glm32k.weights.tensors import StoredTensor, cast, same_bits, stored_bytes
from mindformers_glm32k.weights.writer import CheckpointWriter, write_report


def merge(
    src_ckpt_dir: str | os.PathLike,
    dst: str | os.PathLike | None = None,
    strategy: str | os.PathLike | None = None,
    step: str | int | None = None,
    optimizer_states: bool = False,
    lora: bool = False,
    lora_scaling: float | None = None,
    base: str | os.PathLike | None = None,
    adapters_only: str | os.PathLike | None = None,
    dims: ModelDims | None = None,
    progress: bool = False,
    adapters_format: str = "mindformers",
    model_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Merges the checkpoints of a parallel run; returns the report, as written to OUT.report.json, with "remarks" for
    the user.

    Args:
        src_ckpt_dir: folder with rank_0, rank_1, …
        dst: `.ckpt` or `.safetensors` to write; None where only adapters are wanted.
        strategy: strategy files' folder, or one file. None: every rank has the whole model (one process, data
            parallel), which is checked.
        step: "EPOCH_STEP" as in the file names, or step_num inside; None takes the newest complete one.
        optimizer_states: whether adam_m.*, adam_v.* and counters are kept.
        lora: whether adapters are added to the weights.
        lora_scaling: alpha / rank; needed with `lora`.
        base: the whole checkpoint that adapters were trained on, where the ranks' files have none of it, or have it
            sharded in a way that the strategy does not tell.
        adapters_only: a file for the adapters alone; with adapters_format "peft" a folder that PEFT loads on the
            published model, with "peft_glm" one for transformers' `glm` and vLLM.
        dims: of the model; None takes them from the weights.
        progress: whether to show progress bars.
        model_config: the run's; the config beside `base` must agree with it in fields that shapes do not show.

    Raises:
        InputError: files, strategy and model do not fit together; nothing is left behind.
        TransformFailed: MindSpore failed.
    """
    outputs = [Path(path) for path in (dst, adapters_only) if path is not None]
    peft = Path(adapters_only) if adapters_only is not None and adapters_format != "mindformers" else None
    files_to_write = [path for path in outputs if path != peft]
    _check_options(files_to_write, lora, lora_scaling, base, optimizer_states, peft)
    known = config_of(base) if base is not None else None
    if model_config is not None:
        check_agreement(known, model_config, "model.model_config of the run")
    stages = read_stages(strategy) if strategy is not None else None
    ranks = range(stage_devices(stages) * len(stages)) if stages else None
    files, remarks = choose(src_ckpt_dir, ranks, step)
    world = len(files.tensors)
    plan = MergePlan(files, stages or [{}], world // len(stages or [{}]), strategy)
    job = _Job(plan, lora, lora_scaling, optimizer_states, _open_base(base), dims, peft, adapters_format)
    job.check(src_ckpt_dir, dst is not None, adapters_only is not None)
    if not stages:
        remarks.append(
            f"{world} ranks have the whole model each, no strategy is needed: compared, and that of rank 0 taken"
            if world > 1
            else "one rank, which has everything: no strategy is needed"
        )
    read = {file.resolve() for file in files.files.values()}
    if any(path.resolve() in read for path in outputs):
        raise InputError(f"{outputs[0]}: is one of the files to merge; choose another name")
    report = {
        "source": {str(rank): str(path) for rank, path in sorted(files.files.items())},
        "ranks": world,
        "stages": len(plan.stages),
        "strategy": strategy and str(strategy),
        "step": files.label,
        "counters": {name: value for name, value in files.counters.items() if value is not None},
        "base": base and str(base),
        "huggingface_config": known and known.fields,
        "lora_scaling": lora_scaling if lora or peft else None,
        "checksums": "of the little-endian values, without the file format's framing",
    }
    job.write(dst and Path(dst), adapters_only and Path(adapters_only), report, progress)
    report["remarks"] = remarks + job.remarks
    return report


def _check_options(outputs, lora, scaling, base, states, peft):
    if peft is not None:
        if peft.exists():
            raise InputError(f"{peft}: exists already; a new folder is needed for adapters")
        if scaling is None:
            raise InputError("adapters for PEFT need alpha / rank: give --lora_scaling, or --config with the YAML")
    if not outputs and peft is None:
        raise InputError("nothing to write: give --dst or --adapters_only")
    for path in outputs:
        if path.suffix not in (".ckpt", ".safetensors") or path.is_dir():
            raise InputError(f"{path}: a file name that ends in .ckpt or .safetensors is needed")
    if len({path.with_suffix("") for path in outputs}) < len(outputs):
        raise InputError(f"{outputs[0]}: --dst and --adapters_only need different names, their reports too")
    if lora and scaling is None:
        raise InputError("--lora needs alpha / rank: give --lora_scaling, or --config with the YAML of the LoRA run")
    if lora and states:
        raise InputError(
            "--optimizer_states with --lora: the states belong to the adapters, which are gone once they "
            "are merged; leave one of the two out"
        )
    if base is not None and not lora:
        raise InputError("--base is for adapters that are merged: add --lora")


def _open_base(path):
    if path is None:
        return None
    return {name: tensor for name, tensor in open_source(path).tensors.items() if kind_of(name) == WEIGHT}


@dataclass
class _Job:
    """One merge, its tensors sorted by what becomes of them."""

    plan: MergePlan
    lora: bool
    scaling: float | None
    states: bool
    base: dict[str, StoredTensor] | None
    dims: ModelDims | None
    peft: Path | None = None
    adapters_format: str = "mindformers"

    def check(self, source: object, wants_weights: bool, wants_adapters: bool) -> None:
        """Checks all that can be checked without reading values; raises InputError."""
        plan = self.plan
        self.weights = {name: merged.whole for name, merged in plan.of_kind(WEIGHT).items()}
        self.adapters = {name: merged.whole for name, merged in plan.of_kind(ADAPTER).items()}
        self.state_names = list(plan.of_kind(STATE))
        self.remarks = []
        if (self.lora or wants_adapters) and not self.adapters:
            raise InputError(f"{source}: no LoRA adapters in {plan.files.name}")
        if self.states and not self.state_names:
            raise InputError(f"{source}: no optimizer states in {plan.files.name}; leave --optimizer_states out")
        self.frozen = sorted(set(self.weights) & set(self.base or {}))
        if self.base is not None:
            self.weights = self.base
        if wants_weights and not self.weights:
            raise InputError(
                f"{source}: {plan.files.name} holds adapters only: add the whole base checkpoint with "
                "--lora --base FILE, or write them alone with --adapters_only FILE"
            )
        if self.weights:
            origin = plan.files.name if self.base is None else next(iter(self.weights.values())).file
            plan.check_model(self.dims, self.weights, origin, self.frozen)
        self.pairs = pairs_of({name: whole.shape for name, whole in self.adapters.items()}, source)
        lost = [weight for weight in self.pairs if self.weights and weight not in self.weights]
        if lost:
            raise InputError(f"{source}: adapters of {lost[0]!r} ({len(lost)} such), which is not among the weights")
        if not self.states and self.state_names:
            self.remarks.append(
                f"{len(self.state_names)} optimizer states are left out (--optimizer_states keeps them)"
            )
        if self.adapters and wants_weights and not self.lora:
            self.remarks.append(f"{len(self.adapters)} LoRA matrices are kept beside the weights (--lora merges them)")

    def write(self, dst: Path | None, adapters_only: Path | None, report: dict[str, Any], progress: bool) -> None:
        """Writes the outputs to a hidden folder, verifies them, and moves them to their final names."""
        first = dst or adapters_only
        with work_folder(first) as work:
            order = in_model_order(self.adapters)
            weights = in_model_order(self.weights) if dst else []
            states = in_model_order(self.state_names) if self.states and dst else []
            kept = [] if self.lora or not dst else order
            wholes = {**{name: merged.whole for name, merged in self.plan.merged.items()}, **self.weights}
            counters = self.plan.counters if states else []
            entries = [tensor.spec for tensor in [*(wholes[name] for name in [*weights, *kept, *states]), *counters]]
            nbytes = sum(entry.nbytes for entry in entries)
            require_space(first, nbytes + 3 * min(nbytes, reshard.CHUNK_BYTES))
            made = []
            with (
                reshard.Transformer(work / "log") as transformer,
                tqdm(total=nbytes, unit="B", unit_scale=True, desc="merge", disable=not progress) as bar,
            ):
                adapters = dict(_merged_values(self.plan, order, transformer, work))
                if adapters_only:
                    made.append((self._write_adapters(work, adapters_only, order, adapters), adapters_only))
                if dst:
                    for name in self.frozen:
                        _check_frozen(self.plan, self.base, name)
                    values = self._values(weights, adapters, transformer, work)
                    with CheckpointWriter.for_file(work / f"out{dst.suffix}", entries) as writer:
                        for name, array in values:
                            writer.write(name, array)
                            bar.update(array.nbytes)
                        for name in kept:
                            writer.write(name, adapters[name])
                        for name, array in _merged_values(self.plan, states, transformer, work):
                            writer.write(name, array)
                            bar.update(array.nbytes)
                        for counter in counters:
                            writer.write(counter.name, counter.raw_bytes())
                        writer.finish()
                    made.append((writer, dst))
            for writer, path in made:
                file = writer.folder / writer.files[0].name
                if path == self.peft:
                    shutil.copytree(writer.folder, path)
                elif path == first:
                    file.replace(path)
                else:  # this path may be on another disk
                    copy_atomically(file, path)
                report.setdefault("outputs", []).append(str(path))
                beside = (
                    path.with_name(path.name + ".report.json")
                    if path == self.peft
                    else path.with_suffix(".report.json")
                )
                write_report(beside, {**report, "output": str(path), "tensors": writer.describe()})
            report["tensors"] = made[-1][0].describe()

    def _values(self, weights, adapters, transformer, work):
        """Yields the weights, with the adapters' products added where they are merged."""
        stream = (
            _merged_values(self.plan, weights, transformer, work)
            if self.base is None
            else ((name, self.base[name].load()) for name in weights)
        )
        for name, array in stream:
            if self.lora and name in self.pairs:
                a, b = ((adapters[side], self.adapters[side].dtype) for side in self.pairs[name])
                array = add_product((array, self.weights[name].dtype), a, b, self.scaling, name)
            yield name, array

    def _write_adapters(self, work, path, order, adapters):
        if path == self.peft:
            values = {name: (adapters[name], self.adapters[name].dtype) for name in order}
            naming = "glm" if self.adapters_format == "peft_glm" else "chatglm"
            return write_adapter(work / "peft", values, self.scaling, self.dims or self._dims_of_weights(), naming)
        entries = [self.adapters[name].spec for name in order]
        with CheckpointWriter.for_file(work / f"adapters{path.suffix}", entries) as writer:
            for name in order:
                writer.write(name, adapters[name])
            writer.finish()
        return writer

    def _dims_of_weights(self):
        try:
            return dims_from_tensors({key_of(name): whole for name, whole in self.weights.items()})
        except InputError:  # adapters alone, or an extended model
            return None


def _merged_values(
    plan: MergePlan, names: Sequence[str], transformer: reshard.Transformer, work: Path
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields whole tensors in the order of names, each in the carrier of its dtype, compared with every rank's file.

    Raises:
        InputError: copies that should be equal differ, named with their files.
        TransformFailed: MindSpore failed.
    """

    def stage_and_kind(name):
        return plan.merged[name].stage, plan.merged[name].spec is not None

    for (stage, is_sharded), group in groupby(names, stage_and_kind):
        ranks = plan.ranks(stage)
        if not is_sharded:
            for name in group:
                yield name, _equal_copies(plan, name, ranks)
            continue
        costs = {}
        for name in group:
            shard = plan.files.tensors[ranks[0]][name]
            costs[name] = stored_bytes(shard.shape, shard.dtype) * len(ranks)
        strategy = work / f"stage_{stage}.ckpt"
        if not strategy.exists():
            write_stage(plan.strategy, stage, strategy)
        for chunk in reshard.chunks_of(costs):
            shards = [[plan.files.tensors[rank][name] for name in chunk] for rank in ranks]
            found = reshard.merge_chunk(transformer, work / "chunk", shards, strategy)
            for name in chunk:
                whole = found[name].load() if name in found else np.empty(0)
                _compare(plan, name, whole, ranks)
                yield name, whole


def _compare(plan, name, whole, ranks):
    """Shards a merged tensor again and compares the shards with the files."""
    merged = plan.merged[name]
    if whole.shape != merged.whole.shape:
        raise InputError(
            f"key {name!r}: MindSpore merged it to {whole.shape}, the strategy gives "
            f"{merged.whole.shape}; check that the strategy files are those of this run"
        )
    agreeing, differing = {}, []
    for rank in ranks:
        tensor = plan.files.tensors[rank][name]
        index = merged.spec.index(rank - ranks[0])
        if same_bits(tensor.load(), merged.spec.shard_of(whole, rank - ranks[0])):
            agreeing.setdefault(index, tensor.file)
        else:
            differing.append((index, tensor.file))
    for index, file in differing:
        if index in agreeing:
            raise InputError(
                f"{file}: key {name!r} is a copy of what {agreeing[index]} holds, but has other "
                "values; one of the two files is damaged or of another run"
            )
    if differing:
        raise InputError(
            f"{differing[0][1]}: key {name!r} has other values than its shard of the merged tensor; check "
            "that the strategy files are those of this run"
        )


def _equal_copies(plan, name, ranks):
    tensors = [plan.files.tensors[rank][name] for rank in ranks]
    whole = tensors[0].load()
    for tensor in tensors[1:]:
        if not same_bits(tensor.load(), whole):
            why = (
                FROZEN
                if plan.strategy
                else "if the parameters are sharded, give --src_ckpt_strategy or --config; if not, one of the files is "
                "damaged or of another run"
            )
            raise InputError(f"{tensor.file}: key {name!r} has other values than in {tensors[0].file}; {why}")
    return whole


def _check_frozen(plan, base, name):
    """Checks that the ranks were trained on this base: their values of a weight are a block of the base's."""
    merged, whole = plan.merged[name], base[name].load()
    for rank in plan.ranks(merged.stage):
        tensor = plan.files.tensors[rank][name]
        shard = tensor.load()
        expected = cast(whole, base[name].dtype, tensor.dtype)
        if not any(np.array_equal(shard, expected[block]) for block in _blocks(expected.shape, shard.shape)):
            raise InputError(
                f"{tensor.file}: key {name!r} is no part of it in {base[name].file}: the adapters were "
                "trained on another base; give the checkpoint that the run loaded"
            )


def _blocks(whole, shard):
    """Yields the index expressions of the blocks of shape `shard` that tile `whole`; none where they do not tile it."""
    if len(whole) != len(shard) or any(size % block for size, block in zip(whole, shard)):
        return
    counts = [size // block for size, block in zip(whole, shard)]
    for index in np.ndindex(*counts):
        yield tuple(slice(i * block, (i + 1) * block) for i, block in zip(index, shard))
