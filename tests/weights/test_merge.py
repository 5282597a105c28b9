"""The files of all ranks joined: complete, of one step, equal copies, nothing lost; or an error and no file."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from mindformers_glm32k import cli
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights import merge, split
from mindformers_glm32k.weights.formats import read_ckpt, read_safetensors
from mindformers_glm32k.weights.reshard import Transformer
from weights.parallel import TINY_DIMS, read_all, read_weights, whole_tensors, write_checkpoint, write_layout

pytestmark = pytest.mark.usefixtures("in_process")
NAME = "glm32k_rank_{}-1_20.ckpt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a run of mp 2 x pp 2 leaves: strategy, checkpoint/rank_N; the whole in whole.ckpt. Only to be read."""
    folder = tmp_path_factory.mktemp("trained")
    write_layout(folder / "strategy", "mp2pp2")
    split(write_checkpoint(folder / "whole.ckpt", whole_tensors()), folder / "checkpoint", folder / "strategy")
    shutil.rmtree(folder / "checkpoint" / "strategy")
    for rank in range(4):
        path = folder / "checkpoint" / f"rank_{rank}"
        (path / f"checkpoint_{rank}.ckpt").rename(path / NAME.format(rank))
        (path / "meta.json").write_text("{}")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def file_of(run, rank, name=NAME):
    return run / "checkpoint" / f"rank_{rank}" / name.format(rank)


def refused(run, *words, **options):
    before = sorted(run.parent.rglob("*"))
    options = {"strategy": run / "strategy", **options}
    with pytest.raises(InputError) as error:
        merge(run / "checkpoint", run.parent / "out.ckpt", **options)
    assert all(word in str(error.value) for word in words), error.value
    assert sorted(run.parent.rglob("*")) == before


def test_everything_comes_back(trained, tmp_path):
    report = merge(trained / "checkpoint", tmp_path / "out.ckpt", trained / "strategy", optimizer_states=True)
    assert (tmp_path / "out.ckpt").read_bytes() == (trained / "whole.ckpt").read_bytes()
    saved = json.loads((tmp_path / "out.report.json").read_text())
    assert saved["tensors"] == report["tensors"] and saved["step"] == "1_20" and saved["ranks"] == 4
    assert report["counters"] == {"epoch_num": 2, "step_num": 40} and not report["remarks"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.ckpt", "out.report.json"]


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_weights_alone(trained, suffix, tmp_path):
    report = merge(trained / "checkpoint", tmp_path / f"out{suffix}", trained / "strategy", dims=TINY_DIMS)
    expected = {name: values for name, (values, _) in whole_tensors(states=False).items()}
    found = read_weights(tmp_path / f"out{suffix}")
    assert list(found) == list(expected)
    assert all((found[name] == values).all() for name, values in expected.items())
    assert "34 optimizer states are left out" in report["remarks"][0]


def test_safetensors_files_of_a_run_with_counters(run, tmp_path):
    for rank in range(4):
        path = file_of(run, rank)
        write_checkpoint(path.with_suffix(".safetensors"), read_all(path))
        path.unlink()
    merge(run / "checkpoint", tmp_path / "out.safetensors", run / "strategy", optimizer_states=True)
    found = read_weights(tmp_path / "out.safetensors")
    assert all((found[name] == values).all() for name, values in read_weights(run / "whole.ckpt").items())
    codes = {tensor.name: tensor.dtype for tensor in read_safetensors(tmp_path / "out.safetensors") if not tensor.shape}
    assert codes == {
        "scale_sense": "fp32",
        "step_num": "I64",
        "epoch_num": "I64",
        "global_batch_size": "I64",
        "another_number": "I64",
    }


def test_merged_strategy_file(trained, tmp_path):
    import mindspore

    mindspore.merge_pipeline_strategys(str(trained / "strategy"), str(tmp_path / "merged_ckpt_strategy.ckpt"))
    merge(trained / "checkpoint", tmp_path / "out.ckpt", tmp_path / "merged_ckpt_strategy.ckpt", optimizer_states=True)
    assert (tmp_path / "out.ckpt").read_bytes() == (trained / "whole.ckpt").read_bytes()


def test_file_of_another_rank_by_its_name(run):
    swap(file_of(run, 0), file_of(run, 1))
    file_of(run, 0).rename(file_of(run, 0).with_name(NAME.format(1)))
    refused(run, "rank_0/glm32k_rank_1-1_20.ckpt", "files were swapped")


def swap(one, other):
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def test_file_of_another_stage(run):
    swap(file_of(run, 0), file_of(run, 2))
    refused(run, "rank_0/glm32k_rank_0-1_20.ckpt: missing: 'transformer.embedding.embedding_weight'")


def test_missing_rank(run):
    shutil.rmtree(run / "checkpoint" / "rank_3")
    refused(run, "the file of rank 3 is missing", "ranks 0 to 3 are needed")


def test_more_ranks_than_the_strategy_has(run):
    shutil.copytree(run / "checkpoint" / "rank_3", run / "checkpoint" / "rank_4")
    file_of(run, 4, NAME.format(3)).rename(file_of(run, 4))
    refused(run, "rank_4", "strategy is for 4 NPUs")


def test_truncated_file(run):
    file_of(run, 1).write_bytes(file_of(run, 1).read_bytes()[:-500])
    refused(run, "rank_1/glm32k_rank_1-1_20.ckpt", "cut off")


def test_empty_folder(run):
    shutil.rmtree(run / "checkpoint")
    refused(run, "checkpoint: no such folder")
    (run / "checkpoint").mkdir()
    refused(run, "no rank_N/*.ckpt")


def test_rank_of_another_step_by_its_name(run):
    file_of(run, 2).rename(file_of(run, 2, "glm32k_rank_{}-1_10.ckpt"))
    refused(run, "glm32k_rank_*-1_20.ckpt: the file of rank 2 is missing")


def test_rank_of_another_step_inside(run):
    tensors = read_all(file_of(run, 3))
    tensors["step_num"] = (np.array(39), "Int64")
    write_checkpoint(file_of(run, 3), tensors)
    refused(run, "rank_3", "step_num is 39", "it is 40")


@pytest.mark.parametrize("name, words", [("dp2", ["strategy is for 2 NPUs"]), ("mp2", ["strategy is for 2 NPUs"])])
def test_strategy_of_another_layout(run, name, words, tmp_path):
    refused(run, *words, strategy=write_layout(tmp_path / "other", name))


def test_strategy_of_as_many_npus_but_another_cut(run, tmp_path):
    whole = write_checkpoint(tmp_path / "whole.ckpt", whole_tensors())
    split(whole, tmp_path / "mp2", write_layout(tmp_path / "s_mp2", "mp2"))
    write_layout(tmp_path / "s_dp2", "dp2")
    with pytest.raises(InputError, match=r"expected(.|\n)*Is .*s_dp2 the strategy of this run\?"):
        merge(tmp_path / "mp2", tmp_path / "out.ckpt", tmp_path / "s_dp2")
    assert not list(tmp_path.glob("*out*"))


def test_altered_copy(run):
    """A norm is whole on every rank: the copies must agree. The control: the same change in all copies is a weight."""
    name = "transformer.encoder.layers.1.input_layernorm.weight"
    for rank in (3, 2):
        path = file_of(run, rank)
        offset = next(tensor for tensor in read_ckpt(path) if tensor.name == name).segments[0][0]
        content = bytearray(path.read_bytes())
        content[offset] ^= 1
        path.write_bytes(content)
        if rank == 3:
            refused(run, "rank_3/glm32k_rank_3", name, "is a copy of what", "rank_2")
    merge(run / "checkpoint", run.parent / "out.ckpt", run / "strategy")


def test_rank_without_a_parameter(run):
    tensors = read_all(file_of(run, 1))
    del tensors["transformer.encoder.layers.0.input_layernorm.weight"]
    write_checkpoint(file_of(run, 1), tensors)
    refused(run, "rank_1", "missing: 'transformer.encoder.layers.0.input_layernorm.weight'", "remove_redundancy")


def test_another_model_than_the_yaml_says(run):
    refused(run, "is left over", dims=replace(TINY_DIMS, num_layers=1))


def add_step(run, label, step, ranks=4):
    for rank in range(ranks):
        tensors = read_all(file_of(run, rank))
        tensors["step_num"] = (np.array(step), "Int64")
        write_checkpoint(file_of(run, rank, f"glm32k_rank_{{}}-{label}.ckpt"), tensors)


def test_newest_complete_checkpoint_is_taken(run, tmp_path):
    add_step(run, "9_9", 30)  # named later, older inside
    add_step(run, "3_20", 60)
    add_step(run, "4_20", 80, ranks=3)
    report = merge(run / "checkpoint", tmp_path / "out.ckpt", run / "strategy")
    assert report["step"] == "3_20" and report["counters"]["step_num"] == 60
    assert "3 checkpoints are complete, the newest is taken: glm32k_rank_*-3_20.ckpt" in report["remarks"][0]
    assert "glm32k_rank_*-4_20.ckpt: the file of rank 3 is missing" in report["remarks"][1]
    for step in ("9_9", 30):
        assert merge(run / "checkpoint", tmp_path / "out.ckpt", run / "strategy", step=step)["step"] == "9_9"
    refused(run, "the file of rank 3 is missing", step="4_20")
    refused(run, "no checkpoint of step 7", "1_20 (step_num 40)", step=7)


@pytest.fixture
def data_parallel(tmp_path):
    """Two ranks with the whole model each."""
    for rank in range(2):
        write_checkpoint(tmp_path / "run" / "checkpoint" / f"rank_{rank}" / NAME.format(rank), whole_tensors())
    return tmp_path / "run"


def test_data_parallel_run_needs_no_strategy(data_parallel, tmp_path):
    report = merge(data_parallel / "checkpoint", tmp_path / "out.ckpt", optimizer_states=True)
    assert (tmp_path / "out.ckpt").read_bytes() == file_of(data_parallel, 0).read_bytes()
    assert "2 ranks have the whole model each" in report["remarks"][0]


def test_data_parallel_ranks_must_agree(data_parallel):
    tensors = whole_tensors()
    tensors["transformer.output_layer.weight"][0][3, 5] += 1
    write_checkpoint(file_of(data_parallel, 1), tensors)
    refused(data_parallel, "rank_1", "'transformer.output_layer.weight' has other values", strategy=None)


def test_cut_parameters_need_the_strategy(run):
    refused(run, "rank_2", "Are the parameters sharded?", "--src_ckpt_strategy", strategy=None)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dst": None}, "nothing to write"),
        ({"dst": "out.bin"}, "ends in .ckpt or .safetensors"),
        ({"adapters_only": "out.safetensors"}, "need different names"),
        ({"adapters_only": "a.ckpt"}, "no LoRA adapters"),
        ({"base": "b.ckpt"}, "add --lora"),
        ({"lora": True}, "alpha / rank"),
        ({"lora": True, "lora_scaling": 2.0, "optimizer_states": True}, "belong to the"),
    ],
)
def test_options_that_make_no_sense(trained, options, words):
    with pytest.raises(InputError, match=words):
        merge(trained / "checkpoint", **{"dst": "out.ckpt", "strategy": trained / "strategy", **options})


def test_command(trained, tmp_path, capsys, monkeypatch):
    arguments = ["merge", "--src_ckpt_dir", str(trained / "checkpoint"), "--dst", str(tmp_path / "out.ckpt")]
    assert cli.main([*arguments, "--src_ckpt_strategy", str(trained / "strategy")]) == 0
    output = capsys.readouterr().out
    assert "17 tensors of 4 rank(s), 2 stage(s), epoch_num 2, step_num 40" in output and "all equal" in output
    assert cli.main([*arguments, "--stop", "1_20"]) == 2
    assert "--stop: no such option" in capsys.readouterr().err

    def killed(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Transformer, "run", killed)
    (tmp_path / "out.ckpt").unlink()
    assert cli.main([*arguments, "--src_ckpt_strategy", str(trained / "strategy")]) == 2
    assert "the disk is full" in capsys.readouterr().err and not (tmp_path / "out.ckpt").exists()
