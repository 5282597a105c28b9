"""`run_mindformer`: upstream's launcher with the same options and override rules, for installations from wheels.

Upstream keeps run_mindformer.py in its source repository only. Nothing heavy is imported before the options are known
to be right, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import yaml

from mindformers_glm32k.checks import true_or_false
from mindformers_glm32k.errors import CommandFailed, InputError
from mindformers_glm32k.files import can_be_written, require_file
from mindformers_glm32k.overrides import normalize_values, pairs, parse_value, reject_misspelt, set_key
from mindformers_glm32k.process import pass_on_interrupts

if TYPE_CHECKING:
    from mindformers.tools.register import MindFormerConfig

_MOMENT = 3  # seconds that an interrupted program gets to finish writing
_NEVER_NULL = ("runner_config", "runner_wrapper", "optimizer", "lr_schedule")
RUN_MODES = ("train", "finetune", "eval", "predict", "predict_with_train_model")

# one of these is in the environment of a process that msrun, a rank table's launcher or mpirun started
_LAUNCHERS = ("MS_ROLE", "RANK_TABLE_FILE", "RANK_ID", "OMPI_COMM_WORLD_RANK")


_boolean = functools.partial(true_or_false, digits=False)  # these options are values of the YAML, where 1 is a number


def _boolean_or_name(text):
    try:
        return _boolean(text)
    except argparse.ArgumentTypeError:
        return text


def _key_value(text):
    key, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"KEY=VALUE is needed, got {text!r}")
    return key, value


# option, type, dotted key of the configuration that it sets, help
OVERRIDES = (
    ("mode", int, "context.mode", "0: graph mode, 1: PyNative mode"),
    ("device_id", int, "context.device_id", "which device of this machine"),
    ("device_target", str, "context.device_target", "Ascend or CPU"),
    ("do_eval", _boolean, "do_eval", "evaluate during training"),
    ("seed", int, "seed", "seed of the run"),
    ("use_parallel", _boolean, "use_parallel", "run in several processes (under msrun)"),
    ("load_checkpoint", str, "load_checkpoint", "checkpoint file or folder"),
    ("src_strategy_path_or_dir", str, "src_strategy_path_or_dir", "strategy of load_checkpoint"),
    ("auto_trans_ckpt", _boolean, "auto_trans_ckpt", "transform load_checkpoint to this run's layout"),
    ("transform_process_num", int, "transform_process_num", "processes of that transformation"),
    ("only_save_strategy", _boolean, "only_save_strategy", "write the strategy file and leave"),
    ("resume_training", _boolean_or_name, "resume_training", "resume, from the newest or a named checkpoint"),
    ("strategy_load_checkpoint", str, "parallel.strategy_ckpt_load_file", "strategy file to load"),
    ("remote_save_url", str, "remote_save_url", "where outputs are copied to"),
    ("profile", _boolean, "profile", "profile the run"),
    ("train_dataset_dir", str, "train_dataset.data_loader.dataset_dir", "training data: file or folder"),
    ("eval_dataset_dir", str, "eval_dataset.data_loader.dataset_dir", "evaluation data: file or folder"),
    ("do_sample", _boolean, "model.model_config.do_sample", "sample instead of greedy decoding"),
    ("epochs", int, "runner_config.epochs", "training epochs"),
    ("batch_size", int, "runner_config.batch_size", "sequences per device and step"),
    ("gradient_accumulation_steps", int, "runner_config.gradient_accumulation_steps", "micro steps per update"),
    ("sink_mode", _boolean, "runner_config.sink_mode", "sink several steps to the device"),
    ("output_dir", str, "output_dir", "folder of all outputs"),
    ("trust_remote_code", _boolean, "trust_remote_code", "for Hugging Face tokenizers"),
)


def build_parser() -> argparse.ArgumentParser:
    """The options of upstream's run_mindformer.py."""
    parser = argparse.ArgumentParser(
        prog="run_mindformer",
        allow_abbrev=False,
        description="Train, evaluate or predict with MindFormers from a YAML configuration.",
        epilog="Any other key of the YAML is set by its dotted name: --runner_config.epochs 3 or --a.b=value.",
    )
    parser.add_argument("--config", required=True, help="YAML configuration")
    parser.add_argument("--run_mode", choices=RUN_MODES, help="what to do; default: the YAML's run_mode")
    parser.add_argument("--register_path", help="folder of classes that the YAML loads by auto_register")
    parser.add_argument(
        "--options", nargs="+", type=_key_value, metavar="KEY=VALUE", help="override keys by their dotted names"
    )
    parser.add_argument("--num_samples", type=int, help="use so many samples of each data set")
    parser.add_argument("--predict_data", nargs="+", metavar="TEXT", help="prompts, or a file with one a line")
    parser.add_argument("--predict_batch_size", type=int, help="prompts per batch")
    parser.add_argument("--modal_type", nargs="+", help="not for text models: refused")
    parser.add_argument("--adapter_id", nargs="+", help="LoRA adapter of each prompt (slora)")
    for name, kind, _, text in OVERRIDES:
        parser.add_argument(f"--{name}", type=kind, help=text)
    return parser


def _require_log_folder():
    """MindFormers opens its logs while it is imported, and goes on with a traceback where it cannot."""
    logs = os.environ.get("LOG_MF_PATH") or os.path.join(os.environ.get("LOCAL_DEFAULT_PATH") or "output", "log")
    if not can_be_written(logs):
        raise InputError(
            f"{os.path.abspath(logs)}: cannot be written, and MindFormers keeps its logs there; start in another folder"
            ", or set LOCAL_DEFAULT_PATH to one"
        )


def read_config(argv: Sequence[str] | None = None) -> MindFormerConfig:
    """Reads the YAML and applies all overrides of a command line, by default this process's.

    Raises:
        InputError: a missing or broken YAML, a key whose section does not exist, a misspelt option, a leftover option
            without a value.
    """
    args, leftovers, written = _parse(argv)

    from mindformers.tools.register import MindFormerConfig

    try:
        config = MindFormerConfig(args.config, **({"run_mode": args.run_mode} if args.run_mode else {}))
    except (KeyError, TypeError, ValueError, OSError) as error:  # a section of a wrong type or with unknown keys
        from mindformers_glm32k.preflight import findings_of_yaml

        found = findings_of_yaml(normalize_values(written), args.run_mode)
        lines = [finding.line() for finding in found if finding.severity == "error"]
        reason = str(error.args[0]) if len(error.args) == 1 else str(error)
        raise InputError(f"{args.config}: {'; '.join([reason, *lines])}") from error
    normalize_values(config)
    for section in _NEVER_NULL:  # MindFormers replaces a null by its defaults, such as another learning rate
        if section in written and written[section] is None:
            config[section] = None
    reject_misspelt(leftovers, config, [name for name in vars(args) if name != "config"])
    _override(config, args)
    path = config.load_checkpoint
    if isinstance(path, str) and path and not os.path.exists(path):
        raise InputError(
            f"load_checkpoint {path}: no such file or folder (seen from {os.getcwd()}); training leaves checkpoints in "
            "output/checkpoint/rank_N"
        )
    if config.run_mode not in RUN_MODES:
        raise InputError(f"{args.config}: run_mode is {config.run_mode!r}, allowed are {', '.join(RUN_MODES)}")
    if config.run_mode.startswith("predict"):
        config.input_data = _prompts(args.predict_data)
        if args.predict_batch_size is not None:
            config.predict_batch_size = args.predict_batch_size
        config.adapter_id = args.adapter_id
    for key, text in leftovers:
        set_key(config, key, parse_value(text), f"--{key}")
    return config


def read_prediction_config(
    arguments: Sequence[str], checkpoint: str | None, tokenizer: str | os.PathLike
) -> MindFormerConfig:
    """The configuration of a prediction: --config YAML and overrides, with a checkpoint (None: the YAML's) and a
    tokenizer.model; otherwise as `read_config`.
    """
    more = ["--load_checkpoint", checkpoint] if checkpoint else []
    vocabulary = ["--processor.tokenizer.vocab_file", str(tokenizer)]
    return read_config([*arguments, "--run_mode", "predict", *vocabulary, *more])


def read_as_written(argv: Sequence[str] | None = None) -> tuple[dict, dict]:
    """The YAML as it is written, mistakes included and without MindFormers' defaults, for `glm32k check`.

    Returns:
        the YAML, and a copy with the overrides of the command line.

    Raises:
        InputError: a missing or broken YAML, or an override of a section that does not exist.
    """
    args, leftovers, written = _parse(argv)
    if "base_config" in written:
        from mindformers.tools.register import MindFormerConfig

        written = MindFormerConfig(args.config).to_dict()
    normalize_values(written)
    config = copy.deepcopy(written)
    if args.run_mode:
        config["run_mode"] = args.run_mode
    if config.get("run_mode") not in RUN_MODES:
        raise InputError(f"{args.config}: run_mode is {config.get('run_mode')!r}, allowed are {', '.join(RUN_MODES)}")
    for section in ("context", "runner_config", "parallel", "parallel_config"):
        config.setdefault(section, {})  # MindFormers has defaults for these
    _override(config, args)
    for key, text in leftovers:
        set_key(config, key, parse_value(text), f"--{key}")
    return written, config


def _parse(argv):
    """The known options, the (key, text) of the others, and the YAML's content."""
    args, rest = build_parser().parse_known_args(argv)
    if args.modal_type:
        raise InputError("--modal_type: GLM32K is a text model; leave the option out")
    written = _read_yaml(args.config)
    leftovers = pairs(rest)
    _require_log_folder()
    if args.register_path:
        os.environ["REGISTER_PATH"] = os.path.abspath(args.register_path)
        sys.path.append(os.path.abspath(args.register_path))
    return args, leftovers, written


def _override(config, args):
    for name, _, key, _ in OVERRIDES:
        value = getattr(args, name)
        if value is not None:
            set_key(config, key, value, f"--{name}")
    for key, text in args.options or ():
        set_key(config, key, parse_value(text), f"--options {key}")
    if args.num_samples is not None:
        for section in ("train_dataset", "eval_dataset"):
            if config.get(section) and config[section].get("data_loader"):
                set_key(config, f"{section}.data_loader.num_samples", args.num_samples, "--num_samples")


def _read_yaml(path):
    """The YAML's content; raises InputError for files that MindFormers ignores (another suffix) or fails on (no mapping
    in it)."""
    require_file(path, "--config", f"Give a YAML file (relative paths are seen from {os.getcwd()}).")
    if not path.endswith((".yaml", ".yml")):
        raise InputError(f"--config {path}: MindFormers reads files that end in .yaml or .yml; rename it")
    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise InputError(
            f"--config {path}: a mapping of keys to values is needed, found "
            f"{'comments alone' if found is None else type(found).__name__}"
        )
    return found


def _prompts(predict_data):
    if predict_data is None:
        return None
    texts = [text.replace(r"\n", "\n") for text in predict_data]
    return texts if len(texts) > 1 else texts[0]


def run(config: MindFormerConfig) -> list[dict] | None:
    """Runs what the configuration asks for through MindFormers' Trainer, as upstream's launcher does.

    Returns:
        the answers of a prediction, as GLM32KTrainer.predict returns them.
    """
    from mindformers import Trainer, build_context

    from mindformers_glm32k.compat import barrier_on_cpu, run_mode_restored, set_output_path
    from mindformers_glm32k.preflight import config_findings, is_for_this_plugin, raise_errors, weights_findings

    if is_for_this_plugin(config):
        found = config_findings(config, config.run_mode)
        raise_errors([*found, *weights_findings(config, config.run_mode)])
        for finding in found:
            logging.getLogger("mindformers").warning("%s", finding.line())
    if not can_be_written(os.getcwd()):
        raise InputError(
            f"{os.getcwd()}: cannot be written, and MindFormers writes modules, rank_N and answers into the folder in "
            "which it is started; start in another"
        )
    if config.use_parallel and not any(name in os.environ for name in _LAUNCHERS):
        raise InputError(
            "use_parallel: True needs several processes; start them with scripts/msrun_launcher.sh, or "
            "set use_parallel: False"
        )
    if not config.use_parallel and int(os.environ.get("MS_WORKER_NUM", 1)) > 1:
        raise InputError(
            "one of several processes, and use_parallel is False: each would do the whole work and write "
            "the same files; add --use_parallel True"
        )
    set_output_path(config.output_dir)
    trains = config.run_mode in ("train", "finetune")
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_mode_restored())
        build_context(config)
        if is_for_this_plugin(config):
            from mindformers_glm32k.training.resume import choose_checkpoint
            from mindformers_glm32k.training.stop import hold_output_folder

            if trains:
                stack.enter_context(hold_output_folder(config.output_dir))
            choose_checkpoint(config)
        trainer = Trainer(config)
        stack.enter_context(barrier_on_cpu())  # MindFormers' Trainer itself waits at a barrier before it resumes
        if trains:
            trainer.train()
        elif config.run_mode == "eval":
            trainer.evaluate(eval_checkpoint=config.load_checkpoint)
        else:
            return trainer.predict(
                predict_checkpoint=config.load_checkpoint,
                input_data=config.input_data,
                batch_size=config.predict_batch_size,
                adapter_id=config.adapter_id,
            )
    return None


def _end_after_a_moment():
    """Ends an interrupted process in which nothing waits for the end of a step, although MindSpore still computes."""
    time.sleep(_MOMENT)
    os._exit(128 + signal.SIGINT)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the exit status."""
    if argv is None:
        pass_on_interrupts(_end_after_a_moment)
    try:
        run(read_config(argv))
    except (InputError, CommandFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        if argv is None:
            os._exit(128 + signal.SIGINT)  # a half-loaded MindSpore aborts when Python ends
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
