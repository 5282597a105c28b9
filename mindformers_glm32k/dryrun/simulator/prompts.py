"""The prompts that a rehearsal of prediction decodes."""

import numpy as np

from mindformers_glm32k.dryrun.simulator.scale_down import prompts_of
from mindformers_glm32k.errors import InputError

_LOWEST_WORD = 3  # of random prompts: behind padding and the end of a text


def make_prompts(config, count, seed=7):
    """Prompts of random tokens; with several, every other one is longer and its neighbour shorter.

    Args:
        config (dict): merged configuration.
        count (int): tokens to generate.
        seed (int): of the random numbers.

    Returns:
        list[numpy.ndarray]: int32.

    Raises:
        InputError: more tokens than max_new_tokens.
    """
    rows, length, answer = _sizes(config, count)
    more = min(answer - count, length // 2)
    lengths = [length] * rows
    for row in range(0, rows - 1, 2):
        lengths[row], lengths[row + 1] = length - more, length + more
    rng = np.random.default_rng(seed)
    words = int(config["model"]["model_config"]["padded_vocab_size"])
    return [rng.integers(_LOWEST_WORD, words, size).astype(np.int32) for size in lengths]


def check_prompts(prompts, config, count):
    """Prompts as int32 arrays.

    Args:
        prompts (list): as many sequences of token ids as are answered together, on average seq_length - max_new_tokens
            long: the program holds all of them in one row.
        config (dict): merged configuration.
        count (int): tokens to generate.

    Returns:
        list[numpy.ndarray]: int32.

    Raises:
        InputError: they do not fit the programs that the configuration asks for.
    """
    rows, length, answer = _sizes(config, count)
    words = int(config["model"]["model_config"]["padded_vocab_size"])
    prompts = [np.asarray(ids, np.int32).reshape(-1) for ids in prompts]
    lengths = [len(ids) for ids in prompts]
    if len(prompts) != rows:
        raise InputError(
            f"{len(prompts)} prompts: {rows} are answered together (predict_batch_size, with use_past "
            "model_config.batch_size)"
        )
    if sum(lengths) != rows * length or max(lengths) + count > length + answer or min(lengths) < 1:
        raise InputError(
            f"prompts of {lengths} tokens: seq_length - max_new_tokens is {length}, they must be as long on "
            f"average and leave room for {count} tokens"
        )
    if any(((ids < 0) | (ids >= words)).any() for ids in prompts):
        raise InputError(f"prompts hold tokens outside of the {words} words of model_config.padded_vocab_size")
    return prompts


def _sizes(config, count):
    """(prompts, average tokens of a prompt, max_new_tokens)."""
    model = config["model"]["model_config"]
    answer = int(model.get("max_new_tokens") or 1)
    length, rows = int(model["seq_length"]) - answer, prompts_of(config)
    if count > answer:
        raise InputError(
            f"--execute {count}: model_config.max_new_tokens is {answer}; ask for fewer tokens or raise it"
        )
    if length < 1:
        raise InputError(
            f"model_config.max_new_tokens={answer}: no room for a prompt in seq_length={model['seq_length']}; "
            "lower the one or raise the other"
        )
    return rows, length, answer
