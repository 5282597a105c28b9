"""Makes checkpoints for tests and benchmarks: any size, torch zip-pickle files without torch, the published layout."""

import json
import struct
import zipfile

import numpy as np

TINY = {
    "num_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "multi_query_group_num": 2,
    "ffn_hidden_size": 160,
    "padded_vocab_size": 1024,
}
_STORAGES = {
    np.dtype("f4"): "FloatStorage",
    np.dtype("f2"): "HalfStorage",
    np.dtype("u2"): "BFloat16Storage",
    np.dtype("i8"): "LongStorage",
}
_CODES = {
    np.dtype("int8"): "I8",
    np.dtype("f4"): "F32",
    np.dtype("f2"): "F16",
    np.dtype("u2"): "BF16",
    np.dtype("i8"): "I64",
}


def chatglm_shapes(config):
    """Names and shapes as published with ChatGLM3, in the model's order."""
    hidden, ffn, vocab = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    projection = config["num_attention_heads"] * config["kv_channels"]
    qkv = projection + 2 * config["multi_query_group_num"] * config["kv_channels"]
    shapes = {
        "transformer.embedding.word_embeddings.weight": (vocab, hidden),
        "transformer.rotary_pos_emb.inv_freq": (config["kv_channels"] // 4,),
    }
    for layer in range(config["num_layers"]):
        prefix = f"transformer.encoder.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "self_attention.query_key_value.weight"] = (qkv, hidden)
        shapes[prefix + "self_attention.query_key_value.bias"] = (qkv,)
        shapes[prefix + "self_attention.dense.weight"] = (hidden, projection)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.dense_h_to_4h.weight"] = (2 * ffn, hidden)
        shapes[prefix + "mlp.dense_4h_to_h.weight"] = (hidden, ffn)
    shapes["transformer.encoder.final_layernorm.weight"] = (hidden,)
    shapes["transformer.output_layer.weight"] = (vocab, hidden)
    return shapes


def random_values(shapes, dtype, seed=0):
    """Random tensors; dtype "fp32", "fp16" or "bf16" (bit patterns as uint16). All fp32 values are full precision."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = generator.standard_normal(shape, np.float32) * np.float32(0.02)
        if dtype == "fp16":
            values = values.astype(np.float16)
        elif dtype == "bf16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        tensors[name] = values
    return tensors


def write_safetensors(path, tensors):
    """Writes a safetensors file (uint16 arrays count as bf16, for which NumPy and the library have no common dtype)."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": _CODES[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [position, position + values.nbytes],
        }
        position += values.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            handle.write(np.ascontiguousarray(values).tobytes())


def write_torch(path, tensors, pickle=None, views=None):
    """Writes a file as torch.save does.

    Args:
        path: the file.
        tensors: name -> array; one record each.
        pickle: the bytes of data.pkl, for files that torch.save would not write.
        views: name -> (offset, shape, strides) for tensors that are not all of their storage, in order.
    """
    prefix = path.stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def put(name, data):
            archive.writestr(zipfile.ZipInfo(f"{prefix}/{name}", (1980, 1, 1, 0, 0, 0)), data)

        put("data.pkl", state_dict_pickle(tensors, views or {}) if pickle is None else pickle)
        put("byteorder", b"little")
        for key, values in enumerate(tensors.values()):
            put(f"data/{key}", memoryview(np.ascontiguousarray(values)).cast("B"))
        put("version", b"3\n")


def _text(text):
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _number(value):
    return b"J" + struct.pack("<i", value)


def _numbers(values):
    return b"(" + b"".join(map(_number, values)) + b"t"


def state_dict_pickle(tensors, views):
    """The pickle (protocol 2) of an OrderedDict of tensors, as torch writes it."""
    out = b"\x80\x02ccollections\nOrderedDict\n)R("
    for key, (name, values) in enumerate(tensors.items()):
        steps = [int(np.prod(values.shape[axis + 1 :], dtype=int)) for axis in range(values.ndim)]
        offset, shape, strides = views.get(name, (0, values.shape, steps))
        storage = (
            b"("
            + _text("storage")
            + b"ctorch\n"
            + _STORAGES[values.dtype].encode()
            + b"\n"
            + _text(str(key))
            + _text("cpu")
            + _number(values.size)
            + b"tQ"
        )
        out += (
            _text(name)
            + b"ctorch._utils\n_rebuild_tensor_v2\n("
            + storage
            + _number(offset)
            + _numbers(shape)
            + _numbers(strides)
            + b"\x89"
            + b"ccollections\nOrderedDict\n)R"
            + b"tR"
        )
    # torch puts the modules' versions beside the tensors, as an attribute
    return out + b"u}" + _text("_metadata") + b"ccollections\nOrderedDict\n)Rsb."


def shard_of(name, config, count):
    """Which shard holds a tensor when the layers are dealt out evenly, the ends with the first and the last."""
    if ".layers." not in name:
        return 0 if "embedding" in name or "rotary" in name else count - 1
    return min(int(name.split(".layers.")[1].split(".")[0]) * count // config["num_layers"], count - 1)


def write_folder(folder, config, tensors, kind, shards=2, place=None):
    """Writes a Hugging Face folder: shards, index, config.json.

    Args:
        folder: created when missing.
        config: fields of config.json that differ from a minimal ChatGLM's.
        tensors: name -> array.
        kind: "bin" or "safetensors".
        shards: their number; 1 writes a single file without an index.
        place: name -> shard number, instead of an even distribution.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("pytorch_model", ".bin") if kind == "bin" else ("model", ".safetensors")
    write = write_torch if kind == "bin" else write_safetensors
    (folder / "config.json").write_text(
        json.dumps(
            dict(
                {
                    "model_type": "chatglm",
                    "multi_query_attention": True,
                    "add_qkv_bias": True,
                    "layernorm_epsilon": 1e-5,
                    "rope_ratio": 50,
                    "seq_length": 32768,
                    "eos_token_id": 2,
                    "pad_token_id": 0,
                },
                **config,
            )
        )
    )
    names = [f"{stem}-{number:05d}-of-{shards:05d}{suffix}" for number in range(1, shards + 1)]
    if shards == 1:
        names = [f"{stem}{suffix}"]
    place = place or {name: shard_of(name, config, shards) for name in tensors}
    for number, file in enumerate(names):
        write(folder / file, {name: values for name, values in tensors.items() if place[name] == number})
    if shards > 1:
        weight_map = {name: names[place[name]] for name in tensors}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
