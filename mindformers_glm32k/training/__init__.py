"""Training, evaluation and prediction in MindFormers: the trainer, its train steps and its monitor, each under the name
that the YAMLs give it, imported on first use."""

from mindformers_glm32k.lazy import face

_FACE = {
    "GLM32KCheckpointMonitor": "checkpoints",
    "GLM32KMonitor": "monitor",
    "GLM32KPipelineTrainOneStepCell": "step",
    "GLM32KTrainOneStepCell": "step",
    "GLM32KTrainer": "trainer",
}
__all__ = list(_FACE)
__getattr__ = face(__name__, _FACE)
