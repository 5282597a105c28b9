"""What a conversion does, decided before it writes: every tensor checked, every output byte given its place."""

from dataclasses import dataclass

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.dtypes import ITEM_SIZE
from mindformers_glm32k.weights.names import MLP, QKV, Slot, name_of, slot_of, slots
from mindformers_glm32k.weights.tensors import StoredTensor, element_count

_QKV_BIAS = tuple(part + "_bias" for part in QKV)
_FAMILY = {part: family for family in (QKV, _QKV_BIAS, MLP) for part in family}
_MOST_NAMED = 12  # problems spelled out in one message


@dataclass(frozen=True)
class Target:
    """A tensor to write: its name, what it holds, shape and dtype."""

    name: str
    slot: Slot
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self):
        """int: bytes of the values."""
        return element_count(self.shape) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Move:
    """Consecutive values copied from a source tensor to a target: both positions count elements."""

    source: StoredTensor
    source_start: int
    target: Target
    target_start: int
    count: int


@dataclass(frozen=True)
class Group:
    """The smallest unit of work: tensors that share parts, as Q, K, V and their fused form. Moves are in order."""

    moves: tuple[Move, ...]

    @property
    def targets(self):
        """list[Target]: without repetition, in order."""
        return list(dict.fromkeys(move.target for move in self.moves))

    @property
    def sources(self):
        """list[StoredTensor]: without repetition, in order."""
        return list(dict.fromkeys(move.source for move in self.moves))


def weights_of(source):
    """Sorts a source's tensors into weights and the rest.

    Args:
        source (source.Source): the opened checkpoint.

    Returns:
        tuple[dict[Slot, StoredTensor], list[str]]: the weights, and the names that are skipped.

    Raises:
        InputError: unknown names, weights of other dtypes, or a part that is there twice.
    """
    weights, skipped, problems, holders = {}, [], [], {}
    for name, tensor in source.tensors.items():
        try:
            slot = slot_of(name)
        except InputError as error:
            problems.append(f"{tensor.file}: {error}")
            continue
        if slot is None:
            skipped.append(name)
            continue
        if tensor.dtype not in ITEM_SIZE:
            problems.append(
                f"{tensor.file}: key {name!r} has dtype {tensor.dtype}, {', '.join(ITEM_SIZE)} are "
                "understood; quantized weights cannot be converted"
            )
            continue
        for part in slot.parts:
            other = holders.setdefault((part, slot.layer), tensor)
            if other is not tensor:
                problems.append(f"{tensor.file}: key {name!r} holds what {other.name!r} in {other.file.name} holds too")
        weights[slot] = tensor
    raise_problems(source.path, problems)
    if not weights:
        raise InputError(f"{source.path}: no weights in it")
    return weights, skipped


def weights_in(tensors):
    """The model's weights among the tensors of a training checkpoint, whatever else lies there.

    Args:
        tensors (dict[str, StoredTensor]): by name, under any naming.

    Returns:
        dict[Slot, StoredTensor]
    """
    found = {}
    for name, tensor in tensors.items():
        try:
            slot = slot_of(name)
        except InputError:  # adapters, and parameters of a model that somebody extended
            continue
        if slot is not None:
            found[slot] = tensor
    return found


def check_against(sizes, weights, path):
    """Checks that every expected weight is there with its shape, and none is left over.

    Args:
        sizes (sizes.Sizes): of the model.
        weights (dict[Slot, StoredTensor]): from weights_of.
        path: the checkpoint, for messages.

    Raises:
        InputError: one message names all problems.
    """
    problems, present, missing = [], {}, {}
    expected = {
        (part, slot.layer): slot for slot in slots(sizes.num_layers, sizes.qkv_bias, True, True) for part in slot.parts
    }
    for slot, tensor in weights.items():
        present.update({(part, slot.layer): tensor for part in slot.parts})
        shape = sizes.shape(slot)
        if not all((part, slot.layer) in expected for part in slot.parts):
            problems.append(
                f"{tensor.file}: key {tensor.name!r} is left over: a model of {sizes.num_layers} layers"
                f"{'' if sizes.qkv_bias else ' without QKV biases'} has no such weight"
            )
        elif tensor.shape != shape:
            problems.append(f"{tensor.file}: key {tensor.name!r} has shape {tensor.shape}, expected {shape}")
    for (part, layer), slot in expected.items():
        if (part, layer) not in present:
            missing.setdefault(slot, []).append(part)
    for slot, parts in missing.items():
        lost = slot if len(parts) == len(slot.parts) else Slot(tuple(parts), slot.layer)
        names = dict.fromkeys(
            name_of(one, naming)
            for one in ([lost] if lost == slot else [Slot((p,), slot.layer) for p in parts])
            for naming in ("chatglm", "glm")
        )
        problems.append(f"{path}: missing: {' or '.join(map(repr, names))}")
    raise_problems(path, problems)


def raise_problems(path, problems):
    """Raises one InputError that names all problems; does nothing without any.

    Args:
        path: what the problems are in.
        problems (list[str]): a sentence each.
    """
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        more = f"\n  … and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        raise InputError(f"{path}: {len(problems)} problems:\n  " + "\n  ".join(problems[:_MOST_NAMED]) + more)


def make_targets(sizes, weights, naming, qkv_concat, mlp_concat, dtype):
    """Lists the tensors to write in the model's order.

    Args:
        sizes (sizes.Sizes), weights (dict[Slot, StoredTensor]): as checked.
        naming (str): "mindspore", "chatglm" or "glm".
        qkv_concat, mlp_concat (bool): the layout to write.
        dtype (str | None): None keeps each weight's own.

    Returns:
        list[Target]
    """
    own = {(part, slot.layer): tensor.dtype for slot, tensor in weights.items() for part in slot.parts}
    return [
        Target(name_of(slot, naming), slot, sizes.shape(slot), dtype or own[slot.parts[0], slot.layer])
        for slot in slots(sizes.num_layers, sizes.qkv_bias, qkv_concat, mlp_concat)
    ]


def make_groups(sizes, weights, targets):
    """Says which source bytes go where.

    Args:
        sizes (sizes.Sizes), weights (dict[Slot, StoredTensor]): as checked.
        targets (list[Target]): what to write.

    Returns:
        list[Group]: in the order of the source files' bytes, so that disks are read forward.
    """
    sources, places = {}, {}
    for slot, tensor in weights.items():
        sources.update(_places(sizes, slot, tensor))
    for target in targets:
        places.update(_places(sizes, target.slot, target))
    families = {}
    for key in places:
        families.setdefault((_FAMILY.get(key[0], key[0]), key[1]), []).append(key)
    groups = []
    for (family, layer), keys in families.items():
        moves: list[Move] = []
        for key in sorted(keys, key=lambda key: family.index(key[0]) if isinstance(family, tuple) else 0):
            source, source_start, count = sources[key]
            target, target_start, _ = places[key]
            last = moves[-1] if moves else None
            if last and last.source is source and last.target is target:
                moves[-1] = Move(source, last.source_start, target, last.target_start, last.count + count)
            else:
                moves.append(Move(source, source_start, target, target_start, count))
        groups.append(Group(tuple(moves)))
    return sorted(groups, key=lambda group: (group.moves[0].source.file, group.moves[0].source.segments[0][0]))


def _places(sizes, slot, tensor):
    """Where each part of a tensor lies: (part, layer) -> (tensor, first element, elements)."""
    row, start, places = element_count(tensor.shape[1:]), 0, {}
    for part in slot.parts:
        count = sizes.rows(part) * row
        places[part, slot.layer] = (tensor, start, count)
        start += count
    return places
