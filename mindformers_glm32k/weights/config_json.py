"""The one table of config.json's fields, as ChatGLM and transformers' `glm` call them; readers of the file as
transformers 4 and 5 write it, and of reports and YAMLs in its place; and comparison of fields that no shape shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_glm32k.checks import parse_json
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.names import ModelDims
from mindformers_glm32k.weights.tensors import TO_CONFIG


class Field(NamedTuple):
    """A field of ChatGLM's config.json.

    published: what THUDM/chatglm3-6b-32k has; also the default of GLM32KConfig.
    glm: the field of transformers' `glm` with the same meaning.
    filled_in: written for `glm` even where the ChatGLM file leaves it to its code, since transformers' defaults are
        those of another model.
    in_yaml: means the same in a MindFormers model_config.
    shapes: decides the shapes of weights.
    """

    published: Any
    glm: str | None = None
    filled_in: bool = False
    in_yaml: bool = True
    shapes: bool = False


FIELDS = {
    "_name_or_path": Field("THUDM/chatglm3-6b-32k", in_yaml=False),
    "model_type": Field("chatglm", in_yaml=False),
    "architectures": Field(["ChatGLMModel"], in_yaml=False),
    "auto_map": Field(
        {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
        },
        in_yaml=False,
    ),
    "add_bias_linear": Field(False),
    "add_qkv_bias": Field(True, "attention_bias", filled_in=True, shapes=True),
    "apply_query_key_layer_scaling": Field(True),
    "apply_residual_connection_post_layernorm": Field(False),
    "attention_dropout": Field(0.0, "attention_dropout", filled_in=True),
    "attention_softmax_in_fp32": Field(True),
    "bias_dropout_fusion": Field(True),
    "ffn_hidden_size": Field(13696, "intermediate_size", shapes=True),
    "fp32_residual_connection": Field(False),
    "hidden_dropout": Field(0.0),
    "hidden_size": Field(4096, "hidden_size", shapes=True),
    "kv_channels": Field(128, "head_dim", shapes=True),
    "layernorm_epsilon": Field(1e-05, "rms_norm_eps", filled_in=True),
    "rope_ratio": Field(50),  # `glm`: rope_theta, see to_glm
    "multi_query_attention": Field(True, shapes=True),
    "multi_query_group_num": Field(2, "num_key_value_heads", shapes=True),
    "num_attention_heads": Field(32, "num_attention_heads", shapes=True),
    "num_layers": Field(28, "num_hidden_layers", shapes=True),
    "original_rope": Field(True, in_yaml=False),
    "padded_vocab_size": Field(65024, "vocab_size", shapes=True),
    "post_layer_norm": Field(True),
    "rmsnorm": Field(True),
    "seq_length": Field(32768, "max_position_embeddings", filled_in=True),
    "use_cache": Field(True, "use_cache", filled_in=True, in_yaml=False),
    "torch_dtype": Field("float16", "torch_dtype", in_yaml=False),
    "transformers_version": Field("4.30.2", in_yaml=False),
    "tie_word_embeddings": Field(False, "tie_word_embeddings", filled_in=True, in_yaml=False),
    "eos_token_id": Field(2, "eos_token_id", filled_in=True),
    "pad_token_id": Field(0, "pad_token_id", filled_in=True),
}
PUBLISHED = {key: field.published for key, field in FIELDS.items()}
GLM_NAMES = {key: field.glm for key, field in FIELDS.items() if field.glm}
_ROPE_BASE = 10000.0
_STOP_TOKENS = (2, 64795, 64797)  # </s>, <|user|>, <|observation|>
_MODEL_CONFIG_LAYOUT = ("qkv_concat", "mlp_concat")
# The published 8k model's config.json has no rope_ratio, and its code takes 1; the 32k model's has 50.
_LONGEST_WITHOUT_ROPE_RATIO = 8192
# Fields that change the logits but no shape (shapes show products such as heads x kv_channels), and the vocabulary's
# size, by which people tell models apart.
_MUST_AGREE = (
    "rope_ratio",
    "layernorm_epsilon",
    "num_attention_heads",
    "kv_channels",
    "multi_query_group_num",
    "padded_vocab_size",
    "add_qkv_bias",
    "rmsnorm",
    "post_layer_norm",
    "apply_residual_connection_post_layernorm",
)


def to_glm(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of transformers' native `glm` model, from that of ChatGLM, with the keys of versions 4 and 5.

    ChatGLM multiplies the rotary base by rope_ratio and rotates half of each head (modeling_chatglm.py); that is
    rope_theta = 10000 x rope_ratio and partial_rotary_factor = 0.5.
    """
    fields = {**{key: field.published for key, field in FIELDS.items() if field.filled_in}, **fields}
    config = {
        "model_type": "glm",
        "architectures": ["GlmForCausalLM"],
        "hidden_act": "silu",
        "partial_rotary_factor": 0.5,
        "rope_theta": _ROPE_BASE * fields.get("rope_ratio", 1),
    }
    config["rope_parameters"] = {
        "rope_type": "default",
        **{key: config[key] for key in ("rope_theta", "partial_rotary_factor")},
    }
    config.update({glm: fields[key] for key, glm in GLM_NAMES.items() if key in fields})
    if not fields.get("multi_query_attention", True):
        config["num_key_value_heads"] = fields["num_attention_heads"]
    if fields.get("padded_vocab_size") == PUBLISHED["padded_vocab_size"] and fields.get("eos_token_id") == 2:
        config["eos_token_id"] = list(_STOP_TOKENS)  # in a chat the model ends its turn with the next one's role token
    return config


def to_chatglm(config: Mapping[str, Any], path: Any) -> dict[str, Any]:
    """The published model's config.json from that of a `glm` model: the inverse of to_glm.

    Raises:
        InputError: settings that ChatGLM3 does not have.
    """
    config = _with_flat_rope(config, path)
    if config.get("rope_theta") is None:
        raise InputError(
            f"{path}: neither rope_theta nor rope_parameters is there; add rope_theta: {_ROPE_BASE:g} x rope_ratio, "
            "which is 500000 for ChatGLM3-6B-32K"
        )
    ratio = config["rope_theta"] / _ROPE_BASE
    if config.get("rope_ratio", ratio) != ratio:
        raise InputError(
            f"{path}: rope_theta is {config['rope_theta']!r}, rope_ratio {config['rope_ratio']!r}; mend one"
        )
    if config.get("partial_rotary_factor", 0.5) != 0.5 or config.get("hidden_act", "silu") != "silu":
        raise InputError(
            f"{path}: partial_rotary_factor 0.5 and hidden_act silu are ChatGLM3's, found "
            f"{config.get('partial_rotary_factor')!r} and {config.get('hidden_act')!r}"
        )
    fields = dict(PUBLISHED, rope_ratio=_whole(ratio))
    fields.update({key: config[glm] for key, glm in GLM_NAMES.items() if glm in config})
    if fields["eos_token_id"] == list(_STOP_TOKENS):
        fields["eos_token_id"] = _STOP_TOKENS[0]
    fields.pop("_name_or_path")
    return fields


class KnownConfig(NamedTuple):
    """A checkpoint's config.

    fields: as in ChatGLM's config.json, rope_ratio among them.
    layout: `qkv_concat` and `mlp_concat`, where a YAML names them.
    origin: the file that it was read from.
    notes: sentences on defaults for what the file leaves out.
    """

    fields: dict[str, Any]
    layout: dict[str, bool]
    origin: Path
    notes: tuple[str, ...] = ()


def read_config(path: str | Path) -> KnownConfig:
    """Reads a config.json (ChatGLM or `glm`), its folder, a conversion's report, or a MindFormers YAML.

    Raises:
        InputError: missing, unreadable, of another model, or with no rotary base or two different ones.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix in (".yaml", ".yml"):
        return KnownConfig(*_from_yaml(path), path)
    config = load_object(path)
    config = config.get("huggingface_config", config)  # a conversion's report carries it
    if not isinstance(config, dict) or config.get("model_type") not in ("chatglm", "glm"):
        found = config.get("model_type") if isinstance(config, dict) else config
        raise InputError(f"{path}: model_type is {found!r}, 'chatglm' or 'glm' is needed")
    config = _with_flat_rope(config, path)
    if config["model_type"] == "glm":
        return KnownConfig(to_chatglm(config, path), {}, path)
    return KnownConfig(*_with_rope_ratio(config, path))


def _with_flat_rope(config, path):
    """The fields as transformers 4 writes them; version 5 has `rope_parameters` and `dtype` instead."""
    config = dict(config)
    if config.get("dtype") is not None:
        config.setdefault("torch_dtype", config["dtype"])
    config.pop("dtype", None)
    for section in ("rope_parameters", "rope_scaling"):
        rope = config.pop(section, None) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind != "default":
            raise InputError(f"{path}: {section} is {rope!r}; ChatGLM3 has plain rotary positions, of type 'default'")
        for key in ("rope_theta", "partial_rotary_factor"):
            value = rope.get(key, config.get(key))
            if value != config.get(key, value):
                raise InputError(f"{path}: {key} is {config[key]!r}, but {value!r} in {section}; mend one of the two")
            if value is not None:
                config[key] = _positive(value, key, path)
    return config


def _with_rope_ratio(config, path):
    """ChatGLM's fields with rope_ratio, from whichever key the file has; returns the fields of a KnownConfig."""
    theta, ratio, notes = config.pop("rope_theta", None), config.get("rope_ratio"), ()
    if config.pop("partial_rotary_factor", 0.5) != 0.5:
        raise InputError(f"{path}: partial_rotary_factor is not 0.5, which is ChatGLM3's")
    if ratio is not None:
        _positive(ratio, "rope_ratio", path)
        if ratio != 1 and "chatglm2" in str(config.get("_name_or_path")).lower():
            raise InputError(
                f"{path}: _name_or_path is {config['_name_or_path']!r}, rope_ratio {ratio!r}: ChatGLM2 divides "
                "positions by it where ChatGLM3 multiplies the rotary base; take a ChatGLM3 model"
            )
        if theta not in (None, _ROPE_BASE, _ROPE_BASE * ratio):
            raise InputError(
                f"{path}: rope_ratio is {ratio!r}, rope_theta {theta!r}, which is "
                f"{_ROPE_BASE:g} x {theta / _ROPE_BASE:g}; remove the one that is wrong"
            )
    elif theta is not None:
        ratio = _whole(theta / _ROPE_BASE)
    elif config.get("seq_length", PUBLISHED["seq_length"]) <= _LONGEST_WITHOUT_ROPE_RATIO:
        ratio, notes = 1, (f"{path}: no rope_ratio; 1 is taken, as the code of ChatGLM3-6B (8k) does",)
    else:
        raise InputError(
            f"{path}: neither rope_ratio nor rope_theta nor rope_parameters is there, and seq_length is "
            f"{config.get('seq_length')!r}; add rope_ratio: 50 for ChatGLM3-6B-32K, 1 for ChatGLM3-6B and -Base"
        )
    return dict(config, rope_ratio=ratio), {}, path, notes


def _positive(value, key, path):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise InputError(f"{path}: {key} is {value!r}, a positive number is needed")
    return value


def _whole(number):
    return int(number) if number == int(number) else number


def load_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; raises InputError for anything else."""
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds a {type(config).__name__}, a JSON object is needed")
    return config


def _from_yaml(path):
    import yaml

    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["model_config"]
        given = {key: model[key] for key, field in FIELDS.items() if field.in_yaml and model.get(key) is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise InputError(
            f"{path}: no readable YAML with model.model_config ({type(error).__name__}: {error})"
        ) from error
    defaults = dict(PUBLISHED)
    if model.get("type") == "ChatGLM2Config":  # upstream's own defaults where they differ from ours
        defaults.update(rope_ratio=1, seq_length=2048)
    for key, value in given.items():
        if isinstance(value, str) and not isinstance(defaults[key], str):
            try:
                given[key] = float(value)  # YAML 1.1 reads 1e-5 as text
            except ValueError as error:
                raise InputError(f"{path}: model.model_config.{key} is {value!r}, a number is needed") from error
    layout = {key: model[key] for key in _MODEL_CONFIG_LAYOUT if isinstance(model.get(key), bool)}
    return dict(defaults, **given), layout


def check_agreement(known: KnownConfig | None, wanted: Mapping[str, Any], where: object) -> None:
    """Compares a checkpoint's config with another, such as a run's model_config, in fields that shapes do not show.

    Raises:
        InputError: they differ; names every field with both values.
    """
    wrong = disagreements(known.fields, wanted) if known else {}
    if wrong:
        raise InputError(
            f"{known.origin}: {', '.join(f'{key} is {found}' for key, (found, _) in wrong.items())}, but {where} has "
            f"{', '.join(f'{key} {value}' for key, (_, value) in wrong.items())}: another model, though shapes may "
            "agree; load the checkpoint meant, or set the values of its config"
        )


def disagreements(fields: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields in which two models differ, perhaps without a difference in shapes: key -> (value found, value wanted).

    A field that is left out has its reader's default: the published model's, or upstream's for a ChatGLM2Config.
    """
    found, wanted = _effective(fields), _effective(wanted)
    return {key: (found[key], wanted[key]) for key in _MUST_AGREE if found[key] != wanted[key]}


def _effective(fields):
    """The fields that must agree, missing ones at their reader's default (see `disagreements`)."""
    defaults = dict(PUBLISHED, rope_ratio=1) if fields.get("type") == "ChatGLM2Config" else PUBLISHED
    result = {key: defaults[key] if fields.get(key) is None else fields[key] for key in _MUST_AGREE}
    if not fields.get("multi_query_attention", True):
        result["multi_query_group_num"] = result["num_attention_heads"]
    for key, value in result.items():
        if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
            try:
                result[key] = float(value)
            except ValueError as error:
                raise InputError(f"model_config.{key} is {value!r}, a number is needed") from error
    return result


def config_text(fields: Mapping[str, Any], naming: str, dtype: str) -> str:
    """The text of config.json, for "chatglm" or "glm", with the dtype of the weights."""
    config = dict(to_glm(fields) if naming == "glm" else fields, torch_dtype=TO_CONFIG[dtype])
    if naming == "glm":
        config["dtype"] = config["torch_dtype"]
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def dims_from_config(config: Mapping[str, Any], path: Any) -> ModelDims:
    """Reads the dimensions from the content of the config.json at `path`, of ChatGLM or of transformers' `glm`.

    Raises:
        InputError: another model, or keys that are missing or no positive numbers.
    """
    kind = config.get("model_type")
    if kind not in ("chatglm", "glm"):
        raise InputError(f"{path}: model_type is {kind!r}, 'chatglm' or 'glm' is needed")

    def key_in_file(key):
        return key if kind == "chatglm" else GLM_NAMES[key]

    values, problems = {}, []
    for key in (
        "num_layers",
        "padded_vocab_size",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "kv_channels",
    ):
        values[key] = config.get(key_in_file(key))
        if key == "kv_channels" and values[key] is None and kind == "glm" and not problems:
            values[key] = values["hidden_size"] // values["num_attention_heads"]
        if type(values[key]) is not int or values[key] < 1:
            problems.append(f"{key_in_file(key)} is {values[key]!r}, a positive number is needed")
    heads = values["num_attention_heads"]
    groups = config.get(key_in_file("multi_query_group_num"), heads)
    if kind == "chatglm" and not config.get("multi_query_attention", True):
        groups = heads
    if type(groups) is not int or groups < 1:
        problems.append(f"{key_in_file('multi_query_group_num')} is {groups!r}, a positive number is needed")
    if config.get("add_bias_linear"):
        problems.append("add_bias_linear is true: ChatGLM3 has no biases in its linear layers")
    if config.get("tie_word_embeddings"):
        problems.append("tie_word_embeddings is true: ChatGLM3 has an output layer of its own")
    if problems:
        raise InputError(f"{path}: " + "; ".join(problems))
    return ModelDims(
        values["num_layers"],
        values["padded_vocab_size"],
        values["hidden_size"],
        values["ffn_hidden_size"],
        heads * values["kv_channels"],
        groups * values["kv_channels"],
        bool(config.get(key_in_file("add_qkv_bias"), True)),
    )


def dims_of_run(config: Mapping[str, Any], path: Any) -> ModelDims:
    """The dimensions from a run's merged configuration, of the YAML `path`; raises as `dims_from_config` does."""
    model = config["model"]["model_config"]
    given = {key: model[key] for key, field in FIELDS.items() if field.shapes and model.get(key) is not None}
    return dims_from_config({**PUBLISHED, **given}, path)
