"""Gradient accumulation on one device: the same steps as with the larger batch."""

import csv
import json
import random

import mindspore as ms
import numpy as np
import pytest
from conftest import ROOT

from mindformers_glm32k.run_mindformer import main

TINY = ROOT / "research" / "glm32k" / "finetune_glm32k_tiny_cpu.yaml"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train_vocabulary):
    """(curve, weights) of three steps of 8 sequences with unequal numbers of labels, by micro batches accumulated."""
    folder = tmp_path_factory.mktemp("accumulation")
    draw = random.Random(0)
    lines = [{"content": "a b c", "summary": "word " * draw.choice((1, 9)) + "end"} for _ in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    vocab_file, found = train_vocabulary(), {}
    patch = pytest.MonkeyPatch()
    for parts in (1, 2, 4):
        output = folder / str(parts)
        output.mkdir()
        patch.chdir(output)
        argv = f"--config {TINY} --train_dataset_dir {folder / 'train.jsonl'} --epochs 1 --batch_size {8 // parts}"
        argv += f" --gradient_accumulation_steps {parts} --output_dir {output} --lr_schedule.warmup_steps 0"
        argv += f" --train_dataset.tokenizer.vocab_file {vocab_file} --model.model_config.seq_length 256"
        argv += f" --processor.tokenizer.vocab_file {vocab_file} --runner_wrapper.max_grad_norm 0.5"
        argv += " --callbacks.2.save_checkpoint_steps 3 --optimizer.eps 1e-3"  # AdamW makes no steps of rounding errors
        assert main(argv.split()) == 0
        with open(output / "loss_curve.csv", newline="", encoding="utf-8") as file:
            curve = list(csv.DictReader(file))
        (path,) = output.rglob("*-1_3.ckpt")
        found[parts] = curve, {name: value.asnumpy() for name, value in ms.load_checkpoint(str(path)).items()}
    patch.undo()
    return found


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_equal_the_whole_batch(runs, parts):
    (curve, weights), (whole, expected) = runs[parts], runs[1]
    assert [row["step"] for row in curve] == [row["step"] for row in whole] == ["1", "2", "3"]
    for column in ("loss", "global_norm", "learning_rate"):
        ours, theirs = ([float(row[column]) for row in rows] for rows in (curve, whole))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=column)
    assert float(whole[0]["global_norm"]) > 0.5  # the gradients are clipped, after they have been added up
    assert set(weights) == set(expected)
    for name in expected:
        if "." in name and not name.startswith("adam"):
            np.testing.assert_allclose(weights[name], expected[name], atol=1e-6, err_msg=name)
