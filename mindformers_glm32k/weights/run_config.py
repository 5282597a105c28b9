"""What the commands on parallel checkpoints take from a run's YAML: the model's sizes, LoRA's scale."""

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.parallel import one_program
from mindformers_glm32k.weights.hf_config import PUBLISHED
from mindformers_glm32k.weights.model_dims import sizes_from_config

_SIZE_FIELDS = (
    "num_layers",
    "padded_vocab_size",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "multi_query_group_num",
    "multi_query_attention",
    "add_qkv_bias",
)


def sizes_of_run(config, path):
    """The sizes that decide the weights' shapes.

    Args:
        config (dict): the merged configuration.
        path: the YAML, for messages.

    Returns:
        sizes.Sizes

    Raises:
        InputError: sizes that are no positive numbers.
    """
    model = config["model"]["model_config"]
    fields = {key: model[key] for key in PUBLISHED if model.get(key) is not None and key in _SIZE_FIELDS}
    return sizes_from_config({**PUBLISHED, **fields}, path)


def shards_parameters(config, layout):
    """bool: whether a run shards its parameters; with one NPU or plain data parallelism every rank has them whole."""
    return layout.world > 1 and one_program(config)


def lora_scale(config, path):
    """What MindFormers multiplies an adapter's product by: lora_alpha / lora_rank.

    Args:
        config (dict): merged.
        path: the YAML, for messages.

    Returns:
        float

    Raises:
        InputError: no pet_config, or numbers missing.
    """
    pet = config["model"]["model_config"].get("pet_config") or {}
    try:
        return float(pet["lora_alpha"]) / int(pet["lora_rank"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"{path}: model_config.pet_config with lora_rank and lora_alpha is needed (found "
            f"{pet or None}); give --lora_scaling or the YAML of the LoRA run"
        ) from error
