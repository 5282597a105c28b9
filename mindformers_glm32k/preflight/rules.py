"""Keys of a run that contradict each other, or need one that is not there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mindformers_glm32k import compat
from mindformers_glm32k.checks import is_int
from mindformers_glm32k.files import can_be_written
from mindformers_glm32k.parallel import layout_problems, one_program
from mindformers_glm32k.preflight.findings import ERROR, SET, WARNING, Finding, value_at

TRAINS = ("train", "finetune")
_ADAPTED = ("dense", "dense_4h_to_h", "output_layer")  # leaf cells that LoRA can adapt, in every layout


def is_template(config: Mapping[str, Any], run_mode: str) -> bool:
    """Whether the paths that the run needs are still to be filled in, as in the shipped YAMLs."""
    section = {"eval": "eval_dataset"}.get(run_mode, "train_dataset" if run_mode in TRAINS else "processor")
    paths = [value_at(config, f"{section}.tokenizer.vocab_file")]
    if section != "processor":
        paths.append(value_at(config, f"{section}.data_loader.dataset_dir"))
    return not any(paths)


def rule_findings(config: Mapping[str, Any], run_mode: str, built: Iterable[str] = ()) -> Iterator[Finding]:
    """Findings about keys that contradict each other, or lack another that they need.

    Args:
        config: the configuration; sections of a wrong type are passed over.
        run_mode: "train", "finetune", "eval" or "predict".
        built: sections for which the caller passes an object.
    """
    trains = run_mode in TRAINS
    path = checkpoint_of(config)
    resume = config.get("resume_training")
    if trains and not path and (resume is True or isinstance(resume, str) and resume.endswith((".ckpt", "tensors"))):
        yield Finding(
            ERROR,
            "resume_training",
            f"{resume!r} without load_checkpoint would train from random weights",
            "add --load_checkpoint FOLDER, such as output/checkpoint of the run to resume, or set it to False",
        )
    if config.get("auto_trans_ckpt") is True and config.get("use_parallel") is not True:
        yield Finding(
            ERROR,
            "auto_trans_ckpt",
            "True with use_parallel: False: one process has nothing to transform",
            "set auto_trans_ckpt: False, or start the run with use_parallel: True",
        )
    mode = value_at(config, "context.mode")
    if mode in (1, "PYNATIVE_MODE") and not isinstance(mode, bool) and compat.pynative_is_upstreams():
        yield Finding(
            ERROR,
            "context.mode",
            "1 (PyNative) chooses MindFormers 2.x's own PyNative models, which glm2 is not among",
            "write 0",
            (SET, 0),
        )
    if trains and value_at(config, "context.device_target") == "CPU" and value_at(config, "runner_config.sink_mode"):
        yield Finding(
            WARNING,
            "runner_config.sink_mode",
            "True on CPU trains epochs x sink_size steps, not whole epochs",
            "write False",
            (SET, False),
        )
    past, flash = (value_at(config, f"model.model_config.{key}") for key in ("use_past", "use_flash_attention"))
    if run_mode == config.get("run_mode") == "predict" and past is False and flash is True:
        yield Finding(
            ERROR,
            "model.model_config.use_past",
            "False with use_flash_attention: True: MindFormers predicts with both or with neither",
            "set use_past: True and is_dynamic: True, or use_flash_attention: False",
        )
    if value_at(config, "monitor_config.monitor_on") is True and value_at(config, "context.device_target") == "CPU":
        yield Finding(
            ERROR,
            "monitor_config.monitor_on",
            "True on CPU: MindFormers' per-layer monitor uses operators without a CPU kernel",
            "write False; GLM32KMonitor and tensorboard work",
            (SET, False),
        )
    parts = value_at(config, "model.model_config.pp_interleave_num")
    interleaves = value_at(config, "parallel.pipeline_config.pipeline_interleave")
    if (
        trains
        and is_int(parts, 2)
        and is_int(value_at(config, "parallel_config.pipeline_stage"), 2)
        and not interleaves
    ):
        yield Finding(
            WARNING,
            "model.model_config.pp_interleave_num",
            f"{parts} without parallel.pipeline_config.pipeline_interleave: the pipeline does not interleave",
            "set parallel.pipeline_config: {pipeline_interleave: True, pipeline_scheduler: 1f1b}, or remove the key",
        )
    output = config.get("output_dir") or "./output"
    if isinstance(output, str) and not can_be_written(os.path.expanduser(output)):
        yield Finding(ERROR, "output_dir", f"{output} cannot be written", "choose another folder, or make it writable")
    yield from _lora(config)
    yield from _evaluation(config, run_mode, built)


def checkpoint_of(config: Mapping[str, Any]) -> Any:
    """The checkpoint that a run loads, whichever key names it."""
    return (
        value_at(config, "checkpoint.load_path")
        or config.get("load_checkpoint")
        or value_at(config, "model.model_config.checkpoint_name_or_path")
    )


def weights_findings(config: Mapping[str, Any], run_mode: str) -> Iterator[Finding]:
    """An error for a run without a checkpoint that is useless with random weights, unless `random_weights: True` says
    that they are intended. Not for networks that the caller passes."""
    if checkpoint_of(config) or config.get("random_weights") is True or is_template(config, run_mode):
        return
    what = None
    if run_mode not in TRAINS:
        what = "evaluate" if run_mode == "eval" else "predict with"
    elif value_at(config, "model.model_config.pet_config"):
        what = "train LoRA adapters of"
    if what:
        yield Finding(
            ERROR,
            "load_checkpoint",
            f"empty: the run would {what} random weights",
            "give a checkpoint, or --random_weights True where that is meant",
        )


def adaptable_cells(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the leaf cells that LoRA can adapt, against which MindFormers matches target_modules."""
    attention = ("query_key_value",) if model.get("qkv_concat", True) else ("wq", "wk", "wv")
    mlp = ("dense_h_to_4h",) if model.get("mlp_concat", True) else ("dense_left", "dense_right")
    return (*attention, *mlp, *_ADAPTED)


def _lora(config):
    model = value_at(config, "model.model_config")
    pet = model.get("pet_config") if isinstance(model, Mapping) else None
    if not isinstance(pet, Mapping) or str(pet.get("pet_type", "lora")).lower() != "lora":
        return
    key, pattern, cells = "model.model_config.pet_config.target_modules", pet.get("target_modules"), None
    if not isinstance(pattern, str) or not pattern:
        message = f"{pattern!r} is not a pattern of cells' names"
    else:
        try:
            cells = [cell for cell in adaptable_cells(model) if re.match(pattern, cell)]
            message = f"{pattern!r} matches no cell of the model"
        except re.error as error:
            message = f"{pattern!r} is no regular expression ({error})"
    if not cells:
        names = ", ".join(adaptable_cells(model))
        yield Finding(ERROR, key, message, f"cells are {names}; as shipped: .*query_key_value.*")


def _evaluation(config, run_mode, built):
    evaluates = run_mode == "eval" or (run_mode in TRAINS and config.get("do_eval") is True)
    if not evaluates:
        return
    section = value_at(config, "eval_dataset.data_loader")
    if "eval_dataset" not in built and isinstance(section, Mapping):
        given = section.get("dataset_dir")
        if run_mode in TRAINS and not given and not is_template(config, run_mode):
            yield Finding(
                ERROR,
                "eval_dataset.data_loader.dataset_dir",
                "empty, and do_eval is True",
                "give --eval_dataset_dir FILE, or set do_eval: False",
            )


def layout_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Sizes that do not fit the layout; for configurations whose values are of the right types."""
    if (
        config.get("use_parallel") is True
        and isinstance(config.get("parallel_config"), Mapping)
        and one_program(config)
    ):
        for problem in layout_problems(config):
            key = re.split(r"[=:\s]", problem, maxsplit=1)[0]
            name = f"model.{key}" if key.startswith("model_config.") else key
            yield Finding(ERROR, name, problem[len(key) :].lstrip("=: "))
