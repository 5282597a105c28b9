"""Files that take the place of data and vocabularies that are not there, so that a layout can be tried on any machine.

The program does not depend on them: rows have the length that the YAML asks for, the vocabulary has the model's size
by the YAML's padded_vocab_size. Upstream's and the plugin's data classes read them as they read the real ones.
"""

import io
import json
from pathlib import Path

ROWS = 2  # in batches: any data set has at least one batch, upstream's epoch arithmetic wants no more
TEXT = "Rows of a dry run hold no text of yours, only their length matters."
PROMPT = "a"  # the worker sets the prompts' lengths; the trainer refuses those that leave no room for the answer


def fill(config, folder, batch_rows, use_files=True):
    """Points the keys of missing files to stand-ins; those of files that are there become absolute.

    Args:
        config (MindFormerConfig): the merged configuration, changed in place.
        folder (pathlib.Path): where the stand-ins are written.
        batch_rows (int): rows of one step over all devices.
        use_files (bool): False: stand-ins for all.

    Returns:
        list[str]: one sentence for the report, or nothing.
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
        section[key] = str(make(folder, batch_rows))
    if not missing:
        return []
    return [
        "Stand-ins of the right shape take the place of files that are not there: "
        + ", ".join(sorted(set(missing)))
        + "."
    ]


def _inputs(config):
    """(section, key, maker of a stand-in) of every file that the run reads."""
    if config.run_mode in ("train", "finetune"):
        dataset = config.train_dataset
        yield dataset.get("data_loader") or {}, "dataset_dir", _data
        yield dataset.get("tokenizer") or {}, "vocab_file", _vocabulary
    yield (config.get("processor") or {}).get("tokenizer") or {}, "vocab_file", _vocabulary


def _data(folder, batch_rows):
    """AdGen's layout: one JSON object a line."""
    path = folder / "stand_in.json"
    if not path.exists():
        line = json.dumps({"content": TEXT, "summary": TEXT}) + "\n"
        path.write_text(line * (ROWS * batch_rows), encoding="utf-8")
    return path


def _vocabulary(folder, _):
    """A small SentencePiece model; the words of TEXT and all bytes."""
    path = folder / "stand_in.model"
    if not path.exists():
        from sentencepiece import SentencePieceTrainer

        model = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT]),
            model_writer=model,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        path.write_bytes(model.getvalue())
    return path
