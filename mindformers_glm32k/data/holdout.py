"""Splits by document, and what keeps scores on LongBench honest: its test sets in a model's training data."""
import hashlib

TEST_SETS = frozenset((
    "narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh", "hotpotqa", "2wikimqa", "musique", "dureader",
    "gov_report", "qmsum", "multi_news", "vcsum", "trec", "triviaqa", "samsum", "lsht", "passage_count",
    "passage_retrieval_en", "passage_retrieval_zh", "lcc", "repobench-p"))
LOUD = ("THE MODEL IS TRAINED ON LONGBENCH'S TEST SET. LongBench has test sets only: scores on the rows that were "
        "trained on say nothing about the model. ")


def document_key(context, seed=0):
    """bytes: 16 that stand for a document, the same for the same text (blank space at its ends apart) and seed.

    Args:
        context (str): the document.
        seed (int): other seeds give other, unrelated keys.
    """
    return hashlib.blake2b(context.strip().encode("utf-8", "surrogatepass"), digest_size=16,
                           key=str(seed).encode("ascii")).digest()


def is_held_out(context, fraction, seed=0):
    """bool: whether a document belongs to the held-out part. It depends on the text and the seed alone, so that rows
    of one document fall on the same side whatever file they are in, and however the files change around them.

    Args:
        context (str): the document.
        fraction (float): the part of all documents to hold out, 0 <= fraction <= 1, met on average.
        seed (int): determines which ones.
    """
    return int.from_bytes(document_key(context, seed)[:8], "big") < fraction * 2 ** 64


def is_test_set(dataset):
    """bool: whether a name is one of LongBench's data sets, or LongBench-E's (`trec_e`)."""
    return dataset in TEST_SETS or dataset[-2:] == "_e" and dataset[:-2] in TEST_SETS


def contamination_warning(source):
    """What to say when files are read for training.

    Args:
        source (SampleSource): the samples.

    Returns:
        list[str]: one loud sentence where LongBench's own files are among them, else nothing.
    """
    names = [path for path, dataset in source.longbench_files() if is_test_set(dataset)]
    return [LOUD + f"Files: {', '.join(names)}. `glm32k preprocess --holdout 0.1` splits them by document and notes "
                   "which rows were trained on."] if names else []
