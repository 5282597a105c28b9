"""Mutated files through the readers: an InputError, or a result; no other exception, and no reader that takes long.

GLM32K_FUZZ says how many mutations each reader gets in the long run, `pytest -m fuzz -s`.
"""

import gzip
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from mindformers_glm32k.data.prompts import PromptTemplates
from mindformers_glm32k.data.sources import SampleSource
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.generation.questions import read_prompts
from mindformers_glm32k.run_mindformer import _read_yaml
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary
from mindformers_glm32k.weights.checkpoint import read_file, read_index
from mindformers_glm32k.weights.config_json import read_config
from mindformers_glm32k.weights.formats.ckpt import frame
from mindformers_glm32k.weights.strategy import read_strategy
from tests.weights.strategy_files import write_strategy
from tests.weights.synthetic import write_safetensors, write_torch

RECORDS = [
    {"content": "a b", "summary": "c"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"query": "a", "response": "b", "history": []},
    {"text": "a b c"},
]
CONFIG = {"model_type": "chatglm",
    "num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16, "kv_channels": 4, "num_attention_heads": 2,
    "multi_query_attention": True, "multi_query_group_num": 1, "padded_vocab_size": 32, "seq_length": 64,
    "rope_ratio": 50, "layernorm_epsilon": 1e-5, "add_qkv_bias": True, "torch_dtype": "float16",
}  # fmt: skip
STRANGE = [None, True, 0, -1, 1 << 70, 1e308, float("nan"), "", "\ud800", "../../x", [], {}, [[]], {"a": {"a": [None]}}]
SECONDS = 10


def mutated(data, draw):
    """Bytes with some bits flipped, cut out, repeated, overwritten or taken from elsewhere."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(data) or 1), draw.choice((1, 1, 4, 8, 64))
        kind = draw.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length]
        elif kind == 3:
            data[at : at + length] = draw.choice((b"\xff", b"\0", b"\x80", b"[", b"9")) * length
        elif kind == 4:
            del data[at:]
        else:
            start = draw.randrange(len(data) or 1)
            data[at : at + length] = data[start : start + length]
    return bytes(data)


def strange(value, draw):
    """JSON with one value of another type or size, or one key gone."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.8:
        value = type(value)(value)
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if draw.random() < 0.15:
            del value[key]
        else:
            value[key] = strange(value[key], draw)
        return value
    return draw.choice(STRANGE)


def structured(value, draw):
    text = json.dumps(strange(value, draw)).encode()
    return mutated(text, draw) if draw.random() < 0.2 else text


def every_sample(path):
    source = SampleSource(path)
    for index in range(len(source)):
        source[index]


def _lines(draw):
    record = draw.choice(RECORDS)  # one layout a file; the rest of the records sound, so that many files are read
    sound = [json.dumps(record).encode()] * draw.randint(0, 2)
    return b"\n".join([*sound, structured(record, draw)])


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, train_vocabulary):
    """{file's name: its sound bytes}."""
    folder = tmp_path_factory.mktemp("seeds")
    tensors, found = {"transformer.a.weight": np.ones((2, 3), np.float32)}, {}
    for name, write in (("a.safetensors", write_safetensors), ("a.bin", write_torch)):
        write(folder / name, tensors)
        found[name] = (folder / name).read_bytes()
    values = tensors["transformer.a.weight"].tobytes()
    found["a.ckpt"] = b"".join(before + values for before, _ in frame("transformer.a.weight", (2, 3), "fp32"))
    write_strategy(folder / "strategy.ckpt", {"a": ([2, 4], [0, -1], 0, 0), "b": ([2], [-1], 0, 0)})
    found["strategy.ckpt"] = (folder / "strategy.ckpt").read_bytes()
    found["tokenizer.model"] = Path(train_vocabulary()).read_bytes()
    found["a.txt"] = "eins\nzwei\n".encode("utf-8-sig")
    return found


READERS = {
    "records": ("a.jsonl", lambda draw, seeds: _lines(draw), every_sample),
    "records as an array": ("a.json", lambda draw, seeds: structured([draw.choice(RECORDS)] * 2, draw), every_sample),
    "records in gzip": (
        "a.jsonl.gz",
        lambda draw, seeds: mutated(gzip.compress(json.dumps(draw.choice(RECORDS)).encode()), draw),
        every_sample,
    ),
    "config.json": ("config.json", lambda draw, seeds: structured(CONFIG, draw), read_config),
    "yaml": (
        "a.yaml",
        lambda draw, seeds: mutated(yaml.safe_dump({"a": [CONFIG, {"b": "c"}]}).encode(), draw),
        lambda path: _read_yaml(str(path)),
    ),
    "safetensors": ("a.safetensors", lambda draw, seeds: mutated(seeds["a.safetensors"], draw), read_index),
    "MindSpore checkpoint": ("a.ckpt", lambda draw, seeds: mutated(seeds["a.ckpt"], draw), read_index),
    "dataset2prompt.json": (
        "dataset2prompt.json",
        lambda draw, seeds: structured({"qasper": "a {context} b {input}", "b": "{context}"}, draw),
        PromptTemplates,
    ),
    "tokenizer.model": ("tokenizer.model", lambda draw, seeds: mutated(seeds["tokenizer.model"], draw), Vocabulary),
    "strategy": ("strategy.ckpt", lambda draw, seeds: mutated(seeds["strategy.ckpt"], draw), read_strategy),
    "torch": ("a.bin", lambda draw, seeds: mutated(seeds["a.bin"], draw), read_file),
    "prompts": ("a.txt", lambda draw, seeds: mutated(seeds["a.txt"], draw), lambda path: read_prompts(str(path))),
}


def fuzz(name, count, seeds, folder):
    """Mutations that were read and refused."""
    file, make, read = READERS[name]
    path, refused = folder / file, 0
    for seed in range(count):
        path.write_bytes(make(random.Random(seed), seeds))
        started = time.perf_counter()
        try:
            read(path)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error).strip(), (name, seed)
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {path.read_bytes()[:300]!r}") from error
        assert time.perf_counter() - started < SECONDS, (name, seed)
    return refused


@pytest.mark.parametrize("name", READERS)
def test_a_few_mutations(name, seeds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fuzz(name, 100, seeds, tmp_path) > 0 or name == "prompts"


@pytest.mark.fuzz
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", READERS)
def test_many_mutations(name, seeds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = int(os.environ.get("GLM32K_FUZZ", 15_000))
    print(f"\n{name}: {count} mutations, {fuzz(name, count, seeds, tmp_path)} refused")
