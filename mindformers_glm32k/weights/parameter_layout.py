"""How one parameter is cut over the ranks of its pipeline stage.

A strategy file gives every parameter (weights, `accu_grads.*`, `adam_m.*`, `adam_v.*`) a layout:

- `dev_matrix`: the stage's devices as an array, the last axis running fastest over the ranks; axes of size 1 are
  left out (dp 2 x mp 4: [2, 4]);
- `tensor_map`: for each axis of the parameter the device axis that cuts it, counted from the right, -1 for none; a
  list of device axes where several cut one axis, the first one coarsest;
- `opt_weight_shard_size`: the number of parts into which the optimizer cuts axis 0 again, among ranks that would hold
  equal copies otherwise; -1 stands for all of them, 0 for none.

The rules are those of MindSpore's transform_checkpoints, which tests compare with.
"""

from dataclasses import dataclass
from math import prod

from mindformers_glm32k.errors import InputError


@dataclass(frozen=True)
class ParameterLayout:
    """How one parameter is cut over the ranks of its stage.

    Args:
        dev_matrix: sizes of the device axes.
        tensor_map: per axis of the parameter the device axes that cut it, counted from the right, coarsest first; ()
            where it is whole.
        optimizer_parts: parts into which the optimizer cuts axis 0 of what the map leaves; 1 for none.
    """

    dev_matrix: tuple[int, ...]
    tensor_map: tuple[tuple[int, ...], ...]
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
        return tuple(
            slice(index * size, (index + 1) * size) for index, size in zip(self.position(rank_in_stage), sizes)
        )

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
