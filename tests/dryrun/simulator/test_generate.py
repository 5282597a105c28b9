"""Greedy decoding by compiled programs: blocks of the cache, and the published model's text."""

import json

import numpy as np
import pytest
import yaml

from dryrun.tiny import CONFIG, run_command
from mindformers_glm32k.dryrun.compile.pool import read_layout
from mindformers_glm32k.dryrun.simulator import generate
from mindformers_glm32k.dryrun.simulator.generate import Blocks
from mindformers_glm32k.dryrun.simulator.interpreter import SimulationError
from mindformers_glm32k.dryrun.simulator.network import NetworkError
from mindformers_glm32k.dryrun.simulator.scale_down import Request
from mindformers_glm32k.errors import InputError

ANSWER, LENGTH = 48, 64
OVERRIDES = [
    "--model.model_config.seq_length",
    str(LENGTH),
    "--model.model_config.max_new_tokens",
    str(ANSWER),
    "--model.model_config.num_blocks",
    "16",
]


@pytest.mark.parametrize("lengths, size", [([5, 16, 33], 16), ([1], 4), ([31, 2], 8)])
def test_blocks_and_slots_are_those_of_upstreams_generator(lengths, size):
    from mindformers.modules.block_tables import BlockTables

    count, width = 20, 64 // size
    upstream = BlockTables(len(lengths) * width, size, 64)
    upstream.init_cache_engine(len(lengths))
    ours = Blocks(len(lengths), width, size, len(lengths) * width)
    valid, running = np.array(lengths), [False] * len(lengths)
    table, slots = upstream.assemble_pa_full_inputs(max(lengths), valid, running)
    np.testing.assert_array_equal(ours.extend(lengths), slots[slots != -1])
    np.testing.assert_array_equal(ours.table(), table)
    for _ in range(count):
        valid += 1
        table, slots = upstream.assemble_pa_inc_inputs(valid, running)
        np.testing.assert_array_equal(ours.extend([1] * len(lengths)), slots)
        np.testing.assert_array_equal(ours.table(), table)
        assert ours.lengths == valid.tolist()


@pytest.mark.parametrize("width, blocks", [(2, 8), (4, 3)])
def test_a_full_cache_or_table_is_an_error(width, blocks):
    ours = Blocks(2, width, 4, blocks)
    assert ours.extend([8, 1]).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    with pytest.raises(SimulationError, match="prompt 0 of 9 tokens does not fit"):
        ours.extend([1, 1])


def prepare(output, name, golden, reference, *more):
    overrides = [*OVERRIDES, "--model.model_config.batch_size", str(len(golden["greedy_prompt"])), *more]
    request = Request(
        str(CONFIG.with_name(f"{name}.yaml")),
        overrides,
        output,
        ANSWER,
        load_checkpoint=str(reference / "tiny_hf" / "hf_safetensors_fp32"),
    )
    _, config = read_layout(request.arguments)
    return generate.prepare(request, config, list(golden["greedy_prompt"]))[0]


@pytest.fixture(scope="module")
def one_card(tmp_path_factory, golden, reference):
    """Prefill and increment of one card with the published tiny weights."""
    return prepare(tmp_path_factory.mktemp("one"), "predict_glm32k", golden, reference)


@pytest.fixture(scope="module")
def two_cards(tmp_path_factory, golden, reference):
    """The same on mp 2, and one device's with the same weights."""
    return prepare(tmp_path_factory.mktemp("two"), "predict_glm32k_mp2", golden, reference)


def check_published(report, golden):
    """Tokens equal, margins within what float32 gives."""
    prompt = golden["greedy_prompt"].shape[1]
    assert report["tokens"] == golden["greedy_output"][:, prompt:].tolist()
    assert report["agrees"] and report["problems"] == [] and report["non_finite"] == []
    margins = [step["smallest_margin"] for step in report["steps"]]
    np.testing.assert_allclose(margins, golden["greedy_margin"].min(0), atol=3e-5)


def shift_slots(monkeypatch, index):
    """Lets the call `index` write one token into the next slot."""
    extend, calls = Blocks.extend, []

    def wrong(blocks, counts):
        slots = extend(blocks, counts)
        calls.append(counts)
        if len(calls) == index:
            slots[0] += 1
        return slots

    monkeypatch.setattr(Blocks, "extend", wrong)


def test_the_programs_of_one_card_write_the_published_models_text(one_card, golden):
    check_published(one_card.run(), golden)


def test_a_token_in_the_wrong_slot_changes_the_text(one_card, golden, monkeypatch):
    shift_slots(monkeypatch, 2)  # the first decoded token, which all later ones read
    report = one_card.run()
    assert report["tokens"] != golden["greedy_output"][:, -ANSWER:].tolist()


def test_traces_count_tokens(one_card, capsys):
    one_card.run(["layers-CellList/0-ChatGLM2Block/mlp"])
    steps = [line.split()[2] for line in capsys.readouterr().out.splitlines() if " SiLU " in line]
    assert steps == [str(index) for index in range(1, ANSWER + 1)]


def test_caches_begin_empty_each_time(one_card):
    assert one_card.run()["tokens"] == one_card.run()["tokens"]
    (interpreters,) = generate.generate([one_card.one], one_card.whole, one_card.prompts, 1).interpreters
    cache = next(
        parameter.value
        for name, parameter in interpreters["prefill"].parameters.items()
        if name.endswith("layers.0.self_attention.infer_attention.paged_attention_mgr.key_cache")
    )
    used = cache.reshape(-1, cache.shape[-1]).any(1).reshape(cache.shape[:-1]).any(-1)  # (blocks, block)
    assert used.sum() == sum(map(len, one_card.prompts))


@pytest.mark.slow
def test_the_programs_of_two_cards_write_the_published_models_text(two_cards, golden):
    report = two_cards.run()
    check_published(report, golden)
    assert report["tokens_one_device"] == report["tokens"]
    assert report["largest_logit_difference_relative"] < 1e-5
    kinds = {(item["kind"], item["rank"], item["phase"]) for item in report["collectives"]}
    assert {("AllReduce", rank, phase) for rank in (0, 1) for phase in ("prefill", "increment")} <= kinds


@pytest.mark.slow
def test_without_a_cache_the_text_is_the_same(tmp_path, golden, reference):
    check_published(
        prepare(
            tmp_path,
            "predict_glm32k",
            golden,
            reference,
            "--model.model_config.use_past",
            "False",
            "--model.model_config.use_flash_attention",
            "False",
            "--predict_batch_size",
            str(len(golden["greedy_prompt"])),
        ).run(),
        golden,
    )


@pytest.mark.slow
def test_a_wrong_shard_is_caught(two_cards, monkeypatch):
    """Both ranks swap their parts of one weight."""
    right = generate.generate

    def wrong(programs, whole, *rest):
        if len(programs) > 1:
            name = "transformer.encoder.layers.1.self_attention.wq.weight"
            whole = {**whole, name: np.concatenate(np.split(whole[name], 2)[::-1])}
        return right(programs, whole, *rest)

    monkeypatch.setattr(generate, "generate", wrong)
    report = two_cards.run()
    assert not report["agrees"]
    assert "token 1: logits differ from one device's" in report["problems"][0]


def drop_allreduce(monkeypatch, programs, phase):
    """The sum behind the first layer's MLP is gone."""
    for compiled in programs:
        (node,) = [
            node
            for node in compiled.phases[phase].main.nodes
            if node.op == "AllReduce" and "layers-CellList/0" in node.scope and "/mlp-" in node.scope
        ]
        monkeypatch.setattr(node, "op", "StopGradient")  # passes its input on


@pytest.mark.slow
@pytest.mark.parametrize("phase, first", [("prefill", 1), ("increment", 2)])
def test_a_missing_allreduce_is_caught(two_cards, monkeypatch, phase, first):
    drop_allreduce(monkeypatch, two_cards.programs, phase)
    report = two_cards.run()
    assert not report["agrees"]
    assert report["problems"][0].startswith(f"token {first}: logits differ from one device's")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "increment"])
def test_an_allreduce_that_one_rank_leaves_out_is_named(two_cards, monkeypatch, phase):
    drop_allreduce(monkeypatch, two_cards.programs[1:], phase)
    with pytest.raises(NetworkError, match="rank 0 brings .*; rank 1 brings "):
        two_cards.run()


@pytest.mark.rehearsal
@pytest.mark.parametrize("options", [(), ("--precision", "config")])
def test_the_shipped_layout_scaled_down(tmp_path, options):
    """Two prompts of different lengths."""
    result = run_command(
        "dryrun",
        "--execute",
        "8",
        "--output_dir",
        str(tmp_path),
        *options,
        config=CONFIG.with_name("predict_glm32k_mp2.yaml"),
        sizes={"model.model_config.batch_size": 2},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "execution.json").read_text())
    assert report["agrees"] and report["world_size"] == 2 and report["layout"] == "mp 2"
    assert np.shape(report["tokens"]) == np.shape(report["tokens_one_device"]) == (2, 8)
    assert len(set(report["prompt_lengths"])) == 2
    assert report["largest_logit_difference_relative"] <= report["tolerance"]
    assert report["shrunk"]["model.model_config.num_layers"] == [28, 2]
    assert "all agree" in result.stdout and "**All agree.**" in (tmp_path / "execution.md").read_text()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"run_mode": "eval"}, "run_mode eval cannot be simulated"),
        ({}, "--execute 513: model_config.max_new_tokens is 512"),
    ],
)
def test_what_cannot_be_simulated_is_refused_before_anything_is_compiled(tmp_path, changes, words):
    path = CONFIG.with_name("predict_glm32k.yaml")
    config = {**yaml.safe_load(path.read_text()), **changes}
    with pytest.raises(InputError, match=words):
        generate.simulate(Request(str(path), [], tmp_path / "output", 513, scaled_down=False), config)
    assert not (tmp_path / "output").exists()
