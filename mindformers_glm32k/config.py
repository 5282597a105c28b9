"""GLM32KConfig: the fields of upstream's glm2 with ChatGLM3-6B-32K's defaults, checked when constructed."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindformers.generation import GenerationConfig
from mindformers.models.glm2 import ChatGLM2Config

from mindformers_glm32k import compat
from mindformers_glm32k.checks import is_int, is_number, unknown_keys
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.overrides import normalize_values
from mindformers_glm32k.parallel import DOCUMENTS_PER_ROW
from mindformers_glm32k.registry import MODEL_TYPE

CELLS = ("auto", "ascend", "portable")
DTYPES = ("float32", "float16", "bfloat16")

# Keys that MindFormers itself puts into a model config, besides the fields of ChatGLM2Config.
_HOST_KEYS = frozenset(
    (
        "name_or_path",
        "_name_or_path",
        "_commit_hash",
        "pretrained_model_dir",
        "mindformers_version",
        "tokenizer_class",
        "architectures",
        "is_encoder_decoder",
        "is_sample_acceleration",
        "quantization_config",
        "quantization",
        "pet_config",
        "moe_config",
        "monitor_config",
        "dataset_config",
        "calculate_per_token_loss",
        "disable_lazy_inline",
        "model_type",
        "type",
        "auto_map",
        "auto_register",
        "max_position_embeddings",
        "input_sliced_sig",
        "parallel_decoding_params",
        "use_eod_attn_mask_compression",
        "track_max_attention_logit",
        "generation_config",
        "llm_backend",
        "parallel_optimizer",
        "num_samples",
    )
)
# Attributes that the constructor derives; saved configs carry them, so they come back when one is loaded.
_DERIVED = {
    "vocab_size": "padded_vocab_size",
    "num_heads": "num_attention_heads",
    "n_kv_heads": "multi_query_group_num",
}

_HUGGINGFACE_FIELDS = (
    "num_layers",
    "padded_vocab_size",
    "hidden_size",
    "ffn_hidden_size",
    "kv_channels",
    "num_attention_heads",
    "seq_length",
    "hidden_dropout",
    "attention_dropout",
    "layernorm_epsilon",
    "rope_ratio",
    "rmsnorm",
    "apply_residual_connection_post_layernorm",
    "post_layer_norm",
    "add_bias_linear",
    "add_qkv_bias",
    "multi_query_attention",
    "multi_query_group_num",
    "eos_token_id",
    "pad_token_id",
)


class GLM32KConfig(ChatGLM2Config):
    """Size, numerics and memory of a GLM32K model: the fields of upstream's `ChatGLM2Config`, checked.

    Sizes (integers >= 1):
        num_layers: decoder layers. Default 28.
        hidden_size, ffn_hidden_size: features of the residual stream, and inside the MLP. Default 4096, 13696.
        num_attention_heads, multi_query_group_num: query heads, and key-value heads (a divisor). Default 32, 2.
        kv_channels: features of a head, a multiple of 4 (half of each head is rotated, in pairs). Default 128.
        padded_vocab_size: ids that the output layer scores: the tokenizer's, and padding. Default 65024.
        seq_length: tokens of the longest sequence. Default 32768.
        batch_size: sequences of a prediction's batch; training takes the data set's. Default 1.

    Numerics:
        layernorm_epsilon: added to the mean square, in (0, 0.01]. Default 1e-5.
        rope_ratio: factor of the rotary base 10000, > 0. Default 50.
        hidden_dropout, attention_dropout: probability that a value is dropped, in [0, 1). Default 0.
        param_init_type, compute_dtype, layernorm_compute_type, residual_dtype, rotary_dtype: float32, float16 or
            bfloat16, of weights, matrix products, norms, residual stream and rotation. Default float16 for the first
            two, float32 for the next two, compute_dtype (null) for the rotation.

    Architecture and layout (true or false):
        qkv_concat, mlp_concat: one weight for query, key and value, and for both halves of the MLP. Default true.
        add_qkv_bias, add_bias_linear: biases of the QKV projection, and of all other ones. Default true, false.
        post_layer_norm, post_self_attn_layernorm, post_mlp_layernorm, apply_residual_connection_post_layernorm: norms
            after the last layer, attention, the MLP; residual taken after the norm. Default true, false, false, false.
        use_ring_attention, enable_high_performance: upstream's layouts on NPUs. Default false.
        rmsnorm, multi_query_attention: true; use_rearrange_rope: false; pre_seq_len, mask_generate: null. Upstream's
            other values do not occur in the published model and are refused.

    Memory:
        use_flash_attention: attention without an S x S tensor: upstream's kernel on Ascend, tiles on CPU. Default true
            (upstream: false).
        loss_chunk_size: tokens of a sequence whose logits exist at a time in training, >= 1. Default 2048.
        mlp_chunk_size: on Ascend, tokens of a sequence that the MLP takes at a time in training, >= 2; less memory with
            recompute on, for NPUs of 32 GB. Default null: all.
        documents_per_row: documents that a packed sequence holds at most on Ascend with flash attention, >= 1;
            sequences of a device x (documents_per_row + 1) must not exceed 1024. Default 127.
        cells: "ascend" takes upstream's NPU kernels, "portable" cells that run on any device, "auto" decides by the
            device target. Default auto.
        offset: layers of each pipeline stage beyond an equal share (rounded down), an integer or a list. Default 0.
        pp_interleave_num, fine_grain_interleave: virtual stages, overlapping slices of a layer, >= 1. Default 1.

    Prediction:
        use_past, is_dynamic: key-value cache; dynamic shapes, required by use_past. Default false.
        block_size, num_blocks: tokens of a cache block, and blocks of the cache, >= 1. Default 16, 128.
        eos_token_id: an id in [0, padded_vocab_size), or a list, at which generation stops. Default 2 (`</s>`).
        pad_token_id: an id in the same range. Default 0.
        repetition_penalty: divides the logits of ids seen before, > 0. Default 1.

    Also accepted: upstream's generation settings (top_k, max_decode_length, …), what MindFormers' trainer adds
    (parallel_config, pet_config, …), and upstream's fields that nothing reads. Any other key is an error.

    Raises:
        InputError: unknown keys or values out of range; one message names all of them.
    """

    model_type = MODEL_TYPE
    _support_list = []

    def __init__(
        self,
        seq_length: int = 32768,
        rope_ratio: float = 50,
        eos_token_id: int | list[int] = 2,
        use_flash_attention: bool = True,
        loss_chunk_size: int = 2048,
        mlp_chunk_size: int | None = None,
        cells: str = "auto",
        documents_per_row: int = DOCUMENTS_PER_ROW,
        **kwargs,
    ):
        kwargs = normalize_values(dict(kwargs))
        rope_ratio, eos_token_id = normalize_values([rope_ratio, eos_token_id])
        upstreams = dict(
            kwargs,
            seq_length=seq_length,
            rope_ratio=rope_ratio,
            eos_token_id=eos_token_id,
            use_flash_attention=use_flash_attention,
        )
        ours = dict(
            loss_chunk_size=loss_chunk_size,
            mlp_chunk_size=mlp_chunk_size,
            cells=cells,
            documents_per_row=documents_per_row,
        )
        problems = field_problems({**upstreams, **ours})
        if problems:
            raise InputError("GLM32KConfig: " + "; ".join(problems))
        for derived, field in _DERIVED.items():
            value = upstreams.pop(derived, None)
            if value is not None:
                upstreams.setdefault(field, value)
        super().__init__(**upstreams)
        for name, value in ours.items():
            setattr(self, name, value)
        # Upstream's generator and the LoRA adapter read these without a default.
        for name in ("is_encoder_decoder", "is_sample_acceleration"):
            if getattr(self, name, None) is None:
                setattr(self, name, False)

    @property
    def use_portable_cells(self) -> bool:
        """Whether NPU-only kernels are replaced by portable cells."""
        if self.cells == "auto":
            return not compat.on_ascend()
        return self.cells == "portable"

    @classmethod
    def from_huggingface(cls, path: str | os.PathLike, **overrides) -> GLM32KConfig:
        """Reads the `config.json` published with ChatGLM3-6B-32K: the file, or the folder that holds it.

        Fields in `overrides` take precedence over the file's.

        Raises:
            InputError: no such file, not JSON, not a ChatGLM config, or values out of range.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file; give the folder or the config.json of the published model")
        try:
            published = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not a JSON file ({error}); download it again") from error
        if not isinstance(published, dict) or published.get("model_type") != "chatglm":
            found = published.get("model_type") if isinstance(published, dict) else type(published).__name__
            raise InputError(f"{path}: model_type is {found!r}, 'chatglm' is needed; is it ChatGLM3's config.json?")
        fields = {name: published[name] for name in _HUGGINGFACE_FIELDS if published.get(name) is not None}
        if published.get("torch_dtype") in DTYPES:
            fields.update(param_init_type=published["torch_dtype"], compute_dtype=published["torch_dtype"])
        fields.update(overrides)
        try:
            return cls(**fields)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def field_problems(fields: Mapping[str, Any]) -> list[str]:
    """One sentence for each of a model_config's keys that is unknown, contradicts another or has a wrong value."""
    fields = normalize_values(dict(fields))
    signature = inspect.signature(GLM32KConfig.__init__).parameters
    problems = _unknown_keys([name for name in fields if name not in signature])
    for derived, field in _DERIVED.items():
        value = fields.pop(derived, None)
        if value is not None and fields.setdefault(field, value) != value:
            problems.append(f"{derived}={value!r}: contradicts {field}={fields[field]!r}")
    parameters = {**_upstream_parameters(), **signature}
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return problems + _wrong_values({**defaults, **fields})


def _upstream_parameters():
    parameters = inspect.signature(ChatGLM2Config.__init__).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in ("self", "kwargs")}


def _unknown_keys(kwargs):
    generation = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    return unknown_keys(
        kwargs, {*_upstream_parameters(), *_RULES, *generation, "max_decode_length", *_HOST_KEYS, *_DERIVED}
    )


def _is_dtype(value):
    return str(value).lower() in DTYPES


# Each rule: what is allowed, in words, and the test of a value.
_POSITIVE = ("an integer >= 1", lambda value: is_int(value, 1))
_PROBABILITY = ("a number in [0, 1)", lambda value: is_number(value) and 0 <= value < 1)
_FACTOR = ("a number > 0", lambda value: is_number(value) and value > 0)
_DTYPE = (f"one of {', '.join(DTYPES)}", _is_dtype)
_FLAG = ("true or false", lambda value: isinstance(value, bool))
_RULES = {
    "num_layers": _POSITIVE,
    "hidden_size": _POSITIVE,
    "ffn_hidden_size": _POSITIVE,
    "num_attention_heads": _POSITIVE,
    "multi_query_group_num": _POSITIVE,
    "kv_channels": (
        "a multiple of 4 (half of each head is rotated, in pairs)",
        lambda value: is_int(value, 4) and value % 4 == 0,
    ),
    "padded_vocab_size": _POSITIVE,
    "seq_length": _POSITIVE,
    "batch_size": _POSITIVE,
    "layernorm_epsilon": ("a number in (0, 0.01]", lambda value: is_number(value) and 0 < value <= 0.01),
    "rope_ratio": _FACTOR,
    "hidden_dropout": _PROBABILITY,
    "attention_dropout": _PROBABILITY,
    "param_init_type": _DTYPE,
    "compute_dtype": _DTYPE,
    "layernorm_compute_type": _DTYPE,
    "residual_dtype": _DTYPE,
    "rotary_dtype": (_DTYPE[0], lambda value: value is None or _is_dtype(value)),
    "qkv_concat": _FLAG,
    "mlp_concat": _FLAG,
    "add_qkv_bias": _FLAG,
    "add_bias_linear": _FLAG,
    "post_layer_norm": _FLAG,
    "post_self_attn_layernorm": _FLAG,
    "post_mlp_layernorm": _FLAG,
    "apply_residual_connection_post_layernorm": _FLAG,
    "use_ring_attention": _FLAG,
    "enable_high_performance": _FLAG,
    "use_flash_attention": _FLAG,
    "loss_chunk_size": _POSITIVE,
    "mlp_chunk_size": ("null or an integer >= 2", lambda value: value is None or is_int(value, 2)),
    "documents_per_row": _POSITIVE,
    "cells": (f"one of {', '.join(CELLS)}", lambda value: value in CELLS),
    "pp_interleave_num": _POSITIVE,
    "fine_grain_interleave": _POSITIVE,
    "use_past": _FLAG,
    "is_dynamic": _FLAG,
    "block_size": _POSITIVE,
    "num_blocks": _POSITIVE,
    "repetition_penalty": _FACTOR,
    # What upstream's glm2 offers but the published model does not use, and this plugin does not build:
    "rmsnorm": ("true (the published model has no LayerNorm)", lambda value: value is True),
    "multi_query_attention": (
        "true (set multi_query_group_num to the number of key-value heads)",
        lambda value: value is True,
    ),
    "pre_seq_len": ("null (prefix tuning is not supported; LoRA is: pet_config)", lambda value: value in (None, 0)),
    "use_rearrange_rope": ("false (the weights are not permuted)", lambda value: value is False),
    "mask_generate": ("null (the causal mask is built by the attention)", lambda value: value is None),
}


def _wrong_values(fields):
    """One sentence per field whose value is not allowed."""
    problems = []
    right = set()

    def check(name, allowed, is_right):
        if is_right(fields[name]):
            right.add(name)
        else:
            problems.append(f"{name}={fields[name]!r}: allowed is {allowed}")

    for name, rule in _RULES.items():
        check(name, *rule)
    # fields that depend on each other
    if {"num_attention_heads", "multi_query_group_num"} <= right:
        heads = fields["num_attention_heads"]
        check("multi_query_group_num", f"a divisor of num_attention_heads={heads}", lambda value: heads % value == 0)
    if "padded_vocab_size" in right:
        ids = f"an id in [0, padded_vocab_size={fields['padded_vocab_size']})"

        def is_id(value):
            return is_int(value) and 0 <= value < fields["padded_vocab_size"]

        check("pad_token_id", ids, is_id)
        check(
            "eos_token_id",
            f"{ids} or a list of them",
            lambda value: is_id(value) or (isinstance(value, (list, tuple)) and value and all(map(is_id, value))),
        )
    if fields["use_past"] is True:
        check("is_dynamic", "true when use_past is true", lambda value: value is True)
    return problems
