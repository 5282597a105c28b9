"""Checks a run's configuration before anything is built: sections, types of values, names of classes and their keys.

MindFormers finds such mistakes late, one at a time and in its own words, or passes over them: its train-step cell
takes any key.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mindformers_glm32k.checks import did_you_mean, is_int, is_number
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.parallel import AXES, check_layout, one_program

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


_NUMBER = (_is_number, "a number of at least 0")
_COUNT = (_is_int(1), "a whole number of at least 1")
_FLOAT = (_is_float, "a number of at least 0, written with a decimal point")  # MindSpore's optimizers insist on it
_BOOL = (_is_bool, "true or false")

# dotted key -> (test, what is allowed). Keys that are missing or null are MindFormers' to fill in, but for _NEEDED.
VALUES = {
    "seed": (_is_int(0), "a whole number of at least 0"),
    **{key: _BOOL for key in ("use_parallel", "auto_trans_ckpt", "only_save_strategy", "do_eval")},
    "runner_config.epochs": _COUNT,
    "runner_config.batch_size": _COUNT,
    "runner_config.gradient_accumulation_steps": _COUNT,
    "runner_config.sink_mode": _BOOL,
    "runner_config.sink_size": (lambda value: is_int(value, 1) or value == -1, "a whole number of at least 1, or -1"),
    "lr_schedule.learning_rate": _NUMBER,
    "lr_schedule.lr_end": _NUMBER,
    "lr_schedule.warmup_ratio": _NUMBER,
    "lr_schedule.warmup_steps": (_is_int(0), "a whole number of at least 0"),
    "lr_schedule.total_steps": (_is_int(-1), "a whole number of steps, or -1 for all of the run"),
    "optimizer.betas": (_is_pair_of_fractions, "a list of two numbers between 0 and 1"),
    "optimizer.eps": _FLOAT,
    "optimizer.weight_decay": _FLOAT,
    "runner_wrapper.use_clip_grad": _BOOL,
    "runner_wrapper.max_grad_norm": _NUMBER,
    "runner_wrapper.scale_sense": (_is_scale, "a number or a section with the type of a loss scale cell"),
}
_NEEDED = ("runner_config.epochs", "runner_config.batch_size")

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
        built: sections that are not read, because the caller brings an object for them.

    Raises:
        InputError: sections missing, values of a wrong type, classes that are not registered, keys that a class does
            not have; the model's fields as GLM32KConfig checks them.
    """
    from mindformers_glm32k.registry import load

    sections = dict(_MODEL)
    if run_mode in ("train", "finetune"):
        sections.update(_TRAIN, **(_EVALUATE if config.do_eval is True else {}))
    elif run_mode == "eval":
        sections.update(_EVALUATE)
    else:
        sections.update(_PREDICT)
    sections = {
        key: category
        for key, category in sections.items()
        if not any(key == name or key.startswith((name + ".", name + "_task")) for name in built)
    }
    problems = []
    for key, category in sections.items():
        section, parent = _value(config, key), key.rpartition(".")[0]
        if parent and not isinstance(_value(config, parent), dict):
            continue  # named already
        if category == "tokenizer" and hasattr(section, "build_chat_input"):
            continue  # Trainer(tokenizer=…) puts the object there
        if not isinstance(section, dict):
            problems.append(f"{key}: a section of keys is needed, found {section!r}")
        elif category:
            problems += _class_problems(section, category, key)
    for key, (fits, allowed) in VALUES.items():
        value, section = _value(config, key), key.rpartition(".")[0]
        read = not section or (section in sections and isinstance(_value(config, section), dict))
        if read and (value is not None or key in _NEEDED) and not fits(value):
            problems.append(f"{key}: {value!r} is not {allowed}")
    if "optimizer" in sections:
        for index, callback in enumerate(config.callbacks or ()):
            problems += _class_problems(callback, "callback", f"callbacks.{index}")
    if problems:
        raise InputError("configuration: " + "; ".join(problems))
    if "model" in sections and config.model.model_config.type == "GLM32KConfig":
        load("GLM32KConfig")(**config.model.model_config)


def check_run_layout(config: MindFormerConfig) -> None:
    """Sizes against the layout and the number of processes, where one program is split over the devices; data parallel
    processes hold all of it."""
    if not config.use_parallel or not one_program(config):
        return
    from mindspore.communication import get_group_size

    parallel = config.parallel_config
    if not isinstance(parallel, dict):  # upstream's Trainer has made an object of it
        parallel = {name: getattr(parallel, name, None) for name in _LAYOUT}
        algorithm = parallel["context_parallel_algo"]
        parallel["context_parallel_algo"] = getattr(algorithm, "value", algorithm)
    check_layout({**config, "parallel_config": parallel}, get_group_size())


def _value(config: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _class_problems(section: Any, category: str, key: str) -> list[str]:
    """What is wrong with `type` and the other keys of a section that a class is built from."""
    from mindformers.tools.register import MindFormerRegister

    name = section.get("type") if isinstance(section, dict) else None
    classes = MindFormerRegister.registry.get(category, {})
    if name not in classes:
        return [f"{key}.type: no {category} class is registered as {name!r}{did_you_mean(str(name), classes)}"]
    if category not in ("optimizer", "callback", "wrapper"):
        return []  # these take further keys, or check theirs themselves
    known, closed = constructor_keys(classes[name])
    if not closed and category != "wrapper":
        return []
    return [
        f"{key}: {name} has no key {unknown!r}{did_you_mean(unknown, known)}"
        for unknown in section
        if unknown not in known | {"type"}
    ]


def constructor_keys(cls: type) -> tuple[set[str], bool]:
    """Names that a class takes by keyword, those that it passes on to its bases included; and whether that is all
    (False: it takes any)."""
    names = set()
    for base in cls.__mro__:
        constructor = vars(base).get("__init__") or vars(base).get("__new__")
        if constructor is None:
            continue
        parameters = inspect.signature(constructor).parameters.values()
        names.update(
            parameter.name
            for parameter in parameters
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        )
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
            return names, True
    return names, False
