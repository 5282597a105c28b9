"""Keys and class names of MindFormers 1.2 to 1.9 that newer versions lack or ignore, or that this plugin replaces.

Source: the YAMLs that the branches r1.2.0 to r1.9.0 of MindFormers ship for glm2, glm3 and glm32k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mindformers_glm32k.preflight.findings import ERROR, MOVE, REMOVE, SET, WARNING, Finding, value_at

# class name as old YAMLs have it -> the one to write
CLASSES = {
    **dict.fromkeys(("ChatGLM32kConfig", "ChatGLM3Config", "ChatGLM2Config"), "GLM32KConfig"),
    **dict.fromkeys(
        ("ChatGLM32kForConditionalGeneration", "ChatGLM3ForConditionalGeneration", "ChatGLM2ForConditionalGeneration"),
        "GLM32KForConditionalGeneration",
    ),
    **dict.fromkeys(("ChatGLM32kTokenizer", "ChatGLM3Tokenizer", "ChatGLM2Tokenizer"), "GLM32KTokenizer"),
    "GLMProcessor": "GLM32KProcessor",
    "ADGenDataLoader": "GLM32KDataLoader",
    **dict.fromkeys(("KeyWordGenDataset", "MultiTurnDataset"), "GLM32KDataset"),
    "CausalLanguageModelingTrainer": "GLM32KTrainer",
    "MFTrainOneStepCell": "GLM32KTrainOneStepCell",
    "MFPipelineWithLossScaleCell": "GLM32KPipelineTrainOneStepCell",
    **dict.fromkeys(("FP32StateAdamWeightDecay", "FusedAdamWeightDecay", "FusedCastAdamWeightDecay"), "AdamW"),
    "CheckpointMointor": "CheckpointMonitor",
    **dict.fromkeys(("ADGENMetric", "PromptAccMetric", "EntityScore", "EmF1Metric"), "PerplexityMetric"),
}
_GONE_CALLBACKS = ("ObsMonitor",)
# sections with a `type`
TYPED = (
    "model.model_config",
    "model.arch",
    "trainer",
    "processor",
    "processor.tokenizer",
    *(
        f"{kind}_dataset{part}"
        for kind in ("train", "eval")
        for part in (".data_loader", ".tokenizer", "_task", "_task.dataset_config.data_loader")
    ),
    *(f"{kind}_dataset_task.dataset_config.tokenizer" for kind in ("train", "eval")),
    "runner_wrapper",
    "optimizer",
    "metric",
)
# What these names build still runs under MindFormers; this plugin has its own, with its checks and its kernels.
_STILL_RUN = {"CausalLanguageModelingTrainer", "MFTrainOneStepCell", "MFPipelineWithLossScaleCell"}

# dotted key -> (why, new key or None)
KEYS = {
    **{
        key: ("MindSpore's data set tuning of MindFormers 1.2 to 1.6, gone since", None)
        for key in ("auto_tune", "filepath_prefix", "autotune_per_step")
    },
    **{
        f"context.{key}": ("not passed on by MindFormers from 1.6 on", None)
        for key in ("enable_graph_kernel", "graph_kernel_flags", "graph_memory_max_size")
    },
    **{
        f"model.model_config.{key}": ("read by MindFormers 1.2 to 1.5 only", None)
        for key in (
            "use_prompt_flash_attention",
            "use_incre_flash_attention",
            "is_npu_acceleration",
            "is_sample_acceleration",
            "no_recompute_layers",
        )
    },
    "parallel.strategy_ckpt_config.only_trainable_params": ("ignored from 1.8 on", None),
    "recompute_config.recompute_layers": ("never read by glm2", None),
    "runner_config.initial_epoch": ("resume_training finds the epoch itself", None),
    "train_dataset.batch_size_per_device": ("old name", "runner_config.batch_size"),
    "model.model_config.layernorm_compute_dtype": ("old name", "model.model_config.layernorm_compute_type"),
    "only_save_strategy_ckpt": ("old name", "only_save_strategy"),
    "load_checkpoint_path": ("old name", "load_checkpoint"),
    "resume_or_finetune_checkpoint": ("name of MindFormers 0.x", "load_checkpoint"),
    "runner_config.image_size": ("for image models", None),
    "runner_config.has_trained_epoches": ("resume_training finds it itself", None),
    "runner_config.has_trained_steps": ("resume_training finds it itself", None),
}


def is_for_this_plugin(config: Mapping[str, Any]) -> bool:
    """Whether a configuration names a class of this plugin, or an old one that MindFormers no longer registers."""
    from mindformers.tools.register import MindFormerRegister

    present = {name for classes in MindFormerRegister.registry.values() for name in classes}
    names = {value_at(config, f"{key}.type") for key in TYPED}
    return any(
        isinstance(name, str) and (name.startswith("GLM32K") or (name in CLASSES and name not in present))
        for name in names
    )


def stale_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Each stale key and class name of a configuration, with what to write now."""
    for key, (why, new) in KEYS.items():
        parent, _, leaf = key.rpartition(".")
        section = value_at(config, parent) if parent else config
        if isinstance(section, Mapping) and leaf in section:
            fix = f"write {new}" if new else "remove it"
            yield Finding(WARNING, key, f"stale: {why}", fix, (MOVE, new) if new else (REMOVE,))
    for key in TYPED:
        section, _, part = key.partition(".")
        if section.endswith("_task") and part:
            whole = section[: -len("_task")]
            if value_at(config, f"{section}.dataset_config") == config.get(whole):
                continue  # the same by a YAML anchor
        name = value_at(config, f"{key}.type")
        new = CLASSES.get(name) if isinstance(name, str) else None
        if new and key == "runner_wrapper" and value_at(config, "context.device_target") == "CPU":
            yield Finding(ERROR, f"{key}.type", f"{name} has no kernels on CPU", f"write {new}", (SET, new))
        elif new and key != "metric":
            severity = WARNING if name in _STILL_RUN else ERROR
            what = (
                "MindFormers' own, without this plugin's checks"
                if name in _STILL_RUN
                else "an old name, or another model's"
            )
            yield Finding(severity, f"{key}.type", f"{name} is {what}", f"write {new}", (SET, new))
        elif new:
            yield Finding(
                ERROR, f"{key}.type", f"{name} does not work with this model's evaluation", f"write {new}", (SET, new)
            )
    for section in ("callbacks", "eval_callbacks"):
        callbacks = config.get(section)
        for index, callback in enumerate(callbacks if isinstance(callbacks, list) else ()):
            name = callback.get("type") if isinstance(callback, Mapping) else None
            if not isinstance(name, str):
                continue
            if name in CLASSES:
                new = CLASSES[name]
                yield Finding(
                    ERROR, f"{section}.{index}.type", f"{name} is an old spelling", f"write {new}", (SET, new)
                )
            elif name in _GONE_CALLBACKS:
                yield Finding(
                    ERROR, f"{section}.{index}", f"{name} is gone from MindFormers", "remove the item", (REMOVE,)
                )
    yield from _values(config)


def _values(config):
    optimizer = config.get("optimizer")
    if isinstance(optimizer, Mapping) and ("beta1" in optimizer or "beta2" in optimizer):
        betas = [optimizer.get("beta1", 0.9), optimizer.get("beta2", 0.999)]
        yield Finding(ERROR, "optimizer.betas", "beta1 and beta2 are old keys", f"write betas: {betas}", (SET, betas))
        for key in ("beta1", "beta2"):
            if key in optimizer:
                yield Finding(ERROR, f"optimizer.{key}", "old key", f"write betas: {betas}", (REMOVE,))
    url = config.get("remote_save_url")
    if isinstance(url, str) and "please input" in url.lower():
        yield Finding(WARNING, "remote_save_url", f"{url!r} is a placeholder", "remove it", (REMOVE,))
    config_of_model = value_at(config, "model.model_config")
    if isinstance(config_of_model, Mapping) and config_of_model.get("pre_seq_len") == "None":
        yield Finding(WARNING, "model.model_config.pre_seq_len", "'None' is a text", "write null", (SET, None))
