"""Which shard of a parameter a rank holds: MindSpore's strategy files, read without importing MindSpore.

A strategy file belongs to one pipeline stage and gives every parameter (weights, `accu_grads.*`, `adam_m.*`,
`adam_v.*`) a layout (schema: mindspore/train/node_strategy_pb2.py, a protobuf):

- `dev_matrix`: the stage's devices as an array, the last axis running fastest over the ranks; axes of size 1 are
  left out (dp 2 x mp 4: [2, 4]);
- `tensor_map`: for each axis of the parameter the device axis that shards it, counted from the right, -1 for none; a
  list of device axes where several shard one axis, the first one coarsest;
- `opt_weight_shard_size`: the number of shards into which the optimizer divides axis 0 again, among ranks that would
  hold equal copies otherwise; -1 stands for all of them, 0 for none.

The rules are those of MindSpore's transform_checkpoints, which tests compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import require_file
from mindformers_glm32k.protobuf import message_class
from mindformers_glm32k.weights.names import STATE_PREFIXES

_HINT = "`glm32k strategy` writes the files of all ranks; a run writes its own to output/strategy"
_PATTERN = "*ckpt_strategy*.ckpt"


@dataclass(frozen=True)
class ShardSpec:
    """How one parameter is sharded over the ranks of its pipeline stage.

    Args:
        dev_matrix: sizes of the device axes.
        tensor_map: per axis of the parameter the device axes that shard it, counted from the right, coarsest first; ()
            where it is whole.
        optimizer_shards: shards into which the optimizer divides axis 0 of what the map leaves; 1 for none.
    """

    dev_matrix: tuple[int, ...]
    tensor_map: tuple[tuple[int, ...], ...]
    optimizer_shards: int = 1

    @property
    def devices(self) -> int:
        """Devices in `dev_matrix`; ranks beyond them repeat the same shards."""
        return prod(self.dev_matrix)

    @property
    def counts(self) -> tuple[int, ...]:
        """Shards along each axis, the optimizer's of axis 0 included."""
        counts = [prod(self._size(axis) for axis in axes) for axes in self.tensor_map]
        if counts:
            counts[0] *= self.optimizer_shards
        return tuple(counts)

    def index(self, rank_in_stage: int) -> tuple[int, ...]:
        """Which shard a rank holds, per axis, 0 for the first. Ranks with equal indices hold equal copies.

        Args:
            rank_in_stage: the rank minus the first rank of its stage.
        """
        coordinates = self._coordinates(rank_in_stage)
        found = []
        for axes in self.tensor_map:
            index = 0
            for axis in axes:
                index = index * self._size(axis) + coordinates[len(self.dev_matrix) - 1 - axis]
            found.append(index)
        if found:
            found[0] = found[0] * self.optimizer_shards + self._optimizer_index(coordinates)
        return tuple(found)

    def slices(self, rank_in_stage: int, full_shape: tuple[int, ...]) -> tuple[slice, ...]:
        """The rank's shard as an index expression: `whole[spec.slices(rank, whole.shape)]`.

        Raises:
            InputError: the shape has another number of axes than the layout, or cannot be divided evenly.
        """
        sizes = self.shard_shape(full_shape)
        return tuple(slice(index * size, (index + 1) * size) for index, size in zip(self.index(rank_in_stage), sizes))

    def shard_of(self, whole: np.ndarray, rank_in_stage: int) -> np.ndarray:
        """The rank's shard of a whole parameter, a view; raises as `slices` does."""
        return whole[self.slices(rank_in_stage, whole.shape)]

    def shard_shape(self, full_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of every rank's shard of a parameter of `full_shape`; raises as `slices` does."""
        self._check_axes(full_shape)
        if any(size % count for size, count in zip(full_shape, self.counts)):
            raise InputError(f"shape {tuple(full_shape)} cannot be divided evenly into {self.counts} shards")
        return tuple(size // count for size, count in zip(full_shape, self.counts))

    def full_shape(self, shard_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The whole parameter's shape, from that of a rank's shard; the inverse of `shard_shape`."""
        self._check_axes(shard_shape)
        return tuple(size * count for size, count in zip(shard_shape, self.counts))

    def _check_axes(self, shape):
        if len(shape) != len(self.tensor_map):
            raise InputError(f"shape {tuple(shape)} has {len(shape)} axes, the layout is for {len(self.tensor_map)}")

    def _size(self, axis_from_right):
        return self.dev_matrix[len(self.dev_matrix) - 1 - axis_from_right]

    def _coordinates(self, rank):
        coordinates = []
        for size in reversed(self.dev_matrix):
            coordinates.insert(0, rank % size)
            rank //= size
        return coordinates

    def _optimizer_index(self, coordinates):
        """The rank's index in its optimizer group: along the device axes that do not shard the parameter, as many of
        the innermost as the group needs."""
        used = {len(self.dev_matrix) - 1 - axis for axes in self.tensor_map for axis in axes}
        index, weight, left = 0, 1, self.optimizer_shards
        for axis in reversed(range(len(self.dev_matrix))):
            if axis not in used and left > 1:
                taken = min(self.dev_matrix[axis], left)
                index += coordinates[axis] % taken * weight
                weight, left = weight * taken, left // taken
        return index


def read_strategy(path: str | Path) -> dict[str, ShardSpec]:
    """Reads the strategy file of one stage, by parameter, in file order; of all stages in a merged file.

    Raises:
        InputError: no strategy file.
    """
    return {name: spec for specs in read_file(path).values() for name, spec in specs.items()}


def read_stages(path: str | Path) -> list[dict[str, ShardSpec]]:
    """Reads the layouts of all stages.

    Args:
        path: folder of strategy files, or one file: of a run without a pipeline, or merged by transform_ckpt
            (merged_ckpt_strategy.ckpt).

    Raises:
        InputError: no strategy files, stages missing, or files of several layouts in one folder.
    """
    stages, known, origin = {}, set(), {}
    for file in _files(Path(path)):
        content = file.read_bytes() if file.is_file() else b""
        if content and content in known:
            continue  # ranks of a stage have equal files
        known.add(content)
        for stage, specs in read_file(file).items():
            if stage in stages and stages[stage] != specs:
                raise InputError(
                    f"{file}: gives stage {stage} other layouts than {origin[stage].name} does; the files "
                    "are of different runs: write the strategy into an empty folder"
                )
            stages[stage], origin[stage] = specs, file
    missing = sorted(set(range(max(stages) + 1)) - set(stages))
    if missing:
        raise InputError(
            f"{path}: the strategy of pipeline stage {missing[0]} is missing ({len(stages)} of "
            f"{max(stages) + 1} stages are there); {_HINT}"
        )
    return [stages[stage] for stage in range(len(stages))]


def stage_devices(stages: list[dict[str, ShardSpec]]) -> int:
    """Ranks of each stage, from its layouts."""
    return max(spec.devices for specs in stages for spec in specs.values())


def read_file(path: str | Path) -> dict[int, dict[str, ShardSpec]]:
    """Reads one strategy file, by stage: one, unless the file is merged.

    Raises:
        InputError: missing, empty, or no strategy file.
    """
    path = require_file(path, "strategy file", _HINT)
    try:
        strategy, stages = _parse(path.read_bytes()), {}
        for item in strategy.parallel_layout_item:
            stage, name = _stage_and_name(item, strategy)
            stages.setdefault(stage, {})[name] = _spec(item.parallel_layouts)
    except (IndexError, ValueError) as error:
        raise InputError(f"{path}: no strategy file of MindSpore, or cut off ({error}); {_HINT}") from error
    if not stages:
        raise InputError(f"{path}: a strategy file without layouts of parameters; {_HINT}")
    return stages


def write_stage(source: str | Path, stage: int, target: Path) -> None:
    """Writes the layouts of one stage, unchanged, as a strategy file of its own.

    MindSpore takes such a file for a run without a pipeline, whose ranks count from 0.

    Args:
        source: as for `read_stages`, which has accepted it.
        stage: its index.
        target: the file to write.
    """
    path = next(path for path in _files(Path(source)) if path.stat().st_size and stage in read_file(path))
    strategy = _parse(path.read_bytes())
    kept = [item for item in strategy.parallel_layout_item if _stage_and_name(item, strategy)[0] == stage]
    for item in kept:
        item.param_name = _stage_and_name(item, strategy)[1]
    operators = [item for item in strategy.parallel_strategy_item if item.parallel_strategys.stage == stage]
    result = type(strategy)()
    result.CopyFrom(strategy)
    for field, items in (("parallel_strategy_item", operators), ("parallel_layout_item", kept)):
        result.ClearField(field)
        getattr(result, field).extend(items)
    target.write_bytes(result.SerializeToString())


def add_frozen(strategy: bytes, trained: bytes) -> bytes:
    """Completes the strategy file of a run with frozen weights, which MindSpore leaves out though it shards them.

    Args:
        strategy: the file of a stage, as MindSpore writes it for a LoRA run: adapters and their states.
        trained: that of the same run without adapters, where all weights are trained; they are sharded alike.

    Returns:
        The first file with the layouts of the weights that only the second one has.
    """
    result = _parse(strategy)
    known = {item.param_name for item in result.parallel_layout_item}
    for item in _parse(trained).parallel_layout_item:
        if item.param_name not in known and not item.param_name.startswith(STATE_PREFIXES):
            result.parallel_layout_item.append(item)
    return result.SerializeToString()


def _files(path):
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob(_PATTERN) if not file.name.startswith("merged_"))
    files = files or sorted(path.glob(_PATTERN))
    if not files:
        raise InputError(f"{path}: no strategy files ({_PATTERN}) in this folder; {_HINT}")
    return files


def _parse(content):
    from google.protobuf.message import DecodeError

    try:
        return message_class("node_strategy_pb2", "ParallelStrategyMap").FromString(content)
    except DecodeError as error:
        raise ValueError(error) from error


def _stage_and_name(item, strategy):
    """The stage of a layout and the parameter's name: "2-name" is how merging marks the stage."""
    mark, found, plain = item.param_name.partition("-")
    if found and mark.isdigit():
        return int(mark), plain
    operators = strategy.parallel_strategy_item
    return (operators[-1].parallel_strategys.stage if operators else 0), item.param_name


def _spec(layout):
    if layout.field:
        raise ValueError("a layout with a field size is not understood")
    matrix = tuple(layout.dev_matrix[0].dim)
    maps = [tuple(axes.dim) for axes in layout.tensor_map]
    # One map for all axes; or one map per axis, in layouts where several device axes shard the same axis
    by_axis = [(axis,) for axis in maps[0]] if len(maps) == 1 else [axes for axes in maps if axes]
    tensor_map = tuple(tuple(axis for axis in axes if axis != -1) for axes in by_axis)
    copies = prod(matrix) // prod(matrix[len(matrix) - 1 - axis] for axes in tensor_map for axis in axes)
    step, size = layout.opt_weight_shard_step, layout.opt_weight_shard_size
    return ShardSpec(matrix, tensor_map, 1 if not step or not size else copies if size == -1 else size)
