"""GLM32KConfig: the fields of upstream's glm2 with ChatGLM3-6B-32K's defaults, checked when constructed."""

import difflib
import inspect
import json
import numbers
from pathlib import Path

from mindformers.generation import GenerationConfig
from mindformers.models.glm2 import ChatGLM2Config

from mindformers_glm32k import compat
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.parallel import DOCUMENTS_PER_ROW
from mindformers_glm32k.registry import MODEL_TYPE
from mindformers_glm32k.yaml_values import normalize_values

CELLS = ("auto", "ascend", "portable")
DTYPES = ("float32", "float16", "bfloat16")

# Keys that MindFormers itself puts into a model config, beside the fields of ChatGLM2Config.
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
    """Configuration of GLM32K.

    All fields of upstream's `ChatGLM2Config`, with these differences:

    Args:
        seq_length (int): longest row in tokens, >= 1. Default 32768.
        rope_ratio (float): multiplies the rotary base 10000, > 0. Default 50.
        eos_token_id (int | list[int]): generation stops at these. Default 2 (`</s>`).
        residual_dtype (str): dtype of the residual stream. Default "float32".
        loss_chunk_size (int): tokens of a row whose logits exist at a time in training, >= 1. Default 2048.
        mlp_chunk_size (int | None): on Ascend, tokens of a row that the feed-forward part takes at a time in training;
            less memory with recompute on, for NPUs of 32 GB. Default None: all.
        documents_per_row (int): documents that a packed row holds at most on Ascend with flash attention, >= 1; rows of
            a device times one more must not exceed 1024. Default 127.
        cells (str): "ascend" takes upstream's NPU kernels, "portable" cells that run on any device,
            "auto" (default) decides by the device target.
        **kwargs: the other fields of ChatGLM2Config, upstream's generation settings (top_k, max_decode_length, …)
            and what MindFormers' trainer adds (parallel_config, pet_config, …). Any other key is an error.

    Raises:
        InputError: unknown keys or values out of range; one message names all of them.
    """

    model_type = MODEL_TYPE
    _support_list = []

    def __init__(
        self,
        seq_length=32768,
        rope_ratio=50,
        eos_token_id=2,
        loss_chunk_size=2048,
        mlp_chunk_size=None,
        cells="auto",
        documents_per_row=DOCUMENTS_PER_ROW,
        **kwargs,
    ):
        kwargs = normalize_values(dict(kwargs))
        rope_ratio, eos_token_id = normalize_values([rope_ratio, eos_token_id])
        problems = _unknown_keys(kwargs)
        for derived, field in _DERIVED.items():
            value = kwargs.pop(derived, None)
            if value is not None and kwargs.setdefault(field, value) != value:
                problems.append(f"{derived}={value!r}: contradicts {field}={kwargs[field]!r}")
        fields = {name: parameter.default for name, parameter in _upstream_parameters().items()}
        fields.update(
            kwargs,
            seq_length=seq_length,
            rope_ratio=rope_ratio,
            eos_token_id=eos_token_id,
            loss_chunk_size=loss_chunk_size,
            mlp_chunk_size=mlp_chunk_size,
            cells=cells,
            documents_per_row=documents_per_row,
        )
        problems += _wrong_values(fields)
        if problems:
            raise InputError("GLM32KConfig: " + "; ".join(problems))
        super().__init__(seq_length=seq_length, rope_ratio=rope_ratio, eos_token_id=eos_token_id, **kwargs)
        self.loss_chunk_size, self.mlp_chunk_size = loss_chunk_size, mlp_chunk_size
        self.cells = cells
        self.documents_per_row = documents_per_row
        # Upstream's generator and the LoRA adapter read these without a default.
        for name in ("is_encoder_decoder", "is_sample_acceleration"):
            if getattr(self, name, None) is None:
                setattr(self, name, False)

    @property
    def use_portable_cells(self):
        """bool: whether NPU-only kernels are replaced by portable cells."""
        if self.cells == "auto":
            return not compat.on_ascend()
        return self.cells == "portable"

    @classmethod
    def from_huggingface(cls, path, **overrides):
        """Reads the `config.json` published with ChatGLM3-6B-32K.

        Args:
            path (str | os.PathLike): the file, or the folder that holds it.
            **overrides: fields that take precedence over the file's.

        Returns:
            GLM32KConfig

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


def _upstream_parameters():
    parameters = inspect.signature(ChatGLM2Config.__init__).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in ("self", "kwargs")}


def known_keys():
    """The keys that GLM32KConfig takes.

    Returns:
        set[str]
    """
    generation = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    return (
        set(_upstream_parameters())
        | {"loss_chunk_size", "mlp_chunk_size", "cells", "documents_per_row"}
        | generation
        | {"max_decode_length"}
        | _HOST_KEYS
        | set(_DERIVED)
    )


def _unknown_keys(kwargs):
    known = known_keys()
    problems = []
    for key in kwargs:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            problems.append(f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    return problems


def _wrong_values(fields):
    """One sentence per field whose value is not allowed."""
    problems = []

    def check(name, allowed, is_right):
        value = fields[name]
        if not is_right(value):
            problems.append(f"{name}={value!r}: allowed is {allowed}")
        return is_right(value)

    def is_int(value):
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)

    def is_number(value):
        return isinstance(value, numbers.Real) and not isinstance(value, bool)

    positive = [
        name
        for name in (
            "batch_size",
            "num_layers",
            "padded_vocab_size",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "seq_length",
            "multi_query_group_num",
            "block_size",
            "num_blocks",
            "loss_chunk_size",
            "pp_interleave_num",
            "fine_grain_interleave",
            "documents_per_row",
        )
        if check(name, "an integer >= 1", lambda value: is_int(value) and value >= 1)
    ]
    check("mlp_chunk_size", "null or an integer >= 2", lambda value: value is None or is_int(value) and value >= 2)
    check(
        "kv_channels",
        "a multiple of 4 (half of each head is rotated, in pairs)",
        lambda value: is_int(value) and value >= 4 and value % 4 == 0,
    )
    if {"num_attention_heads", "multi_query_group_num"} <= set(positive):
        heads = fields["num_attention_heads"]
        check("multi_query_group_num", f"a divisor of num_attention_heads={heads}", lambda value: heads % value == 0)
    for name in ("hidden_dropout", "attention_dropout"):
        check(name, "a number in [0, 1)", lambda value: is_number(value) and 0 <= value < 1)
    check("layernorm_epsilon", "a number in (0, 0.01]", lambda value: is_number(value) and 0 < value <= 0.01)
    check("rope_ratio", "a number > 0", lambda value: is_number(value) and value > 0)
    check("repetition_penalty", "a number > 0", lambda value: is_number(value) and value > 0)
    for name in ("param_init_type", "compute_dtype", "layernorm_compute_type", "residual_dtype", "rotary_dtype"):
        if name != "rotary_dtype" or fields[name] is not None:
            check(name, f"one of {', '.join(DTYPES)}", lambda value: str(value).lower() in DTYPES)
    for name in (
        "apply_residual_connection_post_layernorm",
        "post_layer_norm",
        "add_bias_linear",
        "add_qkv_bias",
        "use_past",
        "use_flash_attention",
        "enable_high_performance",
        "is_dynamic",
        "mlp_concat",
        "qkv_concat",
        "use_ring_attention",
        "post_self_attn_layernorm",
        "post_mlp_layernorm",
    ):
        check(name, "true or false", lambda value: isinstance(value, bool))
    check("cells", f"one of {', '.join(CELLS)}", lambda value: value in CELLS)
    vocabulary = fields["padded_vocab_size"]
    if "padded_vocab_size" in positive:

        def is_id(value):
            return is_int(value) and 0 <= value < vocabulary

        check("pad_token_id", f"an id in [0, padded_vocab_size={vocabulary})", is_id)
        check(
            "eos_token_id",
            f"an id in [0, padded_vocab_size={vocabulary}) or a list of them",
            lambda value: is_id(value) or (isinstance(value, (list, tuple)) and value and all(map(is_id, value))),
        )
    # What upstream's glm2 offers but the published model does not use, and this plugin does not build:
    check("rmsnorm", "true (the published model has no LayerNorm)", lambda value: value is True)
    check(
        "multi_query_attention",
        "true (set multi_query_group_num to the number of key-value heads)",
        lambda value: value is True,
    )
    check("pre_seq_len", "null (prefix tuning is not supported; LoRA is: pet_config)", lambda value: value in (None, 0))
    check("use_rearrange_rope", "false (the weights are not permuted)", lambda value: value is False)
    check("mask_generate", "null (the causal mask is built by the attention)", lambda value: value is None)
    if fields["use_past"] is True:
        check("is_dynamic", "true when use_past is true", lambda value: value is True)
    return problems
