"""What is compared before an exported folder appears: logits of the checkpoint and of the folder, in this plugin's
model and in transformers' GlmForCausalLM."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.process import free_memory
from mindformers_glm32k.tokenizer.chat_format import conversation_ids
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary
from mindformers_glm32k.weights import convert
from mindformers_glm32k.weights.config_json import config_text

PROMPTS = ("今天天气怎么样", "Write a function that sorts a list.", "1 + 1 = ?")
# Tolerances, as parts of the largest logit: frameworks sum in different orders; export to another dtype rounds once.
_FRAMEWORKS, _ROUNDED = 2e-4, 5e-2
_COPIES = 2.5  # of float32 weights in memory: the network, the checkpoint that it loads, and half for the rest


def verify_logits(
    checkpoint: Path,
    folder: Path,
    work: Path,
    vocabulary: Vocabulary,
    parameters: int,
    rounded: bool,
    torch_python: str,
) -> list[str]:
    """Compares logits on a few prompts; returns a sentence on each comparison, also on one that was not possible.

    Args:
        checkpoint: the whole checkpoint that was exported.
        work: for temporary files.
        parameters: of the model, to see whether it fits into memory.
        rounded: whether the export has another dtype than the checkpoint.
        torch_python: a Python interpreter with torch and transformers; "" for this one, if it has them.

    Raises:
        InputError: logits differ by more than rounding does.
    """
    needed, free = parameters * 4 * _COPIES, free_memory()
    if free is not None and needed > free:
        return [f"logits not compared: {needed / 2**30:.0f} GiB of memory are needed, {free / 2**30:.0f} are free"]
    ids = [conversation_ids(vocabulary, [{"role": "user", "content": text}], True) for text in PROMPTS]
    ours = _our_logits(folder, folder, work, ids)
    done = [_compare(_our_logits(checkpoint, folder, work, ids), ours, _ROUNDED if rounded else 0.0, "the checkpoint")]
    if not torch_python and importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        torch_python = sys.executable
    if not torch_python:
        return [*done, "GlmForCausalLM not compared: no torch in this Python; name one that has it with --torch_python"]
    return [*done, _compare(_glm_logits(torch_python, folder, work, ids), ours, _FRAMEWORKS, "GlmForCausalLM")]


def _compare(theirs, ours, tolerance, what):
    worst = max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-9)) for a, b in zip(theirs, ours))
    if not worst <= tolerance:  # also for NaN
        raise InputError(
            f"the folder's logits differ from those of {what} by {worst:.2g} of the largest, {tolerance:g} is allowed; "
            "nothing was written"
        )
    return f"logits of {len(ours)} prompts compared with those of {what}: largest difference {worst:.2g} of the largest"


def _our_logits(source, config_folder, work, ids):
    import mindspore as ms

    from mindformers_glm32k.config import GLM32KConfig
    from mindformers_glm32k.model import GLM32KForConditionalGeneration

    file = work / "verify.ckpt"
    report = convert(source, file, dtype="fp32", qkv_concat=True, mlp_concat=True, config=config_folder)
    (work / "verify_config.json").write_text(
        config_text(report["huggingface_config"], "chatglm", "fp32"), encoding="utf-8"
    )
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    longest = -(-max(map(len, ids)) // 16) * 16
    config = GLM32KConfig.from_huggingface(
        work / "verify_config.json",
        param_init_type="float32",
        compute_dtype="float32",
        layernorm_compute_type="float32",
        seq_length=longest,
        eos_token_id=2,
    )
    network = GLM32KForConditionalGeneration(config)
    left = ms.load_param_into_net(network, ms.load_checkpoint(str(file)))[0]
    if left:
        raise InputError(f"{source}: {left[0]} of the model is not in it")
    network.set_train(False)
    padded = np.array([row + [0] * (longest - len(row)) for row in ids], np.int32)
    logits = network(ms.Tensor(padded))[0].asnumpy().reshape(*padded.shape, -1)
    file.unlink()
    return [values[: len(row)] for values, row in zip(logits, ids)]


def _glm_logits(python, folder, work, ids):
    (work / "verify_ids.json").write_text(json.dumps(ids), encoding="utf-8")
    worker, output = Path(__file__).with_name("glm_logits.py"), work / "verify.npz"
    command = [python, str(worker), str(folder), str(work / "verify_ids.json"), str(output)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise InputError(f"--torch_python {python}: cannot be started ({error.strerror})") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"{python}: GlmForCausalLM does not load the folder: {last}")
    with np.load(output) as found:
        return [found[f"arr_{index}"] for index in range(len(ids))]
