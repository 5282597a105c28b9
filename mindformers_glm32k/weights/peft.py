"""LoRA adapters in PEFT's folders, merged into a base while it is converted.

PEFT computes W x + scale B A x with A (r, in), B (out, r), and scale = lora_alpha / r, or / sqrt(r) with use_rslora.
Sources: peft/tuners/lora/{config,layer}.py, peft/utils/{save_and_load,other}.py.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mindformers_glm32k.checks import is_int, is_number, parse_json
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.checkpoint import read_file
from mindformers_glm32k.weights.finding import ADAPTER_CONFIG
from mindformers_glm32k.weights.names import ModelDims, TensorKey, key_of, unwrapped
from mindformers_glm32k.weights.tensors import CARRIER, ITEM_SIZE, StoredTensor, cast, count_not_finite

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Fields that are read below, or that no merge needs: origin, dropout, initialization, placement (tensor names tell it).
_WITHOUT_EFFECT = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout "
    "target_modules exclude_modules layers_to_transform layers_pattern megatron_core qalora_group_size modules_to_save "
    "r lora_alpha use_rslora rank_pattern alpha_pattern bias init_lora_weights "
    "fan_in_fan_out ensure_weight_tying".split()
)
_STARTS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_SIDE = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.[\w-]+)?\.weight$")


class _Product(NamedTuple):
    """What is added to some rows of a weight: scale x B A."""

    a: StoredTensor
    b: StoredTensor
    scale: float
    rows: tuple[int, int]  # of the weight: from, to
    b_rows: tuple[int, int]  # of B


@dataclass(frozen=True)
class MergedWeight(StoredTensor):
    """A base's weight, to which adapters are added when its values are read: in float32, rounded once."""

    base: StoredTensor | None = None
    products: tuple[_Product, ...] = ()

    def chunks(self, chunk_bytes: int = 0, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yields all values of the range as one array; see StoredTensor."""
        values = self.base.load()
        if self.base.crc32 is not None and zlib.crc32(np.ascontiguousarray(values)) != self.base.crc32:
            raise InputError(f"{self.file}: key {self.name!r} is corrupt (CRC-32); download it again")
        for a, b, scale, rows, b_rows in self.products:
            ours, theirs = slice(*rows), slice(*b_rows)
            low_rank = (a.load(), a.dtype), (b.load()[theirs], b.dtype)
            for side, (matrix, dtype) in zip((a, b), low_rank):
                if count_not_finite(np.ascontiguousarray(matrix), dtype):
                    raise InputError(f"{side.file}: key {side.name!r} holds NaN or infinity; its training had diverged")
            values[ours] = add_product((values[ours], self.dtype), *low_rank, scale, self.name)
        item = ITEM_SIZE[self.dtype]
        yield values.reshape(-1).view(CARRIER[self.dtype])[start // item : None if stop is None else stop // item]


def merge_adapter(
    folder: str | Path, weights: Mapping[TensorKey, StoredTensor], dims: ModelDims, check_crc: bool = True
) -> tuple[dict[TensorKey, StoredTensor], str]:
    """Merges the adapter in a PEFT folder into a base's weights; returns these and a sentence on what was merged.

    Raises:
        InputError: no adapter, one of another model, or of a kind that cannot be merged here.
    """
    folder = Path(folder)
    config, path = _read_config(folder), folder / ADAPTER_CONFIG
    sides, whole = _read_tensors(folder)
    result, products, ranks = dict(weights), {}, Counter()
    for module, (a, b) in sides.items():
        key, name = _key_of(module + ".weight", a.file)
        rank = _pattern(config.get("rank_pattern"), name, config["r"])
        alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        rows, columns = sum(map(dims.rows, key.parts)), dims.shape(key)[-1]
        if (a.shape, b.shape) != ((rank, columns), (rows, rank)) or len(dims.shape(key)) != 2:
            raise InputError(
                f"{a.file}: lora_A {a.shape} and lora_B {b.shape} of {module!r}: {(rank, columns)} and {(rows, rank)} "
                f"are expected by {ADAPTER_CONFIG} and the base; the adapter is of another model or rank"
            )
        ranks[rank] += 1
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        targets = list(_overlaps(dims, key, weights))
        if not targets:
            raise InputError(f"{a.file}: {module!r} is not in the base, which has {dims.num_layers} layers")
        for target, (where, from_rows) in targets:
            products.setdefault(target, []).append(_Product(a, b, scale, where, from_rows))
    for key, found in products.items():
        base = weights[key]
        segments = ((0, base.nbytes),)
        result[key] = MergedWeight(
            base.name, base.shape, base.dtype, base.file, segments, base=base, products=tuple(found)
        )
    for tensor in whole:
        key, _ = _key_of(tensor.name, tensor.file)
        if key not in weights or tensor.shape != weights[key].shape or tensor.dtype not in ITEM_SIZE:
            raise InputError(f"{tensor.file}: key {tensor.name!r} of modules_to_save does not fit the base's layout")
        result[key] = tensor
    _check_targets(config, sides, dims, path)
    _check_saved(config, whole, path)
    replaced = f", {len(whole)} whole weights replaced" if whole else ""
    return result, (
        f"{folder}: {len(sides)} LoRA adapters of rank {', '.join(map(str, sorted(ranks)))} merged{replaced}; trained "
        f"on {config.get('base_model_name_or_path')!r}"
    )


def _read_config(folder):
    path = folder / ADAPTER_CONFIG
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); give the folder that PEFT's save_pretrained made"
        ) from error
    if kind != "LORA":
        raise InputError(f"{path}: peft_type is {kind!r}; only LORA can be merged")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if not (is_int(value, 1) if key == "r" else is_number(value) and 0 < value < math.inf):
            raise InputError(f"{path}: {key} is {value!r}, a positive number is needed")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise InputError(f"{path}: {key} is {patterns!r:.60}, an object is needed")
        for pattern, value in patterns.items():
            try:
                re.compile(_suffix(pattern))
            except re.error as error:
                raise InputError(f"{path}: {key}: {pattern!r} is no regular expression ({error})") from error
            if not (is_int(value, 1) if key == "rank_pattern" else is_number(value) and 0 < value < math.inf):
                raise InputError(f"{path}: {key}: {pattern!r} is {value!r}, a positive number is needed")
    if config.get("bias", "none") != "none":
        raise InputError(
            f"{path}: bias is {config['bias']!r}: trained biases cannot be merged; only 'none' is understood"
        )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_STARTS_THAT_CHANGE_THE_BASE):
        raise InputError(
            f"{path}: init_lora_weights is {start!r}, which changes the base, too; convert it in PEFT "
            "(save_pretrained with path_initial_model_for_weight_conversion) or merge it there"
        )
    unknown = [key for key, value in config.items() if value and key not in _WITHOUT_EFFECT]
    if unknown:
        raise InputError(f"{path}: {unknown[0]} is {config[unknown[0]]!r}, which is not understood; merge it with PEFT")
    return config


def _read_tensors(folder):
    """The adapters, module -> (A, B), and the tensors that replace a base's."""
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if file is None:
        raise InputError(f"{folder}: neither {' nor '.join(ADAPTER_FILES)} is there; give the folder that PEFT saved")
    found, whole = {}, []
    for tensor in read_file(file):
        if tensor.dtype not in ITEM_SIZE:
            raise InputError(
                f"{file}: key {tensor.name!r} has dtype {tensor.dtype}; only {', '.join(ITEM_SIZE)} are merged"
            )
        match = _SIDE.match(tensor.name)
        if match:
            found.setdefault(match["module"], {})[match["side"]] = tensor
        elif "lora_" in tensor.name:
            raise InputError(
                f"{file}: key {tensor.name!r} is not understood (DoRA, embeddings, biases); merge it with PEFT"
            )
        else:
            name = re.sub(r"\.modules_to_save(\.[\w-]+)?(?=\.)", "", tensor.name)
            whole.append(replace(tensor, name=name))
    lone = [module for module, sides in found.items() if len(sides) < 2]
    if lone or not found:
        raise InputError(f"{file}: {lone[0] + ' has no lora_A and lora_B' if lone else 'no LoRA adapters in it'}")
    return {module: (sides["A"], sides["B"]) for module, sides in found.items()}, whole


def _key_of(name, file):
    plain = unwrapped(name)[0]
    try:
        key = key_of(plain)
    except InputError:
        key = None
    if key is None:
        raise InputError(f"{file}: {name!r} is no weight of ChatGLM3; the adapter is of another model")
    return key, plain[: -len(".weight")]


def _pattern(patterns, module, default):
    """A rank or alpha by the first pattern that fits the end of a module's name, as PEFT chooses it."""
    return next((v for key, v in (patterns or {}).items() if re.match(_suffix(key), module)), default)


def _suffix(pattern):
    return rf"(.*\.)?({pattern})$"


def _overlaps(dims, key, weights):
    """The base's tensors that hold parts of an adapter's weight, fused or split: (key, (rows of it, rows of B))."""
    for target in weights:
        for part in target.parts:
            if target.layer == key.layer and part in key.parts:
                yield target, tuple(rows_of(dims, one, part) for one in (target, key))


def rows_of(dims: ModelDims, key: TensorKey, part: str) -> tuple[int, int]:
    """The rows (first, last + 1) that a part of names.py takes in a tensor that holds it."""
    start = sum(dims.rows(other) for other in key.parts[: key.parts.index(part)])
    return start, start + dims.rows(part)


def _check_targets(config, sides, dims, path):
    """Checks that every target module has adapters: a file that was edited, or whose save failed, lacks some."""
    targets = config.get("target_modules")
    for target in targets if isinstance(targets, list) else ():
        found = [module for module in sides if module == target or module.endswith("." + target)]
        if not found:
            raise InputError(f"{path}: target_modules names {target!r}, but the adapter's file has none of it")
        if config.get("layers_to_transform") is not None or config.get("exclude_modules") or target in _whole(found):
            continue
        layers = {int(number) for module in found for number in re.findall(r"\.layers\.(\d+)\.", module)}
        missing = sorted(set(range(dims.num_layers)) - layers)
        if layers and missing:
            raise InputError(
                f"{path}: target_modules names {target!r}, but the adapter's file has none of it for the layers "
                f"{', '.join(map(str, missing[:8]))} of the base's {dims.num_layers}; is it cut off, or another base's?"
            )


def _whole(modules):
    """Full names of modules, layer included, in both forms that target_modules may list."""
    return {name for module in modules for name in (module, module.removeprefix("base_model.model."))}


def _check_saved(config, whole, path):
    """Checks that every module of modules_to_save is in the file."""
    for name in config.get("modules_to_save") or ():
        if not any(f".{name}." in f".{tensor.name}" for tensor in whole):
            raise InputError(f"{path}: modules_to_save names {name!r}, but the adapter's file has none of it")


def add_product(
    weight: tuple[np.ndarray, str], a: tuple[np.ndarray, str], b: tuple[np.ndarray, str], scale: float, name: str
) -> np.ndarray:
    """W + scale x B A, computed in float32 and rounded once to the weight's dtype.

    Args:
        weight, a, b: values in the carrier of a dtype, and the dtype.
        scale: alpha / rank.
        name: of the weight, for messages.

    Raises:
        InputError: values that the weight's dtype cannot hold.
    """
    values, dtype = weight
    wide = [cast(np.ascontiguousarray(array), kind, "fp32") for array, kind in (weight, a, b)]
    total = (wide[0] + (wide[2] @ wide[1]) * np.float32(scale)).astype(np.float32)
    result = cast(total, "fp32", dtype)
    back = cast(result, dtype, "fp32")
    lost = int(np.count_nonzero(~np.isfinite(back))) - int(np.count_nonzero(~np.isfinite(wide[0])))
    if lost > 0:
        raise InputError(f"{name}: {lost} merged values are too large for {dtype}; merge into a base of fp32 or bf16")
    return result.reshape(values.shape)
