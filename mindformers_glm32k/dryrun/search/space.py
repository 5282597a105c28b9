"""The settings that a search considers: how a model is sharded over NPUs, and what it recomputes to save memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mindformers_glm32k.parallel import layout_problems
from mindformers_glm32k.preflight.findings import set_value

_CHEAP = [  # half of the activations for next to no time: norms, SwiGLU, and the inputs that projections keep of them
    r"mlp\.activation_func\.mul",
    r"mlp\.activation_func\.silu\.silu",
    r"input_layernorm\.(cast|norm)",
    r"post_attention_layernorm\.(cast|norm)",
    r"self_attention\.query_key_value\.reshape",
    r"mlp\.dense_h_to_4h\.reshape",
    r"mlp\.dense_4h_to_h\.reshape",
]
_OF_CHUNKS = r"mlp\.split_tokens"
# What every layer recomputes, from most to least: patterns of recompute_config.select_recompute.
RECOMPUTE = {"whole": [], "mlp": ["mlp", *_CHEAP], "cheap": _CHEAP, "none": []}
HARDER = {"mlp": "whole", "cheap": "mlp", "none": "cheap"}  # the next that saves more memory
MLP_CHUNK = 4096  # tokens
# Other chunk sizes of MLP and loss, tried once the programs with the default sizes are known.
_MLP_CHUNKS, _LOSS_CHUNKS = (2048, 8192), (1024, 4096)
INTERLEAVE = 2  # virtual stages: shallow programs have one layer or two in each
_LEVEL = "parallel.parallel_optimizer_config.optimizer_level"


@dataclass(frozen=True)
class Setting:
    """One way to run a training step.

    Args:
        data_parallel, model_parallel, context_parallel, pipeline_stage: sizes along each axis.
        sequences: of each data parallel rank in a step, one after the other: micro batches of a pipeline, accumulated
            gradients otherwise.
        layers: of each stage.
        recompute: a key of RECOMPUTE.
        recomputed: layers of each stage that recompute HARDER[recompute] instead; empty for none.
        mlp_chunk: model_config.mlp_chunk_size.
        level: optimizer_level. 1 shards weights and optimizer states over data parallel ranks, 2 accumulated gradients,
            too, 3 also gathers weights again in the backward pass.
        loss_chunk: model_config.loss_chunk_size; None: as in the YAML.
        interleave: virtual stages of each pipeline stage.
    """

    data_parallel: int = 1
    model_parallel: int = 1
    context_parallel: int = 1
    pipeline_stage: int = 1
    sequences: int = 1
    layers: tuple[int, ...] = ()
    recompute: str = "whole"
    recomputed: tuple[int, ...] = ()
    mlp_chunk: int | None = None
    level: int = 1
    loss_chunk: int | None = None
    interleave: int = 1

    @property
    def devices(self) -> int:
        """NPUs."""
        return self.data_parallel * self.model_parallel * self.context_parallel * self.pipeline_stage

    @property
    def replicas(self) -> int:
        """NPUs that compute with the same weights, over which optimizer states are sharded."""
        return self.data_parallel * self.context_parallel

    @property
    def rows(self) -> int:
        """Sequences of a step over all NPUs."""
        return self.data_parallel * self.sequences

    @property
    def name(self) -> str:
        """For files and tables: "dp4_cp2_rows8_cheap_whole3"."""
        axes = zip(("dp", "mp", "cp", "pp"), self.axes)
        parts = [f"{axis}{size}" for axis, size in axes if size > 1] or ["one"]
        parts += [f"rows{self.rows}", self.recompute]
        if self.recomputed:
            parts.append(HARDER[self.recompute] + "-".join(map(str, self.recomputed)))
        if len(set(self.layers)) > 1:
            parts.append("layers" + "-".join(map(str, self.layers)))
        parts += [f"chunk{self.mlp_chunk}"] if self.mlp_chunk else []
        parts += [f"loss{self.loss_chunk}"] if self.loss_chunk else []
        parts += [f"level{self.level}"] if self.level > 1 else []
        parts += [f"interleave{self.interleave}"] if self.interleave > 1 else []
        return "_".join(parts)

    @property
    def family(self) -> Setting:
        """The setting whose shallow programs this one is extrapolated from: all layers alike, and just enough sequences
        to show what one more adds."""
        few = 2 * self.pipeline_stage if self.pipeline_stage > 1 else 2
        return replace(self, layers=(), recomputed=(), sequences=min(self.sequences, few))

    @property
    def usual(self) -> Setting:
        """The setting with the default chunk sizes: the YAML's for the loss, MLP_CHUNK for the MLP."""
        return replace(self, loss_chunk=None, mlp_chunk=MLP_CHUNK if self.mlp_chunk else None)

    def resized(self, length: int, loss_chunk: int) -> Iterator[Setting]:
        """Settings that differ in one chunk size; `length` (of a sequence) and the YAML's `loss_chunk` in tokens."""
        tokens = length // self.context_parallel
        for size in _LOSS_CHUNKS:
            if min(size, tokens) != min(loss_chunk, tokens):
                yield replace(self, loss_chunk=size)
        for size in _MLP_CHUNKS if self.mlp_chunk else ():
            if size < length:
                yield replace(self, mlp_chunk=size)

    @property
    def axes(self) -> tuple[int, int, int, int]:
        """dp, mp, cp, pp."""
        return self.data_parallel, self.model_parallel, self.context_parallel, self.pipeline_stage

    def keys(self, order: str | None = None) -> dict[str, Any]:
        """The YAML keys of this setting, dotted, with their values; `order` is context.exec_order."""
        dp, mp, cp, pp = self.axes
        pipeline = pp > 1
        keys = {
            "use_parallel": self.devices > 1,
            "parallel.parallel_mode": 1,
            "parallel.enable_alltoall": cp > 1,
            "parallel.enable_parallel_optimizer": self.replicas > 1,
            "parallel_config.data_parallel": dp,
            "parallel_config.model_parallel": mp,
            "parallel_config.context_parallel": cp,
            "parallel_config.pipeline_stage": pp,
            "parallel_config.micro_batch_num": self.sequences if pipeline else 1,
            "parallel_config.use_seq_parallel": mp > 1,
            "runner_config.batch_size": 1,
            "runner_config.gradient_accumulation_steps": 1 if pipeline else self.sequences,
            "micro_batch_interleave_num": 1,
            "model.model_config.mlp_chunk_size": self.mlp_chunk,
            "model.model_config.pp_interleave_num": self.interleave,
            **self._recompute_keys(),
        }
        if cp > 1:  # with ulysses_cp MindFormers refuses fewer KV heads than ranks
            keys["parallel_config.context_parallel_algo"] = "hybrid_cp"
            keys["parallel_config.ulysses_degree_in_cp"] = cp
        if mp > 1:  # weights that are not concatenated are sharded without moving activations
            keys["model.model_config.qkv_concat"] = keys["model.model_config.mlp_concat"] = False
        if self.level > 1:
            keys[_LEVEL] = f"level{self.level}"
        if self.loss_chunk:
            keys["model.model_config.loss_chunk_size"] = self.loss_chunk
        if self.interleave > 1:  # without it pp_interleave_num does nothing
            keys["parallel.pipeline_config"] = {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"}
        if self.layers:
            keys["model.model_config.offset"] = self._offset()
        if order:
            keys["context.exec_order"] = order
        return keys

    def _offset(self):
        """model_config.offset: a number for each stage, in a list for each virtual one where there are several."""
        parts = self.interleave
        even = sum(self.layers) // (self.pipeline_stage * parts)
        dealt = [[count // parts + (part < count % parts) for count in self.layers] for part in range(parts)]
        offset = [[count - even for count in part] for part in dealt]
        if not any(map(any, offset)):
            return 0
        return offset if parts > 1 else offset[0]

    def _recompute_keys(self):
        whole, patterns = self.recompute == "whole", list(RECOMPUTE[self.recompute])
        if self.mlp_chunk and patterns:
            patterns.append(_OF_CHUNKS)
        if any(self.recomputed):
            counts, harder = list(self.recomputed), HARDER[self.recompute]
            if harder == "whole":
                whole = counts
            else:
                more = {pattern: counts for pattern in RECOMPUTE[harder] if pattern not in patterns}
                patterns = {**dict.fromkeys(patterns, True), **more}
        return {"recompute_config.recompute": whole, "recompute_config.select_recompute": patterns or False}


def applied(config: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration with dotted keys set; missing sections are created."""
    config = copy.deepcopy(dict(config))
    for dotted, value in keys.items():
        set_value(config, dotted, copy.deepcopy(value))
    return config


def settings(config: Mapping[str, Any], devices: int, most_rows: int) -> Iterator[Setting]:
    """All settings that the trainer's own checks accept, every layer recomputed alike.

    Args:
        config: the merged configuration; its own layout is ignored.
        devices: NPUs, all of them used.
        most_rows: sequences that a step may take.
    """
    layers = int(config["model"]["model_config"]["num_layers"])
    length = int(config["model"]["model_config"]["seq_length"])
    adapters = bool(config["model"]["model_config"].get("pet_config"))
    for dp, mp, cp, pp in _layouts(devices):
        if dp > most_rows or pp > layers:
            continue
        for sequences in _sequences(most_rows // dp, pp):
            for dealt, interleave in itertools.product(_deals(layers, pp), (1, INTERLEAVE)):
                if interleave > 1 and (pp == 1 or min(dealt) < interleave):
                    continue
                setting = Setting(dp, mp, cp, pp, sequences, dealt, interleave=interleave)
                if layout_problems(applied(config, setting.keys()), devices):
                    continue
                for kind, chunk, level in itertools.product(RECOMPUTE, (None, MLP_CHUNK), (1, 2, 3)):
                    if chunk and (mp * cp > 1 or chunk >= length or kind == "none"):
                        continue  # chunks do not reduce the activations that are kept
                    if level > 1 and (setting.replicas == 1 or adapters):
                        continue
                    if level == 2 and sequences == 1 or level == 3 and pp > 1:
                        continue
                    if chunk and level == 3 and sequences > 1:
                        continue  # MindSpore 2.9 gathers the weights of a recomputed MLP for its first chunk only
                    yield replace(setting, recompute=kind, mlp_chunk=chunk, level=level)


def _layouts(devices):
    """(dp, mp, cp, pp) with the product `devices`, at most 8 ranks that exchange activations and 16 stages."""
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for mp, cp, pp in itertools.product(sizes, repeat=3):
        if devices % (mp * cp * pp) == 0 and mp * cp <= 8 and pp <= 16:
            yield devices // (mp * cp * pp), mp, cp, pp


def _sequences(most, stages):
    """Numbers of sequences per rank to try."""
    if stages > 1:
        return [most] if most >= stages else []
    return sorted({1, most})


def _deals(layers, stages):
    """Layers of each stage: even, and with one fewer on the first stage, which holds the activations of most micro
    batches, or on the last, which has the loss."""
    each, more = divmod(layers, stages)
    even = [each] * stages
    for index in range(more):  # the middle stages have neither embedding nor loss
        even[(1 + index) % stages] += 1
    found = [tuple(even)]
    if stages > 2 and each > 1:
        for poorer, richer in ((0, stages - 2), (stages - 1, 1)):
            dealt = list(even)
            dealt[poorer], dealt[richer] = dealt[poorer] - 1, dealt[richer] + 1
            found.append(tuple(dealt))
    return found
