"""Refuses layouts that cannot work before anything is compiled, naming the YAML's keys.

MindSpore finds most of these after a minute of compiling, in words of its own, and some not at all.
"""

from mindformers_glm32k.checks import is_int
from mindformers_glm32k.errors import InputError

FLASH_ATTENTION_STEP = 16  # the kernel works on blocks of 16 positions
MOST_SEQUENCES = 1024  # that one call of its variable-length form takes (mindspore.ops.flash_attention_score, "TND")
DOCUMENTS_PER_ROW = 127  # default of model_config.documents_per_row; with padding 128 places, eight rows a device
_SEMI_AUTO = (1, 2, "semi_auto_parallel", "auto_parallel")  # of parallel.parallel_mode: one program is cut
_AXES = ("data_parallel", "model_parallel", "context_parallel", "pipeline_stage")


def check_layout(config, devices=None):
    """Checks sizes against the layout that they are cut into.

    Args:
        config (dict): merged configuration, a MindFormerConfig too.
        devices (int | None): NPUs of the run, where known.

    Raises:
        InputError: one message with all that does not fit, each with its key.
    """
    found = problems(config, devices)
    if found:
        raise InputError("this layout cannot work:\n- " + "\n- ".join(found))


def problems(config, devices=None):
    """What does not fit; arguments of `check_layout`.

    Returns:
        list[str]: one sentence each, the key first.
    """
    parallel = (config.get("parallel_config") or {}) if config.get("use_parallel") else {}
    counts = [(parallel, "parallel_config", name) for name in (*_AXES, "micro_batch_num")]
    counts += [
        (config.get("runner_config") or {}, "runner_config", name)
        for name in ("batch_size", "gradient_accumulation_steps")
    ]
    counts.append((config, "", "micro_batch_interleave_num"))
    found = [
        f"{section + '.' if section else ''}{name}={values[name]!r}: a whole number >= 1 is needed"
        for values, section, name in counts
        if values.get(name) is not None and not is_int(values[name], 1)
    ]
    if found:
        return found
    sizes = _Sizes(config, parallel)
    for check in (_devices, _mode, _heads, _widths, _sequence, _chunks, _batch, _packing):
        found += check(sizes, devices)
    return found + list(_prediction(sizes) if sizes.predicts else _pipeline(sizes))


def packing_problems(config):
    """What keeps an NPU's flash attention from packed rows.

    Args:
        config (dict): merged configuration, with packed training or evaluation data.

    Returns:
        list[str]: one sentence each, the key first.
    """
    model, found = config["model"]["model_config"], []
    if model.get("attention_dropout"):
        found.append(
            f"model_config.attention_dropout={model['attention_dropout']!r}: must be 0 with packing: True, flash "
            "attention drops nothing in rows of several documents"
        )
    rows = int((config.get("runner_config") or {}).get("batch_size") or 1)
    documents = int(model.get("documents_per_row") or DOCUMENTS_PER_ROW)
    if rows * (documents + 1) > MOST_SEQUENCES:
        found.append(
            f"model_config.documents_per_row={documents}: runner_config.batch_size={rows} rows of a device with "
            f"so many documents each and padding are more than the {MOST_SEQUENCES} sequences that flash "
            f"attention takes at once; {MOST_SEQUENCES // rows - 1} is the most"
        )
    return found


def layers_per_stage(config):
    """How upstream deals layers to stages: as many to each, plus `model_config.offset`.

    Args:
        config (dict): merged configuration.

    Returns:
        list[list[int]]: per part of an interleaved pipeline (usually one), layers of each stage.

    Raises:
        InputError: the offset has another shape than the stages.
    """
    parallel = (config.get("parallel_config") or {}) if config.get("use_parallel") else {}
    sizes = _Sizes(config, parallel)
    each = sizes.layers // (sizes.pipeline_stage * sizes.interleave)
    offset = sizes.model.get("offset") or 0
    rows = offset if isinstance(offset, (list, tuple)) and offset and isinstance(offset[0], (list, tuple)) else [offset]
    rows = [list(row) if isinstance(row, (list, tuple)) else [row] * sizes.pipeline_stage for row in rows]
    if len(rows) == 1:
        rows = rows * sizes.interleave
    if len(rows) != sizes.interleave or any(len(row) != sizes.pipeline_stage for row in rows):
        raise InputError(
            f"model_config.offset={offset}: one number per stage is needed, "
            f"parallel_config.pipeline_stage is {sizes.pipeline_stage}"
        )
    return [[each + int(more) for more in row] for row in rows]


class _Sizes:
    """The numbers that matter, with upstream's defaults."""

    def __init__(self, config, parallel):
        self.config, self.parallel = config, parallel
        self.model = model = config["model"]["model_config"]
        for name in _AXES:
            setattr(self, name, int(parallel.get(name) or 1))
        self.micro_batches = int(parallel.get("micro_batch_num") or 1)
        self.predicts = str(config.get("run_mode", "")).startswith("predict")
        self.layers = int(model["num_layers"])
        self.interleave = int(model.get("pp_interleave_num") or 1) if self.pipeline_stage > 1 else 1
        self.length = int(model["seq_length"])
        self.heads = int(model["num_attention_heads"])
        self.groups = int(model["multi_query_group_num"])
        algorithm = str(parallel.get("context_parallel_algo") or "colossalai_cp")
        # how many ranks exchange heads for positions
        self.ulysses = (
            self.context_parallel
            if "ulysses" in algorithm
            else int(parallel.get("ulysses_degree_in_cp") or 1)
            if "hybrid" in algorithm
            else 1
        )


def _devices(sizes, devices):
    product = sizes.data_parallel * sizes.model_parallel * sizes.context_parallel * sizes.pipeline_stage
    if devices is not None and sizes.parallel and product != devices:
        yield (
            "parallel_config: "
            + " x ".join(f"{name} {getattr(sizes, name)}" for name in _AXES)
            + f" = {product} NPUs, the run has {devices}"
        )
    if devices is not None and not sizes.parallel and devices > 1:
        yield f"use_parallel: false is for one NPU, the run has {devices}"


def _mode(sizes, _):
    mode = (sizes.config.get("parallel") or {}).get("parallel_mode")
    axes = [name for name in _AXES[1:] if getattr(sizes, name) > 1]
    if axes and mode not in _SEMI_AUTO:
        yield (
            f"parallel.parallel_mode={mode!r}: parallel_config.{axes[0]}={getattr(sizes, axes[0])} needs 1 "
            "(semi-automatic parallel)"
        )


def _heads(sizes, _):
    parts, words = sizes.model_parallel, "parallel_config.model_parallel"
    if sizes.ulysses > 1:
        parts, words = parts * sizes.ulysses, f"{words} x context_parallel (Ulysses)"
    if sizes.heads % parts:
        yield f"model_config.num_attention_heads={sizes.heads}: not a multiple of {words} = {parts}"
    small, large = sorted((sizes.groups, sizes.model_parallel))
    if large % small:
        yield (
            f"model_config.multi_query_group_num={sizes.groups}: neither a multiple nor a divisor of "
            f"parallel_config.model_parallel={sizes.model_parallel}"
        )
    if sizes.context_parallel % sizes.ulysses:
        yield (
            f"parallel_config.ulysses_degree_in_cp={sizes.ulysses}: does not divide "
            f"context_parallel={sizes.context_parallel}"
        )


def _widths(sizes, _):
    for name, split_by in (
        ("padded_vocab_size", "the output layer is split over the vocabulary"),
        ("ffn_hidden_size", "the MLP is split"),
        ("hidden_size", "rows of weights are split"),
    ):
        if sizes.model[name] % sizes.model_parallel:
            yield (
                f"model_config.{name}={sizes.model[name]}: not a multiple of parallel_config.model_parallel="
                f"{sizes.model_parallel}, over which {split_by}"
            )


def _sequence(sizes, _):
    parts, words = sizes.context_parallel, "parallel_config.context_parallel"
    if sizes.parallel.get("use_seq_parallel"):
        parts, words = parts * sizes.model_parallel, f"{words} x model_parallel (use_seq_parallel)"
    if sizes.length % parts:
        yield f"model_config.seq_length={sizes.length}: not a multiple of {words} = {parts}"
    if sizes.model.get("use_flash_attention", True):
        if sizes.length % FLASH_ATTENTION_STEP:
            yield (
                f"model_config.seq_length={sizes.length}: not a multiple of {FLASH_ATTENTION_STEP}, which "
                "use_flash_attention needs"
            )
    elif sizes.context_parallel > 1:
        yield f"model_config.use_flash_attention: must be true for context_parallel={sizes.context_parallel}"


def _chunks(sizes, _):
    if sizes.model.get("mlp_chunk_size") and sizes.model_parallel * sizes.context_parallel > 1:
        yield (
            f"model_config.mlp_chunk_size={sizes.model['mlp_chunk_size']!r}: for layouts with model_parallel 1 and "
            "context_parallel 1; the others cut these tensors already, set it to null"
        )


def _packing(sizes, _):
    sections = ("eval_dataset",) if str(sizes.config.get("run_mode")) == "eval" else ("train_dataset",)
    if (
        not any((sizes.config.get(section) or {}).get("packing") for section in sections)
        or sizes.predicts
        or not sizes.model.get("use_flash_attention", True)
        or sizes.model.get("cells") == "portable"
    ):
        return
    yield from packing_problems(sizes.config)
    if sizes.context_parallel > sizes.ulysses:
        yield (
            f"parallel_config.context_parallel={sizes.context_parallel} with context_parallel_algo="
            f"{sizes.parallel.get('context_parallel_algo') or 'colossalai_cp'!r}: with packing: True each device needs "
            "all positions of its heads; set context_parallel_algo: ulysses_cp with "
            f"ulysses_degree_in_cp: {sizes.context_parallel}"
        )


def _batch(sizes, _):
    rows = int((sizes.config.get("runner_config") or {}).get("batch_size") or 1)
    interleave = int(sizes.config.get("micro_batch_interleave_num") or 1)
    if sizes.predicts:
        rows, name = int(sizes.model.get("batch_size") or 1), "model_config.batch_size"
        if rows % sizes.data_parallel:
            yield f"{name}={rows}: not a multiple of parallel_config.data_parallel={sizes.data_parallel}"
        return
    if interleave > 1 and sizes.context_parallel > 1:
        yield (
            f"micro_batch_interleave_num={interleave}: cannot go with "
            f"parallel_config.context_parallel={sizes.context_parallel}"
        )
    strategy = (sizes.config.get("parallel") or {}).get("dataset_strategy")
    if isinstance(strategy, (list, tuple)) and strategy and isinstance(strategy[0], (list, tuple)):
        parts = strategy[0][0]
        total = rows * sizes.data_parallel * (sizes.micro_batches if sizes.pipeline_stage > 1 else 1) * interleave
        if isinstance(parts, int) and parts != sizes.data_parallel:
            yield (
                f"parallel.dataset_strategy={strategy}: cuts the {total} rows of a step into {parts}, "
                f"parallel_config.data_parallel={sizes.data_parallel} asks for {sizes.data_parallel}"
            )


def _pipeline(sizes):
    stages = sizes.pipeline_stage
    if stages == 1:
        return []
    found = []
    try:
        dealt = layers_per_stage(sizes.config)
    except InputError as error:
        found.append(str(error))
    else:
        total = sum(map(sum, dealt))
        if total != sizes.layers:
            found.append(
                f"model_config.num_layers={sizes.layers}: parallel_config.pipeline_stage={stages} stages with "
                f"model_config.offset={sizes.model.get('offset') or 0} hold {dealt} = {total} layers; the "
                f"offsets must add up to {sizes.layers % (stages * sizes.interleave)}"
            )
        elif min(map(min, dealt)) < 1:
            found.append(
                f"model_config.num_layers={sizes.layers}: a stage of {dealt} has no layer "
                f"(parallel_config.pipeline_stage={stages}, model_config.offset)"
            )
    if sizes.micro_batches < stages:
        found.append(
            f"parallel_config.micro_batch_num={sizes.micro_batches}: fewer than pipeline_stage={stages}, "
            "stages would wait for ever"
        )
    accumulate = (sizes.config.get("runner_config") or {}).get("gradient_accumulation_steps") or 1
    if accumulate > 1:
        found.append(
            f"runner_config.gradient_accumulation_steps={accumulate}: without effect in a pipeline; raise "
            "parallel_config.micro_batch_num instead"
        )
    return found


def _prediction(sizes):
    for name in ("pipeline_stage", "context_parallel"):
        if getattr(sizes, name) > 1 and sizes.config["run_mode"] == "predict":
            yield f"parallel_config.{name}={getattr(sizes, name)}: must be 1 in run_mode predict"
    mode = (sizes.config.get("parallel") or {}).get("parallel_mode")
    if sizes.model.get("use_past") and sizes.data_parallel > 1 and mode in _SEMI_AUTO:
        yield (
            f"parallel_config.data_parallel={sizes.data_parallel}: must be 1 in run_mode predict with use_past, where all "
            "prompts of a batch are read as one row; start a run for each part of the prompts instead"
        )
    if sizes.model.get("use_past") and sizes.groups % sizes.model_parallel:
        yield (
            f"model_config.multi_query_group_num={sizes.groups}: not a multiple of parallel_config.model_parallel="
            f"{sizes.model_parallel}, over which the cache (use_past) is split"
        )
