"""Write a small vocabulary and long-context tasks in the LongBench layout.

    glm32k make-data --output_dir DIR

writes DIR/tokenizer.model, DIR/train.jsonl, DIR/eval.jsonl and DIR/dataset2prompt.json. Each row has the fields of
LongBench (input, context, answers, length, dataset, language, all_classes, _id) and, for the AdGen layout, the whole
prompt as `content` and the answer as `summary`. The same options give the same files, byte for byte.
"""

import contextlib
import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path

MAX_SEQ_LENGTH = 32768
MAX_TARGET_LENGTH = 15  # tokens of the answer in finetune_glm32k_tiny_cpu.yaml; the end token comes on top
_ATTEMPTS = 1000  # to make a row that is not there yet


def add_arguments(parser):
    """Adds the command's options to an argparse parser."""
    parser.add_argument("--output_dir", required=True, help="folder to write to; made when it is not there")
    parser.add_argument(
        "--seq_length",
        type=int,
        default=256,
        help="tokens of a row, prompt, answer and end token "
        f"together: rows come close to it; at most {MAX_SEQ_LENGTH}. Default %(default)s",
    )
    parser.add_argument("--samples", type=int, default=2000, help="rows to train on. Default %(default)s")
    parser.add_argument("--eval_samples", type=int, default=40, help="rows held out. Default %(default)s")
    parser.add_argument(
        "--facts", type=int, default=4, help="most facts in a context, 1 to 8: more are harder. Default %(default)s"
    )
    parser.add_argument(
        "--filler",
        type=float,
        default=0.5,
        help="share of the context that states no facts, 0.0 to 0.99: more is harder. Default %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="determines vocabulary and rows. Default %(default)s")


def run(args):
    """Writes the files and says which; see the module's docstring.

    Args:
        args (argparse.Namespace): as `add_arguments` declares.

    Raises:
        InputError: an option out of its range; nothing is written then.
    """
    from mindformers_glm32k.data import synthetic as retrieval
    from mindformers_glm32k.tokenizer.vocabulary import Vocabulary

    folder = Path(args.output_dir)
    _check(args, folder)
    # The vocabulary is needed to see whether a row fits, and nothing may be written before that is known.
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary_file = Path(scratch) / "tokenizer.model"
        retrieval.train_vocabulary(retrieval.sentences(args.seed), vocabulary_file)
        vocabulary = Vocabulary(vocabulary_file)
    task = _task(args, vocabulary)

    seen = set()  # digests of contexts: no row is written twice, and none that is held out is trained on
    with contextlib.ExitStack() as stack:  # all files or none

        def new(name):
            return stack.enter_context(atomic_path(folder / name))

        vocabulary.save(new("tokenizer.model"))
        _write_prompts(new("dataset2prompt.json"), {retrieval.DATASET: retrieval.TEMPLATE})
        for name, rows in (("eval", args.eval_samples), ("train", args.samples)):
            _write_rows(new(f"{name}.jsonl"), name, task, rows, random.Random(f"{args.seed}/{name}"), seen)
    print(_summary(args, folder, len(vocabulary)))


def _check(args, folder):
    problems = []
    if folder.exists() and not folder.is_dir():
        problems.append(f"--output_dir {folder}: is a file; give a folder")
    for name, low, high in (
        ("seq_length", 1, MAX_SEQ_LENGTH),
        ("samples", 1, None),
        ("eval_samples", 1, None),
        ("facts", 1, 8),
        ("filler", 0, 0.99),
        ("seed", 0, None),
    ):
        value = getattr(args, name)
        if not low <= value <= (value if high is None else high):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            problems.append(f"--{name} {value}: must be {limits}")
    if problems:
        raise InputError("; ".join(problems))


def _task(args, vocabulary):
    """The task with contexts that fill a row of --seq_length tokens."""
    from mindformers_glm32k.data.synthetic import RetrievalTask
    from mindformers_glm32k.tokenizer import chat_format as chat

    empty = [{"role": "user", "content": ""}]
    around = len(chat.conversation_ids(vocabulary, empty, add_generation_prompt=True)) + MAX_TARGET_LENGTH + 1
    try:
        return RetrievalTask(
            lambda text: len(vocabulary.encode(text)), args.seq_length - around, args.facts, args.filler
        )
    except ValueError as error:
        raise InputError(
            f"--seq_length {args.seq_length}: too short, {error} and {around} go to the chat format and the answer"
        ) from error


def _write_prompts(path, prompts):
    path.write_text(json.dumps(prompts, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_rows(path, name, task, rows, rng, seen):
    from tqdm import tqdm

    with open(path, "w", encoding="utf-8") as file:
        for _ in tqdm(range(rows), desc=f"{name}.jsonl", unit="row", disable=None):
            file.write(json.dumps(_new_row(task, rng, seen), ensure_ascii=False) + "\n")


def _new_row(task, rng, seen):
    from mindformers_glm32k.data.synthetic import DATASET, TEMPLATE

    for _ in range(_ATTEMPTS):
        record = task.record(rng)
        content = TEMPLATE.format(**record)
        digest = hashlib.sha256(content.encode("utf-8")).digest()[:16]
        if digest not in seen:
            seen.add(digest)
            return {
                "content": content,
                "summary": record["answers"][0],
                **record,
                "length": len(record["context"].split()),
                "dataset": DATASET,
                "language": "en",
                "all_classes": None,
                "_id": digest.hex(),
            }
    raise InputError(
        f"no {len(seen) + 1} different rows with these options; raise --seq_length, --filler or --facts, "
        "or ask for fewer --samples"
    )


def _summary(args, folder, vocabulary_size):
    source = args.seq_length - MAX_TARGET_LENGTH - 1
    lines = [
        f"{folder}:",
        f"  tokenizer.model      {vocabulary_size} ids, special tokens included",
        f"  train.jsonl          {args.samples} rows of up to {args.seq_length} tokens",
        f"  eval.jsonl           {args.eval_samples} rows, none of them in train.jsonl",
        "  dataset2prompt.json  their prompt, for the LongBench layout",
        "train on them:",
        "  run_mindformer --config research/glm32k/finetune_glm32k_tiny_cpu.yaml --run_mode finetune \\",
        f"      --train_dataset_dir {folder / 'train.jsonl'} \\",
        f"      --train_dataset.tokenizer.vocab_file {folder / 'tokenizer.model'}",
    ]
    if args.seq_length != 256:
        lines[-1] += " \\"
        lines += [
            f"      --model.model_config.seq_length {args.seq_length} --train_dataset.max_source_length {source} "
            f"--train_dataset.max_target_length {MAX_TARGET_LENGTH}"
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    from mindformers_glm32k.commands import run_command

    sys.exit(run_command(sys.modules[__name__], "glm32k make-data"))
