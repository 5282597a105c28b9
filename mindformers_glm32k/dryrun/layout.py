"""The parallel layout that a configuration asks for: how many NPUs, which rank belongs to which pipeline stage."""

from dataclasses import dataclass, replace

_SHORTEST_RUN = 1024  # positions


@dataclass(frozen=True)
class Layout:
    """Sizes along each axis; data_parallel x context_parallel x model_parallel x stages NPUs.

    Args:
        data_parallel (int), model_parallel (int), context_parallel (int), stages (int): numbers of parts.
        micro_batches (int): per step, of a pipeline; 1 without one.
        rows (int): rows of seq_length tokens that a step reads over all devices.
        seq_length (int), layers (int): of the model.
        widths (tuple[int]): sizes of the model's other axes: hidden, MLP, vocabulary, on a device too.
    """

    data_parallel: int
    model_parallel: int
    context_parallel: int
    stages: int
    micro_batches: int
    rows: int
    seq_length: int
    layers: int
    widths: tuple = ()

    @property
    def world(self):
        """int: number of NPUs."""
        return self.data_parallel * self.model_parallel * self.context_parallel * self.stages

    def stage_of(self, rank):
        """int: ranks are dealt to stages in blocks."""
        return rank // (self.world // self.stages)

    def ranks_of(self, stage):
        """range: the ranks of a stage."""
        size = self.world // self.stages
        return range(stage * size, (stage + 1) * size)

    def on_one_device(self):
        """Layout: the same rows and model, cut over nothing."""
        return replace(self, data_parallel=1, model_parallel=1, context_parallel=1, stages=1, micro_batches=1)

    @property
    def lengths(self):
        """tuple[int]: sizes that an axis of positions has on a device; short runs of context parallel ranks are left
        out, for other axes have such sizes too and no memory problem hides there."""
        run = self.seq_length // self.context_parallel
        return (self.seq_length, run) if run >= _SHORTEST_RUN else (self.seq_length,)

    @property
    def tokens_per_step(self):
        """int: over all devices."""
        return self.rows * self.seq_length

    def describe(self):
        """str: "dp 2 x pp 4, 16 micro batches", …"""
        parts = [
            (self.data_parallel, "dp"),
            (self.model_parallel, "mp"),
            (self.context_parallel, "cp"),
            (self.stages, "pp"),
        ]
        text = " x ".join(f"{name} {size}" for size, name in parts if size > 1) or "one device"
        return text + (f", {self.micro_batches} micro batches" if self.stages > 1 else "")


def layout_of(config):
    """Reads the layout from a merged configuration.

    Args:
        config (dict): what `read_config` returns.

    Returns:
        Layout
    """
    parallel = config.get("parallel_config") or {}
    model = config["model"]["model_config"]
    runner = config.get("runner_config") or {}

    def size(name, section=parallel):
        return int(section.get(name) or 1)

    on = bool(config.get("use_parallel"))
    dp, mp, cp, pp = (
        size(name) if on else 1 for name in ("data_parallel", "model_parallel", "context_parallel", "pipeline_stage")
    )
    micro = size("micro_batch_num") if pp > 1 else 1
    rows = size("batch_size", runner) * dp * micro * size("gradient_accumulation_steps", runner)
    rows *= size("micro_batch_interleave_num", config)
    widths = [int(model[name]) for name in ("hidden_size", "ffn_hidden_size", "padded_vocab_size")]
    widths += [
        2 * widths[1],
        (int(model["num_attention_heads"]) + 2 * int(model["multi_query_group_num"])) * int(model["kv_channels"]),
    ]
    widths += [width // mp for width in widths]
    return Layout(dp, mp, cp, pp, micro, rows, int(model["seq_length"]), int(model["num_layers"]), tuple(widths))
