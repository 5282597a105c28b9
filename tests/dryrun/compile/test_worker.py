"""Batches that a simulation reads from the configuration's data set."""

import json

from dryrun.tiny import CONFIG, OVERRIDES
from mindformers_glm32k.dryrun.compile.placeholders import vocabulary as small_vocabulary
from mindformers_glm32k.dryrun.compile.pool import read_batches


def test_packed_rows_are_those_of_the_data_set(tmp_path):
    """With as many documents as the program has places for, though it is the command line that asks for packing."""
    data = tmp_path / "data.json"
    data.write_text(
        "".join(
            json.dumps({"content": "Rows of a dry run " * (1 + number % 2), "summary": "hold text"}) + "\n"
            for number in range(40)
        ),
        encoding="utf-8",
    )
    vocabulary = small_vocabulary(tmp_path)
    values = {
        **OVERRIDES,
        "train_dataset.packing": True,
        "train_dataset.batch_size": 4,
        "model.model_config.documents_per_row": 2,
        "train_dataset.data_loader.dataset_dir": data,
        "train_dataset.tokenizer.vocab_file": vocabulary,
        "processor.tokenizer.vocab_file": vocabulary,
    }
    rows = read_batches(
        ["--config", str(CONFIG), *(word for key, value in values.items() for word in (f"--{key}", str(value)))],
        2,
        tmp_path,
    )
    assert set(rows) == {"input_ids", "labels", "input_mask", "position_ids", "document_ids"}
    assert {value.shape for value in rows.values()} == {(2, 4, 64)}
    ids, positions = rows["document_ids"], rows["position_ids"]
    assert ids.max() == 2  # two documents and padding
    starts = ids[..., 1:] != ids[..., :-1]
    assert starts.any() and not positions[..., 1:][starts].any()
