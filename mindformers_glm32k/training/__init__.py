"""Training, evaluation and prediction in MindFormers: the trainer, its train steps and its monitor, each under the name
that the YAMLs give it; they are loaded when they are first asked for."""

__all__ = ["GLM32KMonitor", "GLM32KPipelineTrainOneStepCell", "GLM32KTrainOneStepCell", "GLM32KTrainer"]


def __getattr__(name):
    from mindformers_glm32k import registry

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return registry.load(name)
