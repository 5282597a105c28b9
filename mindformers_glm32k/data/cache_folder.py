"""Where files that can be made again are kept: line indexes and token caches."""

import hashlib
import os
from pathlib import Path

NAME = ".glm32k_cache"


def cache_folder(data_file, configured=None):
    """The folder for what is derived from a data file; it is made when it is not there.

    Args:
        data_file (str | os.PathLike): the data file.
        configured (str | os.PathLike | None): the user's choice. By default `.glm32k_cache` beside the file where
            that can be written, else `temporary/glm32k_cache` in MindFormers' output folder (LOCAL_DEFAULT_PATH,
            ./output when unset).

    Returns:
        pathlib.Path: the folder. Files of data files with the same name do not collide in it: see `cache_name`.
    """
    beside = Path(data_file).resolve().parent
    if configured:
        folder = Path(configured)
    elif os.access(beside / NAME if (beside / NAME).is_dir() else beside, os.W_OK):
        folder = beside / NAME
    else:
        folder = Path(os.environ.get("LOCAL_DEFAULT_PATH") or "output") / "temporary" / "glm32k_cache"
    folder.mkdir(parents=True, exist_ok=True)
    if folder.name == NAME and not (folder / ".gitignore").exists():
        (folder / ".gitignore").write_text("*\n", encoding="utf-8")  # nothing to commit beside the user's data
    return folder


def cache_name(data_file, *parts):
    """A name that stands for a data file and whatever else its content depends on.

    Args:
        data_file (str | os.PathLike): the data file.
        *parts (str): what else.

    Returns:
        str: the file's name and ten hex digits of a digest of its path and the parts.
    """
    path = Path(data_file).resolve()
    digest = hashlib.sha256("\0".join((str(path), *parts)).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{path.name}-{digest[:10]}"
