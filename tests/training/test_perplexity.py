"""Perplexity by tokens over all records, whatever the batch size and the number of ranks."""

import json
import math
import random

import numpy as np
import pytest
from conftest import ROOT
from mindformers.core.metric.metric import PerplexityMetric
from mindspore import Tensor

from mindformers_glm32k.data.loader import EpochSampler
from mindformers_glm32k.run_mindformer import main
from mindformers_glm32k.training.perplexity import TokenPerplexity, weigh_by_tokens

TINY = ROOT / "research" / "glm32k" / "finetune_glm32k_tiny_cpu.yaml"


@pytest.fixture
def records(tmp_path):
    """12 records with answers of unequal lengths."""
    draw = random.Random(5)
    lines = [{"content": "a b c", "summary": " ".join("word" for _ in range(draw.choice((1, 9))))} for _ in range(12)]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_every_batch_size_gives_the_same_over_all_records(records, small_vocab_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    original = TokenPerplexity.eval
    monkeypatch.setattr(
        TokenPerplexity, "eval", lambda self: found.append((self.num_data, original(self))) or found[-1][1]
    )
    for batch in (1, 2, 5, 8, 12):
        argv = f"--config {TINY} --run_mode eval --random_weights True --eval_dataset_dir {records}".split()
        argv += f"--processor.tokenizer.vocab_file {small_vocab_file} --model.model_config.num_layers 1".split()
        argv += f"--eval_dataset.tokenizer.vocab_file {small_vocab_file} --batch_size {batch}".split()
        assert main(argv) == 0
    tokens, values = zip(*found)
    assert len(set(tokens)) == 1 and tokens[0] > 12 * 2
    for value in values:
        assert value["PPL"] == pytest.approx(values[0]["PPL"], rel=1e-5)
        assert value["PPL"] == pytest.approx(math.exp(value["loss"]))


def test_tokens_weigh_equally_where_upstream_weighs_batches():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(2, 6, 9)).astype(np.float32)
    labels = draw.integers(0, 9, (2, 6)).astype(np.int32)
    weights = np.zeros((2, 6), np.float32)
    weights[0, 1:] = 1
    weights[1, 5] = 1
    shifted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = [-shifted[i, j - 1, labels[i, j]] for i in range(2) for j in range(1, 6) if weights[i, j]]
    values = []
    for metric in (weigh_by_tokens({"a": PerplexityMetric()})["a"], PerplexityMetric()):
        metric.clear()
        for i in range(2):
            metric.update(*(Tensor(array[i : i + 1]) for array in (logits, labels, weights)))
        values.append(metric.eval()["loss"])
    assert values[0] == pytest.approx(np.mean(losses), rel=1e-5)
    assert abs(values[1] - np.mean(losses)) > 1e-3  # upstream's mean of means, as a control


def test_a_set_without_labels_has_no_perplexity():
    metric = TokenPerplexity()
    metric.clear()
    assert math.isnan(metric.eval()["PPL"])


@pytest.mark.parametrize("size, ranks", [(11, 4), (8, 3), (5, 2)])
def test_ranks_share_all_records_of_an_evaluation(size, ranks):
    samplers = [EpochSampler(size, False, num_shards=ranks, shard_id=rank) for rank in range(ranks)]
    for sampler in samplers:
        sampler.keep_all()
    drawn = [list(sampler) for sampler in samplers]
    assert sorted(sum(drawn, [])) == list(range(size))
    assert [len(indices) for indices in drawn] == [sampler.num_samples for sampler in samplers]
