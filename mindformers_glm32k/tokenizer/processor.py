"""GLM32KProcessor: the `processor` section of the YAML, which MindFormers builds around a tokenizer."""

from mindformers.models.glm2.glm_processor import GLMProcessor


class GLM32KProcessor(GLMProcessor):
    """Upstream's GLMProcessor for GLM32KTokenizer, which upstream's own refuses (it names two tokenizers).

    Args:
        tokenizer (GLM32KTokenizer): the tokenizer.
        max_length (int): texts are padded to so many tokens. Default 128.
        padding (str): "max_length" (default), "longest" or "do_not_pad".
        return_tensors (str | None): "ms" (default), "np", or None for lists.
    """

    tokenizer_class = "AutoTokenizer"
