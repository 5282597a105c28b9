"""The ids that LongBench's pred.py feeds to chatglm3-6b-32k."""

from __future__ import annotations

from typing import Any

from mindformers_glm32k.checks import whole_number
from mindformers_glm32k.data.longbench import PromptTemplate, plain_name
from mindformers_glm32k.data.truncation import halves
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.tokenizer import chat_format as chat

# Few-shot tasks and code completion: pred.py feeds the prompt itself, not a chat turn.
WITHOUT_CHAT_FORMAT = frozenset(("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"))


def build_prompt_ids(sample: dict, prompt_template: str, tokenizer: Any, max_length: int) -> list[int]:
    """The prompt of one LongBench sample, which generation continues.

    The order of the steps matters and is pred.py's: the prompt is formatted and tokenized without special tokens;
    above `max_length` its first and its last half are decoded, joined and tokenized again (which may give a few
    tokens more or less); the chat format, or for WITHOUT_CHAT_FORMAT only `[gMASK] sop`, comes after the truncation.

    Args:
        sample: a line of LongBench's data: `dataset` and the texts that the template names.
        prompt_template: the data set's template of dataset2prompt.json, in str.format's syntax.
        tokenizer: a GLM32KTokenizer.
        max_length: tokens of the formatted prompt, >= 2; 31500 in LongBench's model2maxlen.json for this model.

    Raises:
        InputError: no `dataset`, a field that the template needs and the sample lacks, or a wrong template.
    """
    whole_number(max_length, "max_length", 2)
    name = sample.get("dataset")
    if not isinstance(name, str) or not name:
        raise InputError(f"field 'dataset' is {name!r}; the name of a LongBench data set is needed")
    prompt, _ = PromptTemplate(prompt_template, f"the prompt of {name!r}").render(sample)
    vocabulary = tokenizer.vocabulary
    ids = vocabulary.encode(prompt)
    if len(ids) > max_length:
        prompt = halves(ids, max_length // 2, vocabulary.decode)
        ids = vocabulary.encode(prompt)
    if plain_name(name) in WITHOUT_CHAT_FORMAT:
        return chat.prefix_ids(vocabulary) + ids
    return chat.conversation_ids(vocabulary, [{"role": "user", "content": prompt}], add_generation_prompt=True)
