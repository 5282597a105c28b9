"""Prompts in chat format through upstream's text-generation pipeline: what it tokenizes and decodes with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer.glm32k_tokenizer import GLM32KTokenizer

if TYPE_CHECKING:
    import numpy as np
    from mindformers.models.tokenization_utils_base import BatchEncoding


class ChatPromptTokenizer(GLM32KTokenizer):
    """Stands where upstream's pipeline expects a tokenizer: prompts become chats, generated sequences become answers.

    Args:
        vocab_file: as GLM32KTokenizer.
        longest_prompt: tokens that a prompt may have so that an answer fits behind it.
    """

    def __init__(self, vocab_file: str | Path, longest_prompt: int):
        # MindFormers' generator takes the tokens before the first trailing pad: pads belong on the right
        super().__init__(vocab_file, padding_side="right")
        self.longest_prompt = longest_prompt
        self.prompt_lengths: list[int] = []

    def __call__(self, prompts: str | list[str], **_: Any) -> BatchEncoding:
        """A batch of chats of one user turn each: input_ids, lists of equal length.

        Raises:
            InputError: a prompt that leaves no room for an answer.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        ragged = self.build_batch_input(prompts, padding=False, return_tensors=None)["input_ids"]
        self.prompt_lengths = [len(ids) for ids in ragged]
        for prompt, length in zip(prompts, self.prompt_lengths):
            if length > self.longest_prompt:
                raise InputError(
                    f"a prompt has {length} tokens, {self.longest_prompt} fit into seq_length with "
                    f"room for the answer: {prompt[:60]!r}…; shorten it or raise seq_length"
                )
        return self.build_batch_input(prompts, padding=True, return_tensors=None)

    def decode(self, sequences: Sequence[np.ndarray], **_: Any) -> list[str]:
        """Answers of the batch whose prompts were tokenized last, from prompts and generated tokens together."""
        return [self.decode_answer(ids, length) for ids, length in zip(sequences, self.prompt_lengths)]
