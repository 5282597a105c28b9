"""Which files a checkpoint consists of: indices, numbered sets, hub caches, unfinished downloads, adapters; and which
config.json belongs to it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_glm32k.checks import parse_json
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.config_json import (
    PUBLISHED,
    KnownConfig,
    check_agreement,
    dims_from_config,
    load_object,
    read_config,
)
from mindformers_glm32k.weights.names import ModelDims

INDEX_SUFFIX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)$")
# In a folder the first pattern that matches wins: safetensors before .bin, whole sets before stray files.
_PATTERNS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "*.safetensors.index.json",
    "*.ckpt.index.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "*.ckpt",
)
# What download tools put beside, or in place of, an incomplete file: aria2, wget and curl scripts,
# huggingface_hub, browsers, Xunlei, netdisk clients.
_UNFINISHED = tuple(
    ".aria2 .part .incomplete .crdownload .partial .download .downloading .aria2__temp .td .xltd .tmp .!qB".split()
)
ADAPTER_CONFIG = "adapter_config.json"
HOW_TO_MERGE = "merge it into its base: glm32k convert --input_path BASE --adapter {folder} --output_path OUT.ckpt"


class Found(NamedTuple):
    """The files of a checkpoint.

    files: the weight files, in order.
    index: tensor -> file name, as the index says; None without one.
    folder: where they lie.
    notes: what was passed over, and why.
    """

    files: list[Path]
    index: dict[str, str] | None
    folder: Path
    notes: list[str]


def find_files(path: Path) -> Found:
    """Finds the files of a checkpoint: a folder (also one of a hub's cache), one weight file, or an index file.

    Raises:
        InputError: no files, shards missing or incomplete, an adapter alone, or several checkpoints to choose from.
    """
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        folder, notes = _enter_hub_cache(path)
        found = _find_in_folder(folder)
        found.notes[:0] = notes
    elif not os.path.exists(path):
        raise InputError(f"{path}: no such file or folder")
    elif path.name.endswith(INDEX_SUFFIX):
        index = _read_index(path)
        found = Found([path.parent / name for name in sorted(set(index.values()))], index, path.parent, [])
        _require_all(found.files, path)
    else:
        found = Found([path], None, path.parent, [])
        _require_whole_set(found.files)
    for file in found.files:
        _refuse_unfinished(file)
    return found


def snapshot_of(folder: Path) -> Path:
    """The snapshot inside a hub's cache, any other folder as it is; raises InputError for several snapshots."""
    return _enter_hub_cache(folder)[0]


def _enter_hub_cache(folder):
    """The snapshot inside a `models--*` folder of a hub's cache, or inside the whole cache; else the folder itself."""
    if any(next(folder.glob(pattern), None) for pattern in _PATTERNS):
        return folder, []
    models = [folder] if (folder / "snapshots").is_dir() else sorted(folder.glob("models--*"))
    models += sorted((folder / "hub").glob("models--*")) if not models else []
    snapshots = [one for model in models for one in sorted((model / "snapshots").glob("*")) if one.is_dir()]
    if not models:
        return folder, []
    if len(snapshots) > 1:
        main = [_main_of(model) for model in models]
        names = ", ".join(f"{one} (refs/main)" if one.name in main else str(one) for one in snapshots)
        raise InputError(f"{folder}: a hub's cache with {len(snapshots)} snapshots; give the one meant: {names}")
    if not snapshots:
        raise InputError(f"{folder}: a hub's cache without a snapshot in it; download the model again")
    return snapshots[0], [f"{folder}: a hub's cache; its snapshot {snapshots[0].name} is used"]


def _main_of(model):
    path = model / "refs" / "main"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _refuse_lost_links(folder):
    """A cache copied without its links holds their texts in place of the files."""
    for path in sorted(folder.glob("*")):
        if path.is_file() and path.stat().st_size < 256 and path.read_bytes().startswith(b"../../blobs/"):
            raise InputError(
                f"{path}: the text of a link into a hub's cache, not the file: the cache was copied without its "
                f"links; copy it again with `cp -a`, or download the model again and give its snapshot {folder.name}"
            )


def _find_in_folder(folder):
    _refuse_lost_links(folder)
    failure, notes = None, []
    for pattern in _PATTERNS:
        paths = [path for path in sorted(folder.glob(pattern)) if not path.name.startswith("adapter_model")]
        if not paths or (failure and pattern.endswith((".ckpt", ".ckpt.index.json"))):
            continue  # another kind of checkpoint is no stand-in for a broken download
        try:
            found = _candidate(paths, pattern, folder, bool(failure))
        except InputError as error:
            failure = failure or error
            if isinstance(error, _Unusable):
                continue
            raise
        if failure:
            notes.append(f"{str(failure).split(';')[0]}; the complete set {_names(found.files)} is used instead")
        unread = [path.name for path in sorted(folder.iterdir()) if _is_unread(path, found.files)]
        if unread:
            notes.append(f"{folder}: weight files that are not read: {', '.join(unread)}; {_names(found.files)} are")
        if (folder / ADAPTER_CONFIG).is_file():
            how = HOW_TO_MERGE.format(folder=folder)
            notes.append(f"{folder}: the PEFT adapter beside the weights is not used; {how}")
        return found._replace(notes=notes)
    if failure:
        raise InputError(str(failure))
    _refuse_adapter(folder)
    parts = sorted(path.name for path in folder.iterdir() if path.name.endswith(_UNFINISHED))
    if parts:
        raise InputError(f"{folder}: only unfinished downloads ({', '.join(parts[:5])}); finish the download")
    names = [path.name + "/" * path.is_dir() for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    below = sorted({str(path.parent) for pattern in _PATTERNS for path in folder.glob(f"*/{pattern}")})
    raise InputError(
        f"{folder}: no weight files (*.safetensors, pytorch_model*.bin, *.ckpt) in this folder, which holds "
        + (", ".join(names[:8]) + (" …" if len(names) > 8 else "") or "nothing")
        + (f"; give the folder meant: {' or '.join(below[:4])}" if below else "; other formats are not read")
    )


def _is_unread(path, files):
    """Whether a file of a folder holds weights of a whole model, and is not among those that are read."""
    kind = path.suffix in (".safetensors", ".ckpt", ".pt", ".pth") or path.match("pytorch_model*.bin")
    return kind and path.is_file() and path not in files and not path.name.startswith("adapter_model")


class _Unusable(InputError):
    """This set of files is incomplete; another one in the folder may be complete."""


def _candidate(paths, pattern, folder, instead):
    """The set of files behind one pattern; with `instead` it replaces an incomplete set and must itself be complete."""
    if not pattern.endswith(INDEX_SUFFIX):
        if instead and len(paths) > 1:
            paths = [path for path in paths if _SHARD.match(path.name)] or paths
        _require_whole_set(paths)
        if instead and not (_SHARD.match(paths[0].name) or paths[0].name == pattern):
            raise _Unusable(f"{paths[0]}: not a whole checkpoint")
        return Found(paths, None, folder, [])
    indices, failure = {}, None
    for path in paths:
        indices[path] = _read_index(path)
        try:
            _require_all([folder / name for name in sorted(set(indices[path].values()))], path)
        except _Unusable as error:
            del indices[path]
            failure = failure or error
    if len(indices) > 1:
        raise InputError(
            f"{folder}: {len(indices)} index files ({', '.join(path.name for path in indices)}): give the one meant"
        )
    if not indices:
        raise failure
    index = next(iter(indices.values()))
    return Found([folder / name for name in sorted(set(index.values()))], index, folder, [])


def _names(files):
    return files[0].name if len(files) == 1 else f"{files[0].name} … {files[-1].name}"


def _refuse_adapter(folder):
    if (folder / ADAPTER_CONFIG).is_file() or any(folder.glob("adapter_model.*")):
        raise InputError(f"{folder}: a PEFT adapter, not a whole model; {HOW_TO_MERGE.format(folder=folder)}")


def _refuse_unfinished(file):
    for suffix in _UNFINISHED:
        mark = file.with_name(file.name + suffix)
        if mark.exists():
            raise InputError(
                f"{file}: {mark.name} lies beside it: the download is not finished, the file may have holes; finish "
                f"the download, or remove {mark.name} where the file is known to be whole"
            )


def _read_index(path):
    try:
        weight_map = parse_json(path.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(file, str) and file == Path(file).name for file in weight_map.values()):
            raise ValueError("weight_map must name a file in the same folder for every key")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a usable index ({type(error).__name__}: {error}); download it again") from error
    return weight_map


def _require_all(files, index_path):
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise _Unusable(
            f"{index_path}: {len(missing)} of {len(files)} shards are missing from its folder: "
            f"{', '.join(missing)}; download them"
        )


def _require_whole_set(files):
    """Without an index the shards' own numbering tells which are missing."""
    sets = {}
    for file in files:
        match = _SHARD.match(file.name)
        if match:
            sets.setdefault((match["stem"], match["count"], match["suffix"]), set()).add(int(match["index"]))
    for (stem, count, suffix), indices in sets.items():
        missing = [
            f"{stem}-{index:05d}-of-{count}{suffix}" for index in range(1, int(count) + 1) if index not in indices
        ]
        if missing:
            raise _Unusable(
                f"{files[0].parent}: {len(missing)} of {int(count)} shards are missing: "
                f"{', '.join(missing)}; download them and give the folder"
            )
    if len(sets) > 1 or (sets and sum(map(len, sets.values())) != len(files)):
        raise InputError(
            f"{files[0].parent}: files of several checkpoints lie in one folder "
            f"({', '.join(file.name for file in files)}); give the index file of the one meant"
        )


def config_of(checkpoint: str | Path) -> KnownConfig | None:
    """A checkpoint's config, from the config.json in or beside it or from the report of the conversion, split or merge
    that made it; None without either.

    Raises:
        InputError: the config.json or report contradicts itself.
    """
    path = Path(checkpoint)
    if path.is_dir():
        path = snapshot_of(path)
        places = [*path.glob("*.report.json"), *path.glob("rank_0/*.report.json"), path / "config.json"]
    else:
        stem = re.sub(r"(-\d{5}-of-\d{5})?(\.\w+\.index\.json|\.\w+)$", "", path.name)
        places = [path.with_name(stem + ".report.json"), path.with_name("config.json")]
    for place in places:
        if place.is_file():
            content = load_object(place)
            content = content.get("huggingface_config") if place.name.endswith(".report.json") else content
            if isinstance(content, dict) and content.get("model_type") in ("chatglm", "glm"):
                return read_config(place)
    return None


def find_config(option: Any, checkpoint: Path, inferred: ModelDims) -> KnownConfig:
    """The config of a checkpoint, from the first of: the option, the files beside it (see `config_of`), the published
    model if all dimensions are equal.

    Raises:
        InputError: there is none, two contradict each other, or one contradicts the dimensions of the tensors.
    """
    beside = config_of(checkpoint)
    known = beside if option is None else read_config(option)
    if known is not None:
        wrong = dims_from_config(known.fields, known.origin).differences(inferred)
        if wrong:
            raise InputError(f"{checkpoint}: does not fit {known.origin}: {'; '.join(wrong)}")
        check_agreement(beside, known.fields, known.origin)
        return known
    if inferred == dims_from_config(PUBLISHED, "the published config.json"):
        note = f"{checkpoint}: no config.json or report beside it; that of ChatGLM3-6B-32K is taken (rope_ratio 50)"
        return KnownConfig(dict(PUBLISHED), {}, Path(checkpoint), (note,))
    raise InputError(
        f"{checkpoint}: config.json cannot be made up from the weights (they do not tell the number of "
        "heads); give --config with the original config.json or the YAML that trained the model"
    )
