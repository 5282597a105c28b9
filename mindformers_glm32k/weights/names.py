"""The one table of weight names: MindFormers' glm2, the published ChatGLM files, and transformers' `glm`.

A row lists the *parts* that a tensor holds, stacked along axis 0, and the tensor's name in each naming. Fused
and split layouts are both rows: converting a layout is moving whole parts between rows, never touching a value.
transformers' `glm` rotates interleaved pairs of channels exactly as ChatGLM does (`rotate_half` over x[..., 0::2]
and x[..., 1::2]) and takes the gate from the first half of `gate_up_proj`, so no naming needs a permutation.

Sources: mindformers/models/glm2, modeling_chatglm.py of THUDM/chatglm3-6b-32k, transformers/models/glm.
"""

import re
from typing import NamedTuple, Optional

from mindformers_glm32k.errors import InputError

NAMINGS = ("mindspore", "chatglm", "glm")
QKV, MLP = ("q", "k", "v"), ("gate", "up")

_MS, _GLM = "transformer.encoder.layers.{}.", "model.layers.{}."
_ROWS = (
    # parts                             mindspore                                    chatglm (None: as mindspore)
    #                                                                                glm
    (
        ("embedding",),
        "transformer.embedding.embedding_weight",
        "transformer.embedding.word_embeddings.weight",
        "model.embed_tokens.weight",
    ),
    (("input_norm",), _MS + "input_layernorm.weight", None, _GLM + "input_layernorm.weight"),
    (("q", "k", "v"), _MS + "self_attention.query_key_value.weight", None, _GLM + "self_attn.qkv_proj.weight"),
    (("q",), _MS + "self_attention.wq.weight", None, _GLM + "self_attn.q_proj.weight"),
    (("k",), _MS + "self_attention.wk.weight", None, _GLM + "self_attn.k_proj.weight"),
    (("v",), _MS + "self_attention.wv.weight", None, _GLM + "self_attn.v_proj.weight"),
    (
        ("q_bias", "k_bias", "v_bias"),
        _MS + "self_attention.query_key_value.bias",
        None,
        _GLM + "self_attn.qkv_proj.bias",
    ),
    (("q_bias",), _MS + "self_attention.wq.bias", None, _GLM + "self_attn.q_proj.bias"),
    (("k_bias",), _MS + "self_attention.wk.bias", None, _GLM + "self_attn.k_proj.bias"),
    (("v_bias",), _MS + "self_attention.wv.bias", None, _GLM + "self_attn.v_proj.bias"),
    (("attention_out",), _MS + "self_attention.dense.weight", None, _GLM + "self_attn.o_proj.weight"),
    (("post_norm",), _MS + "post_attention_layernorm.weight", None, _GLM + "post_attention_layernorm.weight"),
    (("gate", "up"), _MS + "mlp.dense_h_to_4h.weight", None, _GLM + "mlp.gate_up_proj.weight"),
    (("gate",), _MS + "mlp.dense_left.weight", None, _GLM + "mlp.gate_proj.weight"),
    (("up",), _MS + "mlp.dense_right.weight", None, _GLM + "mlp.up_proj.weight"),
    (("mlp_out",), _MS + "mlp.dense_4h_to_h.weight", None, _GLM + "mlp.down_proj.weight"),
    (("final_norm",), "transformer.encoder.final_layernorm.weight", None, "model.norm.weight"),
    (("output",), "transformer.output_layer.weight", None, "lm_head.weight"),
)

# Not weights, skipped by name: rotary tables that the model computes itself, and what MindFormers' training and
# generation keep beside the weights in a .ckpt.
_SKIPPED = re.compile(
    r"(.*\.)?(rotary_pos_emb|rotary_emb)\.inv_freq$|(.*\.)?(key_cache|value_cache|key_cache_grad|value_cache_grad)$|"
    r"(adam_[mv]|adamw?_[mv]|moments?_?[12]?|exp_avg|exp_avg_sq|accu_grads|moment[12])\..*|"
    r"(epoch_num|step_num|global_step|learning_rate|scale_sense|loss_scale|current_iterator_step|"
    r"last_overflow_iterator_step|beta[12]_power|weight_decay|cur_epoch_num|cur_step_num|batch_num|"
    r"global_batch_size|"
    r"random_op|_random_seed.*)$"
)
_ADAPTER = re.compile(r"delta_lora|lora_[ABab]\b|\.lora_")


class Slot(NamedTuple):
    """What a tensor is: the parts it holds along axis 0, and its layer (None outside the layers)."""

    parts: tuple[str, ...]
    layer: Optional[int]


def _compile():
    by_parts, patterns = {}, []
    for parts, *names in _ROWS:
        names = [name or names[0] for name in names]
        by_parts[parts] = dict(zip(NAMINGS, names))
        for name in sorted(set(names)):
            patterns.append((re.compile(re.escape(name).replace(r"\{\}", r"(0|[1-9][0-9]*)") + "$"), parts))
    return by_parts, patterns


_BY_PARTS, _PATTERNS = _compile()


def name_of(slot, naming):
    """The name of a tensor.

    Args:
        slot (Slot): what it holds.
        naming (str): one of NAMINGS.

    Returns:
        str

    Raises:
        KeyError: no tensor holds these parts.
    """
    return _BY_PARTS[slot.parts][naming].format(slot.layer)


def slot_of(name):
    """What a name stands for, in any naming: the inverse of name_of.

    Args:
        name (str): a tensor's name in a file.

    Returns:
        Slot | None: None for buffers and training state, which are not weights.

    Raises:
        InputError: the name is unknown.
    """
    for pattern, parts in _PATTERNS:
        match = pattern.match(name)
        if match:
            return Slot(parts, int(match.group(1)) if pattern.groups else None)
    if _SKIPPED.match(name):
        return None
    if _ADAPTER.search(name):
        raise InputError(f"{name!r} belongs to a LoRA adapter: merge the adapters into the base weights first")
    raise InputError(f"{name!r} is not a weight of ChatGLM3 under any known naming ({', '.join(NAMINGS)})")


def slots(num_layers, qkv_bias, qkv_concat, mlp_concat):
    """All tensors of a model in the order of its parameters.

    Args:
        num_layers (int): transformer layers.
        qkv_bias (bool): whether the attention projections have biases.
        qkv_concat (bool): Q, K, V in one tensor.
        mlp_concat (bool): both halves of the MLP's first projection in one tensor.

    Returns:
        list[Slot]
    """

    def layout(parts, fused):
        return [parts] if fused else [(part,) for part in parts]

    layer_parts = [("input_norm",)] + layout(QKV, qkv_concat)
    if qkv_bias:
        layer_parts += layout(tuple(part + "_bias" for part in QKV), qkv_concat)
    layer_parts += [("attention_out",), ("post_norm",)] + layout(MLP, mlp_concat) + [("mlp_out",)]
    return (
        [Slot(("embedding",), None)]
        + [Slot(parts, layer) for layer in range(num_layers) for parts in layer_parts]
        + [Slot(("final_norm",), None), Slot(("output",), None)]
    )
