"""config.json of ChatGLM and of transformers' `glm`, as transformers 4 and 5 write it, reports and YAMLs that stand in
for it, and what two of them must agree on although no shape shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_glm32k.checks import parse_json
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.finding import snapshot_of
from mindformers_glm32k.weights.model_dims import FIELDS, GLM_NAMES, PUBLISHED, ModelDims, dims_from_config
from mindformers_glm32k.weights.tensors import TO_CONFIG

_ROPE_BASE = 10000.0
_STOP_TOKENS = (2, 64795, 64797)  # </s>, <|user|>, <|observation|>
_MODEL_CONFIG_LAYOUT = ("qkv_concat", "mlp_concat")
# The published 8k model's config.json has no rope_ratio, and its code takes 1; the 32k model's has 50.
_LONGEST_WITHOUT_ROPE_RATIO = 8192
# What changes the logits and no shape tells (the shapes show products such as heads x kv_channels), and the
# vocabulary, by which people know their model.
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
    """The config of transformers' native `glm` model, from that of ChatGLM, in the words of versions 4 and 5.

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
    origin: the file that says so.
    notes: what the file leaves to its reader.
    """

    fields: dict[str, Any]
    layout: dict[str, bool]
    origin: Path
    notes: tuple[str, ...] = ()


def read_config(path: str | Path) -> KnownConfig:
    """Reads a config.json (ChatGLM or `glm`), its folder, a conversion's report, or a MindFormers YAML.

    Raises:
        InputError: missing, unreadable, of another model, or silent or of two minds about the rotary base.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix in (".yaml", ".yml"):
        return KnownConfig(*_from_yaml(path), path)
    config = _load_json(path)
    config = config.get("huggingface_config", config)  # a conversion's report carries it
    if not isinstance(config, dict) or config.get("model_type") not in ("chatglm", "glm"):
        found = config.get("model_type") if isinstance(config, dict) else config
        raise InputError(f"{path}: model_type is {found!r}, 'chatglm' or 'glm' is needed")
    config = _with_flat_rope(config, path)
    if config["model_type"] == "glm":
        return KnownConfig(to_chatglm(config, path), {}, path)
    return KnownConfig(*_with_rope_ratio(config, path))


def _with_flat_rope(config, path):
    """The fields as transformers 4 writes them: `rope_parameters` and `dtype` are those of version 5."""
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
    """ChatGLM's fields with rope_ratio, whichever way the file says it; as the first fields of KnownConfig."""
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


def _load_json(path):
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


def config_of(checkpoint: str | Path) -> KnownConfig | None:
    """What lies beside a checkpoint and tells its config: config.json in or beside it, or the report of the conversion,
    split or merge that made it; None where nothing does.

    Raises:
        InputError: the config.json or report contradicts itself.
    """
    path = Path(checkpoint)
    if path.is_dir():
        path = snapshot_of(path)
        places = [*path.glob("*.report.json"), *path.glob("rank_0/*.report.json"), path / "config.json"]
    else:
        stem = re.sub(r"(-\d{5}-of-\d{5})?(\.\w+\.index\.json|\.\w+)$", "", path.name)
        places = [path.with_name(stem + ".report.json"), path.with_name("config.json")]
    for place in places:
        if place.is_file():
            content = _load_json(place)
            content = content.get("huggingface_config") if place.name.endswith(".report.json") else content
            if isinstance(content, dict) and content.get("model_type") in ("chatglm", "glm"):
                return read_config(place)
    return None


def check_agreement(known: KnownConfig | None, wanted: Mapping[str, Any], where: object) -> None:
    """Holds a checkpoint's config against another, such as a run's model_config, in what shapes do not show.

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
    """What differs between two models and may not show in shapes: key -> (value found, value wanted).

    A value that one of the two leaves out is the default of its reader: of the published model, or upstream's.
    """
    found, wanted = _effective(fields), _effective(wanted)
    return {key: (found[key], wanted[key]) for key in _MUST_AGREE if found[key] != wanted[key]}


def _effective(fields):
    """The fields that must agree, with the defaults of who leaves one out."""
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


def find_config(option: Any, checkpoint: Path, inferred: ModelDims) -> KnownConfig:
    """The config of a checkpoint, from the first of: the option, what lies beside it (see `config_of`), the published
    model when all dimensions are its.

    Raises:
        InputError: none of them is there, two contradict each other, or one the dimensions inferred from the tensors.
    """
    beside = config_of(checkpoint)
    known = beside if option is None else read_config(option)
    if known is not None:
        wrong = dims_from_config(known.fields, known.origin).differences(inferred)
        if wrong:
            raise InputError(f"{checkpoint}: does not fit {known.origin}: {'; '.join(wrong)}")
        check_agreement(beside, known.fields, known.origin)
        return known
    if inferred == dims_from_config(PUBLISHED, "the published config.json"):
        note = f"{checkpoint}: no config.json or report beside it; that of ChatGLM3-6B-32K is taken (rope_ratio 50)"
        return KnownConfig(dict(PUBLISHED), {}, Path(checkpoint), (note,))
    raise InputError(
        f"{checkpoint}: config.json cannot be made up from the weights (they do not tell the number of "
        "heads); give --config with the original config.json or the YAML that trained the model"
    )


def config_text(fields: Mapping[str, Any], naming: str, dtype: str) -> str:
    """The text of config.json, for "chatglm" or "glm", with the dtype of the weights."""
    config = dict(to_glm(fields) if naming == "glm" else fields, torch_dtype=TO_CONFIG[dtype])
    if naming == "glm":
        config["dtype"] = config["torch_dtype"]
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
