"""Cached generation on CPU beside torch's GlmForCausalLM of the same size: prefill, decoding, memory, compile time.

    python benchmarks/decode.py [--lengths 128 2048 …] [--batches 1 4] [--torch_python PYTHON] [--rounds 2] [--new 64]

4 layers, hidden 512, 8 heads of 64, 2 key-value groups, feed-forward 1368, vocabulary 65024, float32, greedy, random
prompts. Ours is `model.generate` with a cache of blocks; torch (an interpreter with torch and transformers,
--torch_python or GLM32K_TORCH_PYTHON) is `generate` with sdpa attention. Every measurement is a process of its own; the
programs take turns (ours, torch, ours, torch), medians count. A process answers one prompt to compile, one whose times
count, and one of half the length, which is to find all its programs compiled. Beside wall time stands the time that
the process itself had a processor for (all threads), which a busy machine changes less.

Beside it, the machine's memory bandwidth, and how near a decoded token comes to reading weights and cache once.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from small_model import GROUPS, LAYERS, OURS, PRODUCTS, SIZE, VOCAB_SIZE, torch_model

ROOT = Path(__file__).resolve().parents[1]
LENGTHS, BATCHES = (128, 2048, 8192, 32000), (1, 4)
SEQ_LENGTH, BLOCK = 32768, 16
CACHE = 2 * LAYERS * GROUPS * SIZE  # values of a token
NUMBER = 4  # bytes of float32


class Times:
    """A streamer, or a logits processor of transformers: when each token came."""

    def __init__(self):
        self.wall, self.cpu = [], []
        self.tick()

    def tick(self):
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def put(self, _):
        self.tick()

    def end(self):
        pass

    def __call__(self, _, scores):
        self.tick()
        return scores

    def figures(self, skip):
        """Seconds of prefill, and medians of decoding, wall and processor, after `skip` ticks."""
        wall, cpu = self.wall[skip:], self.cpu[skip:]
        found = {"prefill": wall[1] - wall[0], "prefill_cpu": cpu[1] - cpu[0], "whole": wall[-1] - wall[0]}
        for name, times in (("decode", wall), ("decode_cpu", cpu)):
            found[name] = statistics.median(b - a for a, b in zip(times[1:], times[2:]))
        return found


def measure_ours(length, batch, new):
    """Figures of one prompt length in this process."""
    sys.path.insert(0, str(ROOT))
    import logging

    logging.disable(logging.WARNING)
    import mindspore
    import numpy as np

    mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target="CPU")
    from mindformers_glm32k import GLM32KConfig, GLM32KForConditionalGeneration

    network = GLM32KForConditionalGeneration(
        GLM32KConfig(
            **OURS,
            seq_length=SEQ_LENGTH,
            use_past=True,
            is_dynamic=True,
            block_size=BLOCK,
            num_blocks=batch * -(-(length + new) // BLOCK),
        )
    ).set_train(False)

    def generate(length):
        times = Times()
        ids = np.random.default_rng(0).integers(3, 60000, (batch, length))
        options = dict(do_sample=False, eos_token_id=[VOCAB_SIZE - 1], max_new_tokens=new)
        network.generate(ids, streamer=times, **options)
        return times.figures(1)  # the first put is the prompt

    first, second = generate(length), generate(length)
    programs = network.steps.programs
    other = generate(length // 2 + 3)
    return {
        **second,
        "compile": first["whole"] - second["whole"],
        "other": other["prefill"],
        "new_programs": len(network.steps.programs) - len(programs),
    }


def measure_torch(length, batch, new):
    """The same of torch."""
    import torch

    model = torch_model(SEQ_LENGTH).eval()
    ids = torch.randint(3, 60000, (batch, length))
    for count in (2, new):
        times = Times()
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                logits_processor=[times],
            )
    return times.figures(0)


def bandwidth():
    """GB/s of reading, by as many threads as there are processors, and of copying; the best of five."""
    import numpy as np

    count = os.cpu_count() or 1
    parts = [np.ones(2**26 // count, np.float32) for _ in range(count)]
    reads, copies = [], []
    with ThreadPoolExecutor(count) as pool:
        for _ in range(5):
            for times, work in ((reads, np.sum), (copies, np.copy)):
                start = time.perf_counter()
                list(pool.map(work, parts))
                times.append(time.perf_counter() - start)
    size = sum(part.nbytes for part in parts) / 1e9
    return size / min(reads), 2 * size / min(copies)


def run(program, python, length, batch, new, timeout):
    """What a worker measured, or why it failed."""
    command = [python, __file__, "--worker", program, "--lengths", str(length), "--batches", str(batch)]
    try:
        done = subprocess.run(
            [*command, "--new", str(new)], capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not within {timeout} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return f"failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
    return json.loads(lines[-1])


def has_torch(python):
    """Whether an interpreter has torch and transformers."""
    command = [python, "-c", "import torch, transformers; print(torch.__version__, transformers.__version__)"]
    found = subprocess.run(command, capture_output=True, text=True, check=False) if python else None
    if not found or found.returncode:
        print("torch is left out: --torch_python names no interpreter with torch and transformers")
        return False
    print(f"torch, transformers: {found.stdout.strip()}")
    return True


def row(length, batch, runs, speed):
    """One line of the table: medians of a program's runs, and ours over torch's."""
    median = {
        program: {name: statistics.median(run[name] for run in found) for name in found[0]}
        for program, found in runs.items()
        if found
    }
    ours, theirs = median["ours"], median.get("torch")
    cells = [batch, length]
    for name, value in (
        ("prefill", lambda found: f"{batch * length / found['prefill']:.0f}"),
        ("decode", lambda found: f"{found['decode'] * 1e3:.1f}"),
    ):
        cells += [value(ours), value(theirs) if theirs else "–"]
        cells += [f"{theirs[key] / ours[key]:.2f}" if theirs else "–" for key in (name, f"{name}_cpu")]
    cells += [f"{found['peak'] / 2**30:.2f}" if found else "–" for found in (ours, theirs)]
    once = NUMBER * (PRODUCTS + batch * CACHE * length) / speed / 1e9
    cells += [f"{ours['compile']:.1f}", f"{ours['new_programs']:.0f}", f"{once / ours['decode']:.2f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a prompt")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="prompts answered together")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each program, length and batch")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds that a process may take")
    parser.add_argument("--torch_python", default=os.environ.get("GLM32K_TORCH_PYTHON"), help="has torch, transformers")
    parser.add_argument("--worker", choices=("ours", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        measure = {"ours": measure_ours, "torch": measure_torch}[args.worker]
        found = measure(args.lengths[0], args.batches[0], args.new)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({**found, "peak": peak}), flush=True)
        return 0
    pythons = {"ours": sys.executable}
    if has_torch(args.torch_python):
        pythons["torch"] = args.torch_python
    read, copied = bandwidth()
    print(f"memory: {read:.1f} GB/s read, {copied:.1f} GB/s copied (read and written)", flush=True)
    rows = []
    for batch in args.batches:
        for length in args.lengths:
            runs = {program: [] for program in pythons}
            for _ in range(args.rounds):
                for program, python in pythons.items():
                    done = run(program, python, length, batch, args.new, args.timeout)
                    print(f"{program} {batch} x {length}: {done}", flush=True)
                    if isinstance(done, dict):
                        runs[program].append(done)
            if runs["ours"]:
                rows.append(row(length, batch, runs, read))
    print(
        "\n| prompts | tokens | prefill, tokens/s | torch | ratio | of processor time | decode, ms | torch | ratio "
        "| of processor time | GiB | torch | compile, s | new programs for another length "
        "| weights and cache read once, of a token's time |\n|" + "---|" * 15
    )
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
