"""Logits by transformers' own GlmForCausalLM: PYTHON glm_logits.py FOLDER IDS.json OUT.npz, in a Python with torch.

Imports nothing of this package: that Python need not have it, nor MindSpore.
"""

from __future__ import annotations

import json
import sys


def main(folder: str, ids_file: str, output: str) -> None:
    """Writes the logits of each list of ids in the JSON file, as arr_0, arr_1, … of shape (length, vocabulary)."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with open(ids_file, encoding="utf-8") as file:
        prompts = json.load(file)
    with torch.no_grad():
        np.savez(output, *[model(torch.tensor([ids])).logits[0].numpy() for ids in prompts])


if __name__ == "__main__":
    main(*sys.argv[1:])
