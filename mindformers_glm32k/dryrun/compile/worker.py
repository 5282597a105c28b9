"""One process, one NPU's program: runs `run_mindformer` with the user's YAML and options, and stops once compiled."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mindformers_glm32k.dryrun.compile import frontend, placeholders
from mindformers_glm32k.errors import InputError

PROGRAM_FILE = "program.mindir"  # after the phase's name: train_program.mindir
RECORD_FILE = "record.json"
CONFIG_FILE = "config.json"
STATE_FILE = "state.npz"  # initial values of parameters, by name
BATCHES_FILE = "batches.npz"  # columns of the data set: (steps, batch, …)
_COUNTER_SIZE = 8  # elements, at most, of a step counter or loss scale
NOTE = "dryrun: "  # prefix of the lines on standard output that the parent process reads
SIZED = "sized"  # suffix of the phases of programs with static shapes


class Finished(BaseException):
    """Leaves the trainer when everything is compiled. Not an Exception: upstream must not take it for an error."""


class Recorder:
    """Records each compile: the program's file, seconds, memory.

    Args:
        folder: where files are written.
        keep_program: False when only the strategy file is wanted.
        keep_state: whether the parameters' initial values are written, too.
        world_size: number of NPUs.
    """

    def __init__(self, folder: Path, keep_program: bool, keep_state: bool = False, world_size: int = 1):
        self.folder = folder
        self.world_size = world_size
        self.keep_program = keep_program
        self.keep_state = keep_state
        self.seconds = 0.0
        self.record = {"stand_ins": [], "programs": []}

    def compiled(self, cell: object, phase: str, program: Callable[[], bytes], seconds: float) -> None:
        """Called by the frontend after each compile."""
        name = "train" if cell.training else phase_name(phase.split(".")[0], cell.config.use_past)
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

    def save_state(self, network: object) -> None:
        """Writes the initial values of a network: all of them on one device, only the counters on a layout's ranks
        (whose weights and optimizer states are sharded from one device's)."""
        if not self.keep_state:
            return
        weights = {parameter.name for parameter in network.trainable_params()}
        whole = self.world_size == 1
        values = {
            parameter.name: _array(parameter)
            for parameter in network.get_parameters()
            if whole or (parameter.size <= _COUNTER_SIZE and parameter.name not in weights)
        }
        with open(self.folder / STATE_FILE, "wb") as file:
            np.savez(file, **values)

    def finish(self) -> None:
        """Writes the record and leaves the trainer."""
        self.record["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (self.folder / RECORD_FILE).write_text(json.dumps(self.record), encoding="utf-8")
        raise Finished


def _array(parameter):
    """A parameter's values; bfloat16, which NumPy cannot read again, as float32."""
    from mindspore import bfloat16, float32

    return (parameter.astype(float32) if parameter.dtype == bfloat16 else parameter).asnumpy()


def note(text: str) -> None:
    """Tells the command what this process is doing."""
    print(NOTE + text, flush=True)


class Generation:
    """Replaces upstream's `generate` and its post-processing: graphs are compiled, no token is computed.

    The generator compiles "prefill" (prompts in one flattened sequence) and "increment" (one token of each prompt) with
    dynamic shapes, whose memory is unknown. After these two, which an NPU gets, the same two are compiled once more
    with static shapes, for the longest prompts that fit; the report is about these.

    Args:
        finish: called when all graphs are compiled.
        begin: gets the network before the first compile.
        sized_only: whether the programs with dynamic shapes are left out.
    """

    def __init__(self, finish: Callable[[], None], begin: Callable | None = None, sized_only: bool = False):
        self.finish, self.begin, self.sized_only = finish, begin, sized_only
        self.calls_left = 0
        self.sized = False

    def install(self) -> None:
        """Replaces the generator's methods in this process."""
        from mindformers.generation.text_generator import GenerationMixin

        generate, driver = GenerationMixin.generate, self

        def compile_both(model, input_ids, **options):
            config = model.config
            batch = len(np.atleast_2d(np.asarray(input_ids)))
            prompts = np.ones((batch, longest_prompt(config)), np.int32)
            if driver.begin:
                driver.begin(model)
            both = (True,) if driver.sized_only else (False, True)
            for driver.sized in both if config.use_past else (False,):
                driver.calls_left = 2 if config.use_past else 1
                if driver.sized:
                    frontend.close_shapes(model, SIZED)
                generate(model, prompts, **options)
            driver.finish()

        GenerationMixin.generate = compile_both
        GenerationMixin.postprocess = self.next_tokens

    def next_tokens(self, *_, input_ids: list, is_finished: list, **__) -> tuple:
        """Replaces upstream's postprocess: token 1 for every prompt, finished once every graph has been called."""
        self.calls_left -= 1
        return [1] * len(input_ids), None, None, [self.calls_left == 0] * len(is_finished)


def longest_prompt(config: object) -> int:
    """Tokens of the longest prompt that leaves room for the answer; `config` is a GLM32KConfig."""
    return max(config.seq_length - (config.max_new_tokens or 1), 1)


def phase_name(phase: str, use_past: bool) -> str | None:
    """The report's name of one of MindSpore's phases; None for a program with dynamic shapes, whose static one follows.
    With `use_past`, prefill and increment are separate graphs."""
    if not use_past:
        return "predict"
    return phase.rsplit("_", 1)[0] if phase.endswith("_" + SIZED) else None


def _compile_instead_of_training(recorder):
    from mindspore import Tensor
    from mindspore.train import Model

    def train(self, epoch, train_dataset, *args, **kwargs):
        network = self._train_network
        network.set_train(True)
        shapes = frontend.input_shapes(train_dataset)
        inputs = [Tensor(np.zeros(shape, dtype)) for shape, dtype in zip(shapes, train_dataset.output_types())]
        recorder.record["inputs"] = [list(value.shape) for value in inputs]
        recorder.record["columns"] = train_dataset.get_col_names()
        recorder.record["trainable"] = [parameter.name for parameter in network.trainable_params()]
        recorder.save_state(network)
        note("compile")
        shapes = {parameter.name: list(parameter.shape) for parameter in network.get_parameters()}
        network.compile(*inputs)
        recorder.record["layouts"] = {
            name: {"dev_matrix": list(spec[0]), "tensor_map": list(spec[1]), "shape": shapes[name]}
            for name, spec in (network.parameter_layout_dict or {}).items()
            if name in shapes
        }
        recorder.finish()

    Model.train = train


def _adapt(config):
    """What a dry run changes in the merged configuration: nothing that the program depends on."""
    config.resume_training = False
    config.random_weights = True  # no weights are read, so that none are missing
    config.auto_trans_ckpt = False
    config.only_save_strategy = False
    config.profile = False
    config.do_eval = False
    if config.get("checkpoint"):
        config.checkpoint.load_path = ""
    section = config.train_dataset
    if section and section.get("num_parallel_workers"):  # MindSpore refuses more than this machine has cores
        section["num_parallel_workers"] = min(section["num_parallel_workers"], os.cpu_count())
    for name in ("save_graphs", "save_graphs_path"):  # upstream would switch off the dump of the program's text
        config.context.pop(name, None)
    model = config.model.model_config
    model.checkpoint_name_or_path = ""
    if str(model.get("type", "")).startswith("GLM32K") and model.get("cells", "auto") == "auto":
        model.cells = "ascend"
    return config


def _batch_size(config):
    """Sequences that one step reads over all devices, at most."""
    parallel, runner = config.parallel_config or {}, config.runner_config
    factors = [runner.batch_size, parallel.get("data_parallel"), parallel.get("micro_batch_num")]
    factors += [config.micro_batch_interleave_num, runner.gradient_accumulation_steps]
    return math.prod(factor or 1 for factor in factors)


def _read(folder, launcher_arguments, use_files=True):
    """The launcher's merged configuration, adapted, with absolute paths (this process changes its directory); and the
    report's sentence on placeholders, see `placeholders.fill`."""
    from mindformers_glm32k import run_mindformer

    config = _adapt(run_mindformer.read_config([*launcher_arguments, "--load_checkpoint", ""]))
    if config.get("train_dataset") and config.get("train_dataset_task"):
        config.train_dataset_task.dataset_config = config.train_dataset  # as upstream does when training begins
    return config, placeholders.fill(config, folder, _batch_size(config), use_files)


def describe(folder: Path, launcher_arguments: list[str]) -> None:
    """Writes the merged configuration as JSON."""
    config, _ = _read(folder, launcher_arguments)
    (folder / CONFIG_FILE).write_text(json.dumps(config, default=str), encoding="utf-8")


def save_batches(folder: Path, steps: int, launcher_arguments: list[str]) -> None:
    """Writes the first batches of the training data, as the configuration's data set class makes them; the data set
    is read from its start again when it ends. Nothing is written when its files are not there."""
    from mindformers.dataset import build_dataset

    from mindformers_glm32k.preflight import check_packing

    config, missing = _read(folder, launcher_arguments)
    if missing:
        return
    check_packing(config, ["train_dataset"])
    batches = []
    dataset = build_dataset(config.train_dataset_task)
    while len(batches) < steps:
        batches += list(dataset.create_tuple_iterator(num_epochs=1, output_numpy=True))
    columns = {name: np.stack(values) for name, values in zip(dataset.get_col_names(), zip(*batches[:steps]))}
    with open(folder / BATCHES_FILE, "wb") as file:
        np.savez(file, **columns)


def compile_program(
    folder: Path, rank: int, world_size: int, launcher_arguments: list[str], keep_program: bool, for_simulation: bool
) -> None:
    """Compiles one rank's program and writes it, the strategy file and a record below `folder`; for a simulation, the
    initial values, too (its data then come from `save_batches`)."""
    from mindformers_glm32k import run_mindformer

    recorder = Recorder(folder, keep_program, keep_state=for_simulation, world_size=world_size)
    frontend.install(rank, world_size, recorder.compiled)
    config, recorder.record["stand_ins"] = _read(folder, launcher_arguments, use_files=not for_simulation)
    os.chdir(folder)  # what upstream writes into the working directory stays here
    _compile_instead_of_training(recorder)
    Generation(recorder.finish, recorder.save_state, sized_only=for_simulation).install()
    note("build")
    with contextlib.suppress(Finished):
        run_mindformer.run(config)


def main(argv: list[str] | None = None) -> None:
    """`python -m mindformers_glm32k.dryrun.compile.worker OPTIONS -- run_mindformer's options`; it never returns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--describe", action="store_true")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--world_size", type=int)
    parser.add_argument("--strategy_only", action="store_true")
    parser.add_argument("--batches", type=int, help="write the data of so many steps")
    parser.add_argument("--for_simulation", action="store_true")
    parser.add_argument("launcher_arguments", nargs="*")
    args = parser.parse_args(argv)
    note("import")
    try:
        if args.describe:
            describe(args.folder, args.launcher_arguments)
        elif args.batches:
            save_batches(args.folder, args.batches, args.launcher_arguments)
        else:
            keep = not args.strategy_only
            compile_program(args.folder, args.rank, args.world_size, args.launcher_arguments, keep, args.for_simulation)
    except (InputError, frontend.FrontendUnavailable) as error:
        print(f"error: {error}", flush=True)
        os._exit(2)
    # an orderly end would wait for MindSpore's threads and talk to devices that are not there
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
