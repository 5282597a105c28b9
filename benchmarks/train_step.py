"""A full training step on CPU beside torch's GlmForCausalLM of the same size: tokens/s, peak memory, compile time.

    python benchmarks/train_step.py [--lengths 512 2048 …] [--torch_python PYTHON] [--rounds 2] [--steps 3]

4 layers, hidden 512, 8 heads of 64, 2 key-value groups, feed-forward 1368, vocabulary 65024, one sequence, float32,
AdamW. Ours runs in MindFormers' wrapper: GLM32KTrainOneStepCell with clipping and a dynamic loss scale, AdamW with
parameter groups and learning rate schedule as the trainer builds them from the YAML. torch (an interpreter with torch
and transformers, --torch_python) runs `sdpa` attention, plain and tuned: fused AdamW, and glibc kept from giving
memory back (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_). Every measurement is a process of its own; the programs
take turns (ours, torch, tuned torch, ours, …) and the medians of the steps after the warm-up count: MindSpore's
kernels try numbers of threads in their first five launches, so sequences of one block, whose layers are not tiled,
are warm after six steps, longer ones after one. A process that passes --memory_limit is ended, and longer sequences
are not tried.

Beside it, how fast each framework multiplies the matrices of the output layer (512 tokens, forward and backward), and
the tokens/s that a step of products alone would reach at that speed: what is left is what else a step does.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from small_model import HIDDEN, OURS, PRODUCTS, VOCAB_SIZE, torch_model

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (512, 2048, 4096, 8192, 16384, 32768)
PROGRAMS = {
    "ours": {},
    "torch": {},
    "torch tuned": {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)},
}
GIB = 2**30
PRODUCT_TOKENS = 512


def measure_ours(length, steps):
    """Returns seconds of compilation, seconds of each step, losses."""
    sys.path.insert(0, str(ROOT))
    import logging

    logging.disable(logging.WARNING)
    import mindspore
    import numpy as np
    from mindspore import nn

    mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target="CPU")
    from mindformers.core.lr import build_lr
    from mindformers.core.optim import build_optim
    from mindformers.trainer.optimizer_grouped_parameters import get_optimizer_grouped_parameters

    from mindformers_glm32k import GLM32KConfig, GLM32KForConditionalGeneration
    from mindformers_glm32k.training.step import GLM32KTrainOneStepCell

    config = GLM32KConfig(
        **OURS,
        seq_length=length,
        use_flash_attention=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        qkv_concat=True,
        mlp_concat=True,
        add_qkv_bias=True,
        add_bias_linear=False,
    )
    network = GLM32KForConditionalGeneration(config).set_train()
    schedule = build_lr(
        {"type": "polynomial", "learning_rate": 1e-4, "lr_end": 1e-6, "warmup_steps": 1, "total_steps": 1000}
    )
    groups = get_optimizer_grouped_parameters(network, weight_decay=0.01, dynamic_lr_schedule=schedule)
    optimizer = build_optim(
        {"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01},
        default_args={"params": groups, "learning_rate": schedule},
    )
    scale = nn.DynamicLossScaleUpdateCell(loss_scale_value=65536, scale_factor=2, scale_window=1000)
    step = GLM32KTrainOneStepCell(network, optimizer, use_clip_grad=True, max_grad_norm=1.0, scale_sense=scale)
    step.set_train()
    ids = np.random.default_rng(0).integers(3, 60000, (1, length)).astype(np.int32)
    labels = np.concatenate([ids[:, 1:], np.full((1, 1), -100)], 1).astype(np.int32)
    inputs = [mindspore.Tensor(x) for x in (ids, labels)]
    start = time.perf_counter()
    step.compile(*inputs)
    compiled = time.perf_counter() - start
    seconds, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(float(step(*inputs)[0].asnumpy()))
        mindspore.runtime.synchronize()
        seconds.append(time.perf_counter() - start)
    return compiled, seconds, losses


def measure_torch(length, steps, fused):
    """Returns None (nothing is compiled), seconds of each step, losses."""
    import torch

    model = torch_model(length).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True if fused else None
    )
    ids = torch.randint(3, 60000, (1, length))
    seconds, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - start)
        del loss
    return None, seconds, losses


def product_speed(program, repeats=10):
    """GFLOP/s of the output layer's three products (logits, gradient of hidden states, gradient of the weight)."""
    shapes = (
        ((PRODUCT_TOKENS, HIDDEN), (VOCAB_SIZE, HIDDEN), False, True),
        ((PRODUCT_TOKENS, VOCAB_SIZE), (VOCAB_SIZE, HIDDEN), False, False),
        ((PRODUCT_TOKENS, VOCAB_SIZE), (PRODUCT_TOKENS, HIDDEN), True, False),
    )
    import numpy as np

    if program == "ours":
        import mindspore

        tensor = mindspore.Tensor

        def product(transpose_left, transpose_right):
            multiply = mindspore.ops.MatMul(transpose_left, transpose_right)

            @mindspore.jit
            def one_element(left, right):  # of the product; copying it waits for the whole
                return multiply(left, right)[:1, :1]

            return lambda left, right: one_element(left, right).asnumpy()
    else:
        import torch

        tensor = torch.from_numpy

        def product(transpose_left, transpose_right):
            return lambda left, right: (left.T if transpose_left else left) @ (right.T if transpose_right else right)

    seconds = 0.0
    for left, right, *transposed in shapes:
        multiply = product(*transposed)
        left, right = (tensor(np.random.default_rng(0).random(shape, np.float32)) for shape in (left, right))
        for index in range(6 + repeats):
            if index == 6:
                start = time.perf_counter()
            multiply(left, right)
        seconds += (time.perf_counter() - start) / repeats
    return 3 * 2 * PRODUCT_TOKENS * VOCAB_SIZE * HIDDEN / seconds / 1e9


def worker(program, length, steps):
    """Measures in this process and prints one line of JSON: steps, or at length 0 the output layer's products."""
    if not length:
        print(json.dumps({"speed": product_speed(program)}), flush=True)
        return
    measured = measure_ours(length, steps) if program == "ours" else measure_torch(length, steps, "tuned" in program)
    compiled, seconds, losses = measured
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"compile": compiled, "seconds": seconds, "losses": losses, "peak": peak}), flush=True)


def resident(pid):
    """Bytes of memory that a process has now; 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def run(program, python, length, steps, limit):
    """Runs one measurement.

    Returns:
        dict | str: what the worker printed, or why it failed.
    """
    command = [python, __file__, "--worker", program, "--lengths", str(length), "--steps", str(steps)]
    with subprocess.Popen(
        command, env={**os.environ, **PROGRAMS[program]}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while True:
            try:
                output, errors = process.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                if resident(process.pid) > limit * GIB:
                    process.kill()
                    process.communicate()
                    return f"ended above {limit:g} GiB"
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        return f"failed: {errors.strip().splitlines()[-1] if errors.strip() else process.returncode}"
    return json.loads(lines[-1])


def warm_up(length):
    """Steps of a process that do not count."""
    return 6 if length <= 512 else 1


def has_torch(python):
    """bool: whether an interpreter has torch and transformers."""
    found = (
        subprocess.run(
            [python, "-c", "import torch, transformers; print(torch.__version__, transformers.__version__)"],
            capture_output=True,
            text=True,
            check=False,
        )
        if python
        else None
    )
    if not found or found.returncode:
        print("torch is left out: --torch_python names no interpreter with torch and transformers")
        return False
    print(f"torch, transformers: {found.stdout.strip()}")
    return True


def summary(runs):
    """Median figures of a program's runs at one length."""
    return {
        "seconds": statistics.median(second for run in runs for second in run["seconds"]),
        "peak": statistics.median(run["peak"] for run in runs) / GIB,
        "compile": statistics.median(run["compile"] or 0.0 for run in runs),
    }


def growth(figures, name, previous, length):
    """Exponent with which a figure grew from one length to the next."""
    if previous not in figures or length not in figures:
        return None
    return math.log(figures[length][name] / figures[previous][name]) / math.log(length / previous)


def table(results, lengths):
    """Prints what was measured as Markdown: one row per length."""
    print(
        "\n| tokens | ours tokens/s | GiB | compile s | time exponent | memory exponent | torch tokens/s | GiB | ratio "
        "| torch tuned tokens/s | GiB | ratio |\n|" + "---|" * 12
    )

    def cell(value, digits):
        return "–" if value is None else f"{value:.{digits}f}"

    for index, length in enumerate(lengths):
        previous = lengths[index - 1] if index else None
        ours = results["ours"].get(length)
        speed = length / ours["seconds"] if ours else None
        row = [
            length,
            cell(speed, 0),
            cell(ours and ours["peak"], 2),
            cell(ours and ours["compile"], 1),
            cell(growth(results["ours"], "seconds", previous, length), 2),
            cell(growth(results["ours"], "peak", previous, length), 2),
        ]
        for program in ("torch", "torch tuned"):
            theirs = results[program].get(length)
            their_speed = length / theirs["seconds"] if theirs else None
            row += [
                cell(their_speed, 0),
                cell(theirs and theirs["peak"], 2),
                cell(speed / their_speed if speed and their_speed else None, 2),
            ]
        print("| " + " | ".join(map(str, row)) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the sequence")
    parser.add_argument("--steps", type=int, default=3, help="steps of a process that count")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each program and length")
    parser.add_argument("--torch_python", help="interpreter with torch and transformers; without one torch is left out")
    parser.add_argument("--memory_limit", type=float, default=20.0, help="GiB that a process may have")
    parser.add_argument("--worker", choices=PROGRAMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.lengths[0], args.steps)
    pythons = {"ours": sys.executable}
    if has_torch(args.torch_python):
        pythons.update({"torch": args.torch_python, "torch tuned": args.torch_python})
    for program in [name for name in pythons if name != "torch tuned"]:  # its products are torch's
        done = run(program, pythons[program], 0, 0, args.memory_limit)
        if isinstance(done, dict):
            done = (
                f"{done['speed']:.0f} GFLOP/s; a step of products alone: "
                f"{done['speed'] * 1e9 / (6 * PRODUCTS):.0f} tokens/s"
            )
        print(f"{program}, the output layer's products: {done}", flush=True)
    results = {program: {} for program in PROGRAMS}
    given_up = set()
    for length in args.lengths:
        runs = {program: [] for program in pythons}
        for _ in range(args.rounds):
            for program, python in pythons.items():
                if program in given_up:
                    continue
                done = run(program, python, length, args.steps + warm_up(length), args.memory_limit)
                print(f"{program} {length}: {done}", flush=True)
                if isinstance(done, str):
                    given_up.add(program)  # longer sequences need more
                else:
                    runs[program].append({**done, "seconds": done["seconds"][-args.steps :]})
        for program, measured in runs.items():
            if measured:
                results[program][length] = summary(measured)
    table(results, list(args.lengths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
