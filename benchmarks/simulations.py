"""The table of simulations in docs/dryrun.md, from the folders that `glm32k dryrun --execute` wrote.

python benchmarks/simulations.py FOLDER …
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mindformers_glm32k.dryrun.report.markdown import table  # noqa: E402

HEAD = (
    "layout",
    "YAML",
    "ranks",
    "steps",
    "loss, first / last step",
    "largest difference of a loss",
    "of a gradient norm",
    "of a weight",
    "of a moment",
    "result",
)


def relative(steps, name):
    """The largest difference of a value from one device's, relative to that."""
    return max(abs(step[name] / step[f"{name}_one_device"] - 1) for step in steps)


def cells(folder):
    """A layout's line of the table."""
    report = json.loads((Path(folder) / "execution.json").read_text(encoding="utf-8"))
    steps = report["steps"]
    skipped = sum(step["overflow"] for step in steps)
    kept = [step for step in steps if not step["overflow"]]
    differences = [f"{relative(kept, name):.1e}" if kept else "-" for name in ("loss", "grad_norm")]
    differences += [f"{report[f'largest_{kind}_difference_relative']:.1e}" for kind in ("weight", "moment")]
    result = "equal" if report["agrees"] else f"{len(report['problems'])} differences"
    return (
        report["layout"],
        Path(report["config"]).stem,
        str(report["world_size"]),
        f"{len(steps)}{f' ({skipped} skipped)' if skipped else ''}",
        f"{steps[0]['loss']:.5f} / {steps[-1]['loss']:.5f}",
        *differences,
        result,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", help="output folders of `glm32k dryrun --execute`")
    print(table(list(HEAD), map(cells, parser.parse_args().folders), texts=len(HEAD)))


if __name__ == "__main__":
    sys.exit(main())
