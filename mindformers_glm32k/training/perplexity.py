"""Perplexity as it is defined, exp(mean loss of all tokens), whatever the batches and ranks.

Upstream's PerplexityMetric averages the means of batches: a token of a batch with few labels counts for more.
"""

from __future__ import annotations

import numpy as np
from mindformers.core.metric.metric import PerplexityMetric
from mindformers.tools.register import MindFormerConfig
from mindspore import Tensor
from mindspore.ops import operations as P

from mindformers_glm32k.parallel import data_parallel_devices, one_program


class TokenPerplexity(PerplexityMetric):
    """Upstream's metric with means weighted by the loss weights of their tokens, over all ranks of data parallel runs.

    GLM32KTrainer replaces PerplexityMetric by it. In a pipeline, where the last stage alone has logits, it computes as
    upstream's.
    """

    def update(self, *inputs: Tensor) -> None:
        """Adds a batch: logits (B, S + 1, V), labels and loss weights (B, S + 1), whose first column is left out."""
        if self.pipeline_parallel:
            super().update(*inputs)
            return
        weight = float(inputs[2].asnumpy()[:, 1:].sum(dtype=np.float64))
        if weight > 0:
            self.total_loss += float(self.ppl_loss(*inputs).asnumpy()) * weight
            self.num_data += weight

    def eval(self) -> dict | None:
        """{"loss", "PPL"}; None on the stages of a pipeline that have none."""
        if not self.pipeline_parallel and data_parallel_devices() > 1:
            total = P.AllReduce()(Tensor(np.array([self.total_loss, self.num_data], np.float32))).asnumpy()
            self.total_loss, self.num_data = float(total[0]), float(total[1])
        if not self.num_data and not self.pipeline_parallel:
            return {"loss": float("nan"), "PPL": float("nan")}
        return super().eval()


def weigh_by_tokens(metrics: dict) -> dict:
    """The metrics of a run, upstream's perplexity among them in the form that weighs tokens."""
    return {name: TokenPerplexity() if type(metric) is PerplexityMetric else metric for name, metric in metrics.items()}


def evaluate_all_records(config: MindFormerConfig) -> None:
    """Lets the last batch of an evaluation be smaller, unless the program is sharded for batches of one size."""
    if config.eval_dataset and not (config.use_parallel and one_program(config)):
        config.eval_dataset.drop_remainder = False
