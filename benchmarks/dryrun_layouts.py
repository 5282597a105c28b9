"""Every shipped layout beside upstream's: memory, traffic, FLOPs and estimated speed of the compiled programs.

    python benchmarks/dryrun_layouts.py [--output_dir DIR] [--full] [YAML_OR_FOLDER …]

By default each layout is extrapolated from 2 and 4 layers a stage; `--full` compiles all layers. The first column,
`upstream_card`, is a recorded report: the program of upstream's card (dp 2 x pp 4, recompute with
recompute_slice_activation, fp32 residual, vocabulary split over dp, whole logits) with a 2048 x 2048 mask in place of
upstream's 32768 x 32768, whose construction alone takes 13 GB in every process. It was compiled with upstream's cells,
sharding and loss.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
UPSTREAM = Path(__file__).resolve().parent / "reports" / "upstream_card"


def shipped():
    """The YAMLs for fine-tuning on NPUs."""
    return [path for path in sorted((ROOT / "research" / "glm32k").glob("finetune_*.yaml")) if "cpu" not in path.stem]


def main():
    from mindformers_glm32k.cli import main as glm32k

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "layouts", nargs="*", type=Path, help="YAMLs or folders of dry runs (default: all that are shipped)"
    )
    parser.add_argument("--output_dir", default="dryrun_layouts")
    parser.add_argument("--full", action="store_true", help="compile at full depth")
    args = parser.parse_args()
    layouts = [UPSTREAM, *(args.layouts or shipped())]
    return glm32k(
        [
            "dryrun",
            "--compare",
            *map(str, layouts),
            "--output_dir",
            args.output_dir,
            *([] if args.full else ["--quick"]),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
