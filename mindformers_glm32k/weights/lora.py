"""LoRA adapters of MindFormers: which belong to which weight, their scale, and their form as a PEFT folder.

MindFormers computes W x + (alpha / rank) B (A x) with A (rank, in) and B (out, rank); merged, W + (alpha / rank) B A.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.finding import ADAPTER_CONFIG
from mindformers_glm32k.weights.names import MLP, QKV, ModelDims, TensorKey, adapter_of, key_of, name_of
from mindformers_glm32k.weights.peft import ADAPTER_FILES, rows_of
from mindformers_glm32k.weights.tensors import cast
from mindformers_glm32k.weights.writer import CheckpointWriter


def pairs_of(shapes: Mapping[str, tuple[int, int]], path: object) -> dict[str, tuple[str, str]]:
    """Pairs adapters (name -> whole shape) by the weight that they change: weight -> (name of A, name of B).

    Raises:
        InputError: one of a pair is missing in `path`, or the two have different ranks.
    """
    found = {}
    for name in shapes:
        weight, side = adapter_of(name)
        found.setdefault(weight, {})[side] = name
    for sides in found.values():
        if len(sides) < 2:
            only = next(iter(sides.values()))
            raise InputError(f"{path}: {only!r} has no counterpart; both lora_a and lora_b of a weight are needed")
        a, b = shapes[sides["a"]], shapes[sides["b"]]
        if a[0] != b[1]:
            raise InputError(f"{path}: {sides['a']!r} is {a}, {sides['b']!r} is {b}: the ranks differ")
    return {weight: (sides["a"], sides["b"]) for weight, sides in found.items()}


def scale_of_config(config: Mapping[str, Any], path: object) -> float:
    """What MindFormers multiplies an adapter's product by, lora_alpha / lora_rank, from the merged configuration of the
    YAML `path`.

    Raises:
        InputError: no pet_config, or numbers missing.
    """
    pet = config["model"]["model_config"].get("pet_config") or {}
    try:
        return float(pet["lora_alpha"]) / int(pet["lora_rank"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"{path}: model_config.pet_config with lora_rank and lora_alpha is needed (found "
            f"{pet or None}); give --lora_scaling or the YAML of the LoRA run"
        ) from error


def scale_of_run(folder: Path) -> float | None:
    """As `scale_of_config`, from the adapter_config.json that MindFormers leaves in the output folder; None without."""
    path = next(
        (
            parent / "adapter_config.json"
            for parent in list(folder.resolve().parents)[:2]  # Python 3.9 cannot slice parents
            if (parent / "adapter_config.json").is_file()
        ),
        None,
    )
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return float(found["lora_alpha"]) / int(found["r"])
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{path}: no readable lora_alpha and r ({error}); give --lora_scaling") from error


def write_adapter(
    folder: Path,
    adapters: Mapping[str, tuple[np.ndarray, str]],
    scale: float,
    dims: ModelDims | None,
    naming: str = "chatglm",
) -> CheckpointWriter:
    """Writes MindFormers' adapters as a PEFT folder; returns the writer, for a report.

    For the published model ("chatglm") adapters of split projections become one of the fused projection: A stacked, B
    block-diagonal, so that the rank is the sum of theirs, and lora_alpha = scale x rank keeps the product. For
    transformers' `glm` an adapter of the fused QKV becomes three that share A, and all adapters are padded with zeros
    to the largest rank: engines allocate one rank, and not all of them read PEFT's rank_pattern.

    Raises:
        InputError: some of a fused projection's parts have no adapter, and no `dims` tell how large they are.
    """
    modules = {}
    for name, values in adapters.items():
        weight, side = adapter_of(name)
        parts, layer = key_of(weight)
        fused = next((family for family in (QKV, MLP) if parts[0] in family), parts)
        modules.setdefault(TensorKey(fused, layer), {}).setdefault(parts, {})[side] = values
    pairs = {}
    for key, parts in modules.items():
        for part_key, pair in _split(key, parts, dims) if naming == "glm" else [(key, _fuse(key, parts, dims))]:
            pairs[name_of(part_key, naming)[: -len(".weight")]] = pair
    if naming == "glm":
        pairs = _padded(pairs)
    ranks = {module: len(a) for module, (a, _) in pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: other for module, other in ranks.items() if other != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "THUDM/chatglm3-6b-32k" if naming == "chatglm" else None,
        "r": rank,
        "lora_alpha": _plain(scale * rank),
        "lora_dropout": 0.0,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in ranks}),
        "rank_pattern": others,
        "alpha_pattern": {module: _plain(scale * other) for module, other in others.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    layers = sorted({key.layer for key in modules if key.layer is not None})
    expected = dims.num_layers if dims else layers[-1] + 1
    by_target = Counter(module.rsplit(".", 1)[-1] for module in ranks)
    if set(by_target.values()) != {expected}:
        config["target_modules"] = sorted(ranks)  # not every layer has each target: full module names
    folder.mkdir()
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": values
        for module, pair in pairs.items()
        for side, values in zip("AB", pair)
    }
    entries = [(name, values.shape, "fp32") for name, values in tensors.items()]
    with CheckpointWriter.for_file(folder / ADAPTER_FILES[0], entries, "pt") as writer:
        for name, values in tensors.items():
            writer.write(name, values)
        writer.finish()
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return writer


def _split(key, parts, dims):
    """Yields (key, (A, B)) of each weight that `glm` has for a fused one: three of QKV, otherwise one."""
    if key.parts != QKV:
        yield key, _fuse(key, parts, dims)
    elif QKV in parts:
        if dims is None:
            raise InputError(
                "adapters of query_key_value only: the rows of query, key and value in it are unknown; give --config "
                "with the YAML of the run"
            )
        a, b = _fuse(key, parts, dims)
        for part in QKV:
            rows = slice(*rows_of(dims, key, part))
            yield TensorKey((part,), key.layer), (a, np.ascontiguousarray(b[rows]))
    else:
        for held, sides in parts.items():
            yield TensorKey(held, key.layer), _fuse(TensorKey(held, key.layer), {held: sides}, dims)


def _padded(pairs):
    """All pairs with the largest rank of any: rows of A and columns of B that are zero add nothing."""
    rank = max(len(a) for a, _ in pairs.values())
    return {
        module: (np.pad(a, ((0, rank - len(a)), (0, 0))), np.pad(b, ((0, 0), (0, rank - b.shape[1]))))
        for module, (a, b) in pairs.items()
    }


def _fuse(key, parts, dims):
    """A and B in float32 of one fused weight, from those of the tensors that hold its parts."""
    wide = {
        held: [cast(np.ascontiguousarray(values), dtype, "fp32") for values, dtype in (sides["a"], sides["b"])]
        for held, sides in parts.items()
    }
    if key.parts in wide:
        return wide[key.parts]
    if dims is None and len(wide) < len(key.parts):
        raise InputError(
            f"adapters of {', '.join(name_of(TensorKey(held, key.layer), 'mindspore') for held in wide)} only: their "
            "rows in the fused weight are unknown; give --config with the YAML of the run"
        )
    rows = {part: dims.rows(part) if dims else len(wide[(part,)][1]) for part in key.parts}
    a = np.concatenate([pair[0] for pair in wide.values()])
    b, column, row = np.zeros((sum(rows.values()), len(a)), np.float32), 0, 0
    starts = {}
    for part in key.parts:
        starts[part], row = row, row + rows[part]
    for (part,), (_, other) in wide.items():
        b[starts[part] : starts[part] + rows[part], column : column + other.shape[1]] = other
        column += other.shape[1]
    return a, b


def _plain(number):
    return int(number) if number == int(number) else number
