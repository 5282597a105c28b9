"""Checks a run's configuration before anything is built: sections, types of values, names of classes and their keys.

MindFormers finds such mistakes late, one at a time and in its own words, or passes over them: its train-step cell
takes any key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mindformers_glm32k.checks import did_you_mean, is_int, is_number
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.parallel import AXES, check_layout, one_program
from mindformers_glm32k.preflight.findings import ERROR, SET, Finding, raise_errors, value_at
from mindformers_glm32k.preflight.rules import rule_findings
from mindformers_glm32k.preflight.schema import NOBODYS, constructor_keys, registered, required_keys, unknown_keys
from mindformers_glm32k.preflight.stale import stale_findings

if TYPE_CHECKING:
    from mindformers.tools.register import MindFormerConfig


def _is_int(least):
    return lambda value: is_int(value, least)


def _is_number(value):
    return is_number(value, 0)


def _is_bool(value):
    return isinstance(value, bool)


def _is_scale(value):
    return isinstance(value, dict) or _is_number(value)


def _is_float(value):
    return isinstance(value, float) and value >= 0


def _is_pair_of_fractions(value):
    return (
        isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_float(part) and 0 < part < 1 for part in value)
    )


def _is_resume(value):
    return isinstance(value, bool) or (isinstance(value, str) and value.endswith((".ckpt", ".safetensors")))


def _is_memory(value):
    return isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?GB", value) is not None


def _is_text(value):
    return isinstance(value, str)


def _is_names(value):
    return isinstance(value, (list, tuple)) and all(map(_is_text, value))


_PATH = (_is_text, "the path of a file or folder")
_NUMBER = (_is_number, "a number of at least 0")
_COUNT = (_is_int(1), "a whole number of at least 1")
_WHOLE = (_is_int(-1), "a whole number")
_FLOAT = (_is_float, "a number of at least 0, written with a decimal point")  # MindSpore's optimizers insist on a float
_BOOL = (_is_bool, "true or false")
_RATIO = (lambda value: is_number(value, 0) and value <= 1, "a number from 0 to 1")
_MODES = (0, 1, "GRAPH_MODE", "PYNATIVE_MODE")

# dotted key -> (test, what is allowed). MindFormers fills in missing and null keys, except those of _NEEDED.
VALUES = {
    "seed": (_is_int(0), "a whole number of at least 0"),
    **{
        key: _BOOL
        for key in (
            "use_parallel",
            "auto_trans_ckpt",
            "only_save_strategy",
            "do_eval",
            "random_weights",
            "profile",
            "ignore_data_skip",
        )
    },
    "load_checkpoint": _PATH,
    "output_dir": (lambda value: _is_text(value) and value, "the path of a folder"),
    "resume_training": (_is_resume, "true, false or the name of a checkpoint's file"),
    "eval_step_interval": _WHOLE,
    "eval_epoch_interval": _WHOLE,
    "context.mode": (lambda value: not isinstance(value, bool) and value in _MODES, "0 (graph mode) or 1 (PyNative)"),
    "context.device_target": (lambda value: value in ("Ascend", "CPU"), "Ascend or CPU"),
    "context.device_id": (_is_int(0), "a whole number of at least 0"),
    "context.max_device_memory": (_is_memory, "a text such as 59GB"),
    "context.max_call_depth": _COUNT,
    **{f"parallel_config.{axis}": _COUNT for axis in (*AXES, "micro_batch_num", "gradient_aggregation_group")},
    **{f"parallel_config.{key}": _BOOL for key in ("vocab_emb_dp", "use_seq_parallel")},
    "parallel.parallel_mode": (lambda value: is_int(value, 0) or _is_text(value), "a number from 0 to 4 or a name"),
    **{
        f"parallel.{key}": _BOOL
        for key in (
            "gradients_mean",
            "full_batch",
            "enable_parallel_optimizer",
            "enable_alltoall",
            "loss_repeated_mean",
        )
    },
    **{
        f"recompute_config.{key}": _BOOL
        for key in ("parallel_optimizer_comm_recompute", "mp_comm_recompute", "recompute_slice_activation")
    },
    "recompute_config.recompute": (lambda value: isinstance(value, (bool, list)), "true, false or a list of layers"),
    "model.model_config.pet_config.lora_rank": _COUNT,
    "model.model_config.pet_config.lora_alpha": _NUMBER,
    "model.model_config.pet_config.lora_dropout": _RATIO,
    **{
        f"runner_wrapper.scale_sense.{key}": (lambda value: is_number(value, 1), "a number of at least 1")
        for key in ("loss_scale_value", "scale_factor", "scale_window")
    },
    "micro_batch_interleave_num": _COUNT,
    **{
        f"{section}.{key}": rule
        for section in ("train_dataset", "eval_dataset")
        for key, rule in (
            ("data_loader.dataset_dir", _PATH),
            ("tokenizer.vocab_file", _PATH),
            ("input_columns", (_is_names, "a list of names")),
        )
    },
    "processor.tokenizer.vocab_file": _PATH,
    "runner_config.epochs": _COUNT,
    "runner_config.batch_size": _COUNT,
    "runner_config.gradient_accumulation_steps": _COUNT,
    "runner_config.sink_mode": _BOOL,
    "runner_config.sink_size": (lambda value: is_int(value, 1) or value == -1, "a whole number of at least 1, or -1"),
    "lr_schedule.learning_rate": _NUMBER,
    "lr_schedule.lr_end": _NUMBER,
    "lr_schedule.warmup_ratio": _RATIO,
    "lr_schedule.warmup_steps": (_is_int(0), "a whole number of at least 0"),
    "lr_schedule.total_steps": (_is_int(-1), "a whole number of steps, or -1 for all of the run"),
    "optimizer.betas": (_is_pair_of_fractions, "a list of two numbers between 0 and 1"),
    "optimizer.eps": _FLOAT,
    "optimizer.weight_decay": _FLOAT,
    "runner_wrapper.use_clip_grad": _BOOL,
    "runner_wrapper.max_grad_norm": _NUMBER,
    "runner_wrapper.scale_sense": (_is_scale, "a number or a section with the type of a loss scale cell"),
}
# the same for the items of `callbacks`
CALLBACK_VALUES = {
    **{key: _COUNT for key in ("save_checkpoint_steps", "keep_checkpoint_max", "per_print_times")},
    **{key: _BOOL for key in ("integrated_save", "async_save", "save_trainable_params", "save_network_params")},
    "prefix": (_is_text, "a text"),
}
_NEEDED = ("runner_config.epochs", "runner_config.batch_size")
_IN_EVERY_RUN = ("", "context", "parallel_config", "parallel", "recompute_config")

# sections of each kind of run, with MindFormers' category of the class that `type` names, if it names one
_MODEL = {"model": None, "model.model_config": "config", "model.arch": "models"}
_TRAIN = {
    "train_dataset": None,
    "train_dataset.data_loader": "dataset_loader",
    "train_dataset.tokenizer": "tokenizer",
    "train_dataset_task": "dataset",
    "runner_config": None,
    "runner_wrapper": "wrapper",
    "optimizer": "optimizer",
    "lr_schedule": "lr",
}
_EVALUATE = {
    "eval_dataset": None,
    "eval_dataset.data_loader": "dataset_loader",
    "eval_dataset.tokenizer": "tokenizer",
    "eval_dataset_task": "dataset",
}
_PREDICT = {"processor": None, "processor.tokenizer": "tokenizer"}

_LAYOUT = (*AXES, "micro_batch_num", "use_seq_parallel", "context_parallel_algo", "ulysses_degree_in_cp")


def check_config(config: MindFormerConfig, run_mode: str, built: Iterable[str] = ()) -> None:
    """Checks what a run needs; everything that is wrong with it is named at once.

    Args:
        config: the configuration, its values normalized.
        run_mode: "train", "finetune", "eval" or "predict".
        built: sections that are not read, because the caller passes an object for them.

    MindFormers' Trainer adds keys of its own at the top level before it calls ours; those are passed over.

    Raises:
        InputError: every error that `config_findings` finds.
    """
    raise_errors(
        finding for finding in config_findings(config, run_mode, built) if "." in finding.key or finding.fix != NOBODYS
    )


def config_findings(
    config: Mapping[str, Any], run_mode: str, built: Iterable[str] = (), defaults: Iterable[str] = ()
) -> list[Finding]:
    """What is wrong with a configuration. In every section: stale and unknown keys. In sections that the run reads:
    missing sections, values of a wrong type or size, classes that are not registered, keys that a class does not have,
    and keys that contradict each other.

    Args:
        config, run_mode, built: as for `check_config`.
        defaults: sections that may be missing, because MindFormers fills them in when it reads the YAML.
    """
    sections = dict(_MODEL)
    if run_mode in ("train", "finetune"):
        sections.update(_TRAIN, **(_EVALUATE if config.get("do_eval") is True else {}))
    elif run_mode == "eval":
        sections.update(_EVALUATE)
    else:
        sections.update(_PREDICT)
    sections = {
        key: category
        for key, category in sections.items()
        if not any(key == name or key.startswith((name + ".", name + "_task")) for name in built)
        and not (key in defaults and key not in config)
    }
    found = list(stale_findings(config))
    named = {finding.key for finding in found}
    for finding in (
        *unknown_keys(config, named),
        *_section_findings(config, sections),
        *_value_findings(config, sections),
        *(_scale_findings(config) if "runner_wrapper" in sections else ()),
        *_callback_findings(config, "optimizer" in sections),
        *_model_findings(config),
        *rule_findings(config, run_mode, built),
    ):
        if finding.key not in named and finding.key.rpartition(".")[0] not in named:  # one mistake, one finding
            named.add(finding.key)
            found.append(finding)
    return found + list(_dataset_findings(config, sections, named))


def _section_findings(config, sections):
    for key, category in sections.items():
        section, parent = value_at(config, key), key.rpartition(".")[0]
        if parent and not isinstance(value_at(config, parent), Mapping):
            continue  # named already
        if category == "tokenizer" and hasattr(section, "build_chat_input"):
            continue  # Trainer(tokenizer=…) puts the object there
        if not isinstance(section, Mapping):
            message = f"a section of keys is needed, found {section!r}"
            yield Finding(ERROR, key, message, "copy it from a YAML of research/glm32k")
        elif category:
            yield from _class_findings(section, category, key)


def _value_findings(config, sections):
    for key, (fits, allowed) in VALUES.items():
        parent, _, leaf = key.rpartition(".")
        section = value_at(config, parent) if parent else config
        if not isinstance(section, Mapping):
            continue
        if parent not in _IN_EVERY_RUN and not any(parent == one or parent.startswith(f"{one}.") for one in sections):
            continue
        value = section.get(leaf)
        if (value is not None or (key in _NEEDED and leaf in section)) and not fits(value):
            yield _wrong(key, value, allowed, fits)


def _wrong(key, value, allowed, fits):
    """The finding of a wrong value, with an edit where the value is a text that stands for an allowed one."""
    other = None
    if isinstance(value, str) and value.isdecimal():
        other = int(value)
    elif isinstance(value, str) and value.lower() in ("yes", "true", "on", "no", "false", "off"):
        other = value.lower() in ("yes", "true", "on")
    elif key == "context.device_target" and isinstance(value, str):
        other = {"cpu": "CPU", "ascend": "Ascend", "npu": "Ascend"}.get(value.lower())
    elif key == "context.mode" and isinstance(value, str):
        other = {"graph": 0, "graph_mode": 0, "pynative": 1, "pynative_mode": 1}.get(value.lower())
    certain = other is not None and fits(other)
    fix = f"write {other!r}" if certain else ""
    return Finding(ERROR, key, f"{value!r} is not {allowed}", fix, (SET, other) if certain else None)


def _dataset_findings(config, sections, named):
    """What the data set's own checks refuse, in sections without other findings."""
    from mindformers.tools.register import MindFormerConfig

    from mindformers_glm32k.data.dataset import KNOWN_KEYS, checked

    for name in ("train_dataset", "eval_dataset"):
        section = config.get(name)
        ours = name in sections and value_at(config, f"{name}_task.type") == "GLM32KDataset"
        if ours and isinstance(section, Mapping) and KNOWN_KEYS.issuperset(section):
            if any(key == name or key.startswith((f"{name}.", f"{name}_task.")) for key in named):
                continue
            try:
                checked(MindFormerConfig(**section))
            except InputError as error:
                key = re.match(r"(\w+)[:=]", str(error))
                yield Finding(ERROR, f"{name}.{key[1]}" if key else name, str(error))


def _scale_findings(config):
    """The cell of a loss scale is built from its section alone; the other classes get arguments from the trainer."""
    key = "runner_wrapper.scale_sense"
    section = value_at(config, key)
    if isinstance(section, Mapping):
        yield from _class_findings(section, "wrapper", key)
        cls = registered("wrapper", section.get("type"))
        for name in required_keys(cls) if cls else ():
            if name not in section:
                yield Finding(ERROR, f"{key}.{name}", f"missing, {section['type']} needs it", "see the shipped YAMLs")


def _callback_findings(config, trains):
    for name in ("callbacks",) if trains else ():
        callbacks = config.get(name)
        if callbacks is not None and not isinstance(callbacks, (list, tuple)):
            yield Finding(ERROR, name, f"a list of callbacks is needed, found {callbacks!r}", "write '- type: …' items")
            continue
        for index, callback in enumerate(callbacks or ()):
            if not isinstance(callback, Mapping) and not isinstance(callback, str) and hasattr(callback, "step_end"):
                continue  # a callback object
            yield from _class_findings(callback, "callback", f"{name}.{index}")
            for key, (fits, allowed) in CALLBACK_VALUES.items():
                value = callback.get(key) if isinstance(callback, Mapping) else None
                if value is not None and not fits(value):
                    yield _wrong(f"{name}.{index}.{key}", value, allowed, fits)


def _model_findings(config) -> Iterator[Finding]:
    from mindformers_glm32k.config import field_problems

    fields = value_at(config, "model.model_config")
    if isinstance(fields, Mapping) and fields.get("type") == "GLM32KConfig":
        for problem in field_problems(fields):
            quoted = re.match(r"unknown key '(\w+)'", problem)
            name = quoted[1] if quoted else re.split(r"[=:]", problem, maxsplit=1)[0]
            yield Finding(ERROR, f"model.model_config.{name}", f"GLM32KConfig: {problem}")


def check_run_layout(config: MindFormerConfig) -> None:
    """Checks sizes against the layout and the number of processes, where one program is split over the devices; in data
    parallel each process holds the whole model."""
    if not config.use_parallel or not one_program(config):
        return
    from mindspore.communication import get_group_size

    parallel = config.parallel_config
    if not isinstance(parallel, dict):  # upstream's Trainer has made an object of it
        parallel = {name: getattr(parallel, name, None) for name in _LAYOUT}
        algorithm = parallel["context_parallel_algo"]
        parallel["context_parallel_algo"] = getattr(algorithm, "value", algorithm)
    check_layout({**config, "parallel_config": parallel}, get_group_size())


def _class_findings(section: Any, category: str, key: str) -> Iterator[Finding]:
    """What is wrong with `type` and the other keys of a section that a class is built from."""
    from mindformers.tools.register import MindFormerRegister

    name = section.get("type") if isinstance(section, Mapping) else None
    classes = MindFormerRegister.registry.get(category, {})
    if not isinstance(name, str) or name not in classes:
        near = did_you_mean(str(name), classes).lstrip(", ")
        yield Finding(ERROR, f"{key}.type", f"no {category} class is registered as {name!r}", near)
        return
    if category not in ("optimizer", "callback", "wrapper"):
        return  # these take further keys, or check theirs themselves
    known, closed = constructor_keys(registered(category, name))
    if not closed and category != "wrapper":
        return
    for unknown in section:
        if unknown not in known | {"type", "auto_register"}:
            near = did_you_mean(unknown, known).lstrip(", ")
            yield Finding(ERROR, f"{key}.{unknown}", f"{name} has no key {unknown!r}", near)
