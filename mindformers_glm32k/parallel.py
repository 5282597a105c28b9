"""How a run is split over NPUs: the layout that a configuration asks for, and checks of whether it can work.

MindSpore finds most of such mistakes after a minute of compiling, in words of its own, and some not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mindformers_glm32k.checks import is_int
from mindformers_glm32k.errors import InputError

FLASH_ATTENTION_STEP = 16  # the kernel works on blocks of 16 positions
MOST_SEQUENCES = 1024  # in one call of the kernel with input_layout "TND" (mindspore.ops.flash_attention_score)
DOCUMENTS_PER_ROW = 127  # default of model_config.documents_per_row; 128 with padding, so eight sequences a device fit
AXES = ("data_parallel", "model_parallel", "context_parallel", "pipeline_stage")
_ONE_PROGRAM = (1, 2, "semi_auto_parallel", "auto_parallel")  # values of parallel.parallel_mode
_SHORTEST_RUN = 1024  # positions


def one_program(config: Mapping | None = None) -> bool:
    """Whether the compiler splits one program, which has the whole batch, over all devices (semi-automatic or automatic
    parallel); in data parallel each process has a program and a batch of its own.

    Args:
        config: a run's configuration; by default it is MindSpore's context of this process that answers.
    """
    if config is not None:
        return (config.get("parallel") or {}).get("parallel_mode") in _ONE_PROGRAM
    from mindspore import get_auto_parallel_context

    return get_auto_parallel_context("parallel_mode") in _ONE_PROGRAM


def data_parallel_devices() -> int:
    """Devices that average their gradients after the step; 1 where one program has the whole batch."""
    from mindspore.communication import get_group_size
    from mindspore.context import ParallelMode, get_auto_parallel_context

    return get_group_size() if get_auto_parallel_context("parallel_mode") == ParallelMode.DATA_PARALLEL else 1


def pipeline_stages() -> int:
    """Pipeline stages of this process's context; 1 without a pipeline."""
    from mindspore import get_auto_parallel_context

    return get_auto_parallel_context("pipeline_stages") or 1


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel axes, whose product (data x context x model x stages) is the number of NPUs.

    Attributes:
        micro_batches: per step in a pipeline; 1 without a pipeline.
        global_batch_size: sequences of seq_length tokens that a step reads over all devices.
        widths: sizes of the model's other axes (hidden, MLP, vocabulary, QKV), whole and on one device.
    """

    data_parallel: int
    model_parallel: int
    context_parallel: int
    stages: int
    micro_batches: int
    global_batch_size: int
    seq_length: int
    layers: int
    widths: tuple[int, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping) -> ParallelLayout:
        """The layout that a merged configuration asks for; one device where `use_parallel` is off."""
        parallel = config.get("parallel_config") or {}
        model = config["model"]["model_config"]
        runner = config.get("runner_config") or {}
        dp, mp, cp, pp = (_count(parallel, name) if config.get("use_parallel") else 1 for name in AXES)
        micro_batches = _count(parallel, "micro_batch_num") if pp > 1 else 1
        batch = _count(runner, "batch_size") * dp * micro_batches * _count(runner, "gradient_accumulation_steps")
        batch *= _count(config, "micro_batch_interleave_num")
        widths = [int(model[name]) for name in ("hidden_size", "ffn_hidden_size", "padded_vocab_size")]
        heads = int(model["num_attention_heads"]) + 2 * int(model["multi_query_group_num"])
        widths += [2 * widths[1], heads * int(model["kv_channels"])]
        widths += [width // mp for width in widths]
        seq_length, layers = int(model["seq_length"]), int(model["num_layers"])
        return cls(dp, mp, cp, pp, micro_batches, batch, seq_length, layers, tuple(widths))

    @property
    def world(self) -> int:
        """Number of NPUs."""
        return self.data_parallel * self.model_parallel * self.context_parallel * self.stages

    def stage_of(self, rank: int) -> int:
        """The stage of a rank; the ranks of a stage are consecutive."""
        return rank // (self.world // self.stages)

    def ranks_of(self, stage: int) -> range:
        """The ranks of a stage."""
        size = self.world // self.stages
        return range(stage * size, (stage + 1) * size)

    def on_one_device(self) -> ParallelLayout:
        """The same batch and model, split over nothing."""
        return replace(self, data_parallel=1, model_parallel=1, context_parallel=1, stages=1, micro_batches=1)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Sizes of a sequence axis on a device: seq_length, and a context parallel rank's share unless it is short:
        other axes have such sizes too, and short sequence axes cause no memory problem."""
        run = self.seq_length // self.context_parallel
        return (self.seq_length, run) if run >= _SHORTEST_RUN else (self.seq_length,)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step reads over all devices."""
        return self.global_batch_size * self.seq_length

    def describe(self) -> str:
        """A text such as "dp 2 x pp 4, 16 micro batches"."""
        sizes = {"dp": self.data_parallel, "mp": self.model_parallel, "cp": self.context_parallel, "pp": self.stages}
        text = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"
        return text + (f", {self.micro_batches} micro batches" if self.stages > 1 else "")


def virtual_stages(config: Mapping) -> int:
    """Virtual stages per pipeline stage: `pp_interleave_num` where the pipeline interleaves, otherwise 1."""
    pipeline = (config.get("parallel") or {}).get("pipeline_config") or {}
    return _count(config["model"]["model_config"], "pp_interleave_num") if pipeline.get("pipeline_interleave") else 1


def layers_per_stage(config: Mapping) -> list[list[int]]:
    """Layers of each pipeline stage as upstream assigns them: an equal share, plus `model_config.offset`.

    Returns:
        for each virtual stage (one without interleaving), the layers of each pipeline stage.

    Raises:
        InputError: the offset has another shape than the stages.
    """
    run = _Run(config)
    each = run.layers // (run.pipeline_stage * run.interleave)
    offset = run.model.get("offset") or 0
    nested = isinstance(offset, (list, tuple)) and offset and isinstance(offset[0], (list, tuple))
    parts = [
        list(part) if isinstance(part, (list, tuple)) else [part] * run.pipeline_stage
        for part in (offset if nested else [offset])
    ]
    if len(parts) == 1:
        parts *= run.interleave
    if len(parts) != run.interleave or any(len(part) != run.pipeline_stage for part in parts):
        raise InputError(
            f"model_config.offset={offset}: one number per stage is needed, "
            f"parallel_config.pipeline_stage is {run.pipeline_stage}"
        )
    return [[each + int(more) for more in part] for part in parts]


def check_layout(config: Mapping, devices: int | None = None) -> None:
    """Checks the model's sizes against the layout, and the layout against the run's number of NPUs where it is given.

    Raises:
        InputError: one message with all that does not fit, each with its key.
    """
    found = layout_problems(config, devices)
    if found:
        raise InputError("this layout cannot work:\n- " + "\n- ".join(found))


def layout_problems(config: Mapping, devices: int | None = None) -> list[str]:
    """What `check_layout` refuses, one sentence each, the key first."""
    parallel = (config.get("parallel_config") or {}) if config.get("use_parallel") else {}
    runner = config.get("runner_config") or {}
    counts = [(parallel, "parallel_config.", name) for name in (*AXES, "micro_batch_num")]
    counts += [(runner, "runner_config.", name) for name in ("batch_size", "gradient_accumulation_steps")]
    counts.append((config, "", "micro_batch_interleave_num"))
    found = [
        f"{section}{name}={values[name]!r}: a whole number >= 1 is needed"
        for values, section, name in counts
        if values.get(name) is not None and not is_int(values[name], 1)
    ]
    if found:
        return found
    run = _Run(config, devices)
    checks = [_devices, _mode, _heads, _widths, _sequence, _chunks, _batch, _packing]
    checks.append(_prediction if run.predicts else _pipeline)
    return [sentence for check in checks for sentence in check(run)]


def packing_problems(config: Mapping) -> list[str]:
    """What keeps an NPU's flash attention from taking packed sequences, one sentence each, the key first."""
    model, found = config["model"]["model_config"], []
    if model.get("attention_dropout"):
        found.append(
            f"model_config.attention_dropout={model['attention_dropout']!r}: must be 0 with packing: True, flash "
            "attention drops nothing in sequences of several documents"
        )
    sequences = _count(config.get("runner_config") or {}, "batch_size")
    documents = int(model.get("documents_per_row") or DOCUMENTS_PER_ROW)
    if sequences * (documents + 1) > MOST_SEQUENCES:
        found.append(
            f"model_config.documents_per_row={documents}: runner_config.batch_size={sequences} sequences of a device, "
            f"each with so many documents and padding, are more than the {MOST_SEQUENCES} that flash attention takes "
            f"at once; {MOST_SEQUENCES // sequences - 1} is the most"
        )
    return found


def _count(section: Mapping, name: str) -> int:
    return int(section.get(name) or 1)


class _Run:
    """The sizes that the checks compare, with upstream's defaults."""

    def __init__(self, config: Mapping, devices: int | None = None):
        self.config, self.devices = config, devices
        self.parallel: Mapping[str, Any] = (config.get("parallel_config") or {}) if config.get("use_parallel") else {}
        self.model: Mapping[str, Any] = config["model"]["model_config"]
        self.data_parallel, self.model_parallel, self.context_parallel, self.pipeline_stage = (
            _count(self.parallel, name) for name in AXES
        )
        self.micro_batches = _count(self.parallel, "micro_batch_num")
        self.predicts = str(config.get("run_mode", "")).startswith("predict")
        self.layers = int(self.model["num_layers"])
        self.runner: Mapping[str, Any] = config.get("runner_config") or {}
        self.interleave = virtual_stages(config) if self.pipeline_stage > 1 else 1
        self.length = int(self.model["seq_length"])
        self.heads = int(self.model["num_attention_heads"])
        self.groups = int(self.model["multi_query_group_num"])
        algorithm = str(self.parallel.get("context_parallel_algo") or "colossalai_cp")
        self.ulysses = 1  # ranks that exchange heads for positions
        if "ulysses" in algorithm:
            self.ulysses = self.context_parallel
        elif "hybrid" in algorithm:
            self.ulysses = _count(self.parallel, "ulysses_degree_in_cp")


def _devices(run: _Run) -> Iterator[str]:
    product = run.data_parallel * run.model_parallel * run.context_parallel * run.pipeline_stage
    if run.devices is None:
        return
    if run.parallel and product != run.devices:
        sizes = " x ".join(f"{name} {getattr(run, name)}" for name in AXES)
        yield f"parallel_config: {sizes} = {product} NPUs, the run has {run.devices}"
    if not run.parallel and run.devices > 1:
        yield f"use_parallel: false is for one NPU, the run has {run.devices}"


def _mode(run: _Run) -> Iterator[str]:
    mode = (run.config.get("parallel") or {}).get("parallel_mode")
    axis = next((name for name in AXES[1:] if getattr(run, name) > 1), None)
    if axis and not one_program(run.config):
        found = f"parallel_config.{axis}={getattr(run, axis)}"
        yield f"parallel.parallel_mode={mode!r}: {found} needs 1 (semi-automatic parallel)"


def _heads(run: _Run) -> Iterator[str]:
    parts, words = run.model_parallel, "parallel_config.model_parallel"
    if run.ulysses > 1:
        parts, words = parts * run.ulysses, f"{words} x context_parallel (Ulysses)"
    if run.heads % parts:
        yield f"model_config.num_attention_heads={run.heads}: not a multiple of {words} = {parts}"
    small, large = sorted((run.groups, run.model_parallel))
    if large % small:
        parts = f"parallel_config.model_parallel={run.model_parallel}"
        yield f"model_config.multi_query_group_num={run.groups}: neither a multiple nor a divisor of {parts}"
    if run.context_parallel % run.ulysses:
        found = f"context_parallel={run.context_parallel}"
        yield f"parallel_config.ulysses_degree_in_cp={run.ulysses}: does not divide {found}"


def _widths(run: _Run) -> Iterator[str]:
    for name, split in (
        ("padded_vocab_size", "the vocabulary of the output layer"),
        ("ffn_hidden_size", "the MLP"),
        ("hidden_size", "the input of the projections"),
    ):
        if run.model[name] % run.model_parallel:
            yield (
                f"model_config.{name}={run.model[name]}: not a multiple of parallel_config.model_parallel="
                f"{run.model_parallel}, over which {split} is split"
            )


def _sequence(run: _Run) -> Iterator[str]:
    parts, words = run.context_parallel, "parallel_config.context_parallel"
    if run.parallel.get("use_seq_parallel"):
        parts, words = parts * run.model_parallel, f"{words} x model_parallel (use_seq_parallel)"
    if run.length % parts:
        yield f"model_config.seq_length={run.length}: not a multiple of {words} = {parts}"
    if run.model.get("use_flash_attention"):
        if run.length % FLASH_ATTENTION_STEP:
            need = f"{FLASH_ATTENTION_STEP}, which use_flash_attention needs"
            yield f"model_config.seq_length={run.length}: not a multiple of {need}"
    elif run.context_parallel > 1:
        yield f"model_config.use_flash_attention: must be true for context_parallel={run.context_parallel}"


def _chunks(run: _Run) -> Iterator[str]:
    chunk = run.model.get("mlp_chunk_size")
    if chunk and run.model_parallel * run.context_parallel > 1:
        yield (
            f"model_config.mlp_chunk_size={chunk!r}: for layouts with model_parallel 1 and "
            "context_parallel 1; the others shard these tensors already, set it to null"
        )
    sharding = (run.config.get("parallel") or {}).get("parallel_optimizer_config") or {}
    if sharding.get("optimizer_level") == "level3":
        name, size = "optimizer_weight_shard_size", sharding.get("optimizer_weight_shard_size")
        if is_int(size, 1) and size < run.data_parallel * run.context_parallel:
            yield f"parallel.parallel_optimizer_config.{name}={size}: gradients are wrong with optimizer_level: level3"
        if chunk and _count(run.runner, "gradient_accumulation_steps") > 1:
            yield f"model_config.mlp_chunk_size={chunk!r}: null to accumulate gradients with optimizer_level: level3"


def _packing(run: _Run) -> Iterator[str]:
    section = "eval_dataset" if str(run.config.get("run_mode")) == "eval" else "train_dataset"
    flash = run.model.get("use_flash_attention") and run.model.get("cells") != "portable"
    if run.predicts or not flash or not (run.config.get(section) or {}).get("packing"):
        return
    yield from packing_problems(run.config)
    if run.context_parallel > run.ulysses:
        yield (
            f"parallel_config.context_parallel={run.context_parallel} with context_parallel_algo="
            f"{run.parallel.get('context_parallel_algo') or 'colossalai_cp'!r}: with packing: True each device needs "
            "all positions of its heads; set context_parallel_algo: ulysses_cp with "
            f"ulysses_degree_in_cp: {run.context_parallel}"
        )


def _batch(run: _Run) -> Iterator[str]:
    if run.predicts:
        batch = _count(run.model, "batch_size")
        if batch % run.data_parallel:
            parts = f"parallel_config.data_parallel={run.data_parallel}"
            yield f"model_config.batch_size={batch}: not a multiple of {parts}"
        return
    interleave = _count(run.config, "micro_batch_interleave_num")
    if interleave > 1 and run.context_parallel > 1:
        found = f"parallel_config.context_parallel={run.context_parallel}"
        yield f"micro_batch_interleave_num={interleave}: cannot go with {found}"
    strategy = (run.config.get("parallel") or {}).get("dataset_strategy")
    if isinstance(strategy, (list, tuple)) and strategy and isinstance(strategy[0], (list, tuple)):
        parts = strategy[0][0]
        micro_batches = run.micro_batches if run.pipeline_stage > 1 else 1
        batch = _count(run.runner, "batch_size") * run.data_parallel * interleave * micro_batches
        if is_int(parts) and parts != run.data_parallel:
            yield (
                f"parallel.dataset_strategy={strategy}: splits the {batch} sequences of a step into {parts}, "
                f"parallel_config.data_parallel={run.data_parallel} asks for {run.data_parallel}"
            )


def _pipeline(run: _Run) -> Iterator[str]:
    stages = run.pipeline_stage
    if stages == 1:
        return
    try:
        dealt = layers_per_stage(run.config)
    except InputError as error:
        yield str(error)
    else:
        total = sum(map(sum, dealt))
        if total != run.layers:
            yield (
                f"model_config.num_layers={run.layers}: parallel_config.pipeline_stage={stages} stages with "
                f"model_config.offset={run.model.get('offset') or 0} hold {dealt} = {total} layers; the "
                f"offsets must add up to {run.layers % (stages * run.interleave)}"
            )
        elif min(map(min, dealt)) < 1:
            keys = f"parallel_config.pipeline_stage={stages}, model_config.offset"
            yield f"model_config.num_layers={run.layers}: a stage of {dealt} has no layer ({keys})"
    if run.micro_batches < stages:
        yield (
            f"parallel_config.micro_batch_num={run.micro_batches}: fewer than pipeline_stage={stages}, "
            "stages would wait for ever"
        )
    accumulate = _count(run.runner, "gradient_accumulation_steps")
    if accumulate > 1:
        yield (
            f"runner_config.gradient_accumulation_steps={accumulate}: without effect in a pipeline; raise "
            "parallel_config.micro_batch_num instead"
        )


def _prediction(run: _Run) -> Iterator[str]:
    for name in ("pipeline_stage", "context_parallel"):
        if getattr(run, name) > 1 and run.config["run_mode"] == "predict":
            yield f"parallel_config.{name}={getattr(run, name)}: must be 1 in run_mode predict"
    if run.model.get("use_past") and run.data_parallel > 1 and one_program(run.config):
        yield (
            f"parallel_config.data_parallel={run.data_parallel}: must be 1 in run_mode predict with use_past, where "
            "all prompts of a batch are read as one sequence; start a run for each part of the prompts instead"
        )
    if run.model.get("use_past") and run.groups % run.model_parallel:
        yield (
            f"model_config.multi_query_group_num={run.groups}: not a multiple of parallel_config.model_parallel="
            f"{run.model_parallel}, over which the cache (use_past) is split"
        )
