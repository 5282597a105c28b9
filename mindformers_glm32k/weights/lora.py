"""Low-rank adapters: which belong to which weight, and their product added to it.

MindFormers computes W x + (alpha / rank) B (A x) with A (rank, in) and B (out, rank); merged, W + (alpha / rank) B A.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.names import adapter_of
from mindformers_glm32k.weights.tensors import cast

_NARROW_HINT = "merge into a base of fp32 or bf16"


def pairs_of(shapes: Mapping[str, tuple[int, int]], path: object) -> dict[str, tuple[str, str]]:
    """Sorts adapters, name -> whole shape, by the weight that they change: weight -> names of A and B.

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
        raise InputError(f"{name}: {lost} merged values are too large for {dtype}; {_NARROW_HINT}")
    return result.reshape(values.shape)


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
    """The same from the adapter_config.json that MindFormers leaves in the run's output folder; None without."""
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
