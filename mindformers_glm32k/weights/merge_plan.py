"""The plan of a merge: the files of all ranks, checked against the strategy and the model before values are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.checkpoint import check_against, raise_problems, weights_in
from mindformers_glm32k.weights.names import (
    ADAPTER,
    COUNTER,
    SCRATCH_PREFIX,
    STATE,
    WEIGHT,
    ModelDims,
    dims_from_tensors,
    kind_of,
)
from mindformers_glm32k.weights.rank_files import RankFiles
from mindformers_glm32k.weights.strategy import ShardSpec
from mindformers_glm32k.weights.tensors import ITEM_SIZE, StoredTensor

FROZEN = (
    "MindSpore's strategy files leave frozen weights out: give --config of the LoRA run instead of "
    "--src_ckpt_strategy, or the whole base with --base"
)


class MergedTensor(NamedTuple):
    """A parameter to merge.

    Args:
        whole: its name, whole shape and dtype; no segments in a file.
        stage: of the pipeline.
        spec: its shards; None where every rank of the stage should have the whole.
    """

    whole: StoredTensor
    stage: int
    spec: ShardSpec | None


class MergePlan:
    """The parameters of a set of rank files.

    Args:
        files: with their tensors already listed.
        stages: the layouts by stage; [{}] without a strategy.
        devices: ranks of a stage.
        strategy: where the layouts come from, for messages; None without.
    """

    def __init__(
        self, files: RankFiles, stages: list[dict[str, ShardSpec]], devices: int, strategy: object | None
    ) -> None:
        self.files, self.stages, self.devices, self.strategy = files, stages, devices, strategy
        self.merged: dict[str, MergedTensor] = {}
        self.counters: list[StoredTensor] = []
        problems = []
        for stage, specs in enumerate(stages):
            self._add_stage(stage, specs, problems)
        self._raise(problems)

    def ranks(self, stage: int) -> range:
        return range(stage * self.devices, (stage + 1) * self.devices)

    def of_kind(self, kind: str) -> dict[str, MergedTensor]:
        """The merged tensors of one kind (WEIGHT, ADAPTER, STATE), without sums of gradients, which no run needs."""
        return {
            name: merged
            for name, merged in self.merged.items()
            if kind_of(name) == kind and not name.startswith(SCRATCH_PREFIX)
        }

    def check_model(
        self, dims: ModelDims | None, weights: Mapping[str, StoredTensor], source: object, frozen: Collection[str] = ()
    ) -> ModelDims:
        """Checks names and shapes against the model.

        Args:
            dims: None takes them from the weights themselves.
            weights: whole ones: the plan's, or those of a base.
            source: where the weights come from, for messages.
            frozen: names of the plan's weights that come from a base: their shards are not merged.

        Raises:
            InputError: missing, left over, or misshapen parameters.
        """
        try:
            found = weights_in(weights)
            dims = dims or dims_from_tensors(found)
            check_against(dims, found, source)
        except InputError as error:
            raise self._with_hint(error) from None
        self._raise(
            f"{merged.whole.file}: key {name!r} would be {merged.whole.shape} as a whole, expected "
            f"{dims.shape_of(name)}"
            for name, merged in self.merged.items()
            if name not in frozen and not dims.fits(name, merged.whole.shape)
        )
        return dims

    def _raise(self, problems):
        try:
            raise_problems(self.files.name, problems)
        except InputError as error:
            raise self._with_hint(error) from None

    def _with_hint(self, error):
        if not self.strategy:
            hint = "Are the parameters sharded? Then give --src_ckpt_strategy or --config."
        elif any(merged.spec is None for merged in self.of_kind(WEIGHT).values()):
            hint = FROZEN + "."
        else:
            hint = (
                f"Is {self.strategy} the strategy of this run? (Files saved with remove_redundancy: True hold less "
                "than it says and cannot be merged.)"
            )
        return InputError(f"{error}\n{hint}")

    def _add_stage(self, stage, specs, problems):
        ranks = self.ranks(stage)
        first = self.files.tensors[ranks[0]]
        if stage == 0:
            self.counters = [tensor for tensor in first.values() if kind_of(tensor.name) == COUNTER]
        has_weights = any(kind_of(name) == WEIGHT for name in first)
        for name in specs:
            kind = kind_of(name)
            needed = kind == ADAPTER or kind == WEIGHT and has_weights
            if needed and name not in first:
                problems.append(f"{self.files.files[ranks[0]]}: missing: {name!r}")
        for name, tensor in first.items():
            if kind_of(name) not in (WEIGHT, ADAPTER, STATE):
                continue
            if name in self.merged:
                problems.append(
                    f"{tensor.file}: key {name!r} belongs to stage {self.merged[name].stage}, this is stage {stage}"
                )
                continue
            problem = self._differs(name, tensor, ranks)
            spec = specs.get(name)
            shape = tensor.shape
            if not problem and spec is not None:
                try:
                    shape = spec.full_shape(tensor.shape)
                except InputError as error:
                    problem = f"{tensor.file}: key {name!r}: {error}"
            if not problem and tensor.dtype not in ITEM_SIZE:
                problem = f"{tensor.file}: key {name!r} has dtype {tensor.dtype}, {', '.join(ITEM_SIZE)} can be merged"
            if problem:
                problems.append(problem)
            else:
                self.merged[name] = MergedTensor(replace(tensor, shape=shape, segments=()), stage, spec)
        for rank in ranks:
            extra = sorted(
                name
                for name in self.files.tensors[rank]
                if name not in first and kind_of(name) in (WEIGHT, ADAPTER, STATE)
            )
            if extra:
                problems.append(
                    f"{self.files.files[rank]}: key {extra[0]!r} is not in {self.files.files[ranks[0]]} "
                    f"({len(extra)} such keys)"
                )

    def _differs(self, name, tensor, ranks):
        """A sentence on the first rank of the stage whose copy is missing or has another shape or dtype, or None."""
        for rank in ranks:
            other = self.files.tensors[rank].get(name)
            if other is None:
                return f"{self.files.files[rank]}: missing: {name!r}"
            if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
                return (
                    f"{other.file}: key {name!r} is {other.dtype} {other.shape}, in {tensor.file} it is "
                    f"{tensor.dtype} {tensor.shape}"
                )
        return None
