"""The model's dimensions and its config.json in both Hugging Face namings: one table of fields, and who gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.names import QKV, TensorKey, adapter_of, key_of, plain_name
from mindformers_glm32k.weights.tensors import TO_CONFIG, StoredTensor


class _Field(NamedTuple):
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


_FIELDS = {
    "_name_or_path": _Field("THUDM/chatglm3-6b-32k", in_yaml=False),
    "model_type": _Field("chatglm", in_yaml=False),
    "architectures": _Field(["ChatGLMModel"], in_yaml=False),
    "auto_map": _Field(
        {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
        },
        in_yaml=False,
    ),
    "add_bias_linear": _Field(False),
    "add_qkv_bias": _Field(True, "attention_bias", filled_in=True, shapes=True),
    "apply_query_key_layer_scaling": _Field(True),
    "apply_residual_connection_post_layernorm": _Field(False),
    "attention_dropout": _Field(0.0, "attention_dropout", filled_in=True),
    "attention_softmax_in_fp32": _Field(True),
    "bias_dropout_fusion": _Field(True),
    "ffn_hidden_size": _Field(13696, "intermediate_size", shapes=True),
    "fp32_residual_connection": _Field(False),
    "hidden_dropout": _Field(0.0),
    "hidden_size": _Field(4096, "hidden_size", shapes=True),
    "kv_channels": _Field(128, "head_dim", shapes=True),
    "layernorm_epsilon": _Field(1e-05, "rms_norm_eps", filled_in=True),
    "rope_ratio": _Field(50),  # `glm`: rope_theta, see to_glm
    "multi_query_attention": _Field(True, shapes=True),
    "multi_query_group_num": _Field(2, "num_key_value_heads", shapes=True),
    "num_attention_heads": _Field(32, "num_attention_heads", shapes=True),
    "num_layers": _Field(28, "num_hidden_layers", shapes=True),
    "original_rope": _Field(True, in_yaml=False),
    "padded_vocab_size": _Field(65024, "vocab_size", shapes=True),
    "post_layer_norm": _Field(True),
    "rmsnorm": _Field(True),
    "seq_length": _Field(32768, "max_position_embeddings", filled_in=True),
    "use_cache": _Field(True, "use_cache", filled_in=True, in_yaml=False),
    "torch_dtype": _Field("float16", "torch_dtype", in_yaml=False),
    "transformers_version": _Field("4.30.2", in_yaml=False),
    "tie_word_embeddings": _Field(False, "tie_word_embeddings", filled_in=True, in_yaml=False),
    "eos_token_id": _Field(2, "eos_token_id", filled_in=True),
    "pad_token_id": _Field(0, "pad_token_id", filled_in=True),
}
PUBLISHED = {key: field.published for key, field in _FIELDS.items()}
_GLM = {key: field.glm for key, field in _FIELDS.items() if field.glm}
_ROPE_BASE = 10000.0
_STOP_TOKENS = (2, 64795, 64797)  # </s>, <|user|>, <|observation|>
_MODEL_CONFIG_LAYOUT = ("qkv_concat", "mlp_concat")


@dataclass(frozen=True)
class ModelDims:
    """The dimensions that decide every weight's shape.

    Args:
        num_layers: transformer layers.
        vocab: rows of the embedding and of the output layer.
        hidden: width of the residual stream.
        ffn: width of one half of the MLP's first projection.
        q_rows: heads x head_dim.
        kv_rows: key-value groups x head_dim.
        qkv_bias: whether the attention projections have biases.
    """

    num_layers: int
    vocab: int
    hidden: int
    ffn: int
    q_rows: int
    kv_rows: int
    qkv_bias: bool

    def rows(self, part: str) -> int:
        """Rows (axis 0) that a part of names.py takes in a tensor."""
        return {
            **dict.fromkeys(("embedding", "output"), self.vocab),
            **dict.fromkeys(("q", "q_bias"), self.q_rows),
            **dict.fromkeys(("k", "v", "k_bias", "v_bias"), self.kv_rows),
            **dict.fromkeys(("gate", "up"), self.ffn),
        }.get(part, self.hidden)

    def shape(self, key: TensorKey) -> tuple[int, ...]:
        rows = sum(self.rows(part) for part in key.parts)
        first = key.parts[0]
        if first.endswith(("_norm", "_bias")):
            return (rows,)
        return (rows, {"attention_out": self.q_rows, "mlp_out": self.ffn}.get(first, self.hidden))

    def shape_of(self, name: str) -> tuple[int | None, ...] | None:
        """The whole shape of a weight, adapter or state by its name: None stands for the rank of an adapter, which the
        dimensions do not tell; None in all for parameters that are not this model's."""
        name = plain_name(name)
        weight, side = adapter_of(name) or (name, None)
        try:
            key = key_of(weight)
        except InputError:
            key = None
        if key is None:
            return None
        shape = self.shape(key)
        return {"a": (None, shape[-1]), "b": (shape[0], None)}.get(side, shape)

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a shape is as `shape_of` says."""
        expected = self.shape_of(name)
        return (
            expected is None
            or len(shape) == len(expected)
            and all(wanted in (None, found) for wanted, found in zip(expected, shape))
        )

    def differences(self, found: ModelDims) -> list[str]:
        """What is different in another model, as ["ffn is 160, expected 13696"]."""
        other = asdict(found)
        return [
            f"{key} is {other[key]}, expected {value}" for key, value in asdict(self).items() if other[key] != value
        ]


def dims_from_config(config: Mapping[str, Any], path: Any) -> ModelDims:
    """Reads the dimensions from the content of the config.json at `path`, of ChatGLM or of transformers' `glm`.

    Raises:
        InputError: another model, or keys that are missing or no positive numbers.
    """
    kind = config.get("model_type")
    if kind not in ("chatglm", "glm"):
        raise InputError(f"{path}: model_type is {kind!r}, 'chatglm' or 'glm' is needed")

    def key_in_file(key):
        return key if kind == "chatglm" else _GLM[key]

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
    """The dimensions by the merged configuration of the run of the YAML `path`; raises as `dims_from_config` does."""
    model = config["model"]["model_config"]
    given = {key: model[key] for key, field in _FIELDS.items() if field.shapes and model.get(key) is not None}
    return dims_from_config({**PUBLISHED, **given}, path)


def dims_from_tensors(weights: Mapping[TensorKey, StoredTensor]) -> ModelDims:
    """Infers the dimensions where there is no config.json.

    Raises:
        InputError: the tensors that tell them are missing.
    """
    by_part = {}
    for key, tensor in weights.items():
        for part in key.parts:
            by_part.setdefault((part, key.layer if key.layer in (None, 0) else -1), (key, tensor))

    def shape(part, layer):
        key, tensor = by_part.get((part, layer), (None, None))
        if tensor is None or len(tensor.shape) != 2:
            raise InputError(
                f"the sizes of the model cannot be inferred: no tensor of 2 dimensions holds {part!r} of layer "
                f"{layer}; put the model's config.json beside the weights"
            )
        return key, tensor.shape

    vocab, hidden = shape("embedding", None)[1]
    q_rows = shape("attention_out", 0)[1][1]
    ffn = shape("mlp_out", 0)[1][1]
    key, (rows, _) = shape("k", 0)
    kv_rows = (rows - q_rows) // 2 if key.parts == QKV else rows
    layers = 1 + max(key.layer for key in weights if key.layer is not None)
    return ModelDims(layers, vocab, hidden, ffn, q_rows, kv_rows, ("k_bias", 0) in by_part)


def to_glm(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of transformers' native `glm` model, from that of ChatGLM.

    ChatGLM multiplies the rotary base by rope_ratio and rotates half of each head (modeling_chatglm.py); that is
    rope_theta = 10000 x rope_ratio and partial_rotary_factor = 0.5.
    """
    fields = {**{key: field.published for key, field in _FIELDS.items() if field.filled_in}, **fields}
    config = {
        "model_type": "glm",
        "architectures": ["GlmForCausalLM"],
        "hidden_act": "silu",
        "partial_rotary_factor": 0.5,
        "rope_theta": _ROPE_BASE * fields.get("rope_ratio", 1),
    }
    config.update({glm: fields[key] for key, glm in _GLM.items() if key in fields})
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
    ratio = config.get("rope_theta", _ROPE_BASE) / _ROPE_BASE
    if config.get("partial_rotary_factor", 0.5) != 0.5 or config.get("hidden_act", "silu") != "silu":
        raise InputError(
            f"{path}: partial_rotary_factor 0.5 and hidden_act silu are ChatGLM3's, found "
            f"{config.get('partial_rotary_factor')!r} and {config.get('hidden_act')!r}"
        )
    fields = dict(PUBLISHED, rope_ratio=int(ratio) if ratio == int(ratio) else ratio)
    fields.update({key: config[glm] for key, glm in _GLM.items() if glm in config})
    if fields["eos_token_id"] == list(_STOP_TOKENS):
        fields["eos_token_id"] = _STOP_TOKENS[0]
    fields.pop("_name_or_path")
    return fields


def read_config(path: str | Path) -> tuple[dict[str, Any], dict[str, bool]]:
    """Reads a config.json (ChatGLM or `glm`), its folder, a conversion's report, or a MindFormers YAML.

    Returns:
        The fields as in ChatGLM's config.json, and the layout (`qkv_concat`, `mlp_concat`) that a YAML names.

    Raises:
        InputError: missing, unreadable, or of another model.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path)
    config = _load_json(path)
    config = config.get("huggingface_config", config)  # a conversion's report carries it
    if not isinstance(config, dict) or config.get("model_type") not in ("chatglm", "glm"):
        found = config.get("model_type") if isinstance(config, dict) else config
        raise InputError(f"{path}: model_type is {found!r}, 'chatglm' or 'glm' is needed")
    return (to_chatglm(config, path) if config["model_type"] == "glm" else config), {}


def _load_json(path):
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds a {type(config).__name__}, a JSON object is needed")
    return config


def _from_yaml(path):
    import yaml

    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["model_config"]
        given = {key: model[key] for key, field in _FIELDS.items() if field.in_yaml and model.get(key) is not None}
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


def find_config(option: Any, checkpoint: Path, beside: Path | None, inferred: ModelDims) -> dict[str, Any]:
    """The config of a checkpoint, as in ChatGLM's config.json, from the first of: the option, the config.json beside
    it, the report of the conversion that made it, the published model when all dimensions are its.

    Raises:
        InputError: none of them is there, or it contradicts the dimensions inferred from the tensors.
    """
    stem = checkpoint.with_suffix("") if checkpoint.is_file() else checkpoint
    report = stem.with_name(stem.name.replace(".ckpt.index", "").replace(".safetensors.index", "") + ".report.json")
    kept = report.is_file() and _load_json(report).get("huggingface_config")
    for path in (option, beside, report if kept else None):
        if path is not None:
            fields = read_config(path)[0]
            wrong = dims_from_config(fields, path).differences(inferred)
            if wrong:
                raise InputError(f"{checkpoint}: does not fit {path}: {'; '.join(wrong)}")
            return fields
    if inferred == dims_from_config(PUBLISHED, "the published config.json"):
        return dict(PUBLISHED)
    raise InputError(
        f"{checkpoint}: config.json cannot be made up from the weights (they do not tell the number of "
        "heads); give --config with the original config.json or the YAML that trained the model"
    )


def config_text(fields: Mapping[str, Any], naming: str, dtype: str) -> str:
    """The text of config.json, for "chatglm" or "glm", with the dtype of the weights."""
    config = dict(to_glm(fields) if naming == "glm" else fields, torch_dtype=TO_CONFIG[dtype])
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
