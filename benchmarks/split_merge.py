"""Time and memory of `glm32k split` and `merge` beside upstream's transform_ckpt.

    python benchmarks/split_merge.py [--work DIR] [--layers 2]

Splits a checkpoint of the published model's real tensors with fewer layers (2 layers: 1.9 GB in fp16) for two ranks
(mp 2) and merges it again. Ours compare every value with every rank's file, twice; upstream's compare nothing.
"""

import argparse
import filecmp
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = str(ROOT)

from mindformers_glm32k.weights import merge, split  # noqa: E402
from mindformers_glm32k.weights.names import (  # noqa: E402
    ModelDims,  # noqa: E402
    model_keys,
    name_of,
)
from mindformers_glm32k.weights.writer import CheckpointWriter  # noqa: E402


def make(folder, layers):
    """Writes whole/rank_0/whole.ckpt and strategy/; values repeat one random block."""
    from weights.parallel import write_layout

    sizes = ModelDims(layers, 65024, 4096, 13696, 4096, 256, True)
    shapes = {name_of(key, "mindspore"): sizes.shape(key) for key in model_keys(layers, True, True, True)}
    block = (np.random.default_rng(0).standard_normal(1 << 24, np.float32) * np.float32(0.02)).astype(np.float16)
    write_layout(folder / "strategy", "mp2", layers=layers)
    (folder / "whole" / "rank_0").mkdir(parents=True)
    with CheckpointWriter.for_file(
        folder / "whole" / "rank_0" / "whole.ckpt", [(name, shape, "fp16") for name, shape in shapes.items()]
    ) as writer:
        for name, shape in shapes.items():
            writer.write(name, np.resize(block, shape))
        writer.finish()


def upstream(folder, *options):
    """Runs upstream's command."""
    subprocess.run(
        [sys.executable, "-m", "mindformers.tools.transform_ckpt", *map(str, options)],
        check=True,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def programs(folder):
    """list[tuple[str, callable]]: in the order in which they need each other's files."""
    strategy, whole = folder / "strategy", folder / "whole"
    return [
        ("split", lambda: split(whole / "rank_0" / "whole.ckpt", folder / "parts", strategy)),
        ("merge", lambda: merge(folder / "parts", folder / "merged.ckpt", strategy)),
        (
            "upstream's transform_ckpt, cutting",
            lambda: upstream(
                folder, "--dst_ckpt_strategy", strategy, "--src_ckpt_dir", whole, "--dst_ckpt_dir", folder / "cut"
            ),
        ),
        (
            "upstream's transform_ckpt, merging",
            lambda: upstream(
                folder,
                "--src_ckpt_strategy",
                strategy,
                "--src_ckpt_dir",
                folder / "parts",
                "--dst_ckpt_dir",
                folder / "joined",
            ),
        ),
    ]


def measured(title, function):
    """Calls a function and prints seconds and peak resident memory: of this process, and of the largest it started."""
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    own, child = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"{title:36} {seconds:8.1f} {own:10.0f} {child:16.0f}", flush=True)


def in_own_process(function, *args):
    """Peaks of memory are a process's for good: each program gets its own."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{args[0]} failed")


def main():
    """Makes the files, runs the programs, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", help="folder on the disk to measure; default: a temporary one")
    parser.add_argument("--layers", type=int, default=2, help="408 MB each in fp16, beside 1065 MB")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="split-", dir=args.work))
    try:
        in_own_process(make, folder, args.layers)
        size = (folder / "whole" / "rank_0" / "whole.ckpt").stat().st_size
        print(f"{size / 1e9:.2f} GB fp16, mp 2, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
        print(f"{'program':36} {'seconds':>8} {'RSS MB':>10} {'its process, MB':>16}")
        for title, function in programs(folder):
            in_own_process(measured, title, function)
        same = filecmp.cmp(folder / "merged.ckpt", folder / "whole" / "rank_0" / "whole.ckpt", shallow=False)
        print(f"merged equals the whole, byte for byte: {same}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
