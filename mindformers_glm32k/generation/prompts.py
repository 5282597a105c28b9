"""Prompts in chat format through upstream's text-generation pipeline: what it tokenizes and decodes with."""

import os

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer.glm32k_tokenizer import GLM32KTokenizer


class ChatPromptTokenizer(GLM32KTokenizer):
    """Stands where upstream's pipeline expects a tokenizer: prompts become chats, generated rows become answers.

    Args:
        vocab_file (str): as GLM32KTokenizer.
        longest_prompt (int): tokens that a prompt may have so that an answer fits behind it.
    """

    def __init__(self, vocab_file, longest_prompt):
        # MindFormers' generator takes the tokens before the first trailing pad: pads belong on the right
        super().__init__(vocab_file, padding_side="right")
        self.longest_prompt = longest_prompt
        self.prompt_lengths = []

    def __call__(self, prompts, **_):
        """Chats of one user turn each.

        Args:
            prompts (str | list[str]): the prompts of one batch.

        Returns:
            BatchEncoding: input_ids, lists of equal length.

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

    def decode(self, rows, **_):
        """Answers of the batch whose prompts were tokenized last.

        Args:
            rows (list[numpy.ndarray]): prompt and generated tokens of each row.

        Returns:
            list[str]
        """
        return [self.decode_answer(row, length) for row, length in zip(rows, self.prompt_lengths)]


def read_prompts(input_data):
    """Prompts from a text, a list of texts, or a file with one prompt a line.

    Args:
        input_data (str | list[str]): as given to `--predict_data`.

    Returns:
        list[str]

    Raises:
        InputError: nothing given, an empty prompt, an empty file, or not text.
    """
    if isinstance(input_data, str) and os.path.isfile(input_data):
        try:
            with open(input_data, encoding="utf-8") as file:
                prompts = [line.rstrip("\n").replace(r"\n", "\n") for line in file if line.strip()]
        except UnicodeDecodeError as error:
            raise InputError(f"{input_data}: not UTF-8 ({error}); convert the file") from error
        if not prompts:
            raise InputError(f"{input_data}: no prompts; write one a line")
        return prompts
    prompts = [input_data] if isinstance(input_data, str) else input_data
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(
            f"no prompt to answer: found {type(input_data).__name__}; give --predict_data TEXT …, or a "
            "file with one prompt a line"
        )
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise InputError(f"prompt {number} is empty; give a text")
    return prompts
