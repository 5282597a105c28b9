"""A whole checkpoint cut for all ranks: by MindSpore, compared with our own cut, all or nothing."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from dryrun.tiny import ROOT, run_command

from mindformers_glm32k import files
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights import merge, reshard, split
from mindformers_glm32k.weights.strategy import read_stages
from weights.parallel import CASES, TINY_DIMS, read_weights, whole_tensors, write_checkpoint, write_layout
from weights.synthetic import TINY, chatglm_shapes, random_values, write_folder

WEIGHT = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"


@pytest.mark.rehearsal
@pytest.mark.parametrize("name", CASES)
def test_compiled_layouts(name, compiled_split, tmp_path):
    folder, whole, result = compiled_split(name)
    from mindformers.utils.load_checkpoint_utils import get_last_checkpoint

    case = CASES[name]
    assert "all equal" in result.stdout
    files = [folder / f"rank_{rank}" / f"checkpoint_{rank}.ckpt" for rank in range(case.world)]
    assert sorted(folder.glob("rank_*/*")) == sorted(files)
    assert [get_last_checkpoint(str(file.parent)) for file in files] == list(map(str, files))  # what a run loads

    # upstream's own command, with all tensors at once, gives the same
    (tmp_path / "whole" / "rank_0").mkdir(parents=True)
    (tmp_path / "whole" / "rank_0" / "whole.ckpt").write_bytes(whole.read_bytes())
    upstream = subprocess.run(
        [
            sys.executable,
            "-m",
            "mindformers.tools.transform_ckpt",
            "--dst_ckpt_strategy",
            folder / "strategy",
            "--src_ckpt_dir",
            tmp_path / "whole",
            "--dst_ckpt_dir",
            tmp_path / "upstream",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert upstream.returncode == 0, upstream.stderr[-2000:]
    (folder / "strategy" / "merged_ckpt_strategy.ckpt").unlink()  # left behind by the command
    cut = 0
    for rank, file in enumerate(files):
        found = read_weights(file)
        expected = read_weights(tmp_path / "upstream" / f"rank_{rank}" / file.name)
        assert set(found) == set(expected)
        for key, values in found.items():
            np.testing.assert_array_equal(values, expected[key], key)
        cut += sum(values.nbytes for values in found.values())
    assert cut < 1.1 * sum(values.nbytes for values in read_weights(whole).values()) * case.world / case.stages

    report = merge(folder, tmp_path / "again.ckpt", folder / "strategy", optimizer_states=True)
    assert (tmp_path / "again.ckpt").read_bytes() == whole.read_bytes()
    assert report["ranks"] == case.world and report["stages"] == case.stages


@pytest.fixture
def strategy(tmp_path):
    return write_layout(tmp_path / "strategy", "mp2pp2")


def parts(folder, world=4):
    return [read_weights(folder / f"rank_{rank}" / f"checkpoint_{rank}.ckpt") for rank in range(world)]


def is_cut_of(folder, strategy, whole):
    """Whether all ranks hold their parts of `whole`, and nothing else."""
    stages = read_stages(strategy)
    for rank, found in enumerate(parts(folder)):
        layouts = {name: layout for name, layout in stages[rank // 2].items() if name in whole}
        assert set(found) == set(layouts)
        for name, layout in layouts.items():
            np.testing.assert_array_equal(found[name], layout.shard_of(whole[name], rank % 2), name)


@pytest.mark.parametrize("dtype, suffix", [("fp32", ".ckpt"), ("fp16", ".safetensors")])
def test_weights_alone(strategy, dtype, suffix, tmp_path):
    tensors = whole_tensors(dtype=dtype, states=False)
    report = split(write_checkpoint(tmp_path / f"whole{suffix}", tensors), tmp_path / "parts", strategy)
    is_cut_of(tmp_path / "parts", strategy, {name: values for name, (values, _) in tensors.items()})
    assert report == json.loads((tmp_path / "parts" / "split.report.json").read_text())
    assert not report["optimizer_states"] and report["parameters"] == len(tensors)


@pytest.mark.usefixtures("in_process")
def test_one_tensor_at_a_time_gives_the_same(strategy, tmp_path, monkeypatch):
    monkeypatch.setattr(reshard, "CHUNK_BYTES", 1)
    tensors = whole_tensors(states=False)
    split(write_checkpoint(tmp_path / "whole.ckpt", tensors), tmp_path / "parts", strategy, TINY_DIMS)
    is_cut_of(tmp_path / "parts", strategy, {name: values for name, (values, _) in tensors.items()})


@pytest.mark.usefixtures("in_process")
def test_hugging_face_folder(strategy, tmp_path):
    config = {**TINY, "num_layers": 2}
    values = random_values(chatglm_shapes(config), "fp16")
    write_folder(tmp_path / "hf", config, values, "bin")
    split(tmp_path / "hf", tmp_path / "parts", strategy)
    values["transformer.embedding.embedding_weight"] = values.pop("transformer.embedding.word_embeddings.weight")
    del values["transformer.rotary_pos_emb.inv_freq"]
    is_cut_of(tmp_path / "parts", strategy, values)


@pytest.mark.usefixtures("in_process")
def test_base_of_a_lora_run(tmp_path):
    strategy = write_layout(tmp_path / "strategy", "mp2", adapters=True)
    tensors = whole_tensors(states=False)
    split(write_checkpoint(tmp_path / "whole.ckpt", tensors), tmp_path / "parts", strategy)
    assert all(set(found) == set(tensors) for found in parts(tmp_path / "parts", 2))


def damaged(tensors, damage):
    values, dtype = tensors.pop(WEIGHT)
    if damage == "extra":
        tensors[WEIGHT] = values, dtype
        tensors[WEIGHT.replace("layers.1", "layers.2")] = values, dtype
    elif damage == "misshapen":
        tensors[WEIGHT] = values[:, :-2].copy(), dtype
    elif damage == "another dtype":
        tensors[WEIGHT] = values.astype(np.int32), "Int32"
    elif damage == "state":
        tensors[WEIGHT] = values, dtype
        del tensors["adam_v." + WEIGHT]
    return tensors


@pytest.mark.parametrize(
    "damage, words",
    [
        ("missing", [f"missing: '{WEIGHT}'"]),
        ("state", [f"missing: 'adam_v.{WEIGHT}'"]),
        ("extra", ["layers.2.mlp.dense_4h_to_h.weight' is left over", "whole.ckpt"]),
        ("misshapen", [f"'{WEIGHT}' has shape (64, 158), expected (64, 160)"]),
        ("another dtype", [f"'{WEIGHT}' has dtype Int32"]),
    ],
)
def test_damaged_checkpoints(strategy, damage, words, tmp_path):
    whole = write_checkpoint(tmp_path / "whole.ckpt", damaged(whole_tensors(), damage))
    refused(tmp_path, words, whole, strategy, TINY_DIMS)


def refused(tmp_path, words, *arguments):
    before = set(tmp_path.iterdir())
    with pytest.raises(InputError) as error:
        split(arguments[0], tmp_path / "parts", *arguments[1:])
    assert all(word in str(error.value) for word in words), error.value
    assert set(tmp_path.iterdir()) == before


def test_truncated_checkpoint(strategy, tmp_path):
    whole = write_checkpoint(tmp_path / "whole.ckpt", whole_tensors())
    whole.write_bytes(whole.read_bytes()[:-1000])
    refused(tmp_path, ["whole.ckpt"], whole, strategy)


def test_strategy_of_another_model(strategy, tmp_path):
    whole = write_checkpoint(tmp_path / "whole.ckpt", whole_tensors(CASES["dp2pp4"].sizes))
    refused(tmp_path, ["layers.2", "left over", "different models"], whole, strategy)


def test_full_disk(strategy, tmp_path, monkeypatch):
    whole = write_checkpoint(tmp_path / "whole.ckpt", whole_tensors())
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    refused(tmp_path, ["are needed", "1,000 are free"], whole, strategy)


@pytest.mark.usefixtures("in_process")
def test_a_wrong_cut_is_found(strategy, tmp_path, monkeypatch):
    """The control of the comparison: parts dealt to the wrong ranks."""
    right = reshard.split_chunk

    def swapped(*arguments):
        found = right(*arguments)
        return {0: found[1], 1: found[0]}

    monkeypatch.setattr(reshard, "split_chunk", swapped)
    whole = write_checkpoint(tmp_path / "whole.ckpt", whole_tensors())
    refused(tmp_path, ["rank_0", "other values than its shard"], whole, strategy)


def test_an_output_that_exists_is_left_alone(strategy, tmp_path):
    whole = write_checkpoint(tmp_path / "whole.ckpt", whole_tensors())
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "notes.txt").write_text("mine")
    refused(tmp_path, ["parts: exists already"], whole, strategy)


def test_one_npu_has_nothing_to_cut(tmp_path):
    whole = write_checkpoint(tmp_path / "whole.ckpt", whole_tensors(states=False))
    result = run_command(
        "split", "--load_checkpoint", str(whole), "--output", str(tmp_path / "parts"), use_parallel=False
    )
    assert result.returncode == 2 and "nothing to shard" in result.stderr and "use_parallel" in result.stderr
    assert not (tmp_path / "parts").exists()


KILLED = """
import sys
sys.path[:0] = [{root!r}]
import time
from mindformers_glm32k.weights import reshard
from mindformers_glm32k.weights import split
reshard.CHUNK_BYTES = 1
cut = reshard.split_chunk
def slow(*arguments):
    print("cutting", flush=True)
    time.sleep(0.2)
    return cut(*arguments)
reshard.split_chunk = slow
split({whole!r}, {output!r}, {strategy!r})
"""


def test_kill_leaves_nothing_under_the_final_name(strategy, tmp_path):
    whole = write_checkpoint(tmp_path / "whole.ckpt", whole_tensors(states=False))
    program = KILLED.format(root=str(ROOT), whole=str(whole), output=str(tmp_path / "parts"), strategy=str(strategy))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=tmp_path) as process:
        for _ in range(5):
            assert b"cutting" in process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "parts").exists()
    split(whole, tmp_path / "parts", strategy)
    is_cut_of(tmp_path / "parts", strategy, read_weights(whole))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
