"""Speed and memory of the weight converter beside `cp`, and beside upstream's torch converter where torch is.

    python benchmarks/convert.py [--work DIR] [--layers 5] [--torch_python PYTHON [--torch_layers 2]]

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

from mindformers_glm32k.weights import convert_reversed  # noqa: E402

REAL = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "multi_query_group_num": 2,
    "ffn_hidden_size": 13696,
    "padded_vocab_size": 65024,
    "seq_length": 32768,
    "rope_ratio": 50,
}
_COPY = (
    "import os, sys, shutil, subprocess; source, target = sys.argv[1:]; "
    "subprocess.run(['cp', '-r', source, target], check=True); "
    "[os.fsync(os.open(os.path.join(target, name), os.O_RDONLY)) for name in os.listdir(target)]"
)


_UPSTREAM = (
    "import sys; from mindformers.models.glm2.convert_weight import convert_pt_to_ms; "
    "convert_pt_to_ms(input_path=sys.argv[1], output_path=sys.argv[2], config=sys.argv[3])"
)


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
        synthetic.write_torch(
            folder / file, {name: np.resize(block, shape) for name, shape in shapes.items() if place[name] == number}
        )
    weight_map = {name: names[place[name]] for name in shapes}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(dict(config, model_type="chatglm", layernorm_epsilon=1e-5)))


def measure(command, output):
    """Runs a command; returns (seconds, seconds of processor, peak resident MB), the flush of its output included."""
    remove(output)
    os.sync()
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=log,
            stderr=log,
            cwd=output.parent,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            log.seek(0)
            raise SystemExit(log.read().decode(errors="replace")[-2000:])
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def remove(output):
    """Removes an output and its report."""
    for path in (output, output.with_suffix(".report.json")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def table(rows):
    """Measures rows of (title, command, output) and prints them; times are related to the first row's."""
    first = None
    print(f"{'program':40} {'seconds':>8} {'x first':>8} {'CPU s':>8} {'peak RSS MB':>12}")
    for title, command, output in rows:
        seconds, processor, peak = measure(command, output)
        first = first or seconds
        print(f"{title:40} {seconds:8.2f} {seconds / first:8.2f} {processor:8.2f} {peak:12.0f}", flush=True)
        remove(output)


def in_own_process(function, *args):
    """Calls a function in a process of its own: the peak memory of a child starts at that of whoever starts it."""
    process = multiprocessing.Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def make_native(source, target):
    """The same weights under transformers' own names: the only ones that upstream's converter can load offline."""
    convert_reversed(source, target, hf_naming="glm")


def main():
    """Runs the measurements and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", help="folder on the disk to measure; default: a temporary one")
    parser.add_argument("--layers", type=int, default=5, help="of the real width, 408 MB each in fp16, beside 1065 MB")
    parser.add_argument("--torch_python", help="Python of an environment with torch, mindspore and mindformers")
    parser.add_argument(
        "--torch_layers",
        type=int,
        default=2,
        help="layers for upstream's converter, which takes some ten times the checkpoint's size in memory",
    )
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="convert-", dir=args.work))
    convert = [sys.executable, "-m", "mindformers_glm32k.weights.convert", "--input_path"]
    try:
        source, output = work / "source", work / "out.ckpt"
        in_own_process(make_source, source, args.layers)
        size = sum(path.stat().st_size for path in source.iterdir())
        print(
            f"{size / 1e9:.2f} GB fp16, {len(list(source.glob('*.bin')))} shards, {os.cpu_count()} cores, "
            f"load average before the start {os.getloadavg()[0]:.1f}"
        )
        start = [*convert, source, "--output_path", output, "--dtype"]
        table(
            [
                ("cp + fsync", [sys.executable, "-c", _COPY, source, work / "copy"], work / "copy"),
                ("convert to fp16 .ckpt", [*start, "fp16"], output),
                (
                    "convert to fp16 .ckpt, split layout",
                    [*start, "fp16", "--qkv_concat", "False", "--mlp_concat", "False"],
                    output,
                ),
                ("convert to bf16 .ckpt", [*start, "bf16"], output),
                ("convert to fp32 .ckpt (twice the bytes)", [*start, "fp32"], output),
            ]
        )
        shutil.rmtree(source)
        if args.torch_python:
            in_own_process(make_source, source, args.torch_layers)
            in_own_process(make_native, source, work / "native")
            (work / "model.yaml").write_text(
                f"model:\n  model_config:\n    type: ChatGLM2Config\n    num_layers: {args.torch_layers}\n"
            )
            print(
                f"\n{args.torch_layers} layers, glm names, fp16 safetensors to fp32 .ckpt "
                "(upstream leaves the output layer out: AutoModel has none)"
            )
            table(
                [
                    ("convert", [*convert, work / "native", "--output_path", output, "--dtype", "fp32"], output),
                    (
                        "upstream's convert_pt_to_ms (torch)",
                        [args.torch_python, "-c", _UPSTREAM, work / "native", output, work / "model.yaml"],
                        output,
                    ),
                ]
            )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
