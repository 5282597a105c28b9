"""The parallel strategy files of all NPUs of a layout, without an NPU."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from mindformers_glm32k.dryrun.compile.pool import Compiled, run_workers
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import copy_atomically
from mindformers_glm32k.parallel import ParallelLayout
from mindformers_glm32k.weights.strategy import add_frozen

FILE_NAME = "ckpt_strategy_rank_{}.ckpt"  # the run's own name, which transform_ckpt looks for
_WITHOUT_ADAPTERS = ["--model.model_config.pet_config", ""]


def has_adapters(config: dict) -> bool:
    """Whether the run freezes the model's own weights and trains adapters (LoRA)."""
    return bool(config["model"]["model_config"].get("pet_config"))


def write_strategies(
    layout: ParallelLayout, output: Path, launcher_arguments: list[str], adapters: bool = False
) -> list[Path]:
    """Compiles one rank of each stage and writes the files of all ranks, by rank.

    A strategy file says how each parameter of a stage is sharded, not which shard this rank holds: ranks of a stage
    have equal files, byte for byte. MindSpore leaves frozen weights out, though it shards them too; transform_ckpt
    would then take rank 0's shard for the whole. Theirs are added from a second compile, without adapters.

    Args:
        layout: of the configuration.
        output: folder of the files.
        launcher_arguments: run_mindformer's.
        adapters: whether the run trains adapters only.

    Raises:
        InputError: one NPU, or a folder that holds files of a larger layout.
    """
    if layout.world == 1:
        raise InputError(
            f"{launcher_arguments[launcher_arguments.index('--config') + 1]}: one NPU (use_parallel is false, or all "
            "of parallel_config is 1) has no strategy; its checkpoints are whole"
        )
    _refuse_other_layouts(output, layout)
    with tempfile.TemporaryDirectory(prefix="glm32k_strategy_") as work:
        kept = Path(work) / "kept"
        kept.mkdir()

        def keep(compiled: Compiled) -> None:
            path = kept / str(layout.stage_of(compiled.rank))
            content = strategy_file(compiled.folder, compiled.rank).read_bytes()
            path.write_bytes(add_frozen(path.read_bytes(), content) if path.exists() else content)
            shutil.rmtree(compiled.folder)

        for more in [[], _WITHOUT_ADAPTERS] if adapters else [[]]:
            run_workers(
                [layout.ranks_of(stage)[0] for stage in range(layout.stages)],
                layout,
                Path(work).resolve(),
                [*launcher_arguments, *more],
                strategy_only=True,
                on_done=keep,
            )
        written = [output / FILE_NAME.format(rank) for rank in range(layout.world)]
        for rank, path in enumerate(written):  # all or none: nothing is written before the last compile
            copy_atomically(kept / str(layout.stage_of(rank)), path)
    return written


def strategy_file(folder: Path, rank: int) -> Path:
    """The file that a worker of `rank` left below its folder."""
    return folder / "output" / "strategy" / FILE_NAME.format(rank)


def _refuse_other_layouts(output, layout):
    """transform_ckpt merges all files of a folder: those of a larger layout would be mixed in."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file, a folder is needed")
    expected = {FILE_NAME.format(rank) for rank in range(layout.world)}
    others = sorted(path.name for path in output.glob("ckpt_strategy_rank_*.ckpt") if path.name not in expected)
    if others:
        raise InputError(
            f"--output {output}: holds {others[0]} of a layout with more than {layout.world} NPUs; give another folder"
        )
