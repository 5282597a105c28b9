"""The folder that engines serve: weights and config of transformers' `glm`, tokenizer, stop ids, model card; verified
before it gets its final name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.export.native_tokenizer import write_tokenizer
from mindformers_glm32k.export.verify import verify_logits
from mindformers_glm32k.files import weights_digest, work_folder
from mindformers_glm32k.tokenizer.chat_format import stop_ids
from mindformers_glm32k.tokenizer.vocabulary import Vocabulary
from mindformers_glm32k.weights import convert_reversed, merge


def export(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    tokenizer: str | os.PathLike,
    config: str | os.PathLike | None = None,
    dtype: str | None = None,
    merging: Mapping[str, Any] | None = None,
    max_shard_size: str | int = "5GB",
    manifest: str | os.PathLike | None = None,
    torch_python: str = "",
    logits: bool = True,
    workers: int = 2,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes a folder that vLLM and transformers load without code of ours; returns the conversion's report with the
    comparisons that were made as "verified".

    Args:
        checkpoint: file, index or folder of one whole checkpoint in any naming, or folder with rank_N.
        output: folder to make.
        tokenizer: tokenizer.model.
        config: the training YAML, or a config.json; needed where convert_reversed needs it.
        dtype: "fp32", "fp16" or "bf16"; None keeps what is stored.
        merging: options of `merge` for a folder with rank_N: strategy, lora, lora_scaling, base, dims, model_config, …
        manifest: that of the training data, for the model card.
        torch_python: a Python interpreter with torch and transformers, for the comparison with GlmForCausalLM.
        logits: whether logits are compared.

    Raises:
        InputError: bad input, an output that exists, or a comparison that fails; nothing is left behind.
    """
    checkpoint, output, vocabulary = Path(checkpoint), Path(output), Vocabulary(tokenizer)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists already; choose a folder that is new or empty")
    for path in (config, manifest):
        if path is not None and not Path(path).is_file():
            raise InputError(f"{path}: no such file")
    with work_folder(output) as work:
        whole, model = checkpoint, work / "model"
        if has_ranks(checkpoint):
            whole = work / "merged.safetensors"
            merge(checkpoint, whole, progress=progress, **(merging or {}))
        report = convert_reversed(
            whole, model, dtype, "glm", max_shard_size, config, workers=workers, progress=progress
        )
        fields = report["huggingface_config"]
        if len(vocabulary) > fields["padded_vocab_size"]:
            raise InputError(
                f"{tokenizer}: has {len(vocabulary)} tokens, the model {fields['padded_vocab_size']}; give the "
                "tokenizer.model that the model was trained with"
            )
        stored = json.loads((model / "config.json").read_text(encoding="utf-8"))
        texts = write_tokenizer(vocabulary, tokenizer, model, stored["max_position_embeddings"])
        generation = {
            "eos_token_id": stop_ids(vocabulary),
            "pad_token_id": vocabulary.unk_id,
            "do_sample": True,
            "temperature": 0.8,  # the three that the published `chat` uses
            "top_p": 0.8,
            "max_length": stored["max_position_embeddings"],
        }
        (model / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        verified = [f"ids of {texts} odd texts in conversations compared with tokenizer.model's: all equal"]
        if logits:
            rounded = dtype is not None and dtype not in _stored_dtypes(whole)
            parameters = _parameters(whole)
            verified += verify_logits(whole, model, work, vocabulary, parameters, rounded, torch_python)
        provenance = {
            "checkpoint": (checkpoint.name, weights_digest(checkpoint)),
            **{
                what: (Path(path).name, weights_digest(Path(path)))
                for what, path in (("configuration", config), ("data manifest", manifest), ("tokenizer", tokenizer))
                if path is not None
            },
        }
        (model / "README.md").write_text(card_text(stored, provenance, verified), encoding="utf-8")
        if output.is_dir():
            output.rmdir()
        os.replace(model, output)
    return {**report, "verified": verified, "output": str(output)}


def has_ranks(checkpoint: Path) -> bool:
    """Whether a folder holds what a parallel run left: rank_0, rank_1, …"""
    return checkpoint.is_dir() and any(checkpoint.glob("rank_[0-9]*"))


def _stored_dtypes(checkpoint):
    from mindformers_glm32k.weights.checkpoint import open_source, weights_of

    return {tensor.dtype for tensor in weights_of(open_source(checkpoint))[0].values()}


def _parameters(checkpoint):
    from math import prod

    from mindformers_glm32k.weights.checkpoint import open_source, weights_of

    return sum(prod(tensor.shape) for tensor in weights_of(open_source(checkpoint))[0].values())


def card_text(config: Mapping[str, Any], provenance: Mapping[str, tuple[str, str]], verified: Sequence[str]) -> str:
    """README.md of the folder.

    Args:
        config: the content of its config.json.
        provenance: what -> (name of the file, SHA-256).
        verified: a sentence on each comparison.
    """
    length = config["max_position_embeddings"]
    sources = "\n".join(f"| {what} | `{name}` | `{digest}` |" for what, (name, digest) in provenance.items())
    done = "\n".join(f"- {sentence}" for sentence in verified)
    return f"""---
library_name: transformers
base_model: THUDM/chatglm3-6b-32k
pipeline_tag: text-generation
---
# ChatGLM3, trained with MindFormers

{config["num_hidden_layers"]} layers, hidden size {config["hidden_size"]}, {length:,} tokens, {config["dtype"]} weights.
Loads as `GlmForCausalLM`, without `trust_remote_code`, in transformers 4.57 and 5, vLLM and vllm-ascend:

    vllm serve DIR --max-model-len {length}

An answer begins with the line that names a tool (blank in plain answers), as ChatGLM3 was trained: strip it. Answers
end with </s>, <|user|> or <|observation|>, which generation_config.json names. The chat template keeps special tokens
in people's texts plain text; `sop` and `eop` are called `<sop>` and `<eop>` here.

## Where it comes from

| what | file | SHA-256 |
|---|---|---|
{sources}

## Compared before the folder was written

{done}
"""
