"""What PEFT itself computes, run by an interpreter that has torch, transformers and peft: see test_peft_reference.py.

make BASE OUT: adapters on transformers' `glm` with random values, saved by PEFT, and their logits (OUT/NAME.npy).
logits FOLDER OUT: those of a whole `glm` folder.
adapted FOLDER ADAPTER OUT: those of a `glm` folder with an adapter that PEFT loads.
merge WEIGHTS ADAPTER OUT: the published model's linear layers with an adapter that PEFT loads and merges.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GlmForCausalLM

ADAPTERS = {
    "plain": dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["gate_up_proj", "k_proj"],
        rank_pattern={"layers.1.mlp.gate_up_proj": 2},
        alpha_pattern={"k_proj": 5},
        modules_to_save=["lm_head"],
    ),
    "all-linear": dict(r=2, lora_alpha=3, target_modules="all-linear"),
}
IDS = torch.arange(2 * 24).reshape(2, 24) * 37 % 1000


def load(folder):
    return GlmForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.numpy()


def make(base, out):
    torch.manual_seed(0)
    np.save(Path(out) / "base.npy", logits(load(base)))
    for name, options in ADAPTERS.items():
        model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "modules_to_save" in parameter_name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                elif "lora_" in parameter_name:
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
        np.save(Path(out) / f"{name}.npy", logits(model.eval()))
        model.save_pretrained(Path(out) / name)


def merge(weights, adapter, out):
    model = torch.nn.Module()
    model.config = {"model_type": "custom"}
    model.prepare_inputs_for_generation = None
    values = np.load(weights)
    for name in values.files:
        *path, last = name[: -len(".weight")].split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        linear = torch.nn.Linear(*reversed(values[name].shape), bias=False)
        linear.weight.data = torch.from_numpy(values[name])
        parent.add_module(last, linear)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    np.savez(out, **{name: value.numpy() for name, value in merged.state_dict().items()})


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "logits":
        np.save(arguments[1], logits(load(arguments[0])))
    elif command == "adapted":
        np.save(arguments[2], logits(PeftModel.from_pretrained(load(arguments[0]), arguments[1]).eval()))
    else:
        {"make": make, "merge": merge}[command](*arguments)
