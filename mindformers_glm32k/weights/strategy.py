"""Which part of a parameter a rank holds: MindSpore's strategy files, read without MindSpore.

A strategy file belongs to one pipeline stage and gives each of its parameters a layout (see parameter_layout.py).
Schema: mindspore/train/node_strategy_pb2.py, a protobuf.
"""

from math import prod
from pathlib import Path

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import require_file
from mindformers_glm32k.weights.parameter_layout import ParameterLayout, slice_of
from mindformers_glm32k.weights.parameters import STATE_PREFIXES

__all__ = ["ParameterLayout", "add_frozen", "read_file", "read_stages", "read_strategy", "slice_of", "write_stage"]

_HINT = "`glm32k strategy` writes the files of all ranks; a run writes its own to output/strategy"
_PATTERN = "*ckpt_strategy*.ckpt"


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
    files = _files(Path(path))
    stages, known, origin = {}, set(), {}
    for file in files:
        content = file.read_bytes() if file.is_file() else b""
        if content and content in known:
            continue  # ranks of a stage have equal files
        known.add(content)
        for stage, layouts in read_file(file).items():
            if stage in stages and stages[stage] != layouts:
                raise InputError(
                    f"{file}: gives stage {stage} other layouts than {origin[stage].name} does; the files "
                    "are of different runs: write the strategy into an empty folder"
                )
            stages[stage], origin[stage] = layouts, file
    missing = sorted(set(range(max(stages) + 1)) - set(stages))
    if missing:
        raise InputError(
            f"{path}: the strategy of pipeline stage {missing[0]} is missing ({len(stages)} of "
            f"{max(stages) + 1} stages are there); {_HINT}"
        )
    return [stages[stage] for stage in range(len(stages))]


def _files(path):
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob(_PATTERN) if not file.name.startswith("merged_"))
    files = files or sorted(path.glob(_PATTERN))
    if not files:
        raise InputError(f"{path}: no strategy files ({_PATTERN}) in this folder; {_HINT}")
    return files


def write_stage(source, stage, target):
    """Writes one stage's part of a strategy as a file of its own, the layouts as they stand there.

    MindSpore takes such a file for a run without a pipeline, whose ranks count from 0.

    Args:
        source (str | os.PathLike): as for `read_stages`, which has read it.
        stage (int): which.
        target (pathlib.Path): the file to write.
    """
    path = next(path for path in _files(Path(source)) if path.stat().st_size and stage in read_file(path))
    out = b""
    for number, value in _fields(path.read_bytes()):
        if number == 2 and _stage_of(value) != stage:
            continue
        if number == 3:
            item = dict(_fields(value))
            prefix, found, plain = item[1].partition(b"-")
            if found and prefix.isdigit():
                if int(prefix) != stage:
                    continue
                value = _bytes_field(1, plain) + _bytes_field(2, item[2])
        out += _bytes_field(number, value) if isinstance(value, bytes) else bytes([number << 3, value])
    target.write_bytes(out)


def add_frozen(strategy, trained):
    """Completes the strategy file of a run with frozen weights, which MindSpore leaves out of it though it cuts them.

    Args:
        strategy (bytes): the file of a stage, as MindSpore writes it for a LoRA run: adapters and their states.
        trained (bytes): that of the same run without adapters, where all weights are trained; they are cut alike.

    Returns:
        bytes: the first file with the layouts of the weights that only the second one has.
    """
    known = {dict(_fields(value))[1] for number, value in _fields(strategy) if number == 3}
    for number, value in _fields(trained):
        if number == 3:
            name = dict(_fields(value))[1]
            if name not in known and not name.decode("utf-8").startswith(STATE_PREFIXES):
                strategy += _bytes_field(3, value)
    return strategy


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
                stage = _stage_of(value)
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


def _stage_of(strategy_item):
    return dict(_fields(dict(_fields(strategy_item))[2]))[1]


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
            value, position = data[position : position + length], position + length
            if len(value) != length:
                raise ValueError("the file ends early")
        else:
            raise ValueError(f"wire type {key & 7}")
        yield key >> 3, value


def _bytes_field(number, content):
    length, size = bytearray(), len(content)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2]) + bytes(length) + bytes([size]) + content


def _varint(data, position):
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        shift, position = shift + 7, position + 1
        if byte < 0x80:
            return value, position
