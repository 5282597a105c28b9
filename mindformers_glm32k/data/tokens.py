"""Tokenized samples by index, and their token counts, which are kept on disk across runs."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mindformers_glm32k.data.encode import EncodedSample, SampleEncoder
from mindformers_glm32k.data.line_index import cache_folder, cache_name
from mindformers_glm32k.data.sources import SampleSource
from mindformers_glm32k.errors import InputError

KEPT_FROM = 8 << 20  # bytes of data; less is counted in a few seconds
CHECKED_LONG = 1 << 30  # bytes of long records whose answers are checked before a run, in some five seconds
_CHUNK = 64  # samples between two looks at what other ranks have done
# Code that determines a sample's token count, besides data and options: a change makes stored counts outdated.
_CODE = (
    "tokenizer/chat_format.py",
    "tokenizer/vocabulary.py",
    "data/jsonl.py",
    "data/chats.py",
    "data/formats.py",
    "data/records.py",
    "data/longbench.py",
    "data/encode.py",
    "data/sources.py",
    "data/truncation.py",
)
# Keys of the data_loader section that do not affect the tokens.
_WITHOUT_EFFECT = frozenset(
    "dataset_dir shuffle seed num_shards shard_id column_names phase version num_parallel_workers "
    "python_multiprocessing cache_dir prompt_config_file".split()
)


class TokenizedSamples:
    """Encoded samples by index, without padding; InputError, with file and line, where one cannot be encoded.

    Attributes:
        samples: the samples.
        tokenizer: the encoder's GLM32KTokenizer.
    """

    def __init__(self, samples: SampleSource, encoder: SampleEncoder, tokenizer: Any):
        self.samples, self._encoder, self.tokenizer = samples, encoder, tokenizer

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, sample: int) -> EncodedSample:
        try:
            return self._encoder.encode(self.samples[sample])
        except InputError as error:
            location = self.samples.location(sample)
            if str(error).startswith(location.partition(",")[0]):
                raise
            raise InputError(f"{location}: {error}") from error

    def check_answers(self, log: Any) -> None:
        """Raises InputError, before a run starts, for the first sample with answers that do not fit a sequence.

        Only long records are parsed, up to CHECKED_LONG bytes of them, and only those that may have too many tokens are
        tokenized; the rest of a larger data set is checked when it is read.

        Args:
            log: has info(format, …).
        """
        sizes = self.samples.sizes()
        long = np.flatnonzero(2 * sizes > self._encoder.sequence_length)  # 2: tools grow as indented JSON
        looked_at = long[np.cumsum(sizes[long]) <= CHECKED_LONG]
        if len(looked_at) < len(long):
            log.info(
                "the answers of %d of %d long records are checked when they are read",
                len(long) - len(looked_at),
                len(long),
            )
        for sample in tqdm(
            looked_at.tolist(), desc="long answers", unit="records", disable=sizes[looked_at].sum() < 1 << 28
        ):
            if not self._encoder.surely_fits(self.samples[sample]):
                self[sample]


def all_lengths(tokens: TokenizedSamples, threads: int, start: int = 0, kept: np.ndarray | None = None) -> np.ndarray:
    """Tokens of every sample, int32 (samples,); 0 where the truncation drops it.

    Args:
        tokens: the samples; those that `kept` does not have are tokenized, with a progress bar.
        threads: number of threads that tokenize.
        start: the sample to begin with. Ranks that begin at different ones share the work through `kept`.
        kept: what `kept_lengths` returns.
    """
    if kept is None:
        kept = np.zeros(len(tokens), np.int32)
    missing = np.flatnonzero(kept == 0)
    missing = np.roll(missing, -int(np.searchsorted(missing, start)))
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(
            total=len(missing), unit="sample", desc="lengths for packing", disable=None if len(missing) > 1000 else True
        ) as progress,
    ):
        for chunk in (missing[at : at + _CHUNK * threads] for at in range(0, len(missing), _CHUNK * threads)):
            rest = chunk[kept[chunk] == 0]  # another rank may have been here
            kept[rest] = [1 + length for length in pool.map(lambda sample: len(tokens[int(sample)].input_ids), rest)]
            progress.update(len(chunk))
    return np.array(kept) - 1


def kept_lengths(
    samples: SampleSource,
    tokenizer: Any,
    settings: dict,
    section: dict | None,
    configured: bool | None,
    cache_dir: str | os.PathLike | None,
    log: Any,
) -> np.ndarray | None:
    """The stored token counts of a data set, memory-mapped for reading and writing; None where none are kept.

    The file is a NumPy array, int32 (samples,): 0 (not counted yet), or the sample's tokens + 1. Each entry is right or
    0 at any time, so any number of processes may read and write it, and an interrupted one leaves what it has counted.
    The file's name is a hash of all that determines the counts; a file of an earlier state of the data is removed.

    Args:
        samples: the samples.
        tokenizer: the GLM32KTokenizer that encodes them.
        settings: options of the encoding, JSON-serializable, with `sequence_length`.
        section: the data_loader section, for the options that determine samples; None where only a built loader is
            given, of unknown options: then nothing is kept.
        configured: whether to keep lengths; None: from KEPT_FROM bytes of data on.
        cache_dir: see `cache_folder`.
        log: has info and warning(format, …).
    """
    paths = [Path(path).resolve() for path, _, _ in samples.files()]
    states = [os.stat(path) for path in paths]
    if configured is False or section is None:
        return None
    if configured is None and sum(state.st_size for state in states) < KEPT_FROM:
        return None
    prompts = section.get("prompt_config_file")
    key = {
        "files": [str(path) for path in paths],
        "samples": len(samples),
        "settings": settings,
        "data_loader": {name: section[name] for name in sorted(section) if name not in _WITHOUT_EFFECT},
        "prompts": _digest(Path(prompts).read_bytes()) if prompts else None,
        "vocabulary": _digest(tokenizer.vocabulary.model.serialized_model_proto()),
        "code": _code(),
    }
    state = json.dumps([(found.st_size, found.st_mtime_ns) for found in states])
    prefix = cache_name(paths[0], json.dumps(key, sort_keys=True, default=str))
    try:
        path = cache_folder(paths[0], cache_dir) / f"{prefix}-{_digest(state.encode())[:10]}.lengths.npy"
        for old in set(path.parent.glob(f"{glob.escape(prefix)}-*.lengths.npy")) - {path}:
            old.unlink(missing_ok=True)
            log.info("removed %s: its data has changed", old)
        kept = _mapped(path, len(samples), settings["sequence_length"])
        if kept is None:
            _make(path, len(samples))
            kept = _mapped(path, len(samples), settings["sequence_length"])
    except OSError as error:
        log.warning("lengths of the samples are not kept: %s", error)
        return None
    if kept is not None:
        log.info("lengths of the samples are kept in %s; set cache_tokens: False to keep none", path)
    return kept


def _mapped(path, size, longest):
    """The memory-mapped array; None where it is missing, or damaged and removed."""
    try:
        kept = np.load(path, mmap_mode="r+")
    except FileNotFoundError:
        return None
    except (ValueError, EOFError):
        kept = None
    if (
        kept is None
        or kept.shape != (size,)
        or kept.dtype != np.int32
        or not 0 <= kept.min() <= kept.max() <= longest + 1
    ):
        path.unlink(missing_ok=True)
        return None
    return kept


def _make(path, size):
    """Writes all zeros to disk: a full disk raises here and does not crash writes to the memory map."""
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.npy")
    try:
        np.save(draft, np.zeros(size, np.int32))
        os.link(draft, path)  # unlike a rename, does not replace another process's file
    except FileExistsError:
        pass
    finally:
        draft.unlink(missing_ok=True)


def _code():
    package = Path(__file__).resolve().parents[1]
    return _digest(b"\0".join((package / name).read_bytes() for name in _CODE))


def _digest(content):
    return hashlib.sha256(content).hexdigest()[:32]


def in_order(function: Callable, items: Iterable, threads: int, ahead: int) -> Iterator:
    """Yields function(item) for each item, in order; up to `ahead` later ones are computed meanwhile."""

    def call(item):
        if not threading.main_thread().is_alive():
            raise CancelledError  # the program exits, and would wait for all submitted calls
        return function(item)

    pool, waiting = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # No wait: an abandoned generator is closed by the garbage collector, which may run in a thread that holds
        # threading's own locks; waiting there would deadlock.
        pool.shutdown(wait=False, cancel_futures=True)
