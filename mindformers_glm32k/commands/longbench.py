"""LongBench: predict its samples, score the answers as its eval.py does, report them beside other runs."""

from __future__ import annotations

import argparse
import sys

from mindformers_glm32k.errors import InputError

TAKES_OVERRIDES = True  # predict's options that are not listed here are run_mindformer's

_EXAMPLES = """examples (glm32k longbench ACTION --help lists the options):
  glm32k longbench predict --config predict_glm32k.yaml --load_checkpoint glm32k.ckpt --data data.zip
      --prompt_config_file dataset2prompt.json --tokenizer tokenizer.model --output_dir OUT
  glm32k longbench predict --base_url http://localhost:8000/v1 --data data.zip
      --prompt_config_file dataset2prompt.json --tokenizer tokenizer.model --output_dir OUT
  glm32k longbench score --predictions OUT --data data.zip
  glm32k longbench report --predictions OUT --compare base=OTHER_OUT
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions and their options."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _EXAMPLES
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name, text, *groups):
        command = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        for group in groups:
            group(command)

    action("predict", "answer the prompts of pred.py; goes on where it was interrupted", _predicting)
    action("score", "score predictions as LongBench's eval.py does; writes scores.json", _folder, _scoring)
    action(
        "report",
        "write report.html and report.md: scores beside published ones and runs",
        _folder,
        _scoring,
        _reporting,
    )
    action("all", "predict, score and report", _predicting, _scoring, _reporting)


def _predicting(parser):
    parser.add_argument("--data", required=True, help="LongBench's folder or data.zip, or one .jsonl file of it")
    parser.add_argument("--prompt_config_file", help="LongBench's config/dataset2prompt.json")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.model, or its folder")
    parser.add_argument("--output_dir", required=True, help="folder of the predictions, DATASET.jsonl")
    parser.add_argument("--datasets", help="names with commas, such as hotpotqa,trec_e. Default: all in the data")
    parser.add_argument("--max_length", type=int, help="tokens of a prompt. Default: 31500 as pred.py, or what fits")
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=64,
        help="tokens of answers to data sets that LongBench does not have. Default %(default)s",
    )
    parser.add_argument(
        "--stop_at_roles",
        action="store_true",
        help="end answers at <|user|> and <|observation|>, too, as a chat does and pred.py does not",
    )
    parser.add_argument("--limit", type=int, help="at most so many samples, of each data set the same number")
    parser.add_argument(
        "--shard", default="0/1", metavar="K/N", help="of N processes this is number K, from 0. Default %(default)s"
    )
    local = parser.add_argument_group("with this plugin")
    local.add_argument("--config", help="YAML for prediction; other options are overrides, as for run_mindformer")
    local.add_argument("--load_checkpoint", help="checkpoint file or folder. Default: random weights")
    local.add_argument("--batch_size", type=int, help="prompts answered together. Default: that of the YAML")
    server = parser.add_argument_group("with a server that has OpenAI's interface (OPENAI_API_KEY is sent if set)")
    server.add_argument("--base_url", help="such as http://localhost:8000/v1")
    server.add_argument("--model", help="the served name. Default: the first that the server lists")
    server.add_argument(
        "--send",
        choices=("ids", "text"),
        default="ids",
        help="the prompt's token ids, or its text for servers that take no ids. Default %(default)s",
    )
    server.add_argument("--standard", action="store_true", help="leave options that OpenAI's interface lacks out")
    server.add_argument("--concurrency", type=int, default=16, help="requests at a time. Default %(default)s")
    server.add_argument("--timeout", type=float, default=600.0, help="seconds for an answer. Default %(default)s")
    server.add_argument("--retries", type=int, default=8, help="attempts after the first. Default %(default)s")


def _folder(parser):
    parser.add_argument("--predictions", required=True, help="folder of DATASET.jsonl, as predict or pred.py writes it")
    parser.add_argument("--data", help="LongBench's folder or zip: tells which rows are missing")


def _scoring(parser):
    parser.add_argument(
        "--manifest", help="of `glm32k preprocess` (ROWS.manifest.json): rows that were trained on are flagged"
    )
    parser.add_argument("--exclude_trained", action="store_true", help="leave the rows that were trained on out")


def _reporting(parser):
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="another run's predictions, to show beside; may be given several times",
    )
    parser.add_argument("--name", help="what to call this run. Default: the folder's name")
    parser.add_argument("--report_dir", help="folder of report.html and report.md. Default: that of the predictions")


def run(args: argparse.Namespace) -> int:
    """Runs the action; returns the exit status."""
    if args.overrides and not getattr(args, "config", None):
        raise InputError(f"unknown option {args.overrides[0]}; glm32k longbench {args.action} --help lists all")
    return {"predict": _predict, "score": _score, "report": _report, "all": _all}[args.action](args)


def _all(args):
    status = _predict(args)
    if status:
        return status
    args.predictions = args.output_dir
    return _report(args, _scores_said(args))


def _predict(args):
    from pathlib import Path

    from mindformers_glm32k.checks import shard_of
    from mindformers_glm32k.data.longbench import PromptTemplates
    from mindformers_glm32k.longbench import predict, samples
    from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

    if bool(args.config) == bool(args.base_url):
        raise InputError("give --config YAML to answer with this plugin, or --base_url URL to ask a server")
    _check_numbers(args)
    number, count = shard_of(args.shard)
    file = Path(args.tokenizer)
    file = file / "tokenizer.model" if file.is_dir() else file
    vocabulary = Vocabulary(file)
    templates = PromptTemplates(args.prompt_config_file) if args.prompt_config_file else None
    entries = samples.scan(args.data, _datasets(args))
    expected = samples.counts(entries)
    engine = _engine(args, file, vocabulary)
    options = predict.fitted(
        predict.Options(args.max_length, args.max_new_tokens, args.stop_at_roles), engine.room, vocabulary, expected
    )
    try:
        done = predict.predict(
            samples.shard(samples.limited(entries, args.limit), number, count),
            expected,
            engine,
            predict.Prompts(vocabulary, templates, options),
            Path(args.output_dir),
            predict.stamp_of(engine, file, options),
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    for name, rows in done.items():
        print(f"{Path(args.output_dir) / name}.jsonl: {rows} of {expected[name]} samples")
    return 0


def _check_numbers(args):
    from mindformers_glm32k.checks import whole_number

    least = {"max_length": 2, "max_new_tokens": 1, "limit": 1, "batch_size": 1, "concurrency": 1, "retries": 0}
    for name, number in least.items():
        if getattr(args, name) is not None:
            whole_number(getattr(args, name), f"--{name}", number)
    if not args.timeout > 0:
        raise InputError(f"--timeout {args.timeout}: must be more than 0 seconds")


def _engine(args, tokenizer, vocabulary):
    if args.base_url:
        from mindformers_glm32k.longbench.engines import EndpointEngine

        return EndpointEngine(
            args.base_url,
            args.model,
            args.send,
            args.standard,
            args.concurrency,
            args.timeout,
            args.retries,
            vocabulary,
        )
    from mindformers_glm32k.longbench.engines import LocalEngine

    arguments = ["--config", args.config, *args.overrides]
    return LocalEngine(arguments, args.load_checkpoint, str(tokenizer), vocabulary, args.batch_size)


def _scored(args, folder):
    from mindformers_glm32k.data.longbench import Manifest
    from mindformers_glm32k.longbench import samples
    from mindformers_glm32k.longbench.score import score_folder

    if args.exclude_trained and not args.manifest:
        raise InputError("--exclude_trained: --manifest is needed, which says what was trained on")
    expected = samples.counts(samples.scan(args.data, _datasets(args))) if args.data else None
    manifest = Manifest.read(args.manifest) if args.manifest else None
    return score_folder(folder, expected, manifest, args.exclude_trained)


def _datasets(args):
    names = getattr(args, "datasets", None)  # score and report take all
    return names.split(",") if names else None


def _score(args):
    _scores_said(args)
    return 0


def _scores_said(args):
    from mindformers_glm32k.longbench import summary

    scores = _scored(args, args.predictions)
    path = scores.write()
    print(summary.table(scores))
    for line in scores.warnings():
        print(line, file=sys.stderr)
    print(f"scores: {path}")
    return scores


def _report(args, mine=None):
    from pathlib import Path

    from mindformers_glm32k.longbench import write_report

    named = {args.name or _name(args.predictions): args.predictions}
    for text in args.compare:
        name, equals, folder = text.partition("=")
        name, folder = (name, folder) if equals else (_name(text), text)
        if name in named:
            raise InputError(f"--compare {text}: two runs are called {name!r}; write NAME={folder}")
        named[name] = folder
    runs = {}
    for name, folder in named.items():
        runs[name] = mine if mine and not runs else _scored(args, folder)
        if runs[name] is not mine:
            for line in runs[name].warnings():
                print(f"{name}: {line}", file=sys.stderr)
    html, markdown = write_report(runs, Path(args.report_dir or args.predictions))
    print(f"report: {html}\n        {markdown}")
    return 0


def _name(folder):
    from pathlib import Path

    return Path(folder).resolve().name


if __name__ == "__main__":
    from mindformers_glm32k.commands import run_command

    sys.exit(run_command(sys.modules[__name__], "glm32k longbench"))
