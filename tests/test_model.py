"""GLM32KForConditionalGeneration against the published model's golden outputs (fp32, CPU)."""

import mindspore as ms
import mindspore.common.dtype as mstype
import numpy as np
import pytest
from mindformers.models.glm2 import glm2_transformer
from mindformers.pet import LoraConfig, get_pet_model

from mindformers_glm32k import GLM32KConfig, GLM32KForConditionalGeneration
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.kernels.cpu import blocks, tiled_attention, tiled_layers
from mindformers_glm32k.weights.names import key_of, name_of

NO_STOP = [1023]  # an id that the golden continuations do not contain: generation runs to its limit
SMALL = dict(
    num_layers=1, hidden_size=64, num_attention_heads=4, kv_channels=16, ffn_hidden_size=64, padded_vocab_size=512
)


@pytest.fixture(scope="module")
def golden(reference):
    return np.load(reference / "tiny_hf" / "golden.npz")


@pytest.fixture(scope="module")
def weights(reference):
    """Hugging Face tensors by name, float32."""
    from mindformers_glm32k.weights import load_hf_weights

    return {
        name: np.asarray(values, np.float32)
        for name, values in load_hf_weights(reference / "tiny_hf" / "hf_safetensors_fp32")
    }


@pytest.fixture
def build(reference, weights):
    """A function that builds the tiny published model with its weights; keyword arguments override its config."""

    def build_model(mode=ms.GRAPH_MODE, spoil=None, **overrides):
        ms.set_context(mode=mode)
        fields = dict(param_init_type="float32", compute_dtype="float32", seq_length=64)
        fields.update(overrides)
        config = GLM32KConfig.from_huggingface(reference / "tiny_hf" / "hf_safetensors_fp32", **fields)
        network = GLM32KForConditionalGeneration(config)
        set_weights(network, spoil(weights) if spoil else weights)
        network.set_train(False)
        return network

    yield build_model
    ms.set_context(mode=ms.GRAPH_MODE)


def set_weights(network, weights):
    """Puts Hugging Face tensors into a network of either layout; every parameter must find its values."""
    config = network.config
    query = config.num_attention_heads * config.kv_channels
    key = config.multi_query_group_num * config.kv_channels
    shards = {
        "wq": (0, query),
        "wk": (query, query + key),
        "wv": (query + key, query + 2 * key),
        "dense_left": (0, config.ffn_hidden_size),
        "dense_right": (config.ffn_hidden_size, None),
    }
    for parameter in network.get_parameters():
        if parameter.name.endswith("_cache"):
            continue
        name, shard = hf_name(parameter.name), slice(None)
        for part, (start, stop) in shards.items():
            if f".{part}." in parameter.name:
                shard = slice(start, stop)
        parameter.set_data(ms.Tensor(weights[name][shard], parameter.dtype))


def hf_name(name):
    """Hugging Face name of the tensor that holds a parameter of either layout."""
    for part in ("wq", "wk", "wv"):
        name = name.replace(f".{part}.", ".query_key_value.")
    for part in ("dense_left", "dense_right"):
        name = name.replace(f".{part}.", ".dense_h_to_4h.")
    return name.replace("embedding.embedding_weight", "embedding.word_embeddings.weight")


def shifted(golden):
    """Labels in the alignment of the model: labels[i] is the token after position i."""
    labels = golden["labels_unshifted"]
    return np.concatenate([labels[:, 1:], np.full((len(labels), 1), -100)], 1).astype(np.int32)


def logits_of(network, ids):
    return network(ms.Tensor(ids.astype(np.int32)))[0].asnumpy().reshape(*ids.shape, -1)


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
@pytest.mark.parametrize("concat, flash", [(True, True), (False, False)])
def test_logits_loss_and_gradients(build, golden, mode, concat, flash):
    network = build(mode, qkv_concat=concat, mlp_concat=concat, use_flash_attention=flash)
    assert np.abs(logits_of(network, golden["input_ids"]) - golden["logits"]).max() < 1e-4

    network.set_train(True)
    parameters = network.trainable_params()
    loss, gradients = ms.value_and_grad(network, None, parameters)(
        ms.Tensor(golden["input_ids"].astype(np.int32)), ms.Tensor(shifted(golden))
    )
    assert abs(float(loss) / float(golden["loss"]) - 1) < 1e-5
    squares = {}
    for parameter, gradient in zip(parameters, gradients):
        name = hf_name(parameter.name)
        squares[name] = squares.get(name, 0.0) + float((gradient.asnumpy().astype(np.float64) ** 2).sum())
        if concat and f"grad:{name}" in golden:
            np.testing.assert_allclose(gradient.asnumpy(), golden[f"grad:{name}"], atol=1e-4)
    norms = {key[len("gradnorm:") :]: float(golden[key]) for key in golden.files if key.startswith("gradnorm:")}
    assert squares.keys() == norms.keys()
    for name, square in squares.items():
        assert np.sqrt(square) == pytest.approx(norms[name], rel=1e-3), name


def test_known_wrong_rope_ratio_is_caught(build, golden):
    assert np.abs(logits_of(build(rope_ratio=1), golden["input_ids"]) - golden["logits"]).max() > 1e-2


def test_known_wrong_mask_is_caught(build, golden, monkeypatch):
    def visible(query, key):
        return ms.ops.zeros((query.shape[0], key.shape[0]), mstype.float32)

    monkeypatch.setattr(tiled_attention, "causal_bias", visible)
    network = build(use_flash_attention=True)
    assert np.abs(logits_of(network, golden["input_ids"]) - golden["logits"]).max() > 1e-1


def test_known_wrong_split_of_qkv_is_caught(build, golden):
    def swapped(weights):  # key and value exchanged inside the fused weight
        query, key = 64, 32
        order = np.r_[0:query, query + key : query + 2 * key, query : query + key]
        return {name: values[order] if "query_key_value" in name else values for name, values in weights.items()}

    assert np.abs(logits_of(build(spoil=swapped), golden["input_ids"]) - golden["logits"]).max() > 1e-1


def test_token_before_a_change_keeps_its_logits(build, golden):
    network = build(use_flash_attention=False)
    ids = golden["input_ids"][:1]
    changed = ids.copy()
    changed[:, 40:] = (changed[:, 40:] + 1) % 1000
    before, after = logits_of(network, ids), logits_of(network, changed)
    np.testing.assert_array_equal(before[:, :40], after[:, :40])
    assert np.abs(before[:, 40:] - after[:, 40:]).max() > 1e-2


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
@pytest.mark.parametrize("use_past", [True, False])
def test_greedy_output_is_identical(build, golden, mode, use_past):
    network = build(mode, use_past=use_past, is_dynamic=use_past, num_blocks=16, batch_size=2)
    outputs = network.generate(
        golden["greedy_prompt"].tolist(), max_new_tokens=48, do_sample=False, eos_token_id=NO_STOP
    )
    for ours, theirs in zip(outputs, golden["greedy_output"]):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("size", [1, 7, 512])
def test_greedy_output_in_chunks(build, golden, size):
    network = build(use_past=True, is_dynamic=True, num_blocks=16)
    network.steps.chunks = (size,)
    prompt, expected = golden["greedy_prompt"][1], golden["greedy_output"][1]
    output = network.generate([prompt.tolist()], max_new_tokens=48, do_sample=False, eos_token_id=NO_STOP)[0]
    np.testing.assert_array_equal(output, expected)


def test_prompts_of_different_lengths_in_one_batch(build, golden):
    network = build(use_past=True, is_dynamic=True, num_blocks=16)
    prompts = [golden["greedy_prompt"][0].tolist(), golden["greedy_prompt"][1][:9].tolist()]
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=NO_STOP)
    alone = [network.generate([prompt], **options)[0] for prompt in prompts]
    together = network.generate([prompts[0], prompts[1] + [0] * 7], **options)
    for ours, theirs in zip(together, alone):
        np.testing.assert_array_equal(ours, theirs)


def test_evaluation_with_labels_is_shifted_for_perplexity(build, golden):
    network = build()
    ids = golden["input_ids"].astype(np.int32)
    logits, labels, mask = (x.asnumpy() for x in network(ms.Tensor(ids), ms.Tensor(shifted(golden))))
    assert logits.shape == (2, 65, 1024) and labels.shape == mask.shape == (2, 65)
    kept = mask[:, 1:] == 1
    rows = logits[:, :-1][kept].astype(np.float64)
    picked = rows[np.arange(len(rows)), labels[:, 1:][kept]]
    loss = (np.log(np.exp(rows).sum(-1)) - picked).mean()
    assert loss == pytest.approx(float(golden["loss"]), rel=1e-5)


def test_sequences_may_be_shorter_than_seq_length(build, golden):
    network = build(seq_length=1024)
    assert np.abs(logits_of(network, golden["input_ids"]) - golden["logits"]).max() < 1e-4


def test_half_precision_stays_near(build, golden):
    network = build(param_init_type="float16", compute_dtype="float16")
    logits = logits_of(network, golden["input_ids"])
    assert logits.dtype == np.float32
    assert 0 < np.abs(logits - golden["logits"]).max() < 0.15


def test_bfloat16_is_refused_where_there_are_no_kernels(build):
    with pytest.raises(InputError, match="compute_dtype=bfloat16"):
        build(compute_dtype="bfloat16")


@pytest.mark.parametrize("cells", ["portable", "ascend"])
@pytest.mark.parametrize("flash", [True, False])
def test_no_square_tensor_is_created_at_construction(cells, flash):
    length = 3001
    config = GLM32KConfig(**SMALL, seq_length=length, cells=cells, use_flash_attention=flash)
    network = GLM32KForConditionalGeneration(config)
    for _, cell in network.cells_and_names():
        for name, value in vars(cell).items():
            if isinstance(value, (ms.Tensor, np.ndarray)):
                assert np.prod(value.shape) < length * length, (type(cell).__name__, name, value.shape)


def test_cells_of_the_default_config_keep_no_square_tensor():
    config = GLM32KConfig(**SMALL, seq_length=1024, param_init_type="float32", compute_dtype="float32")
    encoder = GLM32KForConditionalGeneration(config).transformer.encoder
    assert isinstance(encoder, tiled_layers.TiledTransformer)
    assert isinstance(encoder.layers[0].self_attention.flash_attention, tiled_attention.TiledAttention)
    assert encoder.layers[0].self_attention.use_flash_attention is True


def test_ascend_cells_are_upstreams():
    config = GLM32KConfig(**SMALL, seq_length=128, cells="ascend", use_flash_attention=True)
    layer = GLM32KForConditionalGeneration(config).transformer.encoder.layers[0]
    assert type(layer.input_layernorm) is glm2_transformer.ChatGLM2RMSNorm
    assert isinstance(layer.self_attention.flash_attention, glm2_transformer.FlashAttention)
    assert type(layer.self_attention.split_qkv).__name__ == "SplitWithSize"


@pytest.mark.parametrize("concat", [True, False])
def test_parameter_names_are_upstreams(reference, concat):
    config = GLM32KConfig.from_huggingface(
        reference / "tiny_hf" / "hf_safetensors_fp32", seq_length=64, qkv_concat=concat, mlp_concat=concat
    )
    names = {parameter.name for parameter in GLM32KForConditionalGeneration(config).get_parameters()}
    assert {name_of(key_of(name), "mindspore") for name in names} == names
    expected = (
        ("query_key_value.weight", "query_key_value.bias")
        if concat
        else ("wq.weight", "wq.bias", "wk.weight", "wk.bias", "wv.weight", "wv.bias")
    )
    assert {name.split("self_attention.")[1] for name in names if "layers.2.self_attention" in name} == {
        *expected,
        "dense.weight",
    }


@pytest.mark.parametrize("flash", [True, False])
def test_packed_sequence_gives_each_document_the_logits_it_has_alone(build, golden, small_blocks, flash):
    network = build(use_flash_attention=flash)
    sequences = golden["input_ids"][:, :64]
    alone = [logits_of(network, sequences[:1, start:stop]) for start, stop in ((0, 20), (20, 45), (45, 64))]
    documents = np.repeat([[0, 1, 2]], [20, 25, 19], axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(20), np.arange(25), np.arange(19)])[None].astype(np.int32)
    # the second sequence is one document after two of padding, to see that sequences do not share ids or positions
    documents = np.concatenate([documents, np.repeat([[7, 3]], [2, 62], axis=1)]).astype(np.int32)
    positions = np.concatenate([positions, np.r_[0, 0, np.arange(62)][None]]).astype(np.int32)
    packed = (
        network(
            ms.Tensor(sequences.astype(np.int32)), position_ids=ms.Tensor(positions), document_ids=ms.Tensor(documents)
        )[0]
        .asnumpy()
        .reshape(2, 64, -1)
    )
    np.testing.assert_allclose(packed[0], np.concatenate(alone, 1)[0], atol=3e-5)
    np.testing.assert_allclose(packed[1, 2:], logits_of(network, sequences[1:, 2:])[0], atol=3e-5)
    without = network(ms.Tensor(sequences.astype(np.int32)))[0].asnumpy().reshape(2, 64, -1)
    assert np.abs(without[0, 20:] - packed[0, 20:]).max() > 1e-2


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 tokens, so that the golden sequences have several."""
    for function in (blocks.block_count, blocks.split_into_blocks):
        monkeypatch.setattr(function, "__defaults__", (16,))


def gradients_of(network, golden):
    """Loss and gradients by parameter name."""
    network.set_train(True)
    parameters = network.trainable_params()
    loss, gradients = ms.value_and_grad(network, None, parameters)(
        ms.Tensor(golden["input_ids"].astype(np.int32)), ms.Tensor(shifted(golden))
    )
    return float(loss), {parameter.name: gradient.asnumpy() for parameter, gradient in zip(parameters, gradients)}


def test_loss_and_gradients_across_blocks_and_chunks(build, golden, small_blocks):
    loss, gradients = gradients_of(build(use_flash_attention=True, loss_chunk_size=50), golden)
    assert abs(loss / float(golden["loss"]) - 1) < 1e-5
    for name, gradient in gradients.items():
        assert np.linalg.norm(gradient) == pytest.approx(float(golden[f"gradnorm:{hf_name(name)}"]), rel=1e-3), name


@pytest.mark.slow
def test_cells_in_place_of_the_tiles_give_the_same_gradients(build, golden, small_blocks):
    """Split weights and adapters go through upstream's cells; half of the weights are frozen."""
    loss, tiled = gradients_of(build(use_flash_attention=True), golden)
    network = build(use_flash_attention=True)
    encoder = network.transformer.encoder
    encoder.modes = lambda index: ("cells", "cells")
    assert gradients_of(network, golden)[0] == pytest.approx(loss, rel=1e-6)
    network = build(use_flash_attention=True)
    for parameter in network.trainable_params():
        parameter.requires_grad = "layers.1." not in parameter.name and "output_layer" not in parameter.name
    assert network.transformer.encoder.modes(1) == ("frozen", "frozen") and network.loss_mode() == "frozen"
    loss_of_part, part = gradients_of(network, golden)
    assert loss_of_part == pytest.approx(loss, rel=1e-6)
    assert part and not any("layers.1." in name for name in part)
    for name, gradient in part.items():
        np.testing.assert_allclose(gradient, tiled[name], atol=1e-6, err_msg=name)


def test_logits_at_32768_positions(build, golden):
    network = build(seq_length=32768)  # attention in tiles is the default
    hidden = network.transformer(ms.Tensor(golden["long_input_ids"].astype(np.int32)))
    picked = hidden[:, ms.Tensor(golden["long_positions"].astype(np.int32))]
    logits = network.transformer.output_layer(picked).asnumpy()[0]
    assert np.abs(logits - golden["long_logits"]).max() < 1e-3


@pytest.mark.slow
def test_adapters_train_through_the_tiles(build, golden, small_blocks):
    """LoRA on query_key_value: that part goes through upstream's cells, the rest through tiles with frozen weights."""
    _, gradients = gradients_of(build(use_flash_attention=True), golden)
    network = get_pet_model(
        build(use_flash_attention=True),
        LoraConfig(lora_rank=4, lora_alpha=8, lora_dropout=0.0, target_modules=".*query_key_value.*"),
    )
    model = network.network.network if hasattr(network.network, "network") else network.network
    assert model.transformer.encoder.modes(0) == ("cells", "frozen") and model.loss_mode() == "frozen"
    loss, of_adapters = gradients_of(network, golden)
    assert loss == pytest.approx(float(golden["loss"]), rel=1e-5)  # adapters start at zero
    assert len(of_adapters) == 2 * model.config.num_layers
    values = {parameter.name: parameter.asnumpy() for parameter in network.trainable_params()}
    names = [name for name in of_adapters if name.endswith("lora_b")]
    assert len(names) == model.config.num_layers
    for name in names:
        # weight + B A alpha / rank: the gradient of B is the weight's times A^T alpha / rank
        weight = gradients["transformer." + name.split("transformer.")[1].replace("mindpet_delta_lora_b", "weight")]
        expected = weight @ values[name.replace("lora_b", "lora_a")].T * 2
        np.testing.assert_allclose(of_adapters[name], expected, atol=1e-4 * np.abs(expected).max())


def test_prediction_computes_the_logits_of_the_last_token_only(build, golden):
    network = build()
    ids = ms.Tensor(golden["input_ids"].astype(np.int32))
    last = network(ids, batch_valid_length=ms.Tensor([[64, 10]], ms.int32))[0].asnumpy()
    assert last.shape == (2, 1024)
    np.testing.assert_allclose(last, golden["logits"][[0, 1], [63, 9]], atol=1e-4)
    inputs = network.prepare_inputs_for_generation(golden["input_ids"], valid_length_each_example=np.array([3, 4]))
    assert inputs["batch_valid_length"].asnumpy().tolist() == [3, 4]
