"""Runs the tests on every supported pair of MindFormers and MindSpore, each in an environment of its own.

    python tests/hosts.py                      all pairs (hours, 3 GB of disk for each environment)
    python tests/hosts.py --pair 1.8.0 --pair 1.9.0:3.12
    python tests/hosts.py --pair 1.9.0:3.9 --again   files in which tests failed, after they were fixed
    python tests/hosts.py --newest --smoke     import, 20 steps and a prediction on the newest that can be installed

Environments lie in --folder and are used again while the pair and setup.cfg stay the same; each pair leaves
`<pair>.json` there. `--table FILE` puts the table made of all of them between FILE's `<!-- hosts -->` marks.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "research" / "glm32k"
STAND_IN = ROOT / "tests" / "hyper_parallel_stand_in.py"
MARK = re.compile(r"(<!-- hosts -->\n).*?(<!-- /hosts -->)", re.S)
STEPS = 20
HANGS_AFTER = 3600  # seconds for the tests of one pair

# what a pair runs: data, tokenizer, weights, training runs, generation, a dry run, and one simulation of a whole layout
TESTS = (
    "tests/data",
    "tests/tokenizer",
    "tests/weights",
    "tests/training",
    "tests/test_compat.py",
    "tests/test_config.py",
    "tests/test_registry.py",
    "tests/test_run_mindformer.py",
    "tests/test_model.py",
    "tests/test_generator.py",
    "tests/kernels/cpu/test_paged_attention.py",
    "tests/commands/test_dryrun.py",
    "tests/dryrun/compile/test_pool.py",
    "tests/dryrun/simulator/test_train.py",
)


@dataclass(frozen=True)
class Host:
    """A MindFormers version with its MindSpore, on one Python.

    Attributes:
        note: what is special about the pair, for the table.
    """

    mindformers: str
    mindspore: str
    python: str = "3.11"
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.mindformers}-py{self.python}"

    @property
    def stands_in(self) -> bool:
        """Whether MindFormers needs `hyper_parallel`, which PyPI does not have."""
        return int(self.mindformers.split(".")[0]) >= 2


HOSTS = (
    Host("1.6.0", "2.7.0"),
    Host("1.7.0", "2.7.1"),
    Host("1.8.0", "2.7.2"),
    Host("1.9.0", "2.9.0"),
    Host("1.9.0", "2.9.0", "3.9"),
    Host("1.9.0", "2.9.0", "3.10"),
    Host("1.9.0", "2.9.0", "3.12"),
    Host("2.0.0", "2.10.0"),
    Host("2.1.0", "2.10.0", note="made for MindSpore 2.11, which is not on PyPI"),
)
NEWEST = HOSTS[-2]


class HostFailed(RuntimeError):
    """A pair's environment could not be built, or a run in it failed."""


def run(command: list, log: Path, **options) -> None:
    """Runs a command, its output in a file.

    Raises:
        HostFailed: another status than 0, with the end of the output.
    """
    with open(log, "wb") as file:
        status = subprocess.run(
            [str(word) for word in command], stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options
        ).returncode
    if status:
        end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise HostFailed(
            f"status {status} of {' '.join(map(str, command[:6]))} …; the end of {log}:\n" + "\n".join(end)
        )


def interpreter(version: str) -> str:
    """A Python of that version: on the PATH, or one of pyenv's.

    Raises:
        HostFailed: there is none.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in (f"python{version}", *sorted(pyenv.glob(f"{version}.*/bin/python"))):
        try:
            subprocess.run([str(candidate), "-c", "import venv, ensurepip"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return str(candidate)
    raise HostFailed(f"no Python {version} with its venv module found; install it, or leave the pair out with --pair")


def build(host: Host, folder: Path) -> Path:
    """Makes the pair's environment, or takes the one that is there.

    Returns:
        its Python.
    """
    environment = folder / host.name
    python = environment / "bin" / "python"
    wanted = hashlib.sha256(
        (ROOT / "setup.cfg").read_bytes() + STAND_IN.read_bytes() + repr((host, str(ROOT))).encode()
    ).hexdigest()
    stamp = environment / "installed"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(environment, ignore_errors=True)
    run([interpreter(host.python), "-m", "venv", environment], folder / f"{host.name}.venv.log")
    log = folder / f"{host.name}.install.log"
    pip = [python, "-m", "pip", "install", "--no-input"]
    if not host.stands_in:
        run([*pip, "-e", f"{ROOT}[test]", f"mindformers=={host.mindformers}", f"mindspore=={host.mindspore}"], log)
    else:
        run([*pip, f"mindspore=={host.mindspore}"], log)
        run([*pip, "--no-deps", f"mindformers=={host.mindformers}"], log)
        packages = next(environment.glob("lib/python*/site-packages"))
        shutil.copy(STAND_IN, packages)
        (packages / "hyper_parallel.pth").write_text(f"import {STAND_IN.stem}\n")
        listed = subprocess.run(
            [python, "-c", "from importlib.metadata import requires\nprint(*requires('mindformers'), sep='\\n')"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        needed = [line for line in listed if not re.match(r"mindspore|hyper.parallel", line)]
        # pyarrow 24 wants NumPy 2, which MindFormers does not take
        needed = [re.sub(r"^pyarrow.*", "pyarrow==23.0.1", line) for line in needed]
        own = [line for line in requirements() if not re.match(r"mindspore|mindformers", line)]
        run([*pip, *needed, *own], log)
        run([*pip, "--no-deps", "-e", ROOT], log)
    stamp.write_text(wanted)
    return python


def requirements() -> list[str]:
    """What setup.cfg requires, the test extra included."""
    import configparser

    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = [parser["options"]["install_requires"], parser["options.extras_require"]["test"]]
    return [line.strip() for text in texts for line in text.splitlines() if line.strip() and line.strip()[0] != "#"]


def surroundings(python: Path) -> dict:
    """Environment variables of a run: the pair's programs first, nothing of another environment."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def smoke(python: Path, folder: Path) -> tuple[float, float]:
    """Imports, trains the tiny YAML for some steps and predicts with what it left.

    Returns:
        the first and the last loss.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    here = {"cwd": folder, "env": surroundings(python)}
    glm32k = [python, "-m", "mindformers_glm32k"]
    run([*glm32k, "make-data", "--output_dir", folder / "data"], folder / "make_data.log", **here)
    vocabulary = folder / "data" / "tokenizer.model"
    train = next((folder / "data").glob("*train*.jsonl"))
    launch = [python, "-m", "mindformers_glm32k.run_mindformer", "--output_dir", folder / "output"]
    run(
        [*launch, "--config", CONFIGS / "finetune_glm32k_tiny_cpu.yaml", "--run_mode", "finetune"]
        + ["--train_dataset_dir", train, "--train_dataset.tokenizer.vocab_file", vocabulary, "--epochs", 5]
        + ["--num_samples", STEPS // 5 * 8, "--runner_config.batch_size", 8],
        folder / "train.log",
        **here,
    )
    checkpoint = max((folder / "output" / "checkpoint" / "rank_0").glob("*.ckpt"), key=os.path.getmtime)
    run(
        [*launch, "--config", CONFIGS / "predict_glm32k_tiny_cpu.yaml", "--run_mode", "predict"]
        + ["--load_checkpoint", checkpoint, "--processor.tokenizer.vocab_file", vocabulary]
        + ["--predict_data", "where is the key?", "--model.model_config.max_new_tokens", 8],
        folder / "predict.log",
        **here,
    )
    if not (folder / "text_generation_result.txt").is_file():
        raise HostFailed(f"{folder / 'predict.log'}: the prediction wrote no text_generation_result.txt")
    with open(folder / "output" / "loss_curve.csv", newline="", encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    if len(losses) != STEPS:
        raise HostFailed(f"{folder / 'train.log'}: {len(losses)} steps instead of {STEPS}")
    return losses[0], losses[-1]


def suite(python: Path, folder: Path, extra: list[str], tests: tuple[str, ...] = TESTS) -> dict:
    """Runs the pair's tests, or only some of them.

    Returns:
        counts by outcome, the reasons of what was skipped, and the names of what failed.
    """
    report = folder / "junit.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", f"--junitxml={report}", *tests, *extra]
    with open(folder / "pytest.log", "wb") as log:
        subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env=surroundings(python),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=HANGS_AFTER,
        )
    if not report.is_file():
        end = (folder / "pytest.log").read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise HostFailed(f"pytest left no report; the end of {folder / 'pytest.log'}:\n" + "\n".join(end))
    outcomes, reasons, failed = Counter(), Counter(), []
    for case in ElementTree.parse(report).iter("testcase"):
        bad = case.find("failure") is not None or case.find("error") is not None
        skipped = case.find("skipped")
        outcomes["failed" if bad else "passed" if skipped is None else "skipped"] += 1
        if bad:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif skipped is not None:
            reasons[re.sub(r"\s+", " ", skipped.get("message", ""))] += 1
    return {**outcomes, "reasons": dict(reasons), "failures": failed}


def suite_again(python: Path, folder: Path, extra: list[str], before: dict) -> dict:
    """Runs the files again in which tests failed.

    Returns:
        what `suite` returned before, with the new outcomes of those tests, and in `again` those that pass now.
    """
    failed = before.get("failures", [])
    files = tuple(sorted({name.partition("::")[0].replace(".", "/") + ".py" for name in failed}))
    if not files:
        return before
    now = suite(python, folder, extra, files)
    mended = [name for name in failed if name not in now["failures"]]
    failures = sorted({*failed, *now["failures"]} - set(mended))
    new = len(failures) - (len(failed) - len(mended))
    return {
        **before,
        "passed": before["passed"] + len(mended) - new,
        "failed": len(failures),
        "failures": failures,
        "again": [*before.get("again", ()), *mended],
    }


def table(results: list[dict]) -> str:
    """The Markdown table of all pairs, in the order of HOSTS."""
    order = [host.name for host in HOSTS]
    results = sorted(results, key=lambda result: order.index(result["name"]))
    lines = [
        "| MindFormers | MindSpore | Python | passed | failed | skipped | loss at step 1 and 20 of one tiny training |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    for result in results:
        skipped = str(result.get("skipped", 0)) if "passed" in result else "–"
        why = "; ".join(f"{count} x {reason}" for reason, count in result.get("reasons", {}).items())
        again = ", ".join(sorted({name.partition("[")[0].rpartition("::")[2] for name in result.get("again", ())}))
        again = again and f"failed at first, passed when run again after they were mended: {again}"
        if result["note"] or why or again:
            notes.append(f"- {result['name']}: " + "; ".join(text for text in (result["note"], why, again) if text))
        losses = " ".join(f"{loss:.6f}" for loss in result["losses"])
        lines.append(
            f"| {result['mindformers']} | {result['mindspore']} | {result['python']} | {result.get('passed', '–')} | "
            f"{result.get('failed', 0) if 'passed' in result else '–'} | {skipped} | {losses} |"
        )
    return "\n".join([*lines, "", *notes]) + "\n"


def chosen(names: list[str] | None) -> list[Host]:
    """The pairs that are asked for, as VERSION or VERSION:PYTHON; all by default."""
    if not names:
        return list(HOSTS)
    found = []
    for name in names:
        version, _, python = name.partition(":")
        hosts = [host for host in HOSTS if host.mindformers == version and host.python == (python or "3.11")]
        if not hosts:
            sys.exit(f"error: --pair {name}: known are " + ", ".join(f"{h.mindformers}:{h.python}" for h in HOSTS))
        found += hosts
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", action="append", metavar="MINDFORMERS[:PYTHON]", help="only these; may be repeated")
    parser.add_argument("--newest", action="store_true", help="only the newest pair that can be installed whole")
    parser.add_argument("--again", action="store_true", help="only the files in which tests failed the last time")
    parser.add_argument("--smoke", action="store_true", help="no tests: import, train, predict")
    parser.add_argument(
        "--folder", type=Path, help="where environments and results are kept; a temporary one by default"
    )
    parser.add_argument("--table", type=Path, help="Markdown file that gets the table between its marks")
    parser.add_argument("pytest", nargs="*", help="further words for pytest, behind --")
    args = parser.parse_args()
    if args.folder is None:
        with tempfile.TemporaryDirectory(prefix="glm32k_hosts_") as folder:
            return measure(args, Path(folder))
    return measure(args, args.folder.resolve())


def measure(args: argparse.Namespace, folder: Path) -> int:
    """Runs the chosen pairs one after the other; the exit status says whether all of them passed."""
    folder.mkdir(parents=True, exist_ok=True)
    bad = 0
    for host in [NEWEST] if args.newest else chosen(args.pair):
        begun = time.monotonic()
        print(f"== {host.name}: MindFormers {host.mindformers} on MindSpore {host.mindspore}", flush=True)
        try:
            python = build(host, folder)
            work = folder / f"{host.name}.work"
            kept = folder / f"{host.name}.json"
            before = json.loads(kept.read_text(encoding="utf-8")) if args.again and kept.is_file() else {}
            losses = smoke(python, work)
            result = {**before, **vars(host), "name": host.name, "losses": losses}
            if before:
                result = suite_again(python, work, args.pytest, result)
            elif not args.smoke:
                result.update(suite(python, work, args.pytest))
        except (HostFailed, subprocess.SubprocessError, OSError) as error:
            bad += 1
            print(f"   FAILED: {error}", flush=True)
            continue
        seconds = round(time.monotonic() - begun)
        kept.write_text(json.dumps(result, indent=1), encoding="utf-8")
        bad += bool(result.get("failed"))
        counts = ", ".join(f"{result[key]} {key}" for key in ("passed", "failed", "skipped") if key in result)
        print(f"   loss {losses[0]:.6f} -> {losses[1]:.6f}; {counts or 'smoke only'}; {seconds} s", flush=True)
        for name in result.get("failures", ()):
            print(f"   FAILED {name}", flush=True)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    for index, what in enumerate(("first", "last")):
        losses = [result["losses"][index] for result in results]
        if losses and max(losses) - min(losses) > 1e-5:
            bad += 1
            print(f"the {what} losses differ by more than 1e-5: {losses}")
    text = table(results)
    print(text)
    if args.table:
        page = args.table.read_text(encoding="utf-8")
        if not MARK.search(page):
            sys.exit(f"error: {args.table} has no <!-- hosts --> … <!-- /hosts --> marks")
        args.table.write_text(MARK.sub(lambda found: found[1] + text + found[2], page), encoding="utf-8")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
