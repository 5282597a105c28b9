"""What a conversion does, decided before it writes: which source values go where in which target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from mindformers_glm32k.weights.model_dims import ModelDims
from mindformers_glm32k.weights.names import MLP, QKV, QKV_BIAS, TensorKey, model_keys, name_of
from mindformers_glm32k.weights.tensors import StoredTensor, TensorSpec

_FAMILY = {part: family for family in (QKV, QKV_BIAS, MLP) for part in family}


@dataclass(frozen=True)
class Move:
    """Consecutive values copied from a source tensor to a target; all figures count elements."""

    source: StoredTensor
    source_start: int
    target: TensorSpec
    target_start: int
    count: int


@dataclass(frozen=True)
class TensorGroup:
    """The smallest unit of work: tensors that share parts, as Q, K, V and their fused form. The moves of a target are
    in the order of its values."""

    moves: tuple[Move, ...]

    @property
    def targets(self) -> list[TensorSpec]:
        return list(dict.fromkeys(move.target for move in self.moves))

    @property
    def sources(self) -> list[StoredTensor]:
        return list(dict.fromkeys(move.source for move in self.moves))


def make_targets(
    dims: ModelDims,
    weights: Mapping[TensorKey, StoredTensor],
    naming: str,
    qkv_concat: bool,
    mlp_concat: bool,
    dtype: str | None,
) -> dict[TensorKey, TensorSpec]:
    """The tensors to write, in the model's order; without a dtype each keeps its own."""
    own = {(part, key.layer): tensor.dtype for key, tensor in weights.items() for part in key.parts}
    return {
        key: TensorSpec(name_of(key, naming), dims.shape(key), dtype or own[key.parts[0], key.layer])
        for key in model_keys(dims.num_layers, dims.qkv_bias, qkv_concat, mlp_concat)
    }


def make_groups(
    dims: ModelDims, weights: Mapping[TensorKey, StoredTensor], targets: Mapping[TensorKey, TensorSpec]
) -> list[TensorGroup]:
    """Says which source values go where, in the order of the source files' bytes, so that disks are read forward."""
    sources, locations = {}, {}
    for key, tensor in weights.items():
        sources.update(_locate_parts(dims, key, tensor))
    for key, target in targets.items():
        locations.update(_locate_parts(dims, key, target))
    families = {}
    for part in locations:
        families.setdefault((_FAMILY.get(part[0], part[0]), part[1]), []).append(part)
    groups = []
    for (family, _), parts in families.items():
        moves: list[Move] = []
        for part in sorted(parts, key=lambda part: family.index(part[0]) if isinstance(family, tuple) else 0):
            source, source_start, count = sources[part]
            target, target_start, _ = locations[part]
            last = moves[-1] if moves else None
            if last and last.source is source and last.target is target:
                moves[-1] = Move(source, last.source_start, target, last.target_start, last.count + count)
            else:
                moves.append(Move(source, source_start, target, target_start, count))
        groups.append(TensorGroup(tuple(moves)))
    return sorted(groups, key=lambda group: (group.moves[0].source.file, group.moves[0].source.segments[0][0]))


def _locate_parts(dims, key, tensor):
    """Where each part of a tensor lies: (part, layer) -> (tensor, first element, elements)."""
    row, start, locations = prod(tensor.shape[1:]), 0, {}
    for part in key.parts:
        count = dims.rows(part) * row
        locations[part, key.layer] = (tensor, start, count)
        start += count
    return locations
