"""From a compiled program (MindIR) to what it costs one NPU: memory, work, communication. Needs no MindSpore."""

from mindformers_glm32k.dryrun.analysis.analyze import analyze
from mindformers_glm32k.dryrun.analysis.mindir import Program, read_program
from mindformers_glm32k.dryrun.analysis.trace import Trace, trace_program

__all__ = ["Program", "Trace", "analyze", "read_program", "trace_program"]
