"""Speed, memory and padding of training data beside upstream's ADGenDataLoader and KeyWordGenDataset.

    python benchmarks/data.py [--size 2GB] [--vocab_file tokenizer.model] [--rounds 2] [--seconds 40]

Writes AdGen lines with a mix of lengths like LongBench's (log-normal, median 5000 tokens, 0.2k to 60k), then lets each
program, in a process of its own and in turn, make batches of one sequence of 32768 tokens from them:

    first     seconds from the building of the data set to the first batch, imports not counted; files are in the page
              cache, indexes and lengths of earlier runs are removed but for the program that is to find them
    tokens/s  tokens that are no padding, per second from the first batch on, for --seconds
    RSS       peak of the process above what it had after the imports, and that again with an eighth of the data
    padding   share of positions that hold no token

Printed are medians over the rounds, beside upstream's.
"""

import argparse
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
REFERENCE = ROOT.parent / "shared" / "reference" / "tokenizer" / "tokenizer.model"
SOURCE, TARGET, SEQUENCE = 30720, 2047, 32768

UPSTREAM, PLAIN, STREAMED, PLANNED, AGAIN = "upstream", "plain", "streamed", "planned", "planned again"
TITLES = {
    UPSTREAM: "upstream: ADGenDataLoader, KeyWordGenDataset",
    PLAIN: "GLM32KDataset, one sample a sequence",
    STREAMED: "GLM32KDataset, packing, rows_per_epoch",
    PLANNED: "GLM32KDataset, packing",
    AGAIN: "the same again, lengths on disk",
}


def write_data(path, size):
    """Writes `size` bytes of lines; texts are slices of one long text.

    Its sentences are those of Python's own manual, in any order, one word in 50 replaced by one of a million made-up
    names: natural English with the many rare words of a big collection.
    """
    from pydoc_data.topics import topics

    rng = random.Random(0)
    sentences = re.split(r"(?<=[.:]) +", " ".join(" ".join(topics.values()).split()))
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
    words = []
    while len(words) < 4_000_000:
        words += rng.choice(sentences).split(" ")
    for place in range(0, 4_000_000, 50):
        words[place + rng.randrange(50)] = "".join(rng.choices(syllables, k=3)).capitalize() + rng.choice(syllables)
    text = " ".join(words[:4_000_000])
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            # letters, some 4 of which make a token
            length = int(min(max(rng.lognormvariate(math.log(20000), 0.9), 800), 240000))
            start = rng.randrange(len(text) - length)
            file.write(
                json.dumps(
                    {
                        "content": text[start : start + length] + "\n\nQuestion: What is meant?",
                        "summary": rng.choice(sentences)[:400],
                    }
                )
                + "\n"
            )


def dataset(program, path, vocab_file, workers):
    """The data set of one program; mindformers is imported."""
    common = {
        "max_source_length": SOURCE,
        "max_target_length": TARGET,
        "batch_size": 1,
        "drop_remainder": True,
        "num_parallel_workers": workers,
        "repeat": 1,
        "seed": 0,
        "prefetch_size": 1,
        "numa_enable": False,
    }
    if program == UPSTREAM:
        from mindformers.dataset import KeyWordGenDataset
        from mindformers.tools.register import MindFormerConfig

        return KeyWordGenDataset(
            MindFormerConfig(
                data_loader={
                    "type": "ADGenDataLoader",
                    "dataset_dir": path,
                    "shuffle": True,
                    "phase": "train",
                    "version": 3,
                    "origin_columns": ["content", "summary"],
                },
                tokenizer={"type": "ChatGLM3Tokenizer", "vocab_file": vocab_file},
                input_columns=["input_ids", "labels"],
                ignore_pad_token_for_loss=True,
                python_multiprocessing=False,
                **common,
            )
        )
    from mindformers_glm32k.data.dataset import GLM32KDataset

    packing = {PLAIN: {}, STREAMED: {"packing": True, "rows_per_epoch": 16000}}.get(program, {"packing": True})
    return GLM32KDataset(
        {
            "data_loader": {"type": "GLM32KDataLoader", "dataset_dir": path, "shuffle": True},
            "tokenizer": {"type": "GLM32KTokenizer", "vocab_file": vocab_file},
            **common,
            **packing,
        }
    )


def run_program(args):
    """In the process of one program: measures and prints one line of JSON."""
    import mindformers  # noqa: F401
    import numpy as np
    from mindformers import build_context  # noqa: F401  what a training run has imported, too
    from mindformers.dataset import KeyWordGenDataset  # noqa: F401

    if args.program != UPSTREAM:
        import mindformers_glm32k.data.dataset  # noqa: F401

    before = _memory("VmRSS")
    start = time.perf_counter()
    data = dataset(args.program, args.data, args.vocab_file, args.workers)
    batches = data.create_dict_iterator(num_epochs=1, output_numpy=True)
    first = None
    tokens = positions = sequences = 0
    for batch in batches:
        ids = batch["input_ids"]
        if first is None:
            first = time.perf_counter() - start
            continue  # the first batch counts for `first` alone
        positions += ids.size
        sequences += len(ids)
        tokens += int(np.count_nonzero(ids))  # padding has the id 0, which no text encodes to
        if time.perf_counter() - start - first > args.seconds:
            break
    seconds = time.perf_counter() - start - first
    print(
        "RESULT "
        + json.dumps(
            {
                "first": first,
                "speed": tokens / seconds,
                "rss": _memory("VmHWM") - before,
                "sequences": sequences,
                "padding": 1 - tokens / max(positions, 1),
            }
        ),
        flush=True,
    )
    os._exit(0)  # threads that read ahead need not be waited for


def _memory(name):
    """float: MB, of this process."""
    return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measure(program, data, args):
    """Runs one program; returns its result (dict)."""
    cache = data.parent / ".glm32k_cache"
    if program != AGAIN:
        shutil.rmtree(cache, ignore_errors=True)
    command = [
        sys.executable,
        __file__,
        "--program",
        program,
        "--data",
        str(data),
        "--vocab_file",
        args.vocab_file,
        "--seconds",
        str(args.seconds),
        "--workers",
        str(args.workers),
    ]
    done = subprocess.run(
        command,
        cwd=data.parent,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    found = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        raise SystemExit(done.stdout[-3000:])
    return json.loads(found[1])


def main():
    """Runs the measurements and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="2GB", help="of the data: 500MB, 2GB, … Default %(default)s")
    parser.add_argument("--vocab_file", default=str(REFERENCE), help="the published tokenizer.model")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each program. Default %(default)s")
    parser.add_argument("--seconds", type=float, default=40, help="for which batches are made. Default %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="num_parallel_workers. Default %(default)s")
    parser.add_argument("--work", help="folder for the data; default: a temporary one")
    parser.add_argument("--program", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.program:
        run_program(args)
    if not Path(args.vocab_file).is_file():
        raise SystemExit(f"{args.vocab_file}: no such file; give --vocab_file, the published tokenizer.model")
    args.vocab_file = str(Path(args.vocab_file).resolve())
    number, unit = re.fullmatch(r"([\d.]+) ?([MG])B", args.size).groups()
    size = int(float(number) * {"M": 1e6, "G": 1e9}[unit])
    work = Path(tempfile.mkdtemp(prefix="data-", dir=args.work))
    try:
        files = {}
        for part in (8, 1):
            files[part] = work / f"part{part}" / "train.jsonl"
            files[part].parent.mkdir()
            write_data(files[part], size // part)
        results = {(program, part): [] for part in files for program in TITLES}
        for _ in range(args.rounds):
            for part, path in files.items():
                for program in TITLES:
                    results[program, part].append(measure(program, path, args))
        print_table(results, files[1].stat().st_size, args)
    finally:
        shutil.rmtree(work)


def print_table(results, size, args):
    """Prints medians over the rounds."""

    def median(program, part, name):
        return statistics.median(result[name] for result in results[program, part])

    print(
        f"{size / 1e9:.2f} GB of JSON lines, sequences of {SEQUENCE} tokens, {args.workers} workers, "
        f"{os.cpu_count()} cores, median of {args.rounds} rounds"
    )
    print(
        f"{'program':48} {'first s':>8} {'sooner':>7} {'tokens/s':>9} {'x':>5} {'RSS MB':>7} {'at 1/8':>7} "
        f"{'padding %':>9} {'sequences':>9}"
    )
    for program, title in TITLES.items():
        first, speed = median(program, 1, "first"), median(program, 1, "speed")
        print(
            f"{title:48} {first:8.2f} {median(UPSTREAM, 1, 'first') / first:7.1f} {speed:9.0f} "
            f"{speed / median(UPSTREAM, 1, 'speed'):5.2f} {median(program, 1, 'rss'):7.0f} "
            f"{median(program, 8, 'rss'):7.0f} {100 * median(program, 1, 'padding'):9.1f} "
            f"{median(program, 1, 'sequences'):9.0f}"
        )


if __name__ == "__main__":
    main()
