"""The hook for upstream's own launcher: `run_mindformer.py --register_path …/research/glm32k`.

The YAMLs' `trainer.auto_register: register_glm32k.GLM32KTrainer` makes MindFormers load this file before it builds
anything else; importing the package registers every class of the plugin. MindFormers runs a copy of the file, so it
imports the installed package by name.
"""
import os
import sys

try:
    import mindformers_glm32k
except ModuleNotFoundError:
    # not installed: run from the checkout that this folder belongs to
    sys.path.append(os.path.dirname(os.path.dirname(os.path.realpath(os.environ["REGISTER_PATH"]))))
    import mindformers_glm32k

GLM32KTrainer = mindformers_glm32k.GLM32KTrainer
