"""The hook for upstream's own launcher: `run_mindformer.py --register_path …/research/glm32k`.

The YAMLs' `trainer.auto_register: register_glm32k.GLM32KTrainer` makes MindFormers load this file before it builds
anything else; importing the package registers every class of the plugin. MindFormers runs a copy of the file, so it
imports the package by name; it also refuses files whose import statements it cannot resolve, hence importlib.
"""

import importlib
import importlib.util
import os
import sys

if importlib.util.find_spec("mindformers_glm32k") is None:
    # not installed: run from the checkout that this folder belongs to
    sys.path.append(os.path.dirname(os.path.dirname(os.path.realpath(os.environ["REGISTER_PATH"]))))

GLM32KTrainer = importlib.import_module("mindformers_glm32k").GLM32KTrainer
