"""The model card of an exported folder: what it is, where it comes from, what was compared, how it is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def card_text(config: Mapping[str, Any], provenance: Mapping[str, tuple[str, str]], verified: Sequence[str]) -> str:
    """README.md of the folder.

    Args:
        config: of its config.json.
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
