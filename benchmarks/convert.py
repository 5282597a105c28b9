"""Speed and memory of the weight converter beside `cp`, and beside upstream's torch converter where torch is.

    python benchmarks/convert.py [--work DIR] [--layers 5] [--torch_python PYTHON]

Makes a checkpoint of the published model's real tensors with fewer layers (5 layers: 3.1 GB in fp16, seven .bin
shards), then measures each program in a process of its own: wall time, and the peak resident memory of the process.
Every program starts with the source in the page cache and its output removed; the time includes the final flush to
disk (`cp` is followed by fsync of its files too).
"""
import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from weights import synthetic  # noqa: E402  (tests/weights)

REAL = {"hidden_size": 4096, "num_attention_heads": 32, "kv_channels": 128, "multi_query_group_num": 2,
        "ffn_hidden_size": 13696, "padded_vocab_size": 65024}
_COPY = ("import os, sys, shutil, subprocess; source, target = sys.argv[1:]; "
         "subprocess.run(['cp', '-r', source, target], check=True); "
         "[os.fsync(os.open(os.path.join(target, name), os.O_RDONLY)) for name in os.listdir(target)]")


def make_source(folder, layers):
    """Writes the checkpoint; values repeat one random block, which costs less than drawing billions of numbers."""
    config = dict(REAL, num_layers=layers)
    block = (np.random.default_rng(0).standard_normal(1 << 24, np.float32) * np.float32(0.02)).astype(np.float16)
    shapes = synthetic.chatglm_shapes(config)
    count = 7
    names = [f"pytorch_model-{number:05d}-of-{count:05d}.bin" for number in range(1, count + 1)]
    place = {name: synthetic.shard_of(name, config, count) for name in shapes}
    folder.mkdir(parents=True)
    for number, file in enumerate(names):
        synthetic.write_torch(folder / file, {name: np.resize(block, shape) for name, shape in shapes.items()
                                              if place[name] == number})
    weight_map = {name: names[place[name]] for name in shapes}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(dict(config, model_type="chatglm", layernorm_epsilon=1e-5)))


def measure(command, output, environment=None):
    """Runs a command; returns (seconds, peak resident MB), the flush of its output included."""
    for path in (output, output.with_suffix(".report.json")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=dict(os.environ, PYTHONPATH=str(ROOT), **(environment or {})))
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed with status {status}")
    return seconds, usage.ru_maxrss / 1024


def main():
    """Runs the measurements and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", help="folder on the disk to measure; default: a temporary one")
    parser.add_argument("--layers", type=int, default=5, help="of the real width, 408 MB each in fp16")
    parser.add_argument("--torch_python", help="Python of an environment with torch, mindspore and mindformers")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="convert-", dir=args.work))
    try:
        source = work / "source"
        # In a process of its own: the peak memory of a child starts at that of the process that starts it.
        maker = multiprocessing.Process(target=make_source, args=(source, args.layers))
        maker.start()
        maker.join()
        size = sum(path.stat().st_size for path in source.iterdir())
        print(f"{size / 1e9:.2f} GB fp16, {len(list(source.glob('*.bin')))} shards, {os.cpu_count()} cores")
        convert = [sys.executable, "-m", "mindformers_glm32k.weights.convert", "--input_path", source, "--output_path"]
        rows = [("cp + fsync", [sys.executable, "-c", _COPY, source, work / "copy"], work / "copy")]
        for title, options in (("convert, fp16 .ckpt", ["--dtype", "fp16"]),
                               ("convert, fp16 .ckpt, split layout", ["--dtype", "fp16", "--qkv_concat", "False",
                                                                      "--mlp_concat", "False"]),
                               ("convert, bf16 .ckpt", ["--dtype", "bf16"]),
                               ("convert, fp32 .ckpt", ["--dtype", "fp32"])):
            rows.append((title, [*convert, work / "out.ckpt", *options], work / "out.ckpt"))
        copy_seconds = None
        print(f"{'program':36} {'seconds':>8} {'x cp':>6} {'peak RSS MB':>12}")
        for title, command, output in rows:
            seconds, peak = measure([str(word) for word in command], output)
            copy_seconds = copy_seconds or seconds
            print(f"{title:36} {seconds:8.2f} {seconds / copy_seconds:6.2f} {peak:12.0f}", flush=True)
            shutil.rmtree(output) if output.is_dir() else output.unlink()
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
