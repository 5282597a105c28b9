"""The cells that a trainer wraps round a model."""

from mindspore import nn

from mindformers_glm32k.training import wrappers


class Wrapper(nn.Cell):
    def __init__(self, network, name="network"):
        super().__init__()
        setattr(self, name, network)


def test_innermost_network():
    model = nn.Dense(2, 2)
    assert wrappers.innermost_network(model) is model
    assert wrappers.innermost_network(Wrapper(Wrapper(model, "_backbone"))) is model


def test_micro_batches():
    model = nn.Dense(2, 2)
    pipeline = Wrapper(model)
    assert wrappers.micro_batches(Wrapper(pipeline)) == 1
    pipeline.micro_size = 16
    assert wrappers.micro_batches(Wrapper(pipeline)) == 16
    assert wrappers.micro_batches(pipeline) == 16


def test_interleaved_parts_are_micro_batches_too():
    model = nn.Dense(2, 2)
    inner = Wrapper(model)
    inner.interleave_num = 2
    outer = Wrapper(inner)
    assert wrappers.interleave_num(outer) == wrappers.micro_batches(outer) == 2
    outer.micro_size = 4
    assert wrappers.micro_batches(outer) == 8
    inner.calculate_per_token_loss = True
    assert wrappers.micro_batches(outer) == 1 and wrappers.interleave_num(model) == 1


def test_index_of_input_follows_the_columns_of_the_data_set():
    model = nn.Dense(2, 2)
    wrapped = Wrapper(model)
    assert wrappers.index_of_input(wrapped, "input_mask", 2) == 2
    wrapped.construct_args_key = ["input_ids", "input_mask", "labels"]
    assert wrappers.index_of_input(Wrapper(wrapped), "input_mask", 2) == 1
    assert wrappers.index_of_input(wrapped, "position_ids", 3) == 3
    assert wrapped.construct_args_key[-1] == "position_ids"
