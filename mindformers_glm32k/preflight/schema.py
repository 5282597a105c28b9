"""The keys of every section of a YAML: what the installed MindFormers reads there, by its own classes, and what this
plugin reads."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mindformers_glm32k.checks import nearest
from mindformers_glm32k.compat import host_config_classes
from mindformers_glm32k.preflight.findings import EMPTY, ERROR, MOVE, Finding, value_at

# Read by MindFormers' trainer, launcher or loader, but in none of its lists of keys.
_TOP_LEVEL = (
    "base_config checkpoint trust_remote_code generation_config grouped_lr_schedule tensorboard remove_redundancy "
    "resume_by_last_timestamp_ckpt data_skip_steps ignore_data_skip use_checkpoint_health_monitor "
    "health_ckpts_record_dir check_for_nan_in_loss_and_grad calculate_per_token_loss transform_by_rank "
    "npu_num_per_node set_numa_enable mindio_pool_capacity use_graceful_exit hub_model_id hub_token "
    "hub_private_repo push_to_hub with_stack profile_output profiler_level data_simplification "
    "create_compressed_eod_mask pretrained_model_dir train_precision_sync infer_precision_sync load_ckpt_format "
    "load_ckpt_async print_separate_loss run_mode register_path rank_id device_num data_size profile_cb "
    "convert_args_to_mindformers_config swap_config monitor_config stable_rank_config"
).split()
# Read by this plugin.
_OWN_TOP_LEVEL = ("random_weights",)
_CONTEXT = (
    "ascend_config jit_level jit_syntax_level exec_order memory_offload op_timeout compile_cache_path "
    "enable_compile_cache enable_recovery recovery_path inter_op_parallel_num enable_mem_offload aoe_tune_mode "
    "aoe_config debug_level gpu_config dataset_broadcast_opt_level affinity_cpu_list affinity_config "
    "use_graceful_exit train_precision_sync infer_precision_sync save_dump_path check_input_format "
    "monitor_local_loss monitor_device_local_loss postprocess_use_numpy exclude_cann_cpu"
).split()
_PARALLEL = (
    "strategy_ckpt_config dataset_strategy fusion_threshold communi_parallel_mode optimizer_weight_shard_size "
    "optimizer_weight_shard_aggregated_save group_ckpt_save_file gradients_mean gradient_fp32_sync "
    "loss_repeated_mean stra_file_only_trainable_params pipeline_config pipeline_interleave pipeline_scheduler "
    "sharding_propagation auto_parallel_new_interface full_batch enable_parallel_optimizer"
).split()
_MAY_BE_ANYTHING = {"checkpoint", "generation_config", "tensorboard", "context.ascend_config"}
# key in a wrong section, as people write it -> where it belongs
_BELONGS = {
    "batch_size": "runner_config.batch_size",
    "epochs": "runner_config.epochs",
    "epoch": "runner_config.epochs",
    "num_train_epochs": "runner_config.epochs",
    "gradient_accumulation_steps": "runner_config.gradient_accumulation_steps",
    "sink_mode": "runner_config.sink_mode",
    "learning_rate": "lr_schedule.learning_rate",
    "warmup_ratio": "lr_schedule.warmup_ratio",
    "warmup_steps": "lr_schedule.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    "seq_length": "model.model_config.seq_length",
    "device_target": "context.device_target",
    "vocab_file": "train_dataset.tokenizer.vocab_file",
    "dataset_dir": "train_dataset.data_loader.dataset_dir",
    "save_checkpoint_steps": "callbacks",
    "keep_checkpoint_max": "callbacks",
}
NOBODYS = "remove it"  # the fix of a key that is similar to no other
_REGISTERED = ("type", "auto_register")
_DATA = ("train_dataset", "eval_dataset")


def constructor_keys(cls: type) -> tuple[set[str], bool]:
    """Names that a class takes by keyword, those that it passes on to its bases included; and whether that is all
    (False: it takes any)."""
    names = set()
    for base in cls.__mro__:
        constructor = vars(base).get("__init__") or vars(base).get("__new__")
        if isinstance(constructor, (staticmethod, classmethod)):
            constructor = constructor.__func__  # the wrapper is not callable before Python 3.10
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


def required_keys(cls: type) -> list[str]:
    """Names of the constructor's arguments that have no default."""
    parameters = list(inspect.signature(cls).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in parameters if one.default is one.empty and one.kind in kinds]


def registered(category: str, name: Any) -> type | None:
    """The class that MindFormers' registry has under a name."""
    from mindformers.tools.register import MindFormerRegister

    return MindFormerRegister.registry.get(category, {}).get(name) if isinstance(name, str) else None


@functools.lru_cache(maxsize=1)
def host_sections() -> dict[str, frozenset[str]]:
    """Section -> keys, of those sections whose keys do not depend on a `type`; "" is the top level."""
    import mindformers.pet.pet_config as pet

    classes, arguments = host_config_classes()

    def supported(*names):
        return {key for name in names for key in vars(getattr(arguments, name)).get("_support_kwargs", ())}

    general = set(classes["general_config"].keys())
    known = {
        "": general | set(classes) - {"general_config"} | {*_TOP_LEVEL, *_OWN_TOP_LEVEL},
        "context": set(classes["context"].keys()) | supported("ContextConfig", "MFContextConfig") | {*_CONTEXT},
        "parallel": set(classes["parallel"].keys()) | supported("ParallelContextConfig") | {*_PARALLEL},
        "parallel.strategy_ckpt_config": {"load_file", "save_file", "only_trainable_params"},
        "model": {"model_config", "arch", "auto_register"},
        "model.arch": set(_REGISTERED),
        "trainer": {*_REGISTERED, "model_name", "model_type"},
        "model.model_config.pet_config": {
            name
            for cls in vars(pet).values()
            if inspect.isclass(cls) and issubclass(cls, pet.PetConfig)
            for name in constructor_keys(cls)[0]
        },
    }
    for name in ("parallel_config", "recompute_config", "swap_config", "moe_config", "runner_config", "monitor_config"):
        if name in classes:
            known[name] = set(classes[name].keys())
    known["monitor_config.stable_rank_config"] = set()
    return {section: frozenset(keys - {"self", "kwargs"}) for section, keys in known.items() if keys}


def _typed_sections(config: Mapping[str, Any]) -> dict[str, set[str]]:
    """Section -> keys, of those sections whose class is this plugin's or takes no further keys."""
    from mindformers_glm32k.data.dataset import KNOWN_KEYS
    from mindformers_glm32k.tokenizer.glm32k_tokenizer import KNOWN_ARGUMENTS

    known = {}
    for name in _DATA:
        task = value_at(config, f"{name}_task.type")
        loader = registered("dataset_loader", "GLM32KDataLoader")
        sections = [name]
        if value_at(config, f"{name}_task.dataset_config") != config.get(name):  # usually the same by a YAML anchor
            sections.append(f"{name}_task.dataset_config")
        for section in sections:
            if task == "GLM32KDataset":
                known[section] = set(KNOWN_KEYS)
            if value_at(config, f"{section}.data_loader.type") == "GLM32KDataLoader":
                known[f"{section}.data_loader"] = constructor_keys(loader)[0] | {*_REGISTERED}
        if task == "GLM32KDataset":
            known[f"{name}_task"] = {*_REGISTERED, "dataset_config"}
    for section in (*(f"{name}.tokenizer" for name in _DATA), "processor.tokenizer"):
        if value_at(config, f"{section}.type") == "GLM32KTokenizer":
            known[section] = {*KNOWN_ARGUMENTS, *_REGISTERED}
    if value_at(config, "processor.type") == "GLM32KProcessor":
        known["processor"] = constructor_keys(registered("processor", "GLM32KProcessor"))[0] | {
            *_REGISTERED,
            "tokenizer",
            "return_tensors",
        }
    for section, category in (
        ("lr_schedule", "lr"),
        ("metric", "metric"),
        ("optimizer", "optimizer"),
        ("runner_wrapper", "wrapper"),
        ("runner_wrapper.scale_sense", "wrapper"),
    ):
        cls = registered(category, value_at(config, f"{section}.type"))
        keys, closed = constructor_keys(cls) if cls else (set(), False)
        if closed or cls and category in ("wrapper", "lr"):
            known[section] = keys | {*_REGISTERED}
    if "lr_schedule" in known:
        known["lr_schedule"] |= {"warmup_ratio", "warmup_steps", "total_steps", "learning_rate"}
    return known


def unknown_keys(config: Mapping[str, Any], skipped: Iterable[str] = ()) -> Iterator[Finding]:
    """A finding for every key that nobody reads, with the most similar known one.

    Args:
        config: the configuration.
        skipped: keys that other findings name.
    """
    skipped = set(skipped)
    sections = {**host_sections(), **_typed_sections(config)}
    for section, known in sections.items():
        values = value_at(config, section) if section else config
        if isinstance(values, (str, int, float, list)) and section not in skipped:
            yield Finding(ERROR, section, f"a section of keys is needed, found {values!r}")
        if not isinstance(values, Mapping):
            continue
        for key in values:
            dotted = f"{section}.{key}" if section else str(key)
            if key in known or dotted in skipped or section in _MAY_BE_ANYTHING:
                continue
            yield _unknown(config, sections, section, str(key), dotted)


def _unknown(config, sections, section, key, dotted):
    where = f"in {section}" if section else "at the top level"
    place = _BELONGS.get(key)
    if place and place.rpartition(".")[0] != section:
        free = value_at(config, place) in EMPTY and "." in place
        return Finding(
            ERROR, dotted, f"nobody reads it {where}", f"write it as {place}", (MOVE, place) if free else None
        )
    near = nearest(key, sections[section], cutoff=0.7)
    target = f"{section}.{near}" if section and near else near
    if not near:
        homes = [name for name, keys in sections.items() if key in keys and not name.endswith("dataset_config")]
        if homes:
            places = " or ".join(f"{home}.{key}" if home else key for home in homes[:3])
            target = places if len(homes) == 1 else None
            return Finding(
                ERROR, dotted, f"nobody reads it {where}", f"write it as {places}", (MOVE, target) if target else None
            )
        near = nearest(key, sections[section])
        if not near:
            return Finding(ERROR, dotted, f"nobody reads it {where}", NOBODYS)
        target = None
    certain = target and value_at(config, target) in EMPTY
    return Finding(
        ERROR, dotted, f"unknown key {key!r}", f"did you mean {near!r}?", (MOVE, target) if certain else None
    )
