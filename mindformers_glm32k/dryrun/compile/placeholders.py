"""Placeholders for missing data and vocabulary files, so that a layout can be tried on any machine.

The program does not depend on their content: seq_length and padded_vocab_size come from the YAML. Upstream's and the
plugin's data classes read placeholders like real files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

BATCHES = 2  # enough for every data set class to yield one batch; upstream's epoch arithmetic needs no more
TEXT = "Samples of a dry run hold no text of yours, only their length matters."
_PIECES = 300
PROMPT = "a"  # short: the trainer refuses prompts that leave no room for the answer; the worker sets the real lengths


def fill(config: dict, folder: Path, batch_size: int, use_files: bool = True) -> list[str]:
    """Points the keys of missing files to placeholders; paths of existing files become absolute.

    Args:
        config: the merged configuration (MindFormerConfig), changed in place.
        folder: where the placeholders are written.
        batch_size: sequences of one step over all devices.
        use_files: False: placeholders even for existing files.

    Returns:
        One sentence for the report, or an empty list.
    """
    missing = []
    if config.run_mode.startswith("predict") and not config.input_data:
        config.input_data = PROMPT
    for section, key, make in _inputs(config):
        given = section.get(key)
        if not isinstance(given, str):
            continue
        if use_files and given and Path(given).exists():
            section[key] = str(Path(given).resolve())
            continue
        missing.append(f"{key} {given!r}")
        section[key] = str(make(folder, batch_size))
    names = ", ".join(sorted(set(missing)))
    return [f"Placeholders of the right shape take the place of files that are not there: {names}."] if missing else []


def _inputs(config) -> Iterator[tuple[dict, str, Callable[[Path, int], Path]]]:
    """(section, key, maker of a placeholder) of every file that the run reads."""
    if config.run_mode in ("train", "finetune"):
        dataset = config.train_dataset
        yield dataset.get("data_loader") or {}, "dataset_dir", _data
        yield dataset.get("tokenizer") or {}, "vocab_file", vocabulary
    yield (config.get("processor") or {}).get("tokenizer") or {}, "vocab_file", vocabulary


def _data(folder, batch_size):
    """AdGen's format: one JSON object a line."""
    path = folder / "placeholder.json"
    if not path.exists():
        line = json.dumps({"content": TEXT, "summary": TEXT}) + "\n"
        path.write_text(line * (BATCHES * batch_size), encoding="utf-8")
    return path


def vocabulary(folder: Path, _: int = 0) -> Path:
    """Writes a small SentencePiece model: pieces of TEXT and all bytes."""
    path = folder / "placeholder.model"
    if not path.exists():
        from mindformers_glm32k.data.synthetic import train_vocabulary

        train_vocabulary([TEXT], path, _PIECES)
    return path
