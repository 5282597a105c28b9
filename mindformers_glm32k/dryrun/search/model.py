"""What a setting would take, before its programs are compiled: a closed form, corrected by all that were compiled.

Work (products, attention, collectives) follows from the sizes. Of memory, the part that stays in a layer from its
forward to its backward pass depends on what is computed again; it is given in features of the residual stream and of
the MLP that each token keeps, and corrected by the ratio found in the shallow programs of the nearest setting.

Legend: T tokens of a sequence that a device has, H hidden size, F MLP size, Q query features, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from mindformers_glm32k.dryrun.analysis.extrapolate import LAYERS
from mindformers_glm32k.dryrun.analysis.order import ORDERS
from mindformers_glm32k.dryrun.search.figures import Figures, at_depth, combine, with_sequences
from mindformers_glm32k.dryrun.search.space import HARDER, Setting

# Elements that a token keeps in a layer, in features of (residual stream, MLP): found in compiled programs.
_KEPT = {"whole": (1.0, 0.0), "mlp": (4.4, 0.0), "cheap": (4.4, 2.0), "none": (9.5, 4.0)}
# Bytes that operators without products read and write, in features of (residual stream, MLP) a token and layer.
_MOVED = {"whole": (250, 85), "mlp": (210, 70), "cheap": (200, 65), "none": (190, 62)}
_MOVED_BY_EXCHANGE = 1.8  # times that, with context parallel: copies before and after
_TRANSIENT = 6  # tensors of a layer's MLP that its backward pass holds at once
_LOGITS = 4  # float32 copies of a chunk's logits that the loss holds at once
_ADAM = 8  # bytes of a parameter's moments
_EXCHANGES = 15  # of a rank's query features, by context parallel, forward and backward of a layer
_SHARES = 20  # of a sequence's residual stream, by tensor parallel


@dataclass(frozen=True)
class Dims:
    """Sizes of the model that a configuration asks for; `bytes` of an element in products, `adapters` for LoRA."""

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
        """Of a merged configuration."""
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
        """Families whose programs a setting's figures would have to be extrapolated from, but are guessed."""
        needed = [setting.family]
        if any(setting.recomputed):
            needed.append(replace(setting, recompute=HARDER[setting.recompute]).family)
        return [family for family in needed if family not in self.known]

    def is_near(self, setting: Setting) -> bool:
        """Whether a guess about a setting follows from programs of the same axes that compute the same again."""
        return any(one.axes == setting.axes and one.recompute == setting.recompute for one in self.known)

    def stages(self, setting: Setting) -> list[Figures]:
        """Figures of each stage."""
        found = []
        for stage, layers in enumerate(setting.layers):
            whole = setting.recomputed[stage] if setting.recomputed else 0  # layers
            figures = self._stage(setting, stage, layers - whole)
            if whole:  # what so many layers more take where each computes more again
                again = replace(setting, recompute=HARDER[setting.recompute], recomputed=())
                more = [self._stage(again, stage, count) for count in (whole, 0)]
                figures = combine((1, figures), (1, more[0]), (-1, more[1]))
            found.append(figures)
        return found

    def _stage(self, setting, stage, layers):
        family = setting.family
        if family in self.known:
            shallow, deeper = (pair[stage] for pair in self.known[family])
            figures = at_depth(shallow, deeper, layers)
        else:
            figures = self._guess(family, stage, layers)
        return with_sequences(figures, family.sequences, setting.sequences)

    def _guess(self, family, stage, layers):
        """The closed form, each figure by the median ratio of the most similar families that were compiled."""
        figures = self.closed_form(family, stage, layers)
        if family not in self._corrections:
            self._corrections[family] = self._ratios(family)
        none, one = (self.closed_form(family, stage, count) for count in (0, 1))  # layers
        for key, (kept, constant) in self._corrections[family].items():
            first, second = none.get(key, 0.0), one.get(key, 0.0)
            figures[key] = constant * first + kept * (second - first) * layers
        return figures

    def _ratios(self, family):
        """figure -> (ratio of what a layer adds, ratio of what there is without layers)."""

        def exchanges(one):
            return one.context_parallel > 1, one.model_parallel > 1

        def unlike(other):
            return (
                other.recompute != family.recompute,
                other.mlp_chunk != family.mlp_chunk,
                (other.pipeline_stage > 1) != (family.pipeline_stage > 1),
                other.level != family.level,
                other.context_parallel != family.context_parallel,
            )

        same = [other for other in self.known if exchanges(other) == exchanges(family)]
        least = min(map(unlike, same), default=())
        near = [other for other in same if unlike(other) == least]
        found = defaultdict(list)
        for other in near:
            for stage, pair in enumerate(zip(*self.known[other])):
                forms = [self.closed_form(other, stage, count) for count in (0, 1)]  # layers
                for key in (("vector",), *(("bytes", order) for order in ORDERS)):
                    zero, one = (form[key] for form in forms)
                    added = (pair[1][key] - pair[0][key]) / (LAYERS[1] - LAYERS[0])
                    without = pair[0][key] - LAYERS[0] * added
                    found[key].append((added / max(one - zero, 1), max(without, 0) / max(zero, 1)))
        return {key: tuple(median(side) for side in zip(*values)) for key, values in found.items()}

    def closed_form(self, setting: Setting, stage: int, layers: float) -> Figures:
        """Figures of a stage with so many layers, from the sizes alone."""
        return {**self._work(setting, stage, layers), **self._memory(setting, stage, layers)}

    def _ends(self, setting, stage):
        """How many of embedding and output layer a stage holds, and whether the loss."""
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
        states = parameters * dims.bytes / (1 if adapters else replicas)
        states += 0 if adapters else parameters * _ADAM / replicas
        states += parameters * dims.bytes / (replicas if setting.level > 1 else 1) if accumulates else 0
        gathered = 0 if adapters or replicas == 1 or setting.level > 2 else parameters * dims.bytes
        hidden, ffn = _KEPT[setting.recompute]
        kept = (hidden * dims.hidden + ffn * dims.ffn / setting.model_parallel) * tokens * dims.bytes
        kept /= setting.model_parallel if setting.model_parallel > 1 else 1
        in_flight = min(setting.pipeline_stage - stage, setting.sequences) if setting.pipeline_stage > 1 else 1
        share = (setting.mlp_chunk or dims.length) / dims.length
        transient = _TRANSIENT * dims.ffn * tokens * dims.bytes * share / setting.model_parallel
        if last:
            transient += _LOGITS * min(dims.loss_chunk, tokens) * dims.vocabulary * 4
        total = states + gathered + kept * in_flight * layers + transient
        return {**{("bytes", order): total for order in ORDERS}, ("states",): states}

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
        for other in (stage - 1, stage + 1):
            if 0 <= other < setting.pipeline_stage:
                ranks = sorted((first, other * per_stage))
                add("Receive", ranks, False, boundary * setting.sequences, setting.sequences)
        return found
