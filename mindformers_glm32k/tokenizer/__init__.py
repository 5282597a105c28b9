"""The published ChatGLM3 tokenizer: its vocabulary, its chat format, and both as a MindFormers tokenizer."""

__all__ = ["GLM32KTokenizer"]


def __getattr__(name):
    # light imports: the vocabulary and the chat format need no MindFormers, which takes five seconds to load
    if name in __all__:
        from mindformers_glm32k.tokenizer.glm32k_tokenizer import GLM32KTokenizer

        return GLM32KTokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
