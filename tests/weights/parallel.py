"""Whole training checkpoints of tiny models, and the layouts that tests cut them into."""

from dataclasses import dataclass, field, replace

import numpy as np
from dryrun.tiny import CONFIG, FFN, GROUPS, HEADS, HIDDEN, SHARDED, SIZE, VOCABULARY

from mindformers_glm32k.weights.checkpoint import read_file
from mindformers_glm32k.weights.names import ModelDims, model_keys, name_of
from mindformers_glm32k.weights.writer import CheckpointWriter
from weights.strategy_files import write_strategy

NUMPY = {"fp32": np.float32, "fp16": np.float16}
LORA_RANK = 8


@dataclass
class Case:
    """A layout that is compiled.

    Args:
        world, stages: NPUs and pipeline stages.
        overrides: of the tiny model's command line.
        config: YAML.
        layers, hidden, heads: of the model.
    """

    world: int
    stages: int
    overrides: dict
    config: object = CONFIG
    layers: int = 2
    hidden: int = HIDDEN
    heads: int = HEADS
    sizes: ModelDims = field(init=False)

    def __post_init__(self):
        self.overrides = {**SHARDED, **self.overrides}
        self.sizes = ModelDims(self.layers, VOCABULARY, self.hidden, FFN, self.heads * SIZE, GROUPS * SIZE, True)


def _parallel(dp=1, mp=1, pp=1):
    return {
        "parallel_config__data_parallel": dp,
        "parallel_config__model_parallel": mp,
        "parallel_config__pipeline_stage": pp,
        "parallel_config__micro_batch_num": max(pp, 1),
    }


CASES = {
    "mp2": Case(2, 1, _parallel(mp=2)),
    "dp2": Case(2, 1, _parallel(dp=2)),
    "mp2pp2": Case(4, 2, _parallel(mp=2, pp=2)),
    "dp2pp4": Case(8, 4, {"model__model_config__num_layers": 4}, layers=4),  # the shipped YAML's
    "cp8": Case(
        8,
        1,
        {
            "model__model_config__num_attention_heads": 8,
            "model__model_config__hidden_size": 128,
            "model__model_config__seq_length": 256,
            "train_dataset__max_source_length": 128,
            "train_dataset__max_target_length": 127,
        },
        CONFIG.with_name("finetune_glm32k_cp8.yaml"),
        hidden=128,
        heads=8,
    ),
    "lora": Case(2, 1, _parallel(mp=2), CONFIG.with_name("finetune_glm32k_lora.yaml")),
}
TINY_DIMS = CASES["mp2"].sizes


def whole_tensors(sizes=TINY_DIMS, dtype="fp32", states=True, adapters=False, seed=0):
    """Random weights, adapters of the QKV weights, optimizer states of what is trained, and counters.

    Returns:
        dict[str, tuple[numpy.ndarray, str]]: values and dtype.
    """
    rng = np.random.default_rng(seed)
    shapes = {name_of(key, "mindspore"): sizes.shape(key) for key in model_keys(sizes.num_layers, True, True, True)}
    lora = {}
    for name, (rows, columns) in ((n, s) for n, s in shapes.items() if n.endswith("query_key_value.weight")):
        layer = name[: -len(".weight")] + ".mindpet_delta_lora_"
        lora.update({layer + "a": (LORA_RANK, columns), layer + "b": (rows, LORA_RANK)})
    shapes.update(lora if adapters else {})
    tensors = {name: (rng.standard_normal(shape).astype(NUMPY[dtype]), dtype) for name, shape in shapes.items()}
    if states:
        trained = lora if adapters else shapes
        for prefix in ("adam_m.", "adam_v."):
            tensors.update(
                {
                    prefix + name: (rng.standard_normal(shape).astype(np.float32), "fp32")
                    for name, shape in trained.items()
                }
            )
        tensors.update(
            {
                "scale_sense": (np.array(1024, np.float32), "fp32"),
                "step_num": (np.array(40), "Int64"),
                "epoch_num": (np.array(2), "Int64"),
                "global_batch_size": (np.array(8), "Int64"),
                "another_number": (np.array(3), "Int64"),
            }
        )
    return tensors


def write_checkpoint(path, tensors):
    """Writes tensors as `whole_tensors` gives them to a .ckpt or .safetensors file; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with CheckpointWriter.for_file(
        path, [(name, values.shape, dtype) for name, (values, dtype) in tensors.items()]
    ) as writer:
        for name, (values, _) in tensors.items():
            writer.write(name, values.tobytes())
        writer.finish()
    return path


def read_weights(path):
    """Arrays of a checkpoint file, counters left out."""
    return {tensor.name: tensor.load() for tensor in read_file(path) if tensor.shape}


def read_all(path):
    """All entries of a checkpoint file, as `write_checkpoint` takes them."""
    return {
        tensor.name: (
            tensor.load() if tensor.shape else np.array(_NUMBERS[tensor.dtype](tensor.raw_bytes())),
            tensor.dtype,
        )
        for tensor in read_file(path)
    }


_NUMBERS = {"fp32": lambda raw: np.frombuffer(raw, np.float32)[0], "Int64": lambda raw: np.frombuffer(raw, np.int64)[0]}


def write_layout(folder, name, adapters=False, frozen=True, layers=2):
    """Writes the strategy that compiling the tiny model gives for "mp2", "mp2pp2" or "dp2".

    Args:
        folder: of the files, one a rank.
        name: of the layout.
        adapters: LoRA: the states are those of the adapters.
        frozen: whether a LoRA strategy has the weights, which MindSpore leaves out.
        layers: of the model.
    """
    case = CASES[name]
    mp = 2 if "mp2" in name else 1
    for rank in range(case.world):
        stage = rank // (case.world // case.stages)
        layouts = {}
        for tensor in whole_tensors(replace(TINY_DIMS, num_layers=layers), states=False, adapters=adapters):
            if case.stages > 1 and stage != ((".layers.1." in tensor) or "final" in tensor or "output" in tensor):
                continue
            layouts[tensor] = _layout(tensor, mp)
        trained = [n for n in layouts if "lora" in n] if adapters else list(layouts)
        states = {prefix + n: layouts[n] for prefix in ("adam_m.", "adam_v.") for n in trained}
        if adapters and not frozen:
            layouts = {n: layouts[n] for n in trained}
        write_strategy(folder / f"ckpt_strategy_rank_{rank}.ckpt", {**layouts, **states}, stage)
    return folder


def _layout(name, mp):
    if name.endswith("norm.weight"):
        return ([2], [-1], 0, 0)
    if name.endswith("bias"):
        return ([2], [0 if mp == 2 else -1], 0, 0)
    if mp == 1 or "embedding" in name or name.endswith("lora_a"):
        return ([2], [-1, -1], 1, -1)  # the optimizer's cut
    return ([2], [-1, 0] if "self_attention.dense" in name or "4h_to_h" in name else [0, -1], 0, 0)
