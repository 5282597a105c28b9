"""The model of a YAML with its weights: from the ids of prompts to the ids of answers."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_glm32k.errors import CommandFailed
from mindformers_glm32k.files import weights_digest
from mindformers_glm32k.generation.sampling import Sampling

if TYPE_CHECKING:
    from mindformers.tools.register import MindFormerConfig


class Network:
    """The model, through MindFormers' generator. It is built and loaded on first use.

    Args:
        config: for prediction, with checkpoint and tokenizer.
        batch_size: prompts that are answered together; None: the YAML's.

    Attributes:
        room: tokens of prompt and answer together: seq_length, or what the cache holds where that is less.
        identity: what determines the answers: engine, model (a digest of its weights) and config.
        writes: whether this process writes the answers (of several that compute together, one does).
    """

    def __init__(self, config: MindFormerConfig, batch_size: int | None = None):
        self._config = config
        model = config.model.model_config
        self.room: int = min(model.seq_length, model.num_blocks * model.block_size if model.use_past else math.inf)
        self.batch_size: int = batch_size or (model.batch_size if model.use_past else None) or 1
        weights = config.load_checkpoint
        self.identity = {
            "engine": "mindformers",
            "model": checkpoint_hash(weights) if weights else f"random weights, seed {config.seed}",
            "config": config_hash(model),
        }
        self.writes = int(os.environ.get("RANK_ID", 0)) == 0 or not config.use_parallel
        self._pad = model.pad_token_id or 0
        self._network: Any = None

    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        min_new_tokens: int = 0,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        streamer: Any = None,
    ) -> list[list[int]]:
        """The answers' ids, stop ids included, as transformers' generate returns them.

        Args:
            prompts: ids, of any lengths.
            max_new_tokens: the longest answer.
            stop_ids: what ends an answer.
            min_new_tokens: no stop id before so many; on NPUs counted from the end of the batch's longest prompt.
            sampling: greedy by default.
            seeds: one per prompt, for sampling; an answer depends on its own seed only.
            streamer: put() gets the prompts, then the ids as they come.
        """
        import numpy as np

        self.load()
        sampling = sampling or Sampling()
        longest = max(map(len, prompts))
        rows = [row + [self._pad] * (longest - len(row)) for row in prompts]
        # every compiled program has the shape of a whole batch
        missing = self.batch_size - len(rows) if len(prompts) > 1 else 0
        rows += rows[-1:] * missing
        options: dict[str, Any] = {"min_new_tokens": min_new_tokens} if min_new_tokens else {}
        if streamer is not None:
            options["streamer"] = streamer
        if sampling.is_random:
            seeds = list(seeds or [0] * len(prompts))
            options["logits_processor"] = sampling.processors([*seeds, *seeds[-1:] * missing])
        try:
            outputs = self._network.generate(
                input_ids=np.array(rows, np.int32),
                max_new_tokens=max_new_tokens,
                eos_token_id=list(stop_ids),
                pad_token_id=self._pad,
                do_sample=False,
                repetition_penalty=float(sampling.repetition_penalty),
                **options,
            )
        except BaseException:
            blocks = getattr(self._network, "block_mgr", None)
            if blocks:  # otherwise an interrupted answer keeps its cache blocks
                blocks.clear_cache()
            raise
        return [[int(index) for index in row[len(prompt) :]] for prompt, row in zip(prompts, outputs)]

    def load(self) -> None:
        """Builds the network, whose weights Trainer.predict checks and loads on the way to a first short answer."""
        if self._network is not None:
            return
        from mindformers import Trainer, build_context
        from mindspore import set_seed

        from mindformers_glm32k.compat import barrier_on_cpu, run_mode_restored, set_output_path
        from mindformers_glm32k.preflight.run_config import check_config

        config = self._config
        check_config(config, "predict")
        config.model.model_config.max_new_tokens = 1
        config.model.model_config.batch_size = self.batch_size
        set_output_path(config.output_dir)
        with contextlib.ExitStack() as stack:
            stack.enter_context(run_mode_restored())
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            build_context(config)
            trainer = Trainer(config)
            set_seed(config.seed or 0)  # for random weights: Trainer ignores a seed of 0
            stack.enter_context(barrier_on_cpu())
            config.save_file = str(Path(folder) / "first.txt")
            trainer.predict(
                predict_checkpoint=config.load_checkpoint,
                input_data=["a"] * self.batch_size,
                batch_size=self.batch_size,
            )
        self._network = getattr(getattr(trainer.trainer, "pipeline_task", None), "network", None)
        if self._network is None:
            raise CommandFailed("MindFormers' Trainer keeps no network after a prediction")


def sequences_in_cache(model_config: dict) -> int | None:
    """How many sequences of seq_length tokens the cache's num_blocks x block_size slots hold; None without a cache."""
    if not model_config.use_past:
        return None
    return max(1, model_config.num_blocks * model_config.block_size // model_config.seq_length)


def config_hash(model_config: dict) -> str:
    """A digest of what a YAML's model_config says about the model itself, not about room, batches and sampling."""
    told = sorted((key, str(value)) for key, value in model_config.items() if key not in _NOT_THE_MODEL)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def checkpoint_hash(path: str | Path) -> str:
    """A digest of a checkpoint's bytes: one file, or all weights in a folder with their names."""
    return f"sha256:{weights_digest(Path(path))[:32]}"


_NOT_THE_MODEL = frozenset(
    "batch_size block_size checkpoint_name_or_path do_sample eos_token_id is_dynamic max_new_tokens num_blocks "
    "repetition_penalty seq_length top_k top_p use_past".split()
)
