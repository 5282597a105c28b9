"""Steps that both directions of a conversion share."""

import contextlib
import os

import numpy as np

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.weights.checkpoint import open_source
from mindformers_glm32k.weights.dtypes import cast, check_dtype
from mindformers_glm32k.weights.plan import weights_of


def load_hf_weights(path):
    """Iterates over the weights of a Hugging Face checkpoint, one tensor in memory at a time.

    Args:
        path (str | os.PathLike): as input_path of convert.

    Yields:
        tuple[str, numpy.ndarray]: name as in the file, values; bf16 is widened to float32, which is exact. Buffers
        are skipped.
    """
    weights, _ = weights_of(open_source(path))
    for tensor in weights.values():
        values = tensor.load()
        yield tensor.name, cast(values, "bf16", "fp32") if tensor.dtype == "bf16" else np.asarray(values)


def open_weights(input_path, dtype, workers):
    """Checks the common options and lists what there is to convert.

    Returns:
        tuple[Source, dict[Slot, StoredTensor], list[str]]: the source, its weights, the names that are skipped.

    Raises:
        InputError
    """
    if dtype is not None:
        check_dtype(dtype)
    if type(workers) is not int or workers < 1:
        raise InputError(f"workers {workers!r}: a number of threads, 1 or more, is needed")
    source = open_source(input_path)
    return (source, *weights_of(source))


@contextlib.contextmanager
def open_job(job):
    """Enters a Job; a folder or disk that cannot be written becomes an InputError."""
    try:
        with job:
            yield job
    except OSError as error:
        raise InputError(f"{error.filename or job.destination}: cannot be written ({error.strerror})") from error


def refuse_overwriting(source, outputs):
    """Raises InputError when one of the output paths is a file that is being read."""
    read = {os.path.realpath(file) for file in source.files}
    for path in outputs:
        if os.path.realpath(path) in read:
            raise InputError(f"{path}: is one of the files to convert; choose another output path")
