"""Joins the checkpoints of all ranks into one file, LoRA adapters too, and checks that nothing was lost."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from tqdm import tqdm

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path, require_space, work_folder
from mindformers_glm32k.weights import reshard as pieces
from mindformers_glm32k.weights.checkpoint import open_source
from mindformers_glm32k.weights.lora import add_product, pairs_of
from mindformers_glm32k.weights.merge_plan import MergePlan, in_model_order
from mindformers_glm32k.weights.merge_values import check_frozen, joined_values
from mindformers_glm32k.weights.parameters import ADAPTER, STATE, WEIGHT, kind_of, raw_bytes
from mindformers_glm32k.weights.rank_files import choose
from mindformers_glm32k.weights.report import write_report
from mindformers_glm32k.weights.split_plan import stage_devices
from mindformers_glm32k.weights.strategy import read_stages
from mindformers_glm32k.weights.transform import Transformer
from mindformers_glm32k.weights.writer import CheckpointWriter


def merge(
    src_ckpt_dir,
    dst=None,
    strategy=None,
    step=None,
    optimizer_states=False,
    lora=False,
    lora_scaling=None,
    base=None,
    adapters_only=None,
    sizes=None,
    progress=False,
):
    """Joins the checkpoints of a parallel run.

    Args:
        src_ckpt_dir (str | os.PathLike): folder with rank_0, rank_1, …
        dst (str | os.PathLike | None): `.ckpt` or `.safetensors` to write; None where only adapters are wanted.
        strategy (str | os.PathLike | None): strategy files' folder, or one file. None: every rank has the whole model
            (one process, data parallel), which is checked.
        step (str | int | None): "EPOCH_STEP" as in the file names, or step_num inside; None takes the newest complete.
        optimizer_states (bool): whether adam_m.*, adam_v.* and counters are kept.
        lora (bool): whether adapters are added to the weights.
        lora_scaling (float | None): alpha / rank; needed with `lora`.
        base (str | os.PathLike | None): the whole checkpoint that adapters were trained on, where the ranks' files
            have none of it, or have it cut in a way that the strategy does not tell.
        adapters_only (str | os.PathLike | None): a file for the adapters alone.
        sizes (sizes.Sizes | None): of the model; None takes them from the weights.
        progress (bool): whether to show progress bars.

    Returns:
        dict: the report, as written to OUT.report.json; "remarks" holds what the user should know.

    Raises:
        InputError: files, strategy and model do not fit together; nothing is left behind.
        transform.TransformFailed: MindSpore failed.
    """
    outputs = [Path(path) for path in (dst, adapters_only) if path is not None]
    _check_options(outputs, lora, lora_scaling, base, optimizer_states)
    stages = read_stages(strategy) if strategy is not None else None
    ranks = range(stage_devices(stages) * len(stages)) if stages else None
    files, remarks = choose(src_ckpt_dir, ranks, step)
    world = len(files.tensors)
    plan = MergePlan(files, stages or [{}], world // len(stages or [{}]), strategy)
    job = _Job(plan, lora, lora_scaling, optimizer_states, _open_base(base), sizes)
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
        "lora_scaling": lora_scaling if lora else None,
        "checksums": "of the little-endian values, without the file format's framing",
    }
    job.write(dst and Path(dst), adapters_only and Path(adapters_only), report, progress)
    report["remarks"] = remarks + job.remarks
    return report


def _check_options(outputs, lora, scaling, base, states):
    if not outputs:
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
    """One merge, its parts sorted by what becomes of them."""

    plan: MergePlan
    lora: bool
    scaling: Optional[float]
    states: bool
    base: Optional[dict]
    sizes: object

    def check(self, source, wants_weights, wants_adapters):
        """Checks all that can be checked without reading values; raises InputError."""
        plan = self.plan
        self.weights = {name: joined.whole for name, joined in plan.of_kind(WEIGHT).items()}
        self.adapters = {name: joined.whole for name, joined in plan.of_kind(ADAPTER).items()}
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
            self.sizes = plan.check_model(self.sizes, self.weights, origin, self.frozen)
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

    def write(self, dst, adapters_only, report, progress):
        """Makes the outputs in a hidden folder, verifies them, and moves them to their names."""
        first = dst or adapters_only
        with work_folder(first) as work:
            order = in_model_order(self.adapters)
            weights = in_model_order(self.weights) if dst else []
            states = in_model_order(self.state_names) if self.states and dst else []
            kept = [] if self.lora or not dst else order
            wholes = {
                **self.weights,
                **{name: joined.whole for name, joined in self.plan.joined.items() if name not in self.weights},
            }
            entries = [(name, wholes[name].shape, wholes[name].dtype) for name in [*weights, *kept, *states]]
            counters = self.plan.counters if states else []
            entries += [(counter.name, counter.shape, counter.dtype) for counter in counters]
            nbytes = sum(pieces.stored_bytes(shape, dtype) for _, shape, dtype in entries)
            require_space(first, nbytes + 3 * min(nbytes, pieces.PIECE_BYTES))
            made = []
            with (
                Transformer(work / "log") as transformer,
                tqdm(total=nbytes, unit="B", unit_scale=True, desc="merge", disable=not progress) as bar,
            ):
                adapters = dict(joined_values(self.plan, order, transformer, work))
                if adapters_only:
                    made.append((self._write_adapters(work, adapters_only, order, adapters), adapters_only))
                if dst:
                    for name in self.frozen:
                        check_frozen(self.plan, self.base, name)
                    values = self._values(weights, adapters, transformer, work)
                    with CheckpointWriter(work / f"out{dst.suffix}", entries) as writer:
                        for name, array in values:
                            writer.write(name, array)
                            bar.update(array.nbytes)
                        for name in kept:
                            writer.write(name, adapters[name])
                        for name, array in joined_values(self.plan, states, transformer, work):
                            writer.write(name, array)
                            bar.update(array.nbytes)
                        for counter in counters:
                            writer.write(counter.name, raw_bytes(counter))
                        writer.finish()
                    made.append((writer, dst))
            for writer, path in made:
                if path == first:
                    writer.path.replace(path)
                else:  # which may be on another disk
                    with atomic_path(path) as temporary:
                        shutil.copyfile(writer.path, temporary)
                report.setdefault("outputs", []).append(str(path))
                write_report(
                    path.with_suffix(".report.json"), {**report, "output": str(path), "tensors": writer.describe()}
                )
            report["tensors"] = made[-1][0].describe()

    def _values(self, weights, adapters, transformer, work):
        """Yields the weights, with the adapters' products added where they are merged."""
        stream = (
            joined_values(self.plan, weights, transformer, work)
            if self.base is None
            else ((name, self.base[name].load()) for name in weights)
        )
        for name, array in stream:
            if self.lora and name in self.pairs:
                a, b = ((adapters[side], self.adapters[side].dtype) for side in self.pairs[name])
                array = add_product((array, self.weights[name].dtype), a, b, self.scaling, name)
            yield name, array

    def _write_adapters(self, work, path, order, adapters):
        entries = [(name, self.adapters[name].shape, self.adapters[name].dtype) for name in order]
        with CheckpointWriter(work / f"adapters{path.suffix}", entries) as writer:
            for name in order:
                writer.write(name, adapters[name])
            writer.finish()
        return writer
