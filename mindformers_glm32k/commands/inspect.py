"""Print training rows as the model sees them, and compare their prompts with what prediction feeds."""

import sys

from mindformers_glm32k.errors import InputError

TAKES_OVERRIDES = True  # options that are not listed here are run_mindformer's


def add_arguments(parser):
    """Adds the command's options to an argparse parser."""
    parser.add_argument("--config", required=True, help="YAML of the run, as for run_mindformer")
    parser.add_argument(
        "-n",
        "--rows",
        type=int,
        default=3,
        help="rows to print, from the first of the first epoch on. Default %(default)s",
    )
    parser.add_argument("--dataset", choices=("train", "eval"), default="train", help="which data set. Default train")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="colours, or [weight|text]; by default colours on a terminal",
    )
    parser.add_argument("--whole", action="store_true", help="print all tokens, not only both ends of long stretches")
    parser.epilog = (
        "Any other option is run_mindformer's: --train_dataset_dir FILE, --train_dataset.packing True, "
        "--num_samples 100, …"
    )


def run(args):
    """Prints the rows; see the module's docstring.

    Args:
        args (argparse.Namespace): as `add_arguments` declares, with `overrides`.

    Raises:
        InputError: a configuration or data that a training run would refuse, too.
    """
    from mindformers_glm32k.data.dataset import check_vocabulary, first_rows
    from mindformers_glm32k.data.render import RowText
    from mindformers_glm32k.run_mindformer import read_config

    if args.rows < 1:
        raise InputError(f"-n {args.rows}: at least one row is needed")
    config = read_config(["--config", args.config, *args.overrides])
    section = f"{args.dataset}_dataset"
    kind = (config.get(f"{section}_task") or {}).get("type")
    if kind != "GLM32KDataset":
        raise InputError(f"{section}_task.type: {kind!r} is not GLM32KDataset, whose rows can be printed")
    rows, samples, tokenizer = first_rows(config[section])
    check_vocabulary(tokenizer, config.model.model_config.padded_vocab_size)
    color = sys.stdout.isatty() if args.color == "auto" else args.color == "always"
    writer = RowText(tokenizer.vocabulary, color, args.whole)
    print(writer.legend())
    for number, (numbers, documents, columns) in zip(range(1, args.rows + 1), rows):
        print("\n" + row_text(number, numbers, documents, columns, samples, writer, tokenizer, config))


def row_text(number, numbers, documents, columns, samples, writer, tokenizer, config):
    """One row with its documents and comparisons.

    Args:
        number (int): of the row, from 1.
        numbers (list[int]): the samples in it.
        documents (list[Row]): their tokens.
        columns (dict[str, np.ndarray]): the row as the model gets it.
        samples (SampleSource): all samples.
        writer (RowText): writes tokens.
        tokenizer (GLM32KTokenizer): for prompts as prediction feeds them.
        config (MindFormerConfig): of the run.

    Returns:
        str
    """
    from mindformers_glm32k.data.encode import IGNORED

    length, used = len(columns["input_ids"]), sum(len(document.input_ids) for document in documents)
    labels = columns["labels"]
    weights = columns.get("input_mask")
    if weights is None:
        weights = (labels != IGNORED).astype("float32")
    parts = [
        writer.border(
            f"row {number}: {len(documents)} document{'s' * (len(documents) != 1)}, {used} of {length} "
            f"tokens, {100 * (1 - used / length):.1f} % padding"
        )
    ]
    end = 0
    for place, (sample, document) in enumerate(zip(numbers, documents), 1):
        start, end = end, end + len(document.input_ids)
        learnt = labels[start:end] != IGNORED
        title = (
            f"document {place} of {len(documents)}: {samples.place(sample)}: {end - start} tokens, "
            f"{int(learnt.sum())} learnt"
        )
        if "input_mask" in columns and learnt.any():
            title += f", weight {weights[start:end][learnt].max():.4g} each"
        if document.dropped:
            title += f"; left out: {document.dropped}"
        elif document.seams:
            title += f"; cut from {document.tokens_before} tokens"
        parts += [
            writer.border(title),
            writer.document(
                columns["input_ids"][start:end],
                labels[start:end],
                weights[start:end],
                document,
                float(weights.max()) or 1.0,
            ),
        ]
        if not document.dropped:
            parts.append(
                writer.border("prediction: " + against_prediction(samples[sample], document, tokenizer, config, writer))
            )
    if end < length:
        parts.append(writer.border(f"padding: {length - end} tokens"))
    return "\n".join(parts)


def against_prediction(sample, document, tokenizer, config, writer):
    """What prediction would feed for the last answer of a sample, against the tokens before it in training.

    Args:
        sample (Sample | Chat | Text): the sample.
        document (Row): its tokens.
        tokenizer (GLM32KTokenizer): the data set's.
        config (MindFormerConfig): has model.model_config.
        writer (RowText): writes tokens.

    Returns:
        str: one paragraph.
    """
    import numpy as np

    from mindformers_glm32k.data.encode import IGNORED
    from mindformers_glm32k.data.formats import Sample, Text
    from mindformers_glm32k.data.render import comparison
    from mindformers_glm32k.generation.prompts import ChatPromptTokenizer

    if isinstance(sample, Text):
        return "plain text, which no prompt asks for"
    learnt = np.flatnonzero(document.labels != IGNORED)
    answer = tokenizer.vocabulary.special["<|assistant|>"]
    asked = [int(place) for place in learnt if document.input_ids[place] == answer]
    if not asked:
        return "no answer is asked for in what is left"
    training = document.input_ids[: asked[-1] + 1].tolist()
    model = config.model.model_config
    longest = model.seq_length - (model.get("max_new_tokens") or 1)
    if isinstance(sample, Sample):
        prompts = ChatPromptTokenizer(tokenizer.vocab_file, longest_prompt=1 << 40)
        prediction = list(prompts([sample.prompt])["input_ids"][0])
    else:
        *history, last = _before_the_last_answer(sample)
        prediction = tokenizer.build_chat_input(last["content"], history, last["role"])["input_ids"][0].tolist()
    text = comparison(training, [int(index) for index in prediction], document.seams, writer.text)
    if len(prediction) > longest:
        text += f"; prediction refuses it, for a prompt may have {longest} tokens in seq_length {model.seq_length}"
    return text


def _before_the_last_answer(sample):
    """list[dict]: the messages before the last turn that is learnt."""
    turns = sample.turns()
    last = max(place for place, turn in enumerate(turns) if turn.learnt)
    return [{"role": turn.role, "content": turn.content, "metadata": turn.metadata} for turn in turns[:last]]


if __name__ == "__main__":
    from mindformers_glm32k.commands import run_command

    sys.exit(run_command(sys.modules[__name__], "glm32k inspect"))
