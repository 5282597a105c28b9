"""Mutated files through the readers: an InputError of one line, or a result; no other exception, nothing that takes
long or much memory, nothing executed, nothing written outside the folder.

GLM32K_FUZZ says how many mutations each reader gets in the long run, `pytest -m fuzz -s`.
"""

import bz2
import contextlib
import copy
import gzip
import io
import json
import logging
import lzma
import os
import random
import stat
import time
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from conftest import ROOT

from mindformers_glm32k.data.longbench import PromptTemplates
from mindformers_glm32k.data.sources import SampleSource
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.generation.conversation import read_document
from mindformers_glm32k.generation.questions import QuestionFile, read_prompts
from mindformers_glm32k.longbench import samples
from mindformers_glm32k.preflight.check import DEFAULTED
from mindformers_glm32k.preflight.findings import SEVERITIES
from mindformers_glm32k.preflight.run_config import config_findings
from mindformers_glm32k.run_mindformer import _read_yaml, read_as_written
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary
from mindformers_glm32k.weights.checkpoint import open_source, read_file, read_index
from mindformers_glm32k.weights.config_json import read_config
from mindformers_glm32k.weights.formats import ckpt_frame
from mindformers_glm32k.weights.peft import merge_adapter
from mindformers_glm32k.weights.strategy import read_strategy
from tests.fuzz.guard import SPARE_BYTES, TIMES, memory_bound, watched
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
LONGBENCH = {"input": "a?", "context": "b c", "answers": ["d"], "length": 3, "dataset": "qasper", "language": "en",
    "all_classes": None, "_id": "x"}  # fmt: skip
PROMPTS = [{"prompt": "a", "_id": 1}, RECORDS[1], {"messages": RECORDS[1]["messages"][:1]},
    {"question": "a", "system": "b", "history": [["c", "d"]], "tools": [{"name": "f", "parameters": {}}]}]  # fmt: skip
ADAPTER = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["query_key_value"], "bias": "none",
    "use_rslora": False, "rank_pattern": {"dense": 4}, "alpha_pattern": {}, "fan_in_fan_out": False}  # fmt: skip
YAMLS = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("research/glm32k/*tiny*.yaml"))]
SMALL = {"run_mode": "finetune", "seed": 1, "a": {"b": {"c": 1}}, "callbacks": [{"type": "x"}, {"type": "y"}],
    "runner_config": {"epochs": 1}, "train_dataset": {"data_loader": {"dataset_dir": ""}}}  # fmt: skip
KEYS = ["seed", "a.b.c", "a.b", "a", "callbacks.1.type", "callbacks.9", "callbacks", "runner_config.epochs", "new.key",
    "epochs", "mode", "do_eval", "options", "num_samples", "train_dataset_dir", "load_checkpiont", "a..b", "", "c.0.d",
    "config", "register_path", "predict_data", "--a", "resume_training"]  # fmt: skip
VALUES = ["1", "1e-5", "True", "None", "[1, 2]", "{a: 1}", "{1: 2}", "{[1]: 2}", "[[[", "&a [*a]", "!!python/name:os.x",
    "2026-01-01", "0x1f", "\ud800", "", " ", "../../x", "a=b", "'q", "#", "{a: {b: {c: 1}}}", "-1", "--x", "é", "1_0",
    "!!binary aGk=", "? a", "<<: 1", "{<<: {a: 1}}", "a: b", "1:30", "{null: 1}", "{type: x, type: y}"]  # fmt: skip
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
    found["a.ckpt"] = b"".join(before + values for before, _ in ckpt_frame("transformer.a.weight", (2, 3), "fp32"))
    write_strategy(folder / "strategy.ckpt", {"a": ([2, 4], [0, -1], 0, 0), "b": ([2], [-1], 0, 0)})
    found["strategy.ckpt"] = (folder / "strategy.ckpt").read_bytes()
    found["tokenizer.model"] = Path(train_vocabulary()).read_bytes()
    for kind in ("parquet", "arrow", "arrow stream"):
        found[kind] = _table(kind, [RECORDS[0]] * 3)
    found["a.txt"] = "eins\nzwei\n".encode("utf-8-sig")
    return found


def _zip(draw, seeds):
    """LongBench's data.zip: sound, with strange names, or with strange entries; then some bytes changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for _ in range(draw.randint(1, 3)):
            name = draw.choice(("data/qasper.jsonl", "qasper_e.jsonl", "../up.jsonl", "/abs.jsonl", "a\\b.jsonl", "."))
            info = zipfile.ZipInfo(name)
            if draw.random() < 0.2:
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, _longbench(draw, seeds))
    return mutated(buffer.getvalue(), draw) if draw.random() < 0.6 else buffer.getvalue()


def _longbench(draw, seeds):
    sound = [json.dumps({**LONGBENCH, "_id": str(number)}).encode() for number in range(draw.randint(0, 2))]
    return b"\n".join([*sound, structured(LONGBENCH, draw)])


def _table(kind, records):
    """Parquet, or Arrow's file or stream, of the records."""
    import pyarrow
    from pyarrow import feather, parquet

    table, target = pyarrow.Table.from_pylist(records), pyarrow.BufferOutputStream()
    if kind == "parquet":
        parquet.write_table(table, target)
    elif kind == "arrow":
        feather.write_feather(table, target, compression="uncompressed")
    else:
        with pyarrow.ipc.new_stream(target, table.schema) as writer:
            writer.write_table(table)
    return target.getvalue().to_pybytes()


def _compressed(draw):
    data = json.dumps(draw.choice(RECORDS)).encode() * draw.randint(1, 40)
    kind = draw.choice(("bz2", "xz", "zstd", "lz4"))
    if kind in ("zstd", "lz4"):
        import pyarrow

        target = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(target, kind) as stream:
            stream.write(data)
        return target.getvalue().to_pybytes()
    return bz2.compress(data) if kind == "bz2" else lzma.compress(data)


def _words(draw):
    """A command line of overrides, its words between zero bytes."""
    words = []
    for _ in range(draw.randint(1, 4)):
        key, value = draw.choice(KEYS), draw.choice(VALUES)
        words += [f"--{key}={value}"] if draw.random() < 0.5 else [f"--{key}", value]
    data = "\0".join(words).encode("utf-8", "surrogatepass")
    return mutated(data, draw) if draw.random() < 0.6 else data


def _overridden(path):
    """The launcher's overrides, as `glm32k check` and run_mindformer apply them."""
    words = [word.decode("utf-8", "surrogateescape") for word in path.read_bytes().split(b"\0")]
    logging.disable()  # what pytest keeps of a log goes from process to process, which surrogates cannot
    try:
        silent = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
        with silent[0], silent[1], mock.patch.dict(os.environ):  # --register_path stays in the environment
            read_as_written(["--config", "small.yaml", *words])
    except SystemExit as end:  # argparse's own refusals, and --help
        assert end.code in (0, 2)
        if end.code:
            raise InputError("usage") from end
    finally:
        logging.disable(logging.NOTSET)


def _checked(path):
    """`glm32k check`'s findings about the keys and values of a configuration."""
    config = json.loads(path.read_bytes())
    if not isinstance(config, dict):
        return
    for mode in ("finetune", "eval", "predict"):
        for finding in config_findings(copy.deepcopy(config), mode, (), DEFAULTED):
            assert finding.severity in SEVERITIES and "\n" not in finding.line(), finding


def _index(draw, seeds):
    """model.safetensors.index.json, of files that may lie elsewhere."""
    name = draw.choice(("a.safetensors", "../a.safetensors", "/etc/passwd", "..", ".", "", "b.safetensors", "a\0b"))
    index = {"metadata": {"total_size": 24}, "weight_map": {"transformer.a.weight": name}}
    return json.dumps(index).encode() if draw.random() < 0.3 else structured(index, draw)


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
    "LongBench": ("qasper.jsonl", _longbench, lambda path: list(samples.read(samples.scan(path)))),
    "LongBench in zip": ("data.zip", _zip, lambda path: list(samples.read(samples.scan(path)))),
    **{
        f"records in {kind}": (
            f"a.{kind.split()[0]}",
            lambda draw, seeds, kind=kind: mutated(seeds[kind], draw),
            every_sample,
        )
        for kind in ("parquet", "arrow", "arrow stream")
    },
    "records in bz2, xz, zstd, lz4": ("a.jsonl.xz", lambda draw, seeds: mutated(_compressed(draw), draw), every_sample),
    "prompt records": (
        "a.jsonl",
        lambda draw, seeds: structured(draw.choice(PROMPTS), draw),
        lambda path: list(map(QuestionFile(path).__getitem__, range(len(QuestionFile(path))))),
    ),
    "overrides": ("a.words", lambda draw, seeds: _words(draw), _overridden),
    "configuration": ("a.json", lambda draw, seeds: json.dumps(strange(draw.choice(YAMLS), draw)).encode(), _checked),
    "index": ("model.safetensors.index.json", _index, lambda path: open_source(path.parent)),
    "adapter_config.json": (
        "adapter_config.json",
        lambda draw, seeds: structured(ADAPTER, draw),
        lambda path: merge_adapter(path.parent, {}, None),
    ),
    "documents": ("a.md", lambda draw, seeds: mutated(seeds["a.txt"], draw), read_document),
    "prompts": ("a.txt", lambda draw, seeds: mutated(seeds["a.txt"], draw), lambda path: read_prompts(str(path))),
}


NEVER_REFUSED = ("prompts", "documents", "configuration")


def fuzz(name, count, seeds, folder, bounded):
    """Mutations that were read and refused. `bounded`: memory is, too, in a process that does nothing else: MindSpore's
    threads, which other tests of a process leave there, end it where they get none."""
    file, make, read = READERS[name]
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    (folder / "a.safetensors").write_bytes(seeds["a.safetensors"])
    path, refused = folder / file, 0
    for seed in range(-3, count):  # the first three: whatever is imported and reserved once
        path.write_bytes(make(random.Random(seed), seeds))
        os.utime(path, (seed + 10, seed + 10))  # what was made of the last one is no cache of this one
        bound = TIMES * path.stat().st_size + SPARE_BYTES
        started = time.perf_counter()
        try:
            with watched(folder) as found, memory_bound(bound) if bounded and seed >= 0 else contextlib.nullcontext():
                read(path)
        except InputError as error:
            refused += seed >= 0
            assert "\n" not in str(error).strip(), (name, seed)
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {path.read_bytes()[:300]!r}") from error
        if seed >= 0:
            assert time.perf_counter() - started < SECONDS, (name, seed)
            assert not found, (name, seed)
    return refused


@pytest.mark.parametrize("name", READERS)
def test_a_few_mutations(name, seeds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fuzz(name, 100, seeds, tmp_path, bounded=False) > 0 or name in NEVER_REFUSED


@pytest.mark.fuzz
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", READERS)
def test_many_mutations(name, seeds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = int(os.environ.get("GLM32K_FUZZ", 15_000))
    print(f"\n{name}: {count} mutations, {fuzz(name, count, seeds, tmp_path, bounded=True)} refused")
