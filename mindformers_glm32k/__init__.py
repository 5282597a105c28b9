"""ChatGLM3-6B-32K for MindFormers 1.6 to 2.1.

Importing this package is enough for MindFormers' YAMLs, Auto classes and Trainer to find GLM32K.
"""

from mindformers_glm32k import registry

__version__ = "0.2.0"
__all__ = [name for _, name, _ in registry.ENTRIES]

registry.register_when_imported()


def __getattr__(name):
    if name in __all__:
        return registry.load(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
