"""Which part of a parameter a rank holds: MindSpore's strategy files, and the cut that they describe, in plain Python.

A strategy file belongs to one pipeline stage. It gives every parameter of the stage (weights, `accu_grads.*`,
`adam_m.*`, `adam_v.*`) a layout:

- `dev_matrix`: the stage's devices as an array, the last axis running fastest over the ranks; axes of size 1 are
  left out (dp 2 x mp 4: [2, 4]);
- `tensor_map`: for each axis of the parameter the device axis that cuts it, counted from the right, -1 for none; a
  list of device axes where several cut one axis, the first one coarsest;
- `opt_weight_shard_size`: the number of parts into which the optimizer cuts axis 0 again, among ranks that would hold
  equal copies otherwise; -1 stands for all of them, 0 for none.

Schema: mindspore/train/node_strategy_pb2.py. The rules are those of MindSpore's transform_checkpoints, which tests
compare with. Nothing here imports MindSpore.
"""
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Tuple

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import require_file

_HINT = "`glm32k strategy` writes the files of all ranks; a run writes its own to output/strategy"
_PATTERN = "*ckpt_strategy*.ckpt"


@dataclass(frozen=True)
class ParameterLayout:
    """How one parameter is cut over the ranks of its stage.

    Args:
        dev_matrix: sizes of the device axes.
        tensor_map: per axis of the parameter the device axes that cut it, counted from the right, coarsest first; ()
            where it is whole.
        optimizer_parts: parts into which the optimizer cuts axis 0 of what the map leaves; 1 for none.
    """

    dev_matrix: Tuple[int, ...]
    tensor_map: Tuple[Tuple[int, ...], ...]
    optimizer_parts: int = 1

    @property
    def devices(self):
        """int: devices that the layout speaks of; ranks beyond them repeat the same cuts."""
        return prod(self.dev_matrix)

    @property
    def parts(self):
        """tuple[int]: into how many parts each axis is cut, the optimizer's cut of axis 0 included."""
        parts = [prod(self._size(axis) for axis in axes) for axes in self.tensor_map]
        if parts:
            parts[0] *= self.optimizer_parts
        return tuple(parts)

    def position(self, rank_in_stage):
        """Which of the parts a rank holds. Ranks with equal positions hold equal copies.

        Args:
            rank_in_stage (int): the rank minus the first rank of its stage.

        Returns:
            tuple[int]: per axis, 0 for the first part.
        """
        coordinates = self._coordinates(rank_in_stage)
        position = []
        for axes in self.tensor_map:
            index = 0
            for axis in axes:
                index = index * self._size(axis) + coordinates[len(self.dev_matrix) - 1 - axis]
            position.append(index)
        if position:
            position[0] = position[0] * self.optimizer_parts + self._optimizer_index(coordinates)
        return tuple(position)

    def slices(self, rank_in_stage, full_shape):
        """The rank's part as an index expression: `whole[layout.slices(rank, whole.shape)]`.

        Args:
            rank_in_stage (int): the rank minus the first rank of its stage.
            full_shape (tuple[int]): of the whole parameter.

        Returns:
            tuple[slice]: one per axis.

        Raises:
            InputError: the shape has another number of axes than the layout, or cannot be cut evenly.
        """
        sizes = self.slice_shape(full_shape)
        return tuple(slice(index * size, (index + 1) * size)
                     for index, size in zip(self.position(rank_in_stage), sizes))

    def slice_shape(self, full_shape):
        """The shape that every rank's part of a parameter of `full_shape` has; raises as `slices` does."""
        self._check_axes(full_shape)
        if any(size % count for size, count in zip(full_shape, self.parts)):
            raise InputError(f"shape {tuple(full_shape)} cannot be cut evenly into {self.parts} parts")
        return tuple(size // count for size, count in zip(full_shape, self.parts))

    def full_shape(self, slice_shape):
        """The whole parameter's shape, from that of a rank's part; the inverse of `slice_shape`."""
        self._check_axes(slice_shape)
        return tuple(size * count for size, count in zip(slice_shape, self.parts))

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
        """The rank's index in its optimizer group: along the device axes that do not cut the parameter, as many of the
        innermost as the group needs."""
        used = {len(self.dev_matrix) - 1 - axis for axes in self.tensor_map for axis in axes}
        index, weight, left = 0, 1, self.optimizer_parts
        for axis in reversed(range(len(self.dev_matrix))):
            if axis not in used and left > 1:
                taken = min(self.dev_matrix[axis], left)
                index += coordinates[axis] % taken * weight
                weight, left = weight * taken, left // taken
        return index


def slice_of(array, layout, rank_in_stage):
    """A rank's part of a whole parameter.

    Args:
        array (numpy.ndarray): the whole parameter, or anything with a shape that takes slices.
        layout (ParameterLayout): its layout.
        rank_in_stage (int): the rank minus the first rank of its stage.

    Returns:
        numpy.ndarray: a view.
    """
    return array[layout.slices(rank_in_stage, array.shape)]


def read_strategy(path):
    """Reads the strategy file of one stage.

    Args:
        path (str | os.PathLike): a file as `glm32k strategy` or a run writes it, or one that merges all stages.

    Returns:
        dict[str, ParameterLayout]: by parameter, in file order; of all stages in a merged file.

    Raises:
        InputError: no strategy file.
    """
    return {name: layout for layouts in read_file(path).values() for name, layout in layouts.items()}


def read_stages(path):
    """Reads the layouts of all stages.

    Args:
        path (str | os.PathLike): folder of strategy files, or one file: of a run without a pipeline, or merged by
            transform_ckpt (merged_ckpt_strategy.ckpt).

    Returns:
        list[dict[str, ParameterLayout]]: by stage.

    Raises:
        InputError: no strategy files, stages missing, or files of several layouts in one folder.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.glob(_PATTERN) if not file.name.startswith("merged_"))
        files = files or sorted(path.glob(_PATTERN))
        if not files:
            raise InputError(f"{path}: no strategy files ({_PATTERN}) in this folder; {_HINT}")
    stages, known, origin = {}, set(), {}
    for file in files:
        content = file.read_bytes() if file.is_file() else b""
        if content and content in known:
            continue  # ranks of a stage have equal files
        known.add(content)
        for stage, layouts in read_file(file).items():
            if stage in stages and stages[stage] != layouts:
                raise InputError(f"{file}: gives stage {stage} other layouts than {origin[stage].name} does; the files "
                                 "are of different runs: write the strategy into an empty folder")
            stages[stage], origin[stage] = layouts, file
    missing = [stage for stage in range(max(stages) + 1) if stage not in stages]
    if missing:
        raise InputError(f"{path}: the strategy of pipeline stage {missing[0]} is missing ({len(stages)} of "
                         f"{max(stages) + 1} stages are there); {_HINT}")
    return [stages[stage] for stage in range(len(stages))]


def read_file(path):
    """Reads one strategy file.

    Args:
        path (str | os.PathLike): the file.

    Returns:
        dict[int, dict[str, ParameterLayout]]: by stage: one, unless the file is merged.

    Raises:
        InputError: missing, empty, or no strategy file.
    """
    path = require_file(path, "strategy file", _HINT)
    try:
        stage, items = 0, []
        for number, value in _fields(path.read_bytes()):
            if number == 2:
                stage = dict(_fields(dict(_fields(value))[2]))[1]
            elif number == 3:
                item = dict(_fields(value))
                items.append((item[1].decode("utf-8"), _layout(item[2])))
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise InputError(f"{path}: no strategy file of MindSpore, or cut off ({error}); {_HINT}") from error
    if not items:
        raise InputError(f"{path}: a strategy file without layouts of parameters; {_HINT}")
    stages = {}
    for name, layout in items:
        number, found, plain = name.partition("-")  # "2-name": how merging marks the stage
        merged = found and number.isdigit()
        stages.setdefault(int(number) if merged else stage, {})[plain if merged else name] = layout
    return stages


def _layout(message):
    matrices, maps, size, step = [], [], 0, 0
    for number, value in _fields(message):
        if number == 1:
            matrices.append(_numbers(value))
        elif number == 2:
            maps.append(_numbers(value))
        elif number == 5 and value:
            raise ValueError("a layout with a field size is not understood")
        elif number == 6:
            step = _signed(value)
        elif number == 7:
            size = _signed(value)
    matrix = matrices[0]
    axes = [[axis] for axis in maps[0]] if len(maps) == 1 else [axes for axes in maps if axes]
    tensor_map = tuple(tuple(axis for axis in cut if axis != -1) for cut in axes)
    cuts = prod(matrix[len(matrix) - 1 - axis] for cut in tensor_map for axis in cut)
    parts = 1 if not step or not size else prod(matrix) // cuts if size == -1 else size
    return ParameterLayout(matrix, tensor_map, parts)


def _numbers(message):
    """tuple[int]: a repeated number, packed or not."""
    found = []
    for _, value in _fields(message):
        if isinstance(value, int):
            found.append(_signed(value))
        else:
            position = 0
            while position < len(value):
                number, position = _varint(value, position)
                found.append(_signed(number))
    return tuple(found)


def _signed(value):
    return value - (1 << 64) if value >= 1 << 63 else value


def _fields(data):
    """Yields the (number, value) of a protobuf message: int, or bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        if key & 7 == 0:
            value, position = _varint(data, position)
        elif key & 7 == 2:
            length, position = _varint(data, position)
            value, position = data[position:position + length], position + length
            if len(value) != length:
                raise ValueError("the file ends early")
        else:
            raise ValueError(f"wire type {key & 7}")
        yield key >> 3, value


def _varint(data, position):
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        shift, position = shift + 7, position + 1
        if byte < 0x80:
            return value, position
