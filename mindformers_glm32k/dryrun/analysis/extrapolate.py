"""Figures of a deep program, extrapolated from two shallow ones: each further layer adds the same."""

from __future__ import annotations

from mindformers_glm32k.checks import is_number
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.parallel import layers_per_stage

LAYERS = (2, 4)  # layers of each stage in the programs that are compiled
_SAME = frozenset(("rank", "stage"))
_MEASURED = frozenset(("compile_seconds", "peak_rss_bytes"))


def layers_of_stages(config: dict) -> list[int]:
    """Layers of each pipeline stage of the merged configuration, all its virtual stages together.

    Raises:
        InputError: a setting differs from layer to layer, so that shallow programs say nothing about it, or the layers
            do not fit the stages.
    """
    model = config["model"]["model_config"]
    for name in ("recompute", "select_recompute", "select_comm_recompute"):
        value = (config.get("recompute_config") or {}).get(name)
        patterns = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
        if isinstance(value, (list, tuple, dict)) and not patterns:  # patterns of operators hold for all layers
            raise InputError(
                f"--quick: recompute_config.{name} is {value!r}, another value for some layers; "
                "compile at full depth (without --quick) or give one value for all layers"
            )
    dealt = layers_per_stage(config)
    if LAYERS[0] % len(dealt):
        raise InputError(
            f"--quick: model_config.pp_interleave_num {len(dealt)} does not divide the {LAYERS[0]} layers of a shallow "
            "stage; compile at full depth (without --quick)"
        )
    layers = [sum(parts) for parts in zip(*dealt)]
    if sum(layers) != int(model["num_layers"]):
        raise InputError(
            f"--quick: model_config.num_layers {model['num_layers']} is not the sum of {layers} layers on "
            f"{len(layers)} stages; set model_config.offset"
        )
    return layers


def overrides_for(layers_of_a_stage: int, stages: int) -> list[str]:
    """run_mindformer's options for a shallow model."""
    return ["--model.model_config.num_layers", str(layers_of_a_stage * stages), "--model.model_config.offset", "0"]


def extrapolate(shallow: dict, deeper: dict, layers: int) -> dict:
    """The report's entry of a stage with more layers.

    Args:
        shallow, deeper: the report's entries of the stage with LAYERS[0] and LAYERS[1] layers.
        layers: of the stage at full depth.

    Returns:
        Counts and sizes extrapolated, lists of tensors of the deeper program, compile_seconds the sum and
        peak_rss_bytes the maximum of both, and "extrapolated": {"from_layers", "to_layers"}.
    """
    steps = (layers - LAYERS[0]) / (LAYERS[1] - LAYERS[0])

    def at_depth(first, second):
        return max(round(first + (second - first) * steps), 0)

    def merge(first, second):
        if isinstance(second, dict):
            return {key: merge(first.get(key, type(value)()), value) for key, value in second.items()}
        if is_number(second):
            return at_depth(first, second)
        return second

    result = {
        key: value if key in _SAME or key in _MEASURED else merge(shallow.get(key), value)
        for key, value in deeper.items()
        if key != "collectives"
    }
    result["compile_seconds"] = round(shallow["compile_seconds"] + deeper["compile_seconds"], 2)
    result["peak_rss_bytes"] = max(shallow["peak_rss_bytes"], deeper["peak_rss_bytes"])
    result["collectives"] = _collectives(shallow["collectives"], deeper["collectives"], at_depth)
    result["extrapolated"] = {"from_layers": list(LAYERS), "to_layers": layers}
    return result


def _collectives(first, second, at_depth):
    def by_key(items):
        return {
            (item["kind"], tuple(item["group_ranks"]), item["dtype"], item["purpose"], item["part"]): item
            for item in items
        }

    first, second = by_key(first), by_key(second)
    result = []
    for key in {**second, **first}:
        sizes = {
            name: at_depth(first.get(key, {}).get(name, 0), second.get(key, {}).get(name, 0))
            for name in ("bytes", "count")
        }
        if sizes["count"]:
            result.append({**(second.get(key) or first[key]), **sizes})
    return sorted(result, key=lambda item: -item["bytes"])
