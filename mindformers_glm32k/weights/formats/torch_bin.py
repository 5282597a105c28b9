"""PyTorch's zip-pickle files (`torch.save` since 1.6), read without torch and without executing the pickle.

The archive holds `<prefix>/data.pkl`, a pickle that rebuilds a dictionary of tensors, and one stored (uncompressed)
record `<prefix>/data/<key>` per storage: the values are read straight from the file. Source: torch/serialization.py.
"""

import struct
import zipfile

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.dtypes import FROM_TORCH_STORAGE, ITEM_SIZE
from mindformers_glm32k.weights.formats.pickle_machine import Dictionary, Machine, View
from mindformers_glm32k.weights.tensors import StoredTensor, element_count

_MAX_PICKLE = 64 << 20  # bytes; a state dict's pickle takes about 150 per tensor
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch.save before 1.6
_WRAPPERS = ("state_dict", "module", "model")  # keys under which trainers put the state dict


def read_torch(path):
    """Lists the tensors of a `.bin`/`.pt` file in the order of its dictionary.

    Args:
        path (pathlib.Path): the file.

    Returns:
        list[StoredTensor]: storages of other dtypes keep torch's name ("LongStorage").

    Raises:
        InputError: another format, truncated, corrupt, or a pickle that wants anything but tensors.
    """
    archive = _open_archive(path)
    with archive:
        records = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise InputError(f"{path}: a zip archive with {len(pickles)} data.pkl, a PyTorch file has one")
        prefix = pickles[0][: -len("data.pkl")]
        if prefix + "byteorder" in records and _small(archive, prefix + "byteorder", path) != b"little":
            raise InputError(f"{path}: written on a big-endian machine; save it again on a little-endian one")
        state = Machine(path).run(_small(archive, pickles[0], path))
        if not isinstance(state, Dictionary):
            raise InputError(f"{path}: holds a {type(state).__name__}, a dictionary of tensors is needed")
        state = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), Dictionary)), state)
        with open(path, "rb") as handle:
            return [_stored(path, handle, records, prefix, key, value) for key, value in state.items()]


def _open_archive(path):
    with open(path, "rb") as handle:
        head = handle.read(len(_LEGACY_MAGIC))
    if head == _LEGACY_MAGIC:
        raise InputError(f"{path}: PyTorch's format of before version 1.6; load and save it once with a newer PyTorch")
    if not head.startswith(b"PK"):
        raise InputError(f"{path}: not a PyTorch file (it starts with {head[:8]!r}); download it again")
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise InputError(f"{path}: the file is cut off or corrupt ({error}); download it again") from error


def _small(archive, name, path):
    if archive.getinfo(name).file_size > _MAX_PICKLE:
        raise InputError(
            f"{path}: {name} has {archive.getinfo(name).file_size} bytes, at most {_MAX_PICKLE} are expected"
        )
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{path}: {name} is corrupt ({error}); download it again") from error


def _stored(path, handle, records, prefix, key, view):
    if not isinstance(key, str) or not isinstance(view, View):
        raise InputError(f"{path}: key {key!r} holds a {type(view).__name__}, a tensor is needed")
    name = f"{prefix}data/{view.storage.key}"
    info = records.get(name)
    if info is None:
        raise InputError(f"{path}: key {key!r}: its record {name} is missing from the archive; download it again")
    if info.compress_type != zipfile.ZIP_STORED:
        raise InputError(
            f"{path}: key {key!r}: its record {name} is compressed; torch.save never compresses: unpack "
            "and zip again with `zip -0`"
        )
    start = _data_start(path, handle, info)
    dtype = FROM_TORCH_STORAGE.get(view.storage.kind, view.storage.kind)
    item = ITEM_SIZE.get(dtype)
    if item is None:
        return StoredTensor(key, view.shape, dtype, path, ((start, info.file_size),))
    if view.storage.count * item != info.file_size:
        raise InputError(
            f"{path}: key {key!r}: {view.storage.count} values of {dtype} need "
            f"{view.storage.count * item} bytes, record {name} has {info.file_size}"
        )
    last = view.offset + sum((size - 1) * step for size, step in zip(view.shape, view.strides))
    count = element_count(view.shape)
    if count and last >= view.storage.count:
        raise InputError(
            f"{path}: key {key!r}: shape {view.shape} reaches past the {view.storage.count} values of "
            f"record {name}; the file is corrupt"
        )
    dense = count == 0 or _row_major(view)
    first, length = start + view.offset * item, (count if dense else last + 1 - view.offset) * item
    whole = dense and length == info.file_size
    return StoredTensor(
        key, view.shape, dtype, path, ((first, length),), None if dense else view.strides, info.CRC if whole else None
    )


def _row_major(view):
    step = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides)):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _data_start(path, handle, info):
    handle.seek(info.header_offset)
    head = handle.read(30)
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise InputError(
            f"{path}: record {info.filename}: no zip entry at byte {info.header_offset}; the file is corrupt"
        )
    name_length, extra_length = struct.unpack("<HH", head[26:30])
    return info.header_offset + 30 + name_length + extra_length
