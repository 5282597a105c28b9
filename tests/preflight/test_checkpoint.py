import importlib

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.preflight import check_checkpoint


class Network(nn.Cell):
    """Weights under names like the model's."""

    def __init__(self, hidden=4, adapters=False, cache=False):
        super().__init__()
        self.transformer = nn.CellList([nn.Dense(hidden, hidden) for _ in range(2)])
        self.embedding = Parameter(Tensor(np.zeros((8, hidden), np.float32)), name="embedding.weight")
        if adapters:
            self.mindpet_delta_lora_a = Parameter(
                Tensor(np.zeros((2, hidden), np.float32)), name="mindpet_delta_lora_a"
            )
        if cache:
            self.key_cache = Parameter(Tensor(np.zeros((2, hidden), np.float32)), name="key_cache")


def values(network, **changes):
    """{name: array} of a network; changes replace entries, None removes them."""
    found = {parameter.name: parameter.asnumpy() for parameter in network.get_parameters()}
    found.update({name.replace("__", "."): value for name, value in changes.items()})
    return {name: value for name, value in found.items() if value is not None}


def save(arrays, name="model.ckpt", **counters):
    entries = [{"name": key, "data": Tensor(array)} for key, array in arrays.items()]
    ms.save_checkpoint(entries, name, append_dict=counters or None, format=name.rsplit(".", 1)[1])
    return name


def refusal(path, network):
    with pytest.raises(InputError) as caught:
        check_checkpoint(path, network)
    return str(caught.value)


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_checkpoint_of_the_network_passes(name):
    network = Network()
    check_checkpoint(save(values(network), name), network)


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_missing_extra_and_misshapen_are_named_at_once(name):
    network = Network()
    path = save(
        values(
            network,
            transformer__0__bias=None,
            transformer__9__weight=np.zeros((4, 4), np.float32),
            transformer__1__weight=np.zeros((4, 6), np.float32),
        ),
        name,
    )
    message = refusal(path, network)
    assert message.startswith(f"{path} does not fit the model: ")
    assert "1 missing: transformer.0.bias;" in message
    assert "1 not in the model: transformer.9.weight;" in message
    assert "1 of another shape: transformer.1.weight is (4, 6) in the file, (4, 4) in the model." in message


def test_another_size_of_model_names_the_first_few():
    message = refusal(save(values(Network(hidden=6))), Network(hidden=4))
    assert "5 of another shape: " in message
    assert "embedding.weight is (8, 6) in the file, (8, 4) in the model" in message
    message = refusal(save({}, num=3), Network())
    assert "5 missing: " in message
    extra = {f"layer{i}__weight": np.zeros(2, np.float32) for i in range(7)}
    message = refusal(save(values(Network(), **extra)), Network())
    assert "7 not in the model: " in message and "and 2 more" in message


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_weight_that_is_not_finite_is_named(name, bad, dtype):
    spoilt = np.zeros((4, 4), dtype)
    spoilt[3, 2] = bad
    network = Network()
    text = refusal(save(values(network, transformer__1__weight=spoilt), name), network)
    assert text.startswith(f"load_checkpoint {name}: transformer.1.weight is the first parameter with NaN or infinity")
    assert "\n" not in text
    whole = {**values(network), "adam_v.transformer.1.weight": spoilt}  # written by a step that was skipped
    check_checkpoint(save(whole, name), network)


def test_optimizer_states_and_counters_are_no_weights():
    network = Network()
    weights = values(network)
    states = {
        f"{prefix}.{name}": array
        for name, array in weights.items()
        for prefix in ("adam_m", "adam_v", "moment1", "moment2", "accu_grads")
    }
    scalars = {
        name: np.float32(1).reshape(shape)
        for name, shape in (("scale_sense", ()), ("global_step", (1,)), ("learning_rate", ()), ("beta1_power", ()))
    }
    path = save({**weights, **states, **scalars}, epoch_num=2, step_num=7, loss_scale=65536.0)
    check_checkpoint(path, network)


@pytest.mark.parametrize(
    "build",
    [
        lambda parameters: importlib.import_module("mindformers.core.optim").AdamW(parameters, learning_rate=1e-3),
        lambda parameters: nn.Adam(parameters),
        lambda parameters: nn.Momentum(parameters, 0.1, 0.9),
    ],
    ids=["AdamW", "Adam", "Momentum"],
)
def test_what_optimizers_save_passes(build):
    """The names are the optimizers' own."""
    network = Network()
    optimizer = build(network.trainable_params())
    parameters = {p.name: p for p in [*network.get_parameters(), *optimizer.get_parameters()]}
    assert len(parameters) > 5
    ms.save_checkpoint([{"name": name, "data": p} for name, p in parameters.items()], "state.ckpt")
    check_checkpoint("state.ckpt", network)


def test_a_plain_checkpoint_starts_lora_training():
    check_checkpoint(save(values(Network())), Network(adapters=True))


def test_adapters_of_another_rank_are_refused():
    path = save(values(Network(adapters=True), mindpet_delta_lora_a=np.zeros((16, 4), np.float32)))
    assert "mindpet_delta_lora_a is (16, 4) in the file, (2, 4) in the model" in refusal(path, Network(adapters=True))


def test_a_checkpoint_with_adapters_does_not_fit_a_plain_model():
    assert "not in the model: mindpet_delta_lora_a" in refusal(save(values(Network(adapters=True))), Network())


def test_adapters_alone_are_no_checkpoint():
    path = save({"mindpet_delta_lora_a": np.zeros((2, 4), np.float32)})
    assert "5 missing" in refusal(path, Network(adapters=True))


def test_caches_are_not_asked_for():
    check_checkpoint(save(values(Network())), Network(cache=True))


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_file_cut_off_is_named(name, share, tmp_path):
    path = save(values(Network(hidden=64)), name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    assert name in refusal(path, Network(hidden=64))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04"])
def test_a_file_of_another_kind_is_named(content, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(content)
    assert "model.ckpt" in refusal("model.ckpt", Network())


def test_folders_are_left_to_mindformers(tmp_path):
    (tmp_path / "rank_0").mkdir()
    assert check_checkpoint(str(tmp_path), Network()) is None
