"""The one list of what the plugin adds to MindFormers, and the one place that registers it.

MindFormers has no entry points: its YAMLs name classes that must have been put into `MindFormerRegister`
before. Importing `mindformers_glm32k` arranges that; see `register_when_imported`.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import wrapt

MODEL_TYPE = "glm32k"
TASK = "text_generation"

# (MindFormerModuleType value, class name = registered name, module). None of the names exists upstream.
ENTRIES = (
    ("config", "GLM32KConfig", "mindformers_glm32k.config"),
    ("models", "GLM32KForConditionalGeneration", "mindformers_glm32k.model"),
    ("tokenizer", "GLM32KTokenizer", "mindformers_glm32k.tokenizer"),
    ("processor", "GLM32KProcessor", "mindformers_glm32k.tokenizer"),
    ("dataset_loader", "GLM32KDataLoader", "mindformers_glm32k.data.loader"),
    ("dataset", "GLM32KDataset", "mindformers_glm32k.data.dataset"),
    ("wrapper", "GLM32KTrainOneStepCell", "mindformers_glm32k.training.step"),
    ("wrapper", "GLM32KPipelineTrainOneStepCell", "mindformers_glm32k.training.step"),
    ("trainer", "GLM32KTrainer", "mindformers_glm32k.training.trainer"),
    ("callback", "GLM32KMonitor", "mindformers_glm32k.training.monitor"),
    ("callback", "GLM32KCheckpointMonitor", "mindformers_glm32k.training.checkpoints"),
)


def load(name: str) -> type:
    """Imports and returns the registered class `name`; KeyError when the list does not have it."""
    modules = {entry_name: module for _, entry_name, module in ENTRIES}
    return getattr(importlib.import_module(modules[name]), name)


def register_all() -> None:
    """Puts every entry into MindFormerRegister and the Auto classes. Calling it again changes nothing."""
    from mindformers.tools.register import MindFormerRegister

    for category, name, _ in ENTRIES:
        registered = MindFormerRegister.registry.get(category, {}).get(name)
        if registered is None:
            MindFormerRegister.register_cls(load(name), module_type=category)
        elif registered is not load(name):
            raise RuntimeError(f"MindFormers already has another {category} named {name}: {registered}")
    _register_auto_classes()


def _register_auto_classes():
    from mindformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    from mindformers.mindformer_book import MindFormerBook
    from mindformers.trainer import trainer as upstream_trainer

    from mindformers_glm32k.compat import config_folder

    config, model, tokenizer = (
        load(name) for name in ("GLM32KConfig", "GLM32KForConditionalGeneration", "GLM32KTokenizer")
    )
    AutoConfig.register(MODEL_TYPE, config, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForCausalLM):
        auto_class.register(config, model, exist_ok=True)
    AutoTokenizer.register(config, slow_tokenizer_class=tokenizer, exist_ok=True)
    MindFormerBook.get_trainer_support_task_list()[TASK][MODEL_TYPE] = str(config_folder() / "finetune_glm32k.yaml")
    # the YAMLs' auto_register looks here unless --register_path said otherwise
    os.environ.setdefault("REGISTER_PATH", str(config_folder()))
    # save_pretrained of a tokenizer writes a YAML with a processor around it, whose name it looks up here.
    MindFormerBook.get_tokenizer_name_to_processor()[tokenizer.__name__] = "GLM32KProcessor"
    upstream_trainer.SUPPORT_MODEL_NAMES.add(MODEL_TYPE)


def register_when_imported() -> None:
    """Registers now if mindformers is loaded, else as soon as somebody imports it.

    Importing mindformers takes five seconds; a program that only prints its help must not pay for it.
    """
    package = Path(__file__).parent
    for module in ("mindformers", *(_module_name(path, package) for path in package.rglob("*.py"))):
        wrapt.register_post_import_hook(_register_unless_loading, module)


def _module_name(path: Path, package: Path) -> str:
    return ".".join((package.name, *path.relative_to(package).with_suffix("").parts))


def _register_unless_loading(loaded: ModuleType) -> None:
    """Registers, except while other modules of the package are half loaded: their own hooks follow.

    A module is half loaded here when it is the program's first import and itself imports mindformers, as
    `mindformers_glm32k.tokenizer.glm32k_tokenizer` in a worker that unpickles a tokenizer.

    Args:
        loaded: the module that has just been loaded; Python still marks it as initializing.
    """
    half_loaded = [
        name
        for name, module in list(sys.modules.items())
        if name.startswith(__package__ + ".")
        and module is not loaded
        and getattr(module.__spec__, "_initializing", False)
    ]
    if "mindformers" in sys.modules and not half_loaded:
        register_all()
