"""The model's config.json in both Hugging Face namings, and where a conversion takes it from."""

import json
from pathlib import Path

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.dtypes import TO_CONFIG
from mindformers_glm32k.weights.model_dims import differences, load_config, sizes_from_config

# What THUDM/chatglm3-6b-32k publishes; also the defaults of GLM32KConfig.
PUBLISHED = {
    "_name_or_path": "THUDM/chatglm3-6b-32k",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "rope_ratio": 50,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 32768,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.30.2",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Fields of a MindFormers model_config that mean the same in config.json.
_SHARED = tuple(
    key
    for key, value in PUBLISHED.items()
    if not isinstance(value, (str, list, dict)) and key not in ("use_cache", "original_rope", "tie_word_embeddings")
)
# ChatGLM field: `glm` field. rope_ratio and vocabulary of stop tokens are handled apart.
_GLM_FIELDS = {
    "attention_dropout": "attention_dropout",
    "add_qkv_bias": "attention_bias",
    "ffn_hidden_size": "intermediate_size",
    "hidden_size": "hidden_size",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "rms_norm_eps",
    "num_attention_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "padded_vocab_size": "vocab_size",
    "multi_query_group_num": "num_key_value_heads",
    "seq_length": "max_position_embeddings",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
    "use_cache": "use_cache",
    "torch_dtype": "torch_dtype",
}
# Written even where the ChatGLM file leaves them to its code: transformers' defaults are those of another model.
_FILLED_IN = (
    "attention_dropout",
    "add_qkv_bias",
    "layernorm_epsilon",
    "seq_length",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "use_cache",
)
_ROPE_BASE = 10000.0
_STOP_TOKENS = (2, 64795, 64797)  # </s>, <|user|>, <|observation|>
_MODEL_CONFIG_LAYOUT = ("qkv_concat", "mlp_concat")


def to_glm(fields):
    """The config of transformers' native `glm` model.

    ChatGLM multiplies the rotary base by rope_ratio and rotates half of each head (modeling_chatglm.py); that is
    rope_theta = 10000 x rope_ratio and partial_rotary_factor = 0.5.

    Args:
        fields (dict): a ChatGLM config.json.

    Returns:
        dict
    """
    fields = {**{key: PUBLISHED[key] for key in _FILLED_IN}, **fields}
    config = {
        "model_type": "glm",
        "architectures": ["GlmForCausalLM"],
        "hidden_act": "silu",
        "partial_rotary_factor": 0.5,
        "rope_theta": _ROPE_BASE * fields.get("rope_ratio", 1),
    }
    config.update({glm: fields[chatglm] for chatglm, glm in _GLM_FIELDS.items() if chatglm in fields})
    if not fields.get("multi_query_attention", True):
        config["num_key_value_heads"] = fields["num_attention_heads"]
    if fields.get("padded_vocab_size") == PUBLISHED["padded_vocab_size"] and fields.get("eos_token_id") == 2:
        config["eos_token_id"] = list(_STOP_TOKENS)  # in a chat the model ends its turn with the next one's role token
    return config


def to_chatglm(config, path):
    """The published model's config.json from that of a `glm` model: the inverse of to_glm.

    Args:
        config (dict): a `glm` config.json.
        path: its file, for messages.

    Returns:
        dict

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
    fields.update({chatglm: config[glm] for chatglm, glm in _GLM_FIELDS.items() if glm in config})
    if fields["eos_token_id"] == list(_STOP_TOKENS):
        fields["eos_token_id"] = _STOP_TOKENS[0]
    fields.pop("_name_or_path")
    return fields


def read_config(path):
    """Reads a config in any of its forms.

    Args:
        path (str | os.PathLike): config.json (ChatGLM or `glm`), its folder, a conversion's report, or a YAML of
            MindFormers with model.model_config.

    Returns:
        tuple[dict, dict]: the fields as in ChatGLM's config.json, and the layout (`qkv_concat`, `mlp_concat`) that
        a YAML names.

    Raises:
        InputError: missing, unreadable, or of another model.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path)
    config = load_config(path)
    config = config.get("huggingface_config", config)  # a conversion's report carries it
    if not isinstance(config, dict) or config.get("model_type") not in ("chatglm", "glm"):
        found = config.get("model_type") if isinstance(config, dict) else config
        raise InputError(f"{path}: model_type is {found!r}, 'chatglm' or 'glm' is needed")
    return (to_chatglm(config, path) if config["model_type"] == "glm" else config), {}


def _from_yaml(path):
    import yaml

    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["model_config"]
        given = {key: model[key] for key in _SHARED if model.get(key) is not None}
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


def find_config(option, source, inferred):
    """The config of a checkpoint, from the first of: the option, config.json beside it, the report of the conversion
    that made it, the published model when all sizes are its.

    Args:
        option (path | None): --config.
        source (source.Source): the opened checkpoint.
        inferred (Sizes): from its tensors.

    Returns:
        dict: as in ChatGLM's config.json.

    Raises:
        InputError: none of them is there.
    """
    stem = source.path.with_suffix("") if source.path.is_file() else source.path
    report = stem.with_name(stem.name.replace(".ckpt.index", "").replace(".safetensors.index", "") + ".report.json")
    kept = report.is_file() and load_config(report).get("huggingface_config")
    for path in (option, source.config, report if kept else None):
        if path is not None:
            fields = read_config(path)[0]
            wrong = differences(sizes_from_config(fields, path), inferred)
            if wrong:
                raise InputError(f"{source.path}: does not fit {path}: {'; '.join(wrong)}")
            return fields
    if inferred == sizes_from_config(PUBLISHED, "the published config.json"):
        return dict(PUBLISHED)
    raise InputError(
        f"{source.path}: config.json cannot be made up from the weights (they do not tell the number of "
        "heads); give --config with the original config.json or the YAML that trained the model"
    )


def config_text(fields, naming, dtype):
    """The text of config.json.

    Args:
        fields (dict): as in ChatGLM's config.json.
        naming (str): "chatglm" or "glm".
        dtype (str): of the weights, "fp32", "fp16" or "bf16".

    Returns:
        str
    """
    config = dict(to_glm(fields) if naming == "glm" else fields, torch_dtype=TO_CONFIG[dtype])
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
