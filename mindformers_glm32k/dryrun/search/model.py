"""Figures of a setting before its programs are compiled: a closed form, corrected by the programs compiled so far.

Work (products, attention, collectives) follows from the sizes. The activations that a layer keeps from its forward to
its backward pass depend on recomputation; they are counted in multiples of the hidden and the MLP size per token, and
corrected by the ratio found in the shallow programs of the most similar setting.

Legend: T tokens of a sequence that a device has, H hidden size, F MLP size, Q query features, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from mindformers_glm32k.dryrun.analysis.extrapolate import LAYERS
from mindformers_glm32k.dryrun.analysis.order import ORDERS
from mindformers_glm32k.dryrun.search.figures import (
    PHASES,
    Figures,
    at_depth,
    best_order,
    combine,
    settled,
    with_sequences,
)
from mindformers_glm32k.dryrun.search.space import HARDER, Setting

# Activations kept per token and layer, in multiples of (hidden size, MLP size); from compiled programs.
_KEPT = {"whole": (1.0, 0.0), "mlp": (4.4, 0.0), "cheap": (4.4, 2.0), "none": (9.5, 4.0)}
# Bytes that vector operators read and write per token and layer in 16 bits, in multiples of (hidden size, MLP size).
_MOVED = {"whole": (250, 85), "mlp": (210, 70), "cheap": (200, 65), "none": (190, 62)}
_MOVED_BY_EXCHANGE = 1.8  # factor on _MOVED with context parallel: copies before and after each AlltoAll
_TRANSIENT = 6  # tensors of a layer's MLP that its backward pass holds at once
_LOGITS = 4  # float32 copies of a chunk's logits that the loss holds at once
_OF_THE_LOSS = 2**28  # bytes of logits at a peak, below which the loss's chunk size does not matter
_UPDATE = 8.5  # bytes per parameter that clipping and AdamW hold beside its moments
_ADAM = 8  # bytes of a parameter's moments
_EXCHANGES = 15  # AlltoAll traffic of context parallel per layer, forward and backward, in tensors of T x Q
_SHARES = 20  # traffic of tensor parallel per layer, forward and backward, in tensors of T x H


@dataclass(frozen=True)
class Dims:
    """Model sizes of a configuration; `query` and `keys` (with values): features; `bytes`: of an element in products;
    `adapters`: LoRA."""

    layers: int
    length: int
    hidden: int
    ffn: int
    query: int
    keys: int
    vocabulary: int
    loss_chunk: int
    bytes: int
    adapters: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Dims:
        """Sizes of a merged configuration."""
        model = config["model"]["model_config"]
        channels = int(model["kv_channels"])
        return cls(
            int(model["num_layers"]),
            int(model["seq_length"]),
            int(model["hidden_size"]),
            int(model["ffn_hidden_size"]),
            int(model["num_attention_heads"]) * channels,
            2 * int(model["multi_query_group_num"]) * channels,
            int(model["padded_vocab_size"]),
            int(model.get("loss_chunk_size") or 2048),
            4 if str(model.get("compute_dtype")) == "float32" else 2,
            bool(model.get("pet_config")),
        )

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return self.hidden * (self.query + self.keys) + self.query * self.hidden + 3 * self.hidden * self.ffn


class Model:
    """Predicts figures of every stage of a setting.

    Args:
        dims: sizes of the model.
    """

    def __init__(self, dims: Dims):
        self.dims = dims
        self.known: dict[Setting, tuple[list[Figures], list[Figures]]] = {}
        self._corrections: dict[Setting, dict] = {}  # of families that were guessed

    def learn(self, family: Setting, shallow: list[Figures], deeper: list[Figures]) -> None:
        """Takes in the figures of a family's programs with LAYERS layers, by stage."""
        self.known[family] = shallow, deeper
        self._corrections.clear()

    def is_known(self, setting: Setting) -> bool:
        """Whether a setting's figures are extrapolated from its own shallow programs, and not guessed."""
        return not self.missing(setting)

    def missing(self, setting: Setting) -> list[Setting]:
        """Families whose shallow programs are not compiled yet: without them a setting's figures are guessed."""
        needed = [setting.family]
        if any(setting.recomputed):
            needed.append(replace(setting, recompute=HARDER[setting.recompute]).family)
        return [family for family in needed if family not in self.known]

    def is_near(self, setting: Setting) -> bool:
        """Whether a guess about a setting follows from programs with the same axes and the same recomputation."""
        return any(one.axes == setting.axes and one.recompute == setting.recompute for one in self.known)

    def stages(self, setting: Setting) -> list[Figures]:
        """Figures of each stage."""
        found = []
        for stage, layers in enumerate(setting.layers):
            whole = setting.recomputed[stage] if setting.recomputed else 0  # layers
            figures = self._stage(setting, stage, layers - whole)
            if whole:  # plus `whole` layers with the next stronger recomputation
                again = replace(setting, recompute=HARDER[setting.recompute], recomputed=())
                more = [self._stage(again, stage, count) for count in (whole, 0)]
                figures = settled(combine((1, figures), (1, more[0]), (-1, more[1])))
            found.append(figures)
        return found

    def _stage(self, setting, stage, layers):
        family = setting.family
        if family in self.known:
            shallow, deeper = (pair[stage] for pair in self.known[family])
            figures = at_depth(shallow, deeper, layers)
        elif family.usual in self.known:
            figures = self._resized(family, stage, layers)
        else:
            figures = self._guess(family, stage, layers)
        return with_sequences(figures, family.sequences, setting.sequences)

    def _resized(self, family, stage, layers):
        """Figures from the programs with the default chunk sizes. Smaller loss chunks save at most the loss's share of
        the peak of those programs."""
        usual = family.usual
        figures = at_depth(*(pair[stage] for pair in self.known[usual]), layers)
        forms = [self.closed_form(one, stage, layers) for one in (family, replace(family, loss_chunk=None), usual)]
        figures["vector",] += forms[0]["vector",] - forms[2]["vector",]
        for order in ORDERS:
            logits = [form["logits", order] for form in forms]
            more = logits[0] - logits[2]
            if more < 0:
                more *= figures["logits", order] / logits[2]
            figures["logits", order] += more
            figures["passes", order] += more + forms[1]["passes", order] - forms[2]["passes", order]
        return settled(figures)

    def limited_by_loss(self, setting: Setting) -> bool:
        """Whether logits take part in the peak of the fullest stage; for a setting that `is_known`."""
        stages = self.stages(setting)
        order = best_order(stages)
        return max(stages, key=lambda figures: figures["bytes", order])["logits", order] > _OF_THE_LOSS

    def _guess(self, family, stage, layers):
        """The closed form, each figure times its median ratio in the most similar families that were compiled."""
        figures = self.closed_form(family, stage, layers)
        if family not in self._corrections:
            self._corrections[family] = self._ratios(family)
        none, one = (self.closed_form(family, stage, count) for count in (0, 1))  # layers
        for key, (kept, constant) in self._corrections[family].items():
            first, second = none.get(key, 0.0), one.get(key, 0.0)
            figures[key] = constant * first + kept * (second - first) * layers
        return settled(figures)

    def _ratios(self, family):
        """Figure -> compiled / closed form, of (what a layer adds, the part that does not depend on the layers)."""

        def exchanges(one):
            return one.context_parallel > 1, one.model_parallel > 1

        def unlike(other):
            return (
                other.recompute != family.recompute,
                other.mlp_chunk != family.mlp_chunk,
                (other.pipeline_stage > 1) != (family.pipeline_stage > 1),
                other.level != family.level,
                other.context_parallel != family.context_parallel,
                other.interleave != family.interleave,
                other.loss_chunk != family.loss_chunk,
            )

        same = [other for other in self.known if exchanges(other) == exchanges(family)]
        least = min(map(unlike, same), default=())
        near = [other for other in same if unlike(other) == least]
        found = defaultdict(list)
        for other in near:
            for stage, pair in enumerate(zip(*self.known[other])):
                forms = [self.closed_form(other, stage, count) for count in (0, 1)]  # layers
                for key in (("vector",), *itertools.product(PHASES, ORDERS)):
                    zero, one = (form[key] for form in forms)
                    added = (pair[1][key] - pair[0][key]) / (LAYERS[1] - LAYERS[0])
                    without = pair[0][key] - LAYERS[0] * added
                    found[key].append((added / max(one - zero, 1), max(without, 0) / max(zero, 1)))
        return {key: tuple(median(side) for side in zip(*values)) for key, values in found.items()}

    def closed_form(self, setting: Setting, stage: int, layers: float) -> Figures:
        """Figures of a stage with `layers` layers, from the sizes alone."""
        return {**self._work(setting, stage, layers), **self._memory(setting, stage, layers)}

    def _ends(self, setting, stage):
        """(how many of embedding and output layer a stage holds, whether it computes the loss)."""
        last = stage == setting.pipeline_stage - 1
        return (stage == 0) + last, last

    def _parameters(self, setting, stage, layers):
        ends, _ = self._ends(setting, stage)
        return (layers * self.dims.layer + ends * self.dims.vocabulary * self.dims.hidden) / setting.model_parallel

    def _memory(self, setting, stage, layers):
        dims, last = self.dims, self._ends(setting, stage)[1]
        parameters = self._parameters(setting, stage, layers)
        tokens = dims.length / setting.context_parallel
        adapters, replicas = dims.adapters, setting.replicas
        accumulates = setting.sequences > 1 and not adapters
        weights = parameters * dims.bytes / (1 if adapters else replicas)
        optimizer = 0 if adapters else parameters * _ADAM / replicas
        gradients = parameters * dims.bytes / (replicas if setting.level > 1 else 1) if accumulates else 0
        states = weights + optimizer + gradients
        gathered = 0 if adapters or replicas == 1 or setting.level > 2 else parameters * dims.bytes
        hidden, ffn = _KEPT[setting.recompute]
        kept = (hidden * dims.hidden + ffn * dims.ffn / setting.model_parallel) * tokens * dims.bytes
        kept /= setting.model_parallel if setting.model_parallel > 1 else 1
        share = (setting.mlp_chunk or dims.length) / dims.length
        transient = _TRANSIENT * dims.ffn * tokens * dims.bytes * share / setting.model_parallel
        logits = last * self._logits(setting, min(setting.loss_chunk or dims.loss_chunk, tokens))
        update = 0 if adapters else parameters * _UPDATE / replicas
        passes = states + gathered + kept * _in_flight(setting, stage) * layers + transient + logits
        at_peak = {"passes": passes, "update": states + update, "gathered": gathered, "logits": logits, "fresh": 0.0}
        kept_always = {"states": states, "weights": weights, "gradients": gradients, "optimizer": optimizer}
        found = settled({(name, order): size for name, size in at_peak.items() for order in ORDERS})
        return {**found, **{(name,): size for name, size in kept_always.items()}}

    def _logits(self, setting, tokens):
        """Bytes that the loss holds for the logits of a chunk of `tokens`."""
        return _LOGITS * tokens * self.dims.vocabulary * 4 / setting.model_parallel

    def _work(self, setting, stage, layers):
        dims, last = self.dims, self._ends(setting, stage)[1]
        mp, cp = setting.model_parallel, setting.context_parallel
        count = setting.sequences
        tokens = dims.length / cp
        products = 2 * dims.layer * tokens / mp
        mlp = 2 * 3 * dims.hidden * dims.ffn * tokens / mp
        again = {"whole": products - mlp / 3, "mlp": mlp * 2 / 3}.get(setting.recompute, 0)
        backward = 1 if dims.adapters else 2
        matmul = layers * ((1 + backward) * products + again)
        matmul += last * (1 + backward) * 2 * dims.vocabulary * dims.hidden * tokens / mp
        pairs = 2 * dims.length * dims.length * dims.query / cp / mp
        attention = layers * pairs * (3.5 + (setting.recompute == "whole"))
        hidden, ffn = _MOVED[setting.recompute]
        vector = layers * tokens * (hidden * dims.hidden + ffn * dims.ffn) * dims.bytes / 2 / mp
        vector *= _MOVED_BY_EXCHANGE if cp > 1 else 1
        vector += last * 60 * tokens * dims.vocabulary / mp + 60 * self._parameters(setting, stage, layers) / (
            setting.replicas * count
        )
        # each loss chunk after the first reads the weight's gradient and its own contribution, and writes the sum
        more_chunks = math.ceil(tokens / (setting.loss_chunk or dims.loss_chunk)) - 1
        vector += last * (not dims.adapters) * more_chunks * 3 * dims.vocabulary * dims.hidden * dims.bytes / mp
        dtype = {2: "float16", 4: "float32"}[dims.bytes]
        work = {("matmul", dtype): matmul * count, ("attention", dtype): attention * count, ("vector",): vector * count}
        return {**work, **self._collectives(setting, stage, layers)}

    def _collectives(self, setting, stage, layers):
        dims, found = self.dims, {}

        def add(kind, ranks, once, size, calls):
            if size and calls:
                found["collective", kind, tuple(ranks), once, "bytes"] = size
                found["collective", kind, tuple(ranks), once, "count"] = calls

        per_stage = setting.devices // setting.pipeline_stage
        first, mp, cp = stage * per_stage, setting.model_parallel, setting.context_parallel
        parameters = self._parameters(setting, stage, layers) * dims.bytes
        if setting.replicas > 1 and not dims.adapters:
            ranks, calls = range(first, first + per_stage, mp), 4 * layers + 2
            gathers = 1 + (setting.level > 2)
            add("AllGather", ranks, True, parameters * gathers, calls * gathers)
            scatters = setting.sequences if setting.level > 1 else 1
            add("ReduceScatter", ranks, True, parameters * scatters, calls * scatters)
        again = 1 + 0.3 * (setting.recompute == "whole")
        tokens = dims.length / cp
        if cp > 1:
            size = _EXCHANGES * again * dims.query / mp * tokens * dims.bytes * layers * setting.sequences
            add("AlltoAll", range(first, first + cp * mp, mp), False, size, 20 * layers * setting.sequences)
        if mp > 1:
            size = _SHARES / 2 * again * tokens * dims.hidden * dims.bytes * layers * setting.sequences
            for kind in ("AllGather", "ReduceScatter"):
                add(kind, range(first, first + mp), False, size, 5 * layers * setting.sequences)
        boundary = tokens * dims.hidden * dims.bytes / mp
        stages = setting.pipeline_stage
        for other, ends in ((stage - 1, stage == 0), (stage + 1, stage == stages - 1)):
            calls = setting.sequences * (setting.interleave - ends)  # virtual stages: the last stage feeds the first
            if stages > 1 and calls:
                key = "collective", "Receive", tuple(sorted((first, other % stages * per_stage))), False
                for what, more in (("bytes", boundary * calls), ("count", calls)):
                    found[(*key, what)] = found.get((*key, what), 0) + more
        return found


def _in_flight(setting, stage):
    """Micro batches whose activations a stage holds at once in all its layers: of 1F1B, or with virtual stages of
    Megatron's interleaved 1F1B, whose warm-up takes one more round over the virtual stages."""
    stages, parts = setting.pipeline_stage, setting.interleave
    if stages == 1:
        return 1
    ahead = stages - stage if parts == 1 else (2 * (stages - 1 - stage) + (parts - 1) * stages + 1) / parts
    return min(ahead, setting.sequences)
