"""What a merge joins: the files of all ranks held against the strategy and the model before any value is read."""

from dataclasses import replace
from typing import NamedTuple

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.dtypes import ITEM_SIZE
from mindformers_glm32k.weights.model_dims import sizes_from_tensors
from mindformers_glm32k.weights.names import slot_of, slots
from mindformers_glm32k.weights.parameter_layout import ParameterLayout
from mindformers_glm32k.weights.parameters import (
    ADAPTER,
    COUNTER,
    SCRATCH_PREFIX,
    STATE,
    WEIGHT,
    adapter_of,
    expected_shape,
    fits,
    kind_of,
    plain_name,
)
from mindformers_glm32k.weights.plan import check_against, raise_problems, weights_in
from mindformers_glm32k.weights.tensors import StoredTensor

FROZEN = (
    "MindSpore's strategy files leave frozen weights out: give --config of the LoRA run instead of "
    "--src_ckpt_strategy, or the whole base with --base"
)


class Joined(NamedTuple):
    """A parameter to put together.

    Args:
        whole: its name, whole shape and dtype; no place in a file.
        stage: of the pipeline.
        layout: None where every rank of the stage should have the whole.
    """

    whole: StoredTensor
    stage: int
    layout: ParameterLayout


class MergePlan:
    """The parameters of a set of rank files.

    Args:
        files (rank_files.RankFiles): read.
        stages (list[dict[str, ParameterLayout]]): by stage; [{}] without a strategy.
        devices (int): ranks of a stage.
        strategy: where the layouts come from, for messages; None without.
    """

    def __init__(self, files, stages, devices, strategy):
        self.files, self.stages, self.devices, self.strategy = files, stages, devices, strategy
        self.joined = {}
        self.counters = []
        problems = []
        for stage, layouts in enumerate(stages):
            self._add_stage(stage, layouts, problems)
        self._raise(problems)

    def ranks(self, stage):
        """range: of a stage."""
        return range(stage * self.devices, (stage + 1) * self.devices)

    def of_kind(self, kind):
        """dict[str, Joined]: weights, adapters or states; sums of gradients are no states worth keeping."""
        return {
            name: joined
            for name, joined in self.joined.items()
            if kind_of(name) == kind and not name.startswith(SCRATCH_PREFIX)
        }

    def check_model(self, sizes, weights, source, frozen=()):
        """Checks names and shapes against the model.

        Args:
            sizes (sizes.Sizes | None): None takes them from the weights themselves.
            weights (dict[str, StoredTensor]): whole ones: the plan's, or those of a base.
            source: where the weights come from, for messages.
            frozen (iterable[str]): of the plan's weights, those that a base stands for: their parts are not joined.

        Returns:
            sizes.Sizes

        Raises:
            InputError: missing, left over, or misshapen parameters.
        """
        try:
            slots_found = weights_in(weights)
            sizes = sizes or sizes_from_tensors(slots_found)
            check_against(sizes, slots_found, source)
        except InputError as error:
            raise self._with_hint(error) from None
        self._raise(
            f"{joined.whole.file}: key {name!r} would be {joined.whole.shape} as a whole, expected "
            f"{expected_shape(sizes, name)}"
            for name, joined in self.joined.items()
            if name not in frozen and not fits(joined.whole.shape, expected_shape(sizes, name))
        )
        return sizes

    def _raise(self, problems):
        try:
            raise_problems(self.files.name, list(problems))
        except InputError as error:
            raise self._with_hint(error) from None

    def _with_hint(self, error):
        if not self.strategy:
            hint = "Are the parameters cut? Then give --src_ckpt_strategy or --config."
        elif any(joined.layout is None for joined in self.of_kind(WEIGHT).values()):
            hint = FROZEN + "."
        else:
            hint = (
                f"Is {self.strategy} the strategy of this run? (Files saved with remove_redundancy: True hold less "
                "than it says and cannot be merged.)"
            )
        return InputError(f"{error}\n{hint}")

    def _add_stage(self, stage, layouts, problems):
        ranks = self.ranks(stage)
        first = self.files.tensors[ranks[0]]
        if stage == 0:
            self.counters = [tensor for tensor in first.values() if kind_of(tensor.name) == COUNTER]
        has_weights = any(kind_of(name) == WEIGHT for name in first)
        for name in layouts:
            kind = kind_of(name)
            needed = kind == ADAPTER or kind == WEIGHT and has_weights
            if needed and name not in first:
                problems.append(f"{self.files.files[ranks[0]]}: missing: {name!r}")
        for name, tensor in first.items():
            if kind_of(name) not in (WEIGHT, ADAPTER, STATE):
                continue
            if name in self.joined:
                problems.append(
                    f"{tensor.file}: key {name!r} belongs to stage {self.joined[name].stage}, this is stage {stage}"
                )
                continue
            problem = self._differs(name, tensor, ranks)
            layout = layouts.get(name)
            shape = tensor.shape
            if not problem and layout is not None:
                try:
                    shape = layout.full_shape(tensor.shape)
                except InputError as error:
                    problem = f"{tensor.file}: key {name!r}: {error}"
            if not problem and tensor.dtype not in ITEM_SIZE:
                problem = f"{tensor.file}: key {name!r} has dtype {tensor.dtype}, {', '.join(ITEM_SIZE)} can be joined"
            if problem:
                problems.append(problem)
            else:
                self.joined[name] = Joined(replace(tensor, shape=shape, segments=()), stage, layout)
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
        """What is different about a parameter in the other ranks of the stage."""
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


def in_model_order(names):
    """Sorts parameters as the model has them; adapters follow the weights, states follow all, one kind after the other.

    Args:
        names (iterable[str]): weights, adapters, states.

    Returns:
        list[str]: names that are not this model's last.
    """

    def key(name):
        plain = plain_name(name)
        weight, side = adapter_of(plain) or (plain, "")
        try:
            slot = slot_of(weight)
        except InputError:
            slot = None
        part = slot.parts[0] if slot else None
        block = 0 if part == "embedding" else 1 if slot and slot.layer is not None else 2 if slot else 3
        return (name[: -len(plain)], bool(side), block, slot.layer or 0 if slot else 0, _PARTS.get(part, 0), side)

    return sorted(names, key=key)


_PARTS = {slot.parts[0]: index for index, slot in enumerate(slots(1, True, False, False))}
