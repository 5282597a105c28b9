"""What a search leaves: search.json, a YAML for each candidate, a table and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mindformers_glm32k.dryrun.report.advice import GIB
from mindformers_glm32k.dryrun.report.estimate import FIGURES, PARTS, note
from mindformers_glm32k.dryrun.report.markdown import table
from mindformers_glm32k.dryrun.search.space import applied
from mindformers_glm32k.files import atomic_path

JSON, TABLE, PICTURE = "search.json", "search.md", "search.png"
# Term of memory -> (label, how to reduce it).
_TERMS = {
    "weights": ("weights", "they take less with more NPUs (--devices)"),
    "gradients": ("accumulated gradients", "they take less with more NPUs (--devices) or fewer sequences (--rows)"),
    "fresh": ("gradients", "more NPUs (--devices) share them out, LoRA (model_config.pet_config) has few"),
    "update": (
        "gradients and their update",
        "more NPUs (--devices) share them out, LoRA (model_config.pet_config) has few",
    ),
    "optimizer": ("optimizer states", "more NPUs (--devices) share them out, LoRA (model_config.pet_config) has few"),
    "gathered": ("gathered weights", "tensor or pipeline parallel layouts on more NPUs (--devices) gather less"),
    "logits": ("logits and loss", "a smaller model_config.loss_chunk_size makes them less"),
    "activations": ("activations", "they take less with a shorter model_config.seq_length or more NPUs (--devices)"),
    "cache": ("key-value cache", "it takes less with a shorter model_config.seq_length or more NPUs (--devices)"),
}
_OF_TRAINING = (
    f"tokens/s/p is fitted to {FIGURES} published figures, nine in ten of which lie in such an interval; beside it "
    "that by one figure, of which matmul to bubble are the seconds."
)
_OF_PREDICTION = (
    "tokens/s/p are tokens decoded behind full prompts, at the efficiencies that were fitted for training: nothing "
    "published is fitted for prediction, and the interval is a guess. Beside it that at the device's peaks, of which "
    "matmul to bubble are the seconds of a token of each prompt."
)
_MISSES = 3  # candidates written when none fits


@dataclass
class Candidate:
    """A setting of training or prediction with its predicted speed and memory.

    Attributes:
        setting: has a `name`, and `keys` of a YAML.
        speed: tokens/s per card by `estimate.fitted`; `interval` bounds it.
        roofline: the same by `estimate`, with its `parts` (seconds).
        bytes: of the fullest card, in `order`.
        terms: `bytes` by what takes them, the largest first.
        known: extrapolated from shallow programs of its own; False: a guess.
        compiled: figures of the program at full depth.
    """

    setting: Any
    speed: float
    interval: tuple[float, float]
    roofline: float
    step_seconds: float
    parts: dict[str, float]
    bytes: float
    order: str
    terms: dict[str, float]
    known: bool = False
    compiled: bool = False
    stages: list[dict] = field(default_factory=list, repr=False)


def write(candidates: list[Candidate], written: Mapping[str, Any], limit: float, folder: Path, config_file: str) -> str:
    """Writes all files; returns the table.

    Args:
        candidates: best first; those that do not fit are not written as YAML.
        written: the YAML's content with the search's overrides.
        limit: bytes of a card.
        folder: where the files go.
        config_file: the YAML that was searched from, for the headings.
    """
    fitting = [item for item in candidates if item.bytes <= limit]
    names = [f"{index:02d}_{item.setting.name}.yaml" for index, item in enumerate(fitting, 1)]
    for old in folder.glob("[0-9][0-9]_*.yaml"):
        if old.name not in names:
            old.unlink()
    for name, item in zip(names, fitting):
        content = applied(written, item.setting.keys(item.order))
        head = (
            f"# {Path(config_file).name} as `glm32k dryrun --search` changed it: {item.setting.name},\n"
            f"# estimated {item.speed:.0f} tokens/s/p and {item.bytes / GIB:.1f} GiB\n"
        )
        with atomic_path(folder / name) as path:
            path.write_text(head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    entries = [_entry(item, name) for item, name in zip(fitting, names)]
    misses = [] if fitting else [_entry(item, None) for item in candidates[:_MISSES]]
    with atomic_path(folder / JSON) as path:
        content = {"candidates": entries, "memory_gib": limit / GIB, "nearest_misses": misses}
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    text = render(candidates, limit, config_file, str(written.get("run_mode")).startswith("predict"))
    with atomic_path(folder / TABLE) as path:
        path.write_text(text, encoding="utf-8")
    draw(candidates, limit, folder / PICTURE, config_file)
    return text


def misfit(candidates: list[Candidate], limit: float, folder: Path) -> str:
    """One line: why no candidate fits, and what would help."""
    if not candidates:
        return "no layout compiles; the lines above say why, the layouts' YAML may not be of this model"
    least = min(candidates, key=lambda item: item.bytes)
    (term, most), *others = ((name, size / GIB) for name, size in least.terms.items())
    name, fix = _TERMS[term]
    rest = ", ".join(f"{_TERMS[other][0]} {size:.1f}" for other, size in others if size >= 0.05)
    rest, guess = f" ({rest})" if rest else "", "" if least.known else " (a guess)"
    size = least.bytes / GIB
    return (
        f"--memory {limit / GIB:g}: nothing fits; {least.setting.name}, the smallest, takes {size:.1f} GiB{guess} and "
        f"is {size - limit / GIB:.1f} GiB over, most of it {name}: {most:.1f} GiB{rest}; {fix}, or give "
        f"--memory {math.ceil(size)} (table: {folder / TABLE})"
    )


def _entry(item, name):
    entry = {
        "config": name,
        "tokens_per_second_per_card": round(item.speed, 1),
        "interval": [round(bound, 1) for bound in item.interval],
        "peak_gib": round(item.bytes / GIB, 2),
        "order": item.order,
        "compiled": item.compiled,
        "figures": _origin(item),
        "layout": item.setting.name,
        "rows": item.setting.rows,
        "step_seconds": round(item.step_seconds, 2),
        "gib_by_term": {name: round(size / GIB, 2) for name, size in item.terms.items()},
        "tokens_per_second_per_card_by_one_figure": round(item.roofline, 1),
    }
    return entry if name else {key: value for key, value in entry.items() if key != "config"}


def render(candidates: list[Candidate], limit: float, config_file: str, predicts: bool = False) -> str:
    """The table in Markdown; of prediction, where `predicts`."""
    lines = [
        [
            item.setting.name,
            item.setting.rows,
            f"**{item.speed:.0f}**",
            f"{item.interval[0]:.0f} to {item.interval[1]:.0f}",
            f"{item.roofline:.0f}",
            f"{item.bytes / GIB:.1f}" + (" (too much)" if item.bytes > limit else ""),
            item.order,
            *map(_seconds, (item.step_seconds, *(item.parts[part] for part in PARTS))),
            _origin(item),
        ]
        for item in candidates
    ]
    head = [
        "setting",
        "prompts" if predicts else "sequences a step",
        "tokens/s/p",
        "interval",
        "at the peaks" if predicts else "by one figure",
        "GiB",
        "order",
        "step, s",
        *PARTS,
        "figures",
    ]
    how = (
        f"Layouts of {Path(config_file).name} for at most {limit / GIB:.0f} GiB a card, the fastest first. Memory is "
        "of the fullest card, in the better of MindSpore's orders of execution, which the YAML sets. "
        + (_OF_PREDICTION if predicts else _OF_TRAINING)
    )
    notes = [] if predicts else [note()]
    return "\n\n".join(["# Search", how, table(head, lines), f"![Memory against speed]({PICTURE})", *notes]) + "\n"


def _seconds(count):
    """Two significant digits below a tenth of a second, else one decimal."""
    return f"{count:.2g}" if 0 < count < 0.1 else f"{count:.1f}"


def _origin(item):
    if item.compiled:
        return "compiled in full"
    return "from 2 and 4 layers a stage" if item.known else "a guess"


def frontier(candidates: list[Candidate]) -> list[Candidate]:
    """The Pareto frontier of speed and memory, by memory."""
    found: list[Candidate] = []
    for item in sorted(candidates, key=lambda one: (one.bytes, -one.speed)):
        if not found or item.speed > found[-1].speed:
            found.append(item)
    return found


def draw(candidates: list[Candidate], limit: float, path: Path, config_file: str) -> None:
    """Memory against speed; the frontier is marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
    best = frontier(candidates)
    axes.plot([item.bytes / GIB for item in best], [item.speed for item in best], "--", color="grey", label="frontier")
    for index, item in enumerate(candidates, 1):
        axes.plot(
            item.bytes / GIB,
            item.speed,
            "o" if item.compiled else "s",
            color="#4878d0" if item.bytes <= limit else "#d65f5f",
            label=f"{index} {item.setting.name.replace('_', ' ')}" + (", compiled in full" if item.compiled else ""),
        )
        axes.annotate(str(index), (item.bytes / GIB, item.speed), xytext=(6, 6), textcoords="offset points", fontsize=9)
    axes.axvline(limit / GIB, color="black", linestyle=":", linewidth=1, label=f"{limit / GIB:.0f} GiB")
    axes.set_xlabel("GiB of the fullest card")
    axes.set_ylabel("estimated tokens/s and card")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    factor = candidates[0].interval[1] / candidates[0].speed if candidates else 1
    title = f"{Path(config_file).name}: estimated, not measured; intervals: a factor of {factor:.2f} both ways"
    axes.set_title(title, fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
