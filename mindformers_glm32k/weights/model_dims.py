"""The sizes that decide every weight's shape: from config.json (ChatGLM or transformers' `glm`) or from the tensors."""

import json
from dataclasses import asdict, dataclass, fields

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.names import QKV

# size: (key in a ChatGLM config.json, key in a `glm` config.json)
_KEYS = {
    "num_layers": ("num_layers", "num_hidden_layers"),
    "vocab": ("padded_vocab_size", "vocab_size"),
    "hidden": ("hidden_size", "hidden_size"),
    "ffn": ("ffn_hidden_size", "intermediate_size"),
    "heads": ("num_attention_heads", "num_attention_heads"),
    "head_dim": ("kv_channels", "head_dim"),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model.

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

    def rows(self, part):
        """Rows (axis 0) that a part of names.py takes in a tensor."""
        return {
            "embedding": self.vocab,
            "output": self.vocab,
            "q": self.q_rows,
            "k": self.kv_rows,
            "v": self.kv_rows,
            "q_bias": self.q_rows,
            "k_bias": self.kv_rows,
            "v_bias": self.kv_rows,
            "gate": self.ffn,
            "up": self.ffn,
        }.get(part, self.hidden)

    def shape(self, slot):
        """The shape of the tensor that holds the parts of a names.Slot."""
        rows = sum(self.rows(part) for part in slot.parts)
        first = slot.parts[0]
        if first.endswith(("_norm", "_bias")):
            return (rows,)
        return (rows, {"attention_out": self.q_rows, "mlp_out": self.ffn}.get(first, self.hidden))


def sizes_from_config(config, path):
    """Reads the sizes from a parsed config.json.

    Args:
        config (dict): the file's content.
        path: the file, for messages.

    Returns:
        Sizes

    Raises:
        InputError: another model, or keys that are missing or no positive numbers.
    """
    kind = config.get("model_type")
    if kind not in ("chatglm", "glm"):
        raise InputError(f"{path}: model_type is {kind!r}, 'chatglm' or 'glm' is needed")
    column = 0 if kind == "chatglm" else 1
    values, problems = {}, []
    for size, keys in _KEYS.items():
        values[size] = config.get(keys[column])
        if size == "head_dim" and values[size] is None and kind == "glm" and not problems:
            values[size] = values["hidden"] // values["heads"]
        if type(values[size]) is not int or values[size] < 1:
            problems.append(f"{keys[column]} is {values[size]!r}, a positive number is needed")
    key = ("multi_query_group_num", "num_key_value_heads")[column]
    groups = config.get(key, values["heads"])
    if kind == "chatglm" and not config.get("multi_query_attention", True):
        groups = values["heads"]
    if type(groups) is not int or groups < 1:
        problems.append(f"{key} is {groups!r}, a positive number is needed")
    if config.get("add_bias_linear"):
        problems.append("add_bias_linear is true: ChatGLM3 has no biases in its linear layers")
    if config.get("tie_word_embeddings"):
        problems.append("tie_word_embeddings is true: ChatGLM3 has an output layer of its own")
    if problems:
        raise InputError(f"{path}: " + "; ".join(problems))
    return Sizes(
        values["num_layers"],
        values["vocab"],
        values["hidden"],
        values["ffn"],
        values["heads"] * values["head_dim"],
        groups * values["head_dim"],
        bool(config.get(("add_qkv_bias", "attention_bias")[column], True)),
    )


def load_config(path):
    """Parses a config.json; raises InputError naming the file when it is missing or no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds a {type(config).__name__}, a JSON object is needed")
    return config


def sizes_from_tensors(tensors):
    """Infers the sizes where there is no config.json.

    Args:
        tensors (dict[names.Slot, StoredTensor]): the file's weights.

    Returns:
        Sizes

    Raises:
        InputError: the tensors that tell the sizes are missing.
    """
    by_part = {}
    for slot, tensor in tensors.items():
        for part in slot.parts:
            by_part.setdefault((part, slot.layer if slot.layer in (None, 0) else -1), (slot, tensor))

    def shape(part, layer, dimensions):
        slot, tensor = by_part.get((part, layer), (None, None))
        if tensor is None or len(tensor.shape) != dimensions:
            raise InputError(
                f"the sizes of the model cannot be inferred: no tensor of {dimensions} dimensions holds "
                f"{part!r} of layer {layer}; put the model's config.json beside the weights"
            )
        return slot, tensor.shape

    vocab, hidden = shape("embedding", None, 2)[1]
    q_rows = shape("attention_out", 0, 2)[1][1]
    ffn = shape("mlp_out", 0, 2)[1][1]
    slot, (rows, _) = shape("k", 0, 2)
    kv_rows = (rows - q_rows) // 2 if slot.parts == QKV else rows
    layers = 1 + max(slot.layer for slot in tensors if slot.layer is not None)
    return Sizes(layers, vocab, hidden, ffn, q_rows, kv_rows, ("k_bias", 0) in by_part)


def sizes_as_dict(sizes):
    """A Sizes as a dictionary for reports."""
    return asdict(sizes)


def differences(expected, found):
    """Names what differs between two Sizes, as ["ffn is 160, expected 13696"]."""
    return [
        f"{field.name} is {getattr(found, field.name)}, expected {getattr(expected, field.name)}"
        for field in fields(Sizes)
        if getattr(found, field.name) != getattr(expected, field.name)
    ]
