"""Compiles each program of a search once: its figures are cached under a digest of all that determines them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mindformers_glm32k.compat import host_versions
from mindformers_glm32k.dryrun.analysis.extrapolate import LAYERS, overrides_for
from mindformers_glm32k.dryrun.programs import compile_and_analyze
from mindformers_glm32k.files import atomic_path
from mindformers_glm32k.parallel import ParallelLayout

_PACKAGE = Path(__file__).resolve().parents[2]
# Parts of the package that no program depends on.
_APART = ("commands", "dryrun/search", "dryrun/report", "dryrun/simulator", "longbench", "export", "tokenizer")
_SECTIONS = (
    "run_mode use_parallel micro_batch_interleave_num model parallel parallel_config recompute_config runner_config "
    "runner_wrapper optimizer lr_schedule context"
).split()


def cache_folder() -> Path:
    """Where the figures of programs are kept: mindformers_glm32k in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindformers_glm32k" / "dryrun"


@functools.cache
def _version() -> str:
    """Digest of the versions and sources that determine a program and its figures."""
    digest = hashlib.sha256(" ".join(host_versions()).encode())
    for path in sorted(_PACKAGE.rglob("*.py")):
        relative = path.relative_to(_PACKAGE).as_posix()
        if not relative.startswith(_APART):
            digest.update(relative.encode() + path.read_bytes())
    return digest.hexdigest()


class Programs:
    """Compiles programs, or reads their figures from the cache.

    Args:
        folder: files of a compile go to a hidden folder below it.
        written: the YAML's content with the search's overrides.
    """

    def __init__(self, folder: Path, written: Mapping[str, Any]):
        self.folder, self.written = folder, written
        self.compiled = 0  # number of programs, those from the cache left out

    def shallow(self, config: dict[str, Any]) -> list[list[dict]]:
        """Programs of every stage of a configuration with LAYERS[0] and LAYERS[1] layers a stage."""
        stages = ParallelLayout.from_config(config).stages
        return [self.full(config, overrides_for(count, stages)) for count in LAYERS]

    def full(self, config: dict[str, Any], overrides: list[str] = ()) -> list[dict]:
        """Entries of report.json, without lists of tensors, for every stage of `config` with `overrides`."""
        path = cache_folder() / f"{_digest(config, overrides)}.json"
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_text(encoding="utf-8"))
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".search_", dir=self.folder) as name:
            work = Path(name).resolve()
            (work / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            arguments = ["--config", str(work / "config.yaml"), *overrides]
            layout = ParallelLayout.from_config(config)
            ranks = [layout.ranks_of(stage)[0] for stage in range(layout.stages)]
            with contextlib.redirect_stderr(io.StringIO()):  # the search prints progress of its own
                programs = compile_and_analyze(ranks, layout, work / "out", arguments)
        self.compiled += len(programs)
        programs = [_without_tensors(program) for program in programs]
        with contextlib.suppress(OSError), atomic_path(path) as temporary:  # the cache may be read-only
            temporary.write_text(json.dumps(programs), encoding="utf-8")
        return programs


def _digest(config, overrides):
    """Digest of the configuration's sections that determine a program, of options and versions."""
    content = {name: config.get(name) for name in _SECTIONS}
    section = config.get("train_dataset") or {}
    content["train_dataset"] = {
        key: value for key, value in section.items() if key not in ("data_loader", "tokenizer", "num_parallel_workers")
    }
    text = json.dumps([content, list(overrides), _version()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _without_tensors(program):
    """The program without its lists of tensors, which only reports show."""
    lists = ("largest_tensors", "at_peak", "square_tensors", "large_constants", "stand_ins", "inputs")
    return {key: value for key, value in program.items() if key not in lists}
