"""Answers prompts with a GLM32K checkpoint, all in batches through `generate`; only the answers go to stdout.

MindFormers logs to stdout; its lines, and those of the libraries below it, go to the --log file instead.
"""
import argparse
import contextlib
import os
import sys
import time

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.run_mindformer import read_config, run

# the two prompts of ChatGLM3-6B-32K's model card
PROMPTS = ("晚上睡不着应该怎么办", "使用python编写快速排序代码")


def build_parser():
    """The options of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config_path", required=True, help="YAML for prediction, e.g. predict_glm32k.yaml")
    parser.add_argument("--load_checkpoint", required=True, help="checkpoint file, or folder with rank_N subfolders")
    parser.add_argument("--vocab_file", required=True, help="tokenizer.model")
    parser.add_argument("--batch_size", type=int, help="prompts per batch; default: as many as the cache has room for")
    parser.add_argument("--log", default="output/predict/predict.log", help="log file")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT",
                        help="prompts, or one file with a prompt a line; default: the two of the model card")
    return parser


def rows_in_cache(model_config):
    """How many rows of seq_length tokens the key-value cache can hold: num_blocks x block_size slots.

    Args:
        model_config (dict): the YAML's model_config.

    Returns:
        int | None: None without a cache.
    """
    if not model_config.use_past:
        return None
    return max(1, model_config.num_blocks * model_config.block_size // model_config.seq_length)


def answer(args):
    """Reads the configuration, runs the prediction.

    Args:
        args (argparse.Namespace): see `build_parser`.

    Returns:
        list[str]: one answer per prompt.
    """
    config = read_config(["--config", args.config_path, "--run_mode", "predict",
                          "--load_checkpoint", args.load_checkpoint,
                          "--processor.tokenizer.vocab_file", args.vocab_file])
    prompts = list(args.prompts or PROMPTS)
    config.input_data = prompts if len(prompts) > 1 else prompts[0]
    config.save_file = os.path.join(os.path.dirname(os.path.abspath(args.log)), "text_generation_result.txt")
    model_config = config.model.model_config
    limit = args.batch_size or rows_in_cache(model_config)
    config.predict_batch_size = model_config.batch_size = min(limit or len(prompts), len(prompts))
    return [text for result in run(config) for text in result["text_generation_text"]]


@contextlib.contextmanager
def logged(path):
    """While open, whatever any library of this process writes to stdout or stderr goes into the file `path`."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with open(path, "wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), kept):
                os.dup2(copy, number)
                os.close(copy)


def main(argv=None):
    """Entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    print(f"answering, log: {args.log}", file=sys.stderr)
    started = time.perf_counter()
    try:
        with logged(args.log):
            answers = answer(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for text in answers:
        print(text)
    print(f"{len(answers)} answers in {time.perf_counter() - started:.1f} s, loading included", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
