"""The programs of a small layout and of one device, compiled once per session, with the weights of the published tiny
checkpoint where it is there."""

import numpy as np
import pytest

from dryrun.tiny import CONFIG, OVERRIDES
from mindformers_glm32k.dryrun.compile.pool import read_layout
from mindformers_glm32k.dryrun.simulator import scale_down, state, train

ROWS, LENGTH = 2, 64
SIZES = {
    "model.model_config.num_layers": 3,
    "parallel_config.micro_batch_num": 1,
    "parallel_config.pipeline_stage": 1,
    "lr_schedule.total_steps": 1000,
    "model.model_config.loss_chunk_size": 16,
    "parallel.parallel_optimizer_config": "{parallel_optimizer_threshold: 0}",
}


class Case:
    """Compiled programs and how to run them.

    Args:
        layout (ParallelLayout), config (dict): of the programs.
        programs (list[CompiledRank]): by rank.
        strategy (pathlib.Path): folder of the strategy files.
    """

    def __init__(self, work, **overrides):
        values = {**OVERRIDES, **SIZES, **{key.replace("__", "."): value for key, value in overrides.items()}}
        arguments = [
            "--config",
            str(CONFIG),
            *(word for key, value in values.items() for word in (f"--{key}", str(value))),
            *scale_down.precision_overrides("float32"),
        ]
        self.layout, self.config = read_layout(arguments)
        self.programs = train.compile_ranks(arguments, self.layout, work)
        self.strategy = work / "strategy"

    def run(self, whole, sequences, programs=None):
        """train.run on these programs, or on changed ones."""
        return train.run(programs or self.programs, self.layout, whole, sequences)


@pytest.fixture(scope="session")
def one_device(tmp_path_factory):
    """Two sequences on one device."""
    return Case(
        tmp_path_factory.mktemp("one_device"),
        use_parallel=False,
        parallel_config__data_parallel=1,
        runner_config__batch_size=ROWS,
        train_dataset__batch_size=ROWS,
    )


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory):
    """The same on dp 2 x mp 2 with optimizer sharding."""
    return Case(
        tmp_path_factory.mktemp("four_ranks"),
        parallel_config__data_parallel=2,
        parallel_config__model_parallel=2,
        runner_config__batch_size=1,
    )


@pytest.fixture(scope="session")
def two_ranks_in_chunks(tmp_path_factory):
    """The same on dp 2 with the feed-forward part in chunks of tokens."""
    return Case(
        tmp_path_factory.mktemp("two_ranks"),
        parallel_config__data_parallel=2,
        runner_config__batch_size=1,
        model__model_config__mlp_chunk_size=24,
    )


@pytest.fixture(scope="session")
def golden(reference):
    """Arrays that the published model computed; `labels` as the model takes them."""
    values = dict(np.load(reference / "tiny_hf" / "golden.npz"))
    unshifted = values["labels_unshifted"]
    values["labels"] = np.concatenate([unshifted[:, 1:], np.full((len(unshifted), 1), -100)], 1).astype(np.int32)
    return values


@pytest.fixture(scope="session")
def published(one_device, reference, tmp_path_factory):
    """One device's state with the published tiny weights."""
    return state.load_weights(
        reference / "tiny_hf" / "hf_safetensors_fp32",
        one_device.programs[0].state,
        one_device.config,
        tmp_path_factory.mktemp("published"),
    )


@pytest.fixture(scope="session")
def weights(one_device):
    """One device's state with random weights."""
    return state.random_weights(one_device.programs[0].state)
