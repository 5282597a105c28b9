"""The one table of config.json's fields in both Hugging Face namings, and the dimensions that decide shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.names import QKV, TensorKey, adapter_of, key_of, plain_name
from mindformers_glm32k.weights.tensors import StoredTensor


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
    """The dimensions by the merged configuration of the run of the YAML `path`; raises as `dims_from_config` does."""
    model = config["model"]["model_config"]
    given = {key: model[key] for key, field in FIELDS.items() if field.shapes and model.get(key) is not None}
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
