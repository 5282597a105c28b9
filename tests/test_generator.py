"""model.generate on CPU: what a batch, a stream, a seed and a full cache do, on a model of random weights."""

import mindspore as ms
import numpy as np
import pytest

from mindformers_glm32k import GLM32KConfig, GLM32KForConditionalGeneration
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.generator import lengths_of, padded
from mindformers_glm32k.kernels.cpu import cached_steps
from mindformers_glm32k.kernels.cpu.cached_steps import CachedSteps, chunks_of

NO_STOP = [299]


def build(**overrides):
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(3)
    fields = dict(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        kv_channels=8,
        multi_query_group_num=2,
        ffn_hidden_size=48,
        padded_vocab_size=300,
        seq_length=190,  # no multiple of the block size
        param_init_type="float32",
        compute_dtype="float32",
        use_past=True,
        is_dynamic=True,
        num_blocks=12,
    )
    network = GLM32KForConditionalGeneration(GLM32KConfig(**{**fields, **overrides}))
    random = np.random.default_rng(0)
    for parameter in network.get_parameters():
        if not parameter.name.endswith("_cache") and parameter.ndim > 1:
            parameter.set_data(ms.Tensor(random.normal(0, 0.3, parameter.shape).astype(np.float32)))
    return network.set_train(False)


@pytest.fixture(scope="module")
def network():
    return build()


@pytest.fixture(scope="module")
def prompts():
    random = np.random.default_rng(1)
    return [random.integers(3, 290, length).tolist() for length in (40, 7, 1)]


def generate(network, prompts, tokens=12, **options):
    return [
        output.tolist()
        for output in network.generate(
            prompts, **{"do_sample": False, "eos_token_id": NO_STOP, "max_new_tokens": tokens, **options}
        )
    ]


def free_blocks(network):
    return len(network.block_mgr.block_mem_pool.free_blocks)


class Stream:
    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, ids):
        self.puts.append(np.array(ids).reshape(-1).tolist())

    def end(self):
        self.ended = True


def test_a_batch_gives_each_prompt_what_it_gets_alone(network, prompts):
    alone = [generate(network, [prompt])[0] for prompt in prompts]
    assert [output[: len(prompt)] for output, prompt in zip(alone, prompts)] == prompts
    assert generate(network, prompts) == alone
    # a prompt that ends early changes nothing for the others
    stop = [alone[0][len(prompts[0]) + 3]]
    assert generate(network, prompts, eos_token_id=stop) == [
        generate(network, [prompt], eos_token_id=stop)[0] for prompt in prompts
    ]


def test_options_that_count_tokens_count_those_of_each_prompt(network, prompts):
    alone = [generate(network, [prompt])[0] for prompt in prompts]
    stops = [output[len(prompt) + 2] for output, prompt in zip(alone, prompts)]
    options = dict(eos_token_id=stops, min_new_tokens=6)
    together = generate(network, prompts, **options)
    assert together == [generate(network, [prompt], **options)[0] for prompt in prompts]
    for output, prompt in zip(together, prompts):
        answer = output[len(prompt) :]
        assert 6 <= len(answer) <= 12 and not set(answer[:6]) & set(stops)
        assert len(answer) == 12 or answer[-1] in stops
    assert generate(network, prompts[:1], eos_token_id=stops[0])[0][-1] == stops[0]  # an id without its list


def test_streaming_gives_what_comes_back_and_the_program_serves_every_length(network, prompts):
    stream = Stream()
    output = generate(network, prompts[:1], streamer=stream)[0]
    assert sum(stream.puts, []) == output and stream.ended
    programs = network.steps.programs
    generate(network, [list(range(3, 163))])
    assert network.steps.programs == programs


def test_samples_come_without_a_context_and_repeat_with_their_seed(network, prompts):
    def sample(seed, **options):
        return generate(network, prompts, do_sample=True, seed=seed, **{"top_k": 20, "top_p": 0.95, **options})

    once = sample(1, temperature=0.8, repetition_penalty=1.1)
    assert once == sample(1, temperature=0.8, repetition_penalty=1.1)
    assert once != sample(2, temperature=0.8, repetition_penalty=1.1)
    assert sample(3, top_k=1) == generate(network, prompts)
    penalized = generate(network, prompts, repetition_penalty=5.0)
    for output, prompt in zip(penalized, prompts):
        assert len(set(output[len(prompt) :]) - set(prompt)) > len(set(output[len(prompt) :])) * 0.9


def test_prompts_that_do_not_fit_are_refused_and_leave_the_cache_free(network, prompts, monkeypatch):
    with pytest.raises(InputError, match=r"5 prompts of up to 40 tokens.*15 blocks of 16.*num_blocks=12; raise"):
        network.generate(prompts[:1] * 5, max_new_tokens=2)
    with pytest.raises(InputError, match="num_blocks=12; raise"):
        generate(network, prompts[:1] * 4, tokens=30)  # three blocks each, and a fourth for the answers
    assert free_blocks(network) == 12
    with pytest.raises(InputError, match=r"prompt 2 of 2 has 190 tokens.*seq_length=190 leaves room for 189"):
        network.generate([prompts[0], [5] * 190])
    with pytest.raises(InputError, match="no prompt to answer"):
        network.generate([[]])
    with pytest.raises(InputError, match="prompt 2 holds nothing but padding"):
        network.generate([[5, 6], [0, 0]])
    expected = generate(network, prompts)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="in the middle"):
        patch.setattr(network.steps, "decode", lambda *_: (_ for _ in ()).throw(ValueError("in the middle")))
        generate(network, prompts)
    assert free_blocks(network) == 12
    assert generate(network, prompts) == expected
    assert len(generate(network, [[5] * 189])[0]) == 190


@pytest.mark.parametrize("tile", [512, 48])
@pytest.mark.parametrize("wide", [(), (1024,)])
@pytest.mark.parametrize("sizes", [(512, 128), (64,), (1,), (7, 3)])
def test_chunks_cover_a_prompt_once_and_lie_in_one_tile(sizes, wide, tile):
    for length in (0, 1, 6, 127, 128, 129, 300, 511, 512, 700, 1153, 2047, 2048):
        chunks = list(chunks_of(length, sizes, tile, wide))
        ends = np.cumsum([kept for _, _, kept in chunks])
        assert [start for start, _, _ in chunks] == [0, *ends][: len(chunks)] and (ends[-1:] == length).all()
        filled_up = length % 1024 if wide and length % 1024 > 1024 - min(sizes) else 0
        for start, size, kept in chunks:
            if size in wide:
                assert start % size == 0 and kept in (size, filled_up)
                continue
            assert size in sizes and 0 < kept <= size
            assert start // tile == (start + kept - 1) // tile
        assert sum(kept for _, size, kept in chunks if size in wide) == (
            length // 1024 * 1024 + filled_up if wide else 0
        )


def test_a_chunk_whose_scores_differ_too_much_is_computed_again(network, monkeypatch):
    monkeypatch.setattr(cached_steps, "PREFILL_TILE", 32)
    weights = [layer.self_attention.query_key_value.weight for layer in network.transformer.encoder.layers]
    originals = [weight.asnumpy() for weight in weights]
    ids = np.random.default_rng(7).integers(3, 290, (1, 90))
    logits = []
    try:
        for weight, original in zip(weights, originals):
            weight.set_data(ms.Tensor(original * 10))
        for any_scores in (False, True):
            steps = CachedSteps(network.transformer, network.config)
            steps.chunks, steps.any_scores = (32,), any_scores
            logits.append(steps.prefill(ids, np.array([90]), np.arange(12)[None]))
            assert steps.any_scores
    finally:
        for weight, original in zip(weights, originals):
            weight.set_data(ms.Tensor(original))
    assert np.isfinite(logits[0]).all()
    np.testing.assert_allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("lengths", [(150,), (75, 51), (75, 7, 51)])
def test_small_and_wide_tiles_give_what_one_tile_gives(network, monkeypatch, lengths):
    prompts = [np.random.default_rng(8).integers(3, 290, length).tolist() for length in lengths]
    expected = generate(network, prompts)  # one tile holds all of it
    monkeypatch.setattr(cached_steps, "DECODE_TILE", 16)
    monkeypatch.setattr(cached_steps, "PREFILL_TILE", 32)
    steps = CachedSteps(network.transformer, network.config)
    steps.chunks = (32,)
    monkeypatch.setattr(network, "steps", steps)
    assert generate(network, prompts) == expected
    assert len(steps.programs) >= 3


def test_prompts_as_lists_and_arrays():
    np.testing.assert_array_equal(padded([[5, 6], [7]], 0), [[5, 6], [7, 0]])
    np.testing.assert_array_equal(padded([5, 6], 0), [[5, 6]])
    np.testing.assert_array_equal(padded(np.array([[5, 6]]), 0), [[5, 6]])
    np.testing.assert_array_equal(lengths_of(np.array([[5, 0, 6], [7, 0, 0]]), 0), [3, 1])


@pytest.mark.slow
def test_logits_behind_32000_tokens_are_those_of_the_whole_prompt_at_once():
    overrides = dict(num_layers=2, seq_length=32768, num_blocks=2048)
    ids = np.random.default_rng(5).integers(3, 290, (1, 32000)).astype(np.int32)
    cached = build(**overrides)
    table = np.random.default_rng(6).permutation(2048)[None].astype(np.int32)
    ours = cached.steps.prefill(ids, np.array([32000]), table)
    whole = build(**overrides, use_past=False, is_dynamic=False)
    theirs = whole(ms.Tensor(ids), batch_valid_length=ms.Tensor([[32000]], ms.int32))[0].asnumpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
