"""What GLM32KForConditionalGeneration adds to MindFormers' generator: one-line errors where prompts do not fit, a cache
that is freed after an exception, and on CPU prefill in chunks and post-processing in NumPy.

The generator itself is upstream's: its loop, its options, its streamers, its block tables.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from mindformers.generation import GenerationConfig, LogitsProcessorList
from mindformers.generation.streamers import BaseStreamer
from mindformers.modules.block_tables import BlockTables

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.kernels.cpu.cached_steps import CachedSteps


class LeastAnswer:
    """Forbids stop ids before `least` tokens of an answer, counted from the end of each prompt; upstream counts from
    the end of the longest prompt of a batch.

    Args:
        network: holds `prompt_lengths` and `lengths` (B,) of the batch that is being answered.
        stop_ids: ids that end an answer.
    """

    def __init__(self, network: PortableGenerator, least: int, stop_ids: Sequence[int]):
        self.network, self.least, self.stop_ids = network, least, list(stop_ids)

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        short = np.flatnonzero(self.network.lengths - self.network.prompt_lengths < self.least)
        scores[np.ix_(short, self.stop_ids)] = -np.inf
        return scores


class BatchProcessors(LogitsProcessorList):
    """Upstream's processors in NumPy, applied after LeastAnswer, which needs the whole batch.

    Upstream reads `postprocess_use_numpy` of MindFormers' context, and takes NPU operators where no context was built.
    """

    def __init__(self, processors: LogitsProcessorList, least_answer: LeastAnswer | None = None):
        super().__init__()
        self.extend(processors)
        self.least_answer = least_answer
        for processor in (self, *self):
            processor.use_numpy = True

    def __bool__(self) -> bool:
        return len(self) > 0 or self.least_answer is not None

    def __call__(
        self, input_ids: np.ndarray, scores: np.ndarray, is_finished: list[bool] | None = None, **kwargs: Any
    ) -> np.ndarray:
        scores = np.array(scores)  # a tensor's array cannot be written to
        if self.least_answer is not None:
            scores = self.least_answer(scores)
        return super().__call__(input_ids, scores, is_finished, **kwargs) if len(self) else scores


class PortableGenerator:
    """A mixin that precedes upstream's GenerationMixin in a network's base classes.

    Attributes:
        steps: prefill and decode with a cache on CPU; None elsewhere.
        prompt_lengths, lengths: (B,) tokens of each prompt that is being answered, without and with its answer.
    """

    steps: CachedSteps | None = None
    prompt_lengths: np.ndarray = np.zeros(0, int)
    lengths: np.ndarray = np.zeros(0, int)

    def generate(
        self,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | np.ndarray,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        streamer: BaseStreamer | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> list[np.ndarray]:
        """Upstream's generate; prompts may be lists of different lengths.

        Raises:
            InputError: a prompt that fills seq_length, or prompts and answers that do not fit into the cache.
        """
        pad = _first_given(kwargs.get("pad_token_id"), getattr(generation_config, "pad_token_id", None))
        pad = _first_given(pad, self.config.pad_token_id, 0)
        if isinstance(kwargs.get("eos_token_id"), (int, np.integer)):
            kwargs["eos_token_id"] = [int(kwargs["eos_token_id"])]
        ids = padded(input_ids, pad)
        self.prompt_lengths = self.lengths = lengths_of(ids, pad)
        self._check_room()
        phase, was_training = self.phase, self.training
        try:
            return super().generate(
                ids,
                generation_config=generation_config,
                logits_processor=logits_processor,
                streamer=streamer,
                seed=seed,
                **kwargs,
            )
        except RuntimeError as error:
            if "block pool is out of memory" not in str(error):
                raise
            raise InputError(self._exhausted("their answers", self.lengths + 1)) from error
        finally:
            if self.block_mgr:
                self.block_mgr.clear_cache()  # upstream keeps the blocks after an exception
            self.phase = phase
            self.set_train(was_training)

    def _check_room(self):
        length, config = int(self.prompt_lengths.max()), self.config
        if length >= config.seq_length:
            which = int(self.prompt_lengths.argmax()) + 1
            raise InputError(
                f"prompt {which} of {len(self.prompt_lengths)} has {length} tokens, and "
                f"model_config.seq_length={config.seq_length} leaves room for {config.seq_length - 1} and an answer; "
                "shorten it, or raise seq_length"
            )
        if config.use_past and _blocks(self.prompt_lengths, config.block_size) > config.num_blocks:
            raise InputError(self._exhausted("one token each", self.prompt_lengths + 1))

    def _exhausted(self, answers, lengths):
        size, config = self.config.block_size, self.config
        longest = _blocks(np.full(len(lengths), config.seq_length), size)
        return (
            f"the cache is full: {len(lengths)} prompts of up to {self.prompt_lengths.max()} tokens and {answers} take "
            f"{_blocks(lengths, size)} blocks of {size} tokens, and model_config.num_blocks={config.num_blocks}; raise "
            f"num_blocks ({longest} hold any {len(lengths)} prompts) or give fewer prompts at a time"
        )

    def _set_block_mgr(self, batch_size, seq_length):
        """Upstream's, but seq_length need not be a multiple of block_size."""
        if not self.block_mgr:
            size = self.config.block_size
            self.block_mgr = BlockTables(self.config.num_blocks, size, -(-seq_length // size) * size)
        super()._set_block_mgr(batch_size, seq_length)

    def get_logits_processor(
        self,
        generation_config: GenerationConfig,
        input_ids_seq_length: int,
        logits_processor: LogitsProcessorList | None,
    ) -> LogitsProcessorList:
        """Upstream's; on CPU in NumPy, with `min_new_tokens` counted for each prompt by itself."""
        if not self.config.use_portable_cells:
            return super().get_logits_processor(generation_config, input_ids_seq_length, logits_processor)
        generation_config = copy.copy(generation_config)
        least, generation_config.min_new_tokens = generation_config.min_new_tokens, None
        processors = super().get_logits_processor(generation_config, input_ids_seq_length, logits_processor)
        return BatchProcessors(processors, LeastAnswer(self, least, generation_config.eos_token_id) if least else None)

    def get_logits_warper(self, generation_config: GenerationConfig) -> LogitsProcessorList:
        """Upstream's; on CPU in NumPy."""
        warpers = super().get_logits_warper(generation_config)
        return BatchProcessors(warpers) if self.config.use_portable_cells else warpers

    def forward(
        self,
        input_ids: np.ndarray,
        valid_length_each_example: np.ndarray,
        block_tables: np.ndarray | None = None,
        slot_mapping: np.ndarray | None = None,
        prefill: bool | None = None,
        use_past: bool = False,
        **kwargs: Any,
    ) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
        """One step of upstream's loop: logits (B, V) of the next tokens, and the index (B,) of each last token."""
        self.lengths = np.array(valid_length_each_example)
        if not use_past or self.steps is None:
            return super().forward(
                input_ids,
                valid_length_each_example,
                block_tables=block_tables,
                slot_mapping=slot_mapping,
                prefill=prefill,
                use_past=use_past,
                **kwargs,
            )
        self.detailed_latency.start_predict_timer()
        ids, lengths = np.asarray(input_ids), self.lengths
        if prefill:
            logits = self.steps.prefill(ids, lengths, block_tables)
        else:
            logits = self.steps.decode(ids[np.arange(len(ids)), lengths - 1], lengths, block_tables)
        return (logits,), lengths - 1


def padded(prompts: Sequence[int] | Sequence[Sequence[int]] | np.ndarray, pad: int) -> np.ndarray:
    """Prompts as an array (B, S), padded at their ends; a single prompt may be a flat list.

    Raises:
        InputError: no prompt, or one without tokens.
    """
    if len(prompts) and np.ndim(prompts[0]) == 0:
        prompts = [prompts]
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise InputError("no prompt to answer: give input_ids with at least one token a prompt")
    longest = max(map(len, prompts))
    return np.array([[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts])


def lengths_of(ids: np.ndarray, pad: int) -> np.ndarray:
    """(B,) tokens of each prompt before the padding at its end.

    Raises:
        InputError: a prompt of padding only.
    """
    real = ids != pad
    if not real.any(1).all():
        raise InputError(f"prompt {int(np.argmin(real.any(1))) + 1} holds nothing but padding (id {pad})")
    return ids.shape[1] - np.argmax(real[:, ::-1], 1)


def _blocks(lengths, size):
    return int((-(-np.asarray(lengths) // size)).sum())


def _first_given(*values):
    return next((value for value in values if value is not None), None)
