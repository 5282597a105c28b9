"""LoRA adapters merged into the weights that they were trained on, or kept apart."""

import json
import subprocess
import sys

import numpy as np
import pytest
from dryrun.tiny import run_command
from mindspore import merge_pipeline_strategys, transform_checkpoints

from mindformers_glm32k import cli
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights import convert, merge
from mindformers_glm32k.weights.peft import add_product
from mindformers_glm32k.weights.strategy import read_strategy
from mindformers_glm32k.weights.tensors import cast
from weights.parallel import CASES, read_all, read_weights, whole_tensors, write_checkpoint, write_layout

pytestmark = pytest.mark.usefixtures("in_process")
NAME = "glm32k_rank_{}-1_20.ckpt"
QKV = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
A, B = (QKV.replace("weight", f"mindpet_delta_lora_{side}") for side in "ab")


@pytest.fixture
def tensors():
    return whole_tensors(adapters=True)


def save_ranks(folder, tensors, strategy, keep=lambda name: True):
    """Writes what two ranks of a run save: counters whole, the rest cut."""
    layouts = read_strategy(strategy / "ckpt_strategy_rank_0.ckpt")
    for rank in range(2):
        write_checkpoint(
            folder / f"rank_{rank}" / NAME.format(rank),
            {
                name: (layouts[name].shard_of(values, rank) if name in layouts else values, dtype)
                for name, (values, dtype) in tensors.items()
                if keep(name)
            },
        )
    return folder


@pytest.fixture
def strategy(tmp_path):
    return write_layout(tmp_path / "strategy", "mp2", adapters=True)


@pytest.fixture
def run(tmp_path, tensors, strategy):
    return save_ranks(tmp_path / "checkpoint", tensors, strategy)


def merged(tensors, scale):
    """The weights that the adapters make, in double precision."""
    weights = {
        name: values.astype(np.float64)
        for name, (values, _) in tensors.items()
        if name.startswith("transformer") and "lora" not in name
    }
    for name, (values, _) in tensors.items():
        if name.endswith("lora_a") and name.startswith("transformer"):
            other = tensors[name.replace("lora_a", "lora_b")][0].astype(np.float64)
            weights[name.replace("mindpet_delta_lora_a", "weight")] += scale * other @ values.astype(np.float64)
    return weights


def assert_close(path, expected):
    found = read_weights(path)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5, err_msg=name)


def test_adapters_as_a_peft_folder(run, tensors, strategy, tmp_path):
    """Merged into the base again they give what merging the run gives."""
    report = merge(run, None, strategy, lora_scaling=0.5, adapters_only=tmp_path / "peft", adapters_format="peft")
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert report["outputs"] == [str(tmp_path / "peft")] and (tmp_path / "peft.report.json").is_file()
    weights = {name: value for name, value in tensors.items() if name.startswith("trans") and "lora" not in name}
    base = write_checkpoint(tmp_path / "base.ckpt", weights)
    convert(base, tmp_path / "out.ckpt", adapter=tmp_path / "peft")
    assert_close(tmp_path / "out.ckpt", merged(tensors, 0.5))
    with pytest.raises(InputError, match="peft: exists already"):
        merge(run, None, strategy, lora_scaling=0.5, adapters_only=tmp_path / "peft", adapters_format="peft")
    with pytest.raises(InputError, match="adapters for PEFT need alpha / rank"):
        merge(run, None, strategy, adapters_only=tmp_path / "other", adapters_format="peft")
    both = merge(
        run,
        tmp_path / "whole.ckpt",
        strategy,
        lora=True,
        lora_scaling=0.5,
        adapters_only=tmp_path / "p2",
        adapters_format="peft",
    )
    assert both["outputs"] == [str(tmp_path / "p2"), str(tmp_path / "whole.ckpt")]
    assert_close(tmp_path / "whole.ckpt", merged(tensors, 0.5))


def test_merged_into_the_weights(run, tensors, strategy, tmp_path):
    merge(
        run,
        tmp_path / "out.ckpt",
        strategy,
        lora=True,
        lora_scaling=2.0,
        adapters_only=tmp_path / "apart" / "lora.safetensors",
    )
    assert_close(tmp_path / "out.ckpt", merged(tensors, 2.0))
    found = read_weights(tmp_path / "apart" / "lora.safetensors")
    assert set(found) == {name for name in tensors if "lora" in name and name.startswith("transformer")}
    assert all((found[name] == tensors[name][0]).all() for name in found)
    frozen = [name for name in read_weights(tmp_path / "out.ckpt") if "query_key_value.weight" not in name]
    assert frozen and all((read_weights(tmp_path / "out.ckpt")[name] == tensors[name][0]).all() for name in frozen)
    assert (tmp_path / "apart" / "lora.report.json").is_file()


def test_kept_beside_the_weights(run, tensors, strategy, tmp_path):
    report = merge(run, tmp_path / "out.ckpt", strategy, optimizer_states=True)
    assert "4 LoRA matrices are kept beside the weights" in report["remarks"][0]
    found = read_weights(tmp_path / "out.ckpt")
    assert set(found) == {name for name, (values, _) in tensors.items() if values.shape}
    assert all((found[name] == tensors[name][0]).all() for name in found)


def test_equal_to_upstreams_tool(tensors, tmp_path):
    """transform_ckpt_lora, on the file of one process."""
    for dtype in ("fp32", "fp16"):
        stored = whole_tensors(dtype=dtype, adapters=True)
        folder = tmp_path / dtype
        file = write_checkpoint(folder / "checkpoint" / "rank_0" / NAME.format(0), stored)
        merge(folder / "checkpoint", folder / "ours.ckpt", lora=True, lora_scaling=2.0)
        (folder / "upstream").mkdir()
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "mindformers.tools.transform_ckpt_lora",
                "--src_ckpt_path_or_dir",
                file,
                "--dst_ckpt_dir",
                folder / "upstream",
                "--lora_scaling",
                "2.0",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        ours, upstream = read_weights(folder / "ours.ckpt"), read_weights(folder / "upstream" / "merged_lora.ckpt")
        for name, values in ours.items():
            # upstream multiplies fp16 matrices in fp16
            np.testing.assert_allclose(
                values,
                upstream[name],
                **({"rtol": 1e-6, "atol": 1e-5} if dtype == "fp32" else {"rtol": 1e-2, "atol": 5e-2}),
                err_msg=name,
            )


def test_adapters_alone_and_their_base(tensors, strategy, tmp_path):
    """What save_trainable_params writes."""
    run = save_ranks(tmp_path / "trainable", tensors, strategy, lambda name: "lora" in name and "adam" not in name)
    with pytest.raises(InputError, match="holds adapters only: add the whole base"):
        merge(run, tmp_path / "out.ckpt", strategy)
    base = write_checkpoint(
        tmp_path / "base.safetensors", {name: tensor for name, tensor in tensors.items() if "lora" not in name}
    )
    merge(run, tmp_path / "out.ckpt", strategy, lora=True, lora_scaling=0.5, base=base)
    assert_close(tmp_path / "out.ckpt", merged(tensors, 0.5))
    merge(run, adapters_only=tmp_path / "lora.ckpt", strategy=strategy)
    assert set(read_weights(tmp_path / "lora.ckpt")) == {
        name for name in tensors if "lora" in name and "adam" not in name
    }


def test_strategy_without_the_frozen_weights(run, tensors, tmp_path):
    """As MindSpore writes it, though it cuts them: nothing says how, and rank 0's part is not the whole."""
    strategy = write_layout(tmp_path / "real", "mp2", adapters=True, frozen=False)
    with pytest.raises(InputError, match="leave frozen weights out: give --config of the LoRA run"):
        merge(run, tmp_path / "out.ckpt", strategy, lora=True, lora_scaling=2.0)
    assert not (tmp_path / "out.ckpt").exists()
    merge_pipeline_strategys(str(strategy), str(tmp_path / "merged.ckpt"))  # the control: what upstream's tool makes
    transform_checkpoints(str(run), str(tmp_path / "upstream"), "checkpoint_", str(tmp_path / "merged.ckpt"))
    upstream = read_weights(tmp_path / "upstream" / "rank_0" / "checkpoint_0.ckpt")
    np.testing.assert_array_equal(upstream[QKV], tensors[QKV][0][:64])
    base = {name: tensor for name, tensor in tensors.items() if name.startswith("transformer") and "lora" not in name}
    merge(
        run,
        tmp_path / "out.ckpt",
        strategy,
        lora=True,
        lora_scaling=2.0,
        base=write_checkpoint(tmp_path / "base.ckpt", base),
    )
    assert_close(tmp_path / "out.ckpt", merged(tensors, 2.0))
    values, dtype = base[QKV]
    base[QKV] = values + np.float32(1), dtype
    with pytest.raises(InputError, match="trained on another base"):
        merge(
            run,
            tmp_path / "wrong.ckpt",
            strategy,
            lora=True,
            lora_scaling=2.0,
            base=write_checkpoint(tmp_path / "other.ckpt", base),
        )
    assert not (tmp_path / "wrong.ckpt").exists()


def test_frozen_weights_that_every_rank_has_whole(tensors, tmp_path):
    """Data parallel without a cut of the weights: no base is needed, though the strategy does not name them."""
    strategy = write_layout(tmp_path / "real", "dp2", adapters=True, frozen=False)
    run = save_ranks(tmp_path / "checkpoint", tensors, strategy)
    merge(run, tmp_path / "out.ckpt", strategy, lora=True, lora_scaling=2.0)
    assert_close(tmp_path / "out.ckpt", merged(tensors, 2.0))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda tensors: tensors.pop(B), "no counterpart"),
        (lambda tensors: tensors.update({A: (tensors[A][0][:4].copy(), "fp32")}), "ranks differ"),
        (lambda tensors: tensors.pop(QKV), "missing|inferred"),
    ],
)
def test_incomplete_adapters(tensors, damage, words, tmp_path):
    damage(tensors)
    write_checkpoint(tmp_path / "checkpoint" / "rank_0" / NAME.format(0), tensors)
    with pytest.raises(InputError, match=words):
        merge(tmp_path / "checkpoint", tmp_path / "out.ckpt", lora=True, lora_scaling=2.0)
    assert not (tmp_path / "out.ckpt").exists()


def test_scale_comes_from_the_run(run, tensors, strategy, tmp_path, capsys):
    command = [
        "merge",
        "--src_ckpt_dir",
        str(run),
        "--dst",
        str(tmp_path / "out.ckpt"),
        "--lora",
        "--src_ckpt_strategy",
        str(strategy),
    ]
    assert cli.main(command) == 2
    assert "alpha / rank" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "r": 8}))
    assert cli.main(command) == 0
    assert "adapters merged with scale 2" in capsys.readouterr().out
    assert_close(tmp_path / "out.ckpt", merged(tensors, 2.0))


@pytest.mark.rehearsal
def test_strategy_and_scale_of_the_yaml(compiled_split, tmp_path):
    """The frozen weights' layouts too: compiled without adapters."""
    folder, whole, _ = compiled_split("lora")
    case = CASES["lora"]
    result = run_command(
        "merge",
        "--lora",
        "--src_ckpt_dir",
        str(folder),
        "--dst",
        str(tmp_path / "out.ckpt"),
        config=case.config,
        **case.overrides,
    )
    assert result.returncode == 0, result.stderr
    assert "adapters merged with scale 2" in result.stdout  # alpha 16, rank 8
    assert_close(tmp_path / "out.ckpt", merged(read_all(whole), 2.0))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_rounded_once(dtype):
    rng = np.random.default_rng(0)
    weight, a, b = (
        cast(rng.standard_normal(shape).astype(np.float32), "fp32", dtype) for shape in ((6, 8), (2, 8), (6, 2))
    )
    wide = [cast(array, dtype, "fp32") for array in (weight, a, b)]
    found = add_product((weight, dtype), (a, dtype), (b, dtype), 2.0, "weight")
    exact = wide[0].astype(np.float64) + 2.0 * wide[2].astype(np.float64) @ wide[1]
    np.testing.assert_array_equal(found, cast(exact.astype(np.float32), "fp32", dtype))


def test_values_that_do_not_fit():
    one = np.full((1, 1), 60000, np.float16)
    with pytest.raises(InputError, match="too large for fp16"):
        add_product((one, "fp16"), (one, "fp16"), (one, "fp16"), 1.0, "weight")
