"""The one table of what a checkpoint's entries are: weights under all namings, adapters, optimizer states, counters;
and the dimensions that decide their shapes.

A row of the table lists the *parts* that a tensor holds, stacked along axis 0, and the tensor's names. Fused and split
layouts are both rows: converting a layout is moving whole parts between rows, never touching a value. transformers'
`glm` rotates interleaved pairs of channels exactly as ChatGLM does (`rotate_half` over x[..., 0::2] and x[..., 1::2])
and takes the gate from the first half of `gate_up_proj`, so no naming needs a permutation.

Sources: mindformers/models/glm2, modeling_chatglm.py of THUDM/chatglm3-6b-32k, transformers/models/glm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.tensors import StoredTensor

NAMINGS = ("mindspore", "chatglm", "glm")
QKV, QKV_BIAS, MLP = ("q", "k", "v"), ("q_bias", "k_bias", "v_bias"), ("gate", "up")

# parts, MindFormers' name, the published name, transformers' `glm` name
_OUTER = (
    (
        ("embedding",),
        "transformer.embedding.embedding_weight",
        "transformer.embedding.word_embeddings.weight",
        "model.embed_tokens.weight",
    ),
    (("final_norm",), *["transformer.encoder.final_layernorm.weight"] * 2, "model.norm.weight"),
    (("output",), *["transformer.output_layer.weight"] * 2, "lm_head.weight"),
)
# parts, name below transformer.encoder.layers.N (MindFormers, published), name below model.layers.N (`glm`)
_IN_LAYER = (
    (("input_norm",), "input_layernorm.weight", "input_layernorm.weight"),
    (QKV, "self_attention.query_key_value.weight", "self_attn.qkv_proj.weight"),
    (("q",), "self_attention.wq.weight", "self_attn.q_proj.weight"),
    (("k",), "self_attention.wk.weight", "self_attn.k_proj.weight"),
    (("v",), "self_attention.wv.weight", "self_attn.v_proj.weight"),
    (QKV_BIAS, "self_attention.query_key_value.bias", "self_attn.qkv_proj.bias"),
    (("q_bias",), "self_attention.wq.bias", "self_attn.q_proj.bias"),
    (("k_bias",), "self_attention.wk.bias", "self_attn.k_proj.bias"),
    (("v_bias",), "self_attention.wv.bias", "self_attn.v_proj.bias"),
    (("attention_out",), "self_attention.dense.weight", "self_attn.o_proj.weight"),
    (("post_norm",), "post_attention_layernorm.weight", "post_attention_layernorm.weight"),
    (MLP, "mlp.dense_h_to_4h.weight", "mlp.gate_up_proj.weight"),
    (("gate",), "mlp.dense_left.weight", "mlp.gate_proj.weight"),
    (("up",), "mlp.dense_right.weight", "mlp.up_proj.weight"),
    (("mlp_out",), "mlp.dense_4h_to_h.weight", "mlp.down_proj.weight"),
)
# What optimizers put before a parameter's name: MindSpore's own, upstream's, and those of other trainers.
STATE_PREFIXES = tuple(
    prefix + "."
    for prefix in (
        *("adam_m", "adam_v", "adamw_m", "adamw_v", "exp_avg", "exp_avg_sq", "accu_grads"),
        *(f"{word}{which}" for word in ("moment", "moments") for which in ("", "1", "2", "_1", "_2")),
    )
)
# Sums of gradients that a pipeline starts from zero in each step: no checkpoint needs them.
SCRATCH_PREFIX = "accu_grads."
WEIGHT, ADAPTER, STATE, COUNTER = "weight", "adapter", "state", "counter"
# Buffers: rotary tables that the model computes itself, and caches of generation.
_BUFFER = re.compile(r"(.*\.)?((rotary_pos_emb|rotary_emb)\.inv_freq|(key_cache|value_cache)(_grad)?)$")
# What trainers store besides the model.
_COUNTER = re.compile(
    r"(epoch_num|step_num|global_step|learning_rate|scale_sense|loss_scale|current_iterator_step|"
    r"last_overflow_iterator_step|beta[12]_power|weight_decay|cur_epoch_num|cur_step_num|batch_num|"
    r"global_batch_size|random_op|_random_seed.*)$"
)
# What wrappers put before the names of the module inside: DDP and DeepSpeed, PEFT, torch.compile, FSDP, own classes.
_WRAPPER = re.compile(
    r"(module|base_model\.model|_orig_mod|model|_forward_module|_fsdp_wrapped_module|network|backbone)\."
)
_INNER_WRAPPER = re.compile(r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ADAPTER = re.compile(r"(?P<layer>.+)\.mindpet_delta_lora_(?P<side>[ab])$")
_ANY_ADAPTER = re.compile(r"delta_lora|lora_[ABab]\b|\.lora_")
_PEFT = re.compile(r"\.(lora_[A-Za-z_]+|base_layer|modules_to_save|original_module|ia3_l)\b|\bprompt_embeddings$")


class TensorKey(NamedTuple):
    """What a tensor is: the parts it holds along axis 0, and its layer (None outside the layers)."""

    parts: tuple[str, ...]
    layer: int | None


def _compile():
    rows = list(_OUTER)
    for parts, published, glm in _IN_LAYER:
        rows.append((parts, *["transformer.encoder.layers.{}." + published] * 2, "model.layers.{}." + glm))
    by_parts = {parts: dict(zip(NAMINGS, names)) for parts, *names in rows}
    patterns = [
        (re.compile(re.escape(name).replace(r"\{\}", r"(0|[1-9][0-9]*)") + "$"), parts)
        for parts, names in by_parts.items()
        for name in sorted(set(names.values()))
    ]
    return by_parts, patterns


_BY_PARTS, _PATTERNS = _compile()


def name_of(key: TensorKey, naming: str) -> str:
    """The name of a tensor in one of NAMINGS; raises KeyError if no tensor holds these parts."""
    return _BY_PARTS[key.parts][naming].format(key.layer)


def key_of(name: str) -> TensorKey | None:
    """What a name stands for, in any naming: the inverse of name_of; None for buffers and training state.

    Raises:
        InputError: the name is unknown.
    """
    for pattern, parts in _PATTERNS:
        match = pattern.match(name)
        if match:
            return TensorKey(parts, int(match.group(1)) if pattern.groups else None)
    if name.startswith(STATE_PREFIXES) or _BUFFER.match(name) or _COUNTER.match(name):
        return None
    if _ANY_ADAPTER.search(name):
        raise InputError(f"{name!r} belongs to a LoRA adapter: merge the adapters into the base weights first")
    raise InputError(f"{name!r} is not a weight of ChatGLM3 under any known naming ({', '.join(NAMINGS)})")


def unwrapped(name: str) -> tuple[str, str]:
    """A weight's name without the prefixes of wrappers, and the prefix removed; a name that is still no weight's is
    returned as it is. ChatGLM's inner model, saved alone, lacks "transformer.", which is added."""
    inner = _INNER_WRAPPER.sub("", name)
    while True:
        for candidate in (inner, "transformer." + inner):
            try:
                if key_of(candidate) is not None:
                    return candidate, name[: len(name) - len(inner)] if name.endswith(inner) else "_orig_mod."
            except InputError:
                continue
        match = _WRAPPER.match(inner)
        if not match:
            return name, ""
        inner = inner[match.end() :]


def foreign_kind(names: Iterable[str]) -> str | None:
    """The kind of tensors that no whole model has, "peft" or "ptuning", by the first such name; None without one."""
    for name in names:
        if _PEFT.search(name):
            return "peft"
        if "prefix_encoder." in name:
            return "ptuning"
    return None


def model_keys(num_layers: int, qkv_bias: bool, qkv_concat: bool, mlp_concat: bool) -> list[TensorKey]:
    """All tensors of a model in the order of its parameters; `concat`: the parts of a projection in one tensor."""

    def layout(parts, fused):
        return [parts] if fused else [(part,) for part in parts]

    layer_parts = [("input_norm",)] + layout(QKV, qkv_concat)
    if qkv_bias:
        layer_parts += layout(QKV_BIAS, qkv_concat)
    layer_parts += [("attention_out",), ("post_norm",)] + layout(MLP, mlp_concat) + [("mlp_out",)]
    return (
        [TensorKey(("embedding",), None)]
        + [TensorKey(parts, layer) for layer in range(num_layers) for parts in layer_parts]
        + [TensorKey(("final_norm",), None), TensorKey(("output",), None)]
    )


def kind_of(name: str) -> str | None:
    """What an entry of a checkpoint or strategy file is: WEIGHT, ADAPTER, STATE or COUNTER (epoch, step, loss scale and
    other numbers besides the model); None for buffers that no checkpoint needs."""
    if name.startswith(STATE_PREFIXES):
        return STATE
    if _ADAPTER.match(name):
        return ADAPTER
    try:
        is_weight = key_of(name) is not None
    except InputError:  # a parameter of an extended model, sharded like any other; or a number that a trainer stores
        is_weight = "." in name
    if is_weight:
        return WEIGHT
    return None if _BUFFER.match(name) else COUNTER


def plain_name(name: str) -> str:
    """The name of the parameter that an optimizer state belongs to; any other name as it is."""
    prefix = next((prefix for prefix in STATE_PREFIXES if name.startswith(prefix)), "")
    return name[len(prefix) :]


def adapter_of(name: str) -> tuple[str, str] | None:
    """The weight that an adapter of MindFormers' LoRA changes, and "a" or "b"; None for other names."""
    match = _ADAPTER.match(name)
    return (match["layer"] + ".weight", match["side"]) if match else None


def in_model_order(names: Iterable[str]) -> list[str]:
    """Sorts parameters as the model has them, unknown ones last; adapters follow the weights, states follow all, one
    kind after the other."""

    def order(name):
        plain = plain_name(name)
        weight, side = adapter_of(plain) or (plain, "")
        try:
            key = key_of(weight)
        except InputError:
            key = None
        part = key.parts[0] if key else None
        block = 0 if part == "embedding" else 1 if key and key.layer is not None else 2 if key else 3
        return (name[: -len(plain)], bool(side), block, key.layer or 0 if key else 0, _ORDER.get(part, 0), side)

    return sorted(names, key=order)


_ORDER = {key.parts[0]: index for index, key in enumerate(model_keys(1, True, False, False))}


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
        """Rows (axis 0) that a part takes in a tensor."""
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
        """The whole shape of a weight, adapter or state by its name, with None in place of an adapter's rank, which the
        dimensions do not tell; None instead of a shape for parameters that are not this model's."""
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
        """Whether a shape agrees with `shape_of`; any shape does for parameters that are not this model's."""
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
