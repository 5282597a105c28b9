"""Prediction in a dry run: upstream's generator is driven through its two graphs, and no token is computed.

The generator compiles "prefill" (prompts in one flattened sequence) and "increment" (one token of each prompt) with
shapes that stay open. A program without shapes has no memory to measure: after the two that an NPU gets, the same two
are compiled once more with the longest prompts that fit, and these are the ones that the report reads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mindformers_glm32k.dryrun.compile import frontend

SIZED = "sized"


class Generation:
    """Takes the place of `generate` and of what it would do with results.

    Args:
        finish: called when all graphs are compiled.
        begin: gets the network before the first one is.
        sized_only: whether the programs with open shapes are left out.
    """

    def __init__(self, finish: Callable[[], None], begin: Callable | None = None, sized_only: bool = False):
        self.finish, self.begin, self.sized_only = finish, begin, sized_only
        self.calls_left = 0
        self.sized = False

    def install(self) -> None:
        """Replaces the generator's methods in this process."""
        from mindformers.generation.text_generator import GenerationMixin

        generate, driver = GenerationMixin.generate, self

        def compile_both(model, input_ids, **options):
            config = model.config
            batch = len(np.atleast_2d(np.asarray(input_ids)))
            prompts = np.ones((batch, longest_prompt(config)), np.int32)
            if driver.begin:
                driver.begin(model)
            both = (True,) if driver.sized_only else (False, True)
            for driver.sized in both if config.use_past else (False,):
                driver.calls_left = 2 if config.use_past else 1
                if driver.sized:
                    frontend.close_shapes(model, SIZED)
                generate(model, prompts, **options)
            driver.finish()

        GenerationMixin.generate = compile_both
        GenerationMixin.postprocess = self.next_tokens

    def next_tokens(self, *_, input_ids: list, is_finished: list, **__) -> tuple:
        """What upstream's postprocess returns, for any token that ends nothing, until all graphs were called."""
        self.calls_left -= 1
        return [1] * len(input_ids), None, None, [self.calls_left == 0] * len(is_finished)


def longest_prompt(config: object) -> int:
    """Tokens of a prompt that leave room for the answer, of a GLM32KConfig."""
    return max(config.seq_length - (config.max_new_tokens or 1), 1)


def phase_name(phase: str, use_past: bool) -> str | None:
    """The report's name of one of MindSpore's phases, or None where the program has open shapes and another of the
    same graph follows; with `use_past`, prefill and increment are separate graphs."""
    if not use_past:
        return "predict"
    return phase.rsplit("_", 1)[0] if phase.endswith("_" + SIZED) else None
