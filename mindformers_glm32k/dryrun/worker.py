"""One process, one NPU's program: runs `run_mindformer` with the user's YAML and options, and stops once compiled."""
import argparse
import contextlib
import json
import os
import resource
import sys
from pathlib import Path

from mindformers_glm32k.dryrun import frontend, prediction, stand_in
from mindformers_glm32k.errors import InputError

PROGRAM_FILE = "program.mindir"  # behind the name of its phase
RECORD_FILE = "record.json"
CONFIG_FILE = "config.json"
NOTE = "dryrun: "  # a line of standard output that starts so is for the command that started this process


class Finished(BaseException):
    """Leaves the trainer when everything is compiled. Not an Exception: upstream must not take it for an error."""


class Recorder:
    """Keeps what a compile gives: the program's file, seconds, memory.

    Args:
        folder (pathlib.Path): where files are written.
        keep_program (bool): False when only the strategy file is wanted.
    """

    def __init__(self, folder, keep_program):
        self.folder = folder
        self.keep_program = keep_program
        self.seconds = 0.0
        self.record = {"stand_ins": [], "programs": []}

    def compiled(self, cell, phase, program, seconds):
        """Called by the frontend after each compile."""
        name = "train" if cell.training else prediction.phase_name(phase.split(".")[0], cell.config.use_past)
        note("compiled" if name is None else f"{name} compiled")
        self.seconds += seconds
        if name is None:
            return
        entry = {"cell": type(cell).__name__, "phase": name, "compile_seconds": round(self.seconds, 2)}
        self.seconds = 0.0
        if self.keep_program:
            entry["file"] = f"{name}_{PROGRAM_FILE}"
            (self.folder / entry["file"]).write_bytes(program())
        self.record["programs"].append(entry)

    def finish(self):
        """Writes the record and leaves the trainer."""
        self.record["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (self.folder / RECORD_FILE).write_text(json.dumps(self.record), encoding="utf-8")
        raise Finished


def note(text):
    """Tells the command what this process is doing."""
    print(NOTE + text, flush=True)


def _compile_instead_of_training(recorder):
    from mindspore import Tensor, dtype_to_nptype
    from mindspore.train import Model
    import numpy as np

    def train(self, epoch, train_dataset, *args, **kwargs):
        network = self._train_network
        network.set_train(True)
        inputs = [Tensor(np.zeros(shape, dtype)) for shape, dtype in
                  zip(frontend.input_shapes(train_dataset), train_dataset.output_types())]
        recorder.record["inputs"] = [list(value.shape) for value in inputs]
        note("compile")
        network.compile(*inputs)
        recorder.finish()

    Model.train = train


def _adapt(config):
    """What a dry run changes in the merged configuration: nothing that the program depends on."""
    config.resume_training = False
    config.auto_trans_ckpt = False
    config.only_save_strategy = False
    config.profile = False
    config.do_eval = False
    if config.get("checkpoint"):
        config.checkpoint.load_path = ""
    for section in (config.train_dataset, (config.train_dataset_task or {}).get("dataset_config")):
        if section and section.get("num_parallel_workers"):  # MindSpore refuses more than this machine has cores
            section["num_parallel_workers"] = min(section["num_parallel_workers"], os.cpu_count())
    for name in ("save_graphs", "save_graphs_path"):  # upstream would switch off what the frontend is asked to write
        config.context.pop(name, None)
    model = config.model.model_config
    model.checkpoint_name_or_path = ""
    if str(model.get("type", "")).startswith("GLM32K") and model.get("cells", "auto") == "auto":
        model.cells = "ascend"
    return config


def _batch_rows(config):
    """Rows that one step reads over all devices, at most."""
    parallel = config.parallel_config or {}
    rows = config.runner_config.batch_size or 1
    for factor in (parallel.get("data_parallel"), parallel.get("micro_batch_num"), config.micro_batch_interleave_num,
                   config.runner_config.gradient_accumulation_steps):
        rows *= factor or 1
    return rows


def _read(folder, launcher_arguments):
    """The configuration as the launcher merges it, adapted, with paths that stay right when this process moves."""
    from mindformers_glm32k import run_mindformer
    config = _adapt(run_mindformer.read_config([*launcher_arguments, "--load_checkpoint", ""]))
    return config, stand_in.fill(config, folder, _batch_rows(config))


def describe(folder, launcher_arguments):
    """Writes the merged configuration as JSON."""
    config, _ = _read(folder, launcher_arguments)
    (folder / CONFIG_FILE).write_text(json.dumps(config, default=str), encoding="utf-8")


def compile_program(folder, rank, world, keep_program, launcher_arguments):
    """Compiles one rank's program and writes it, the strategy file and a record below `folder`."""
    from mindformers_glm32k import run_mindformer
    recorder = Recorder(folder, keep_program)
    frontend.install(rank, world, recorder.compiled)
    config, recorder.record["stand_ins"] = _read(folder, launcher_arguments)
    os.chdir(folder)  # what upstream writes into the working directory stays here
    _compile_instead_of_training(recorder)
    prediction.Generation(recorder.finish).install()
    note("build")
    with contextlib.suppress(Finished):
        run_mindformer.run(config)


def main(argv=None):
    """`python -m mindformers_glm32k.dryrun.worker --folder D (--describe | --rank R --world N) -- run_mindformer's`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--describe", action="store_true")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--world", type=int)
    parser.add_argument("--strategy_only", action="store_true")
    parser.add_argument("launcher_arguments", nargs="*")
    args = parser.parse_args(argv)
    note("import")
    try:
        if args.describe:
            describe(args.folder, args.launcher_arguments)
        else:
            compile_program(args.folder, args.rank, args.world, not args.strategy_only, args.launcher_arguments)
    except (InputError, frontend.FrontendUnavailable) as error:
        print(f"error: {error}", flush=True)
        os._exit(2)
    # an orderly end would wait for MindSpore's threads and talk to devices that are not there
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
