"""Samples as rows of tokens: from the token cache where they are in it, else tokenized, in several threads."""

import hashlib
import json
import os
import threading
from collections import deque
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mindformers_glm32k.data.line_index import cache_folder
from mindformers_glm32k.data.token_cache import TokenCache, remove_outdated
from mindformers_glm32k.errors import InputError

CACHED_FROM = 8 << 20  # bytes of data; less is tokenized in a few seconds
_CHUNK = 64  # samples between two looks at what other ranks have done
_EDGE = 1 << 16  # bytes at a file's beginning and end that belong to its identity
# What decides, beside data and options, which tokens a sample has: another version of it has another cache.
_CODE = (
    "tokenizer/chat_format.py",
    "tokenizer/vocabulary.py",
    "data/jsonl.py",
    "data/formats.py",
    "data/prompts.py",
    "data/encode.py",
    "data/sources.py",
    "data/truncation.py",
)


class TokenizedSamples:
    """Unpadded rows by the sample's number.

    Args:
        samples (SampleSource): the samples.
        builder (RowBuilder): makes rows of them.
        tokenizer (GLM32KTokenizer): the builder's.
        cache (TokenCache | None): where rows are kept.
    """

    def __init__(self, samples, builder, tokenizer, cache=None):
        self.samples, self._builder, self.tokenizer, self.cache = samples, builder, tokenizer, cache

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, sample):
        """Row of a sample, without padding; InputError, with the place, where none can be made."""
        row = self.cache.get(sample) if self.cache else None
        if row is None:
            try:
                row = self._builder.tokens(self.samples[sample])
            except InputError as error:
                place = self.samples.place(sample)
                raise (
                    error if str(error).startswith(place.partition(",")[0]) else InputError(f"{place}: {error}")
                ) from error
            if self.cache:
                self.cache.put(sample, row)
        return row

    def all_lengths(self, threads, start=0):
        """Tokens of every sample's row; what is not in the cache is tokenized, with a progress bar.

        Args:
            threads (int): that tokenize at once.
            start (int): the sample to begin with. Ranks that begin at different ones share the work through the cache.

        Returns:
            np.ndarray: int32 (len(self),).
        """
        lengths = self.cache.lengths() if self.cache else np.full(len(self), -1, np.int32)
        missing = np.flatnonzero(lengths < 0)
        missing = np.roll(missing, -int(np.searchsorted(missing, start)))
        with (
            ThreadPoolExecutor(threads) as pool,
            tqdm(
                total=len(missing),
                unit="row",
                desc="lengths for packing",
                disable=None if len(missing) > 1000 else True,
            ) as progress,
        ):
            for chunk in (missing[at : at + _CHUNK * threads] for at in range(0, len(missing), _CHUNK * threads)):
                known = self.cache.lengths_of(chunk) if self.cache else np.full(len(chunk), -1, np.int32)
                lengths[chunk] = known
                rest = chunk[known < 0]
                lengths[rest] = list(pool.map(lambda sample: len(self[int(sample)].input_ids), rest))
                progress.update(len(chunk))
        return lengths


def in_order(function, items, threads, ahead):
    """Yields function(item) of each item, in order; some that come next are computed meanwhile.

    Args:
        function (Callable): called in a thread.
        items (Iterable): what it is called with.
        threads (int): threads.
        ahead (int): calls that are begun before they are asked for, at most.
    """

    def call(item):
        if not threading.main_thread().is_alive():
            raise CancelledError  # the program ends, and would wait for all that has been begun
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
        # The threads are not waited for. A generator that is left behind is closed by the garbage collector, which may
        # run in any thread, also where that holds threading's own locks: waiting there is for ever.
        pool.shutdown(wait=False, cancel_futures=True)


def token_cache(samples, tokenizer, settings, section, configured, cache_dir, log):
    """The token cache of a data set.

    Args:
        samples (SampleSource): the samples.
        tokenizer (GLM32KTokenizer): makes tokens of them.
        settings (dict): JSON-able; how rows are made of the samples.
        section (dict | None): the data_loader section, for the options that decide what a sample is; None where
            there is only a finished loader, whose options are not known: then nothing is cached.
        configured (bool | None): whether to cache; None: from CACHED_FROM bytes of data on.
        cache_dir (str | os.PathLike | None): see `cache_folder`.
        log: has info and warning(format, …).

    Returns:
        TokenCache | None
    """
    paths = [Path(path).resolve() for path, _, _ in samples.files()]
    states = [os.stat(path) for path in paths]
    if configured is False or section is None:
        return None
    if configured is None and sum(state.st_size for state in states) < CACHED_FROM:
        return None
    options = {name: section[name] for name in sorted(section) if name not in _WITHOUT_EFFECT}
    files = [[str(path), state.st_size, state.st_mtime_ns] for path, state in zip(paths, states)]
    prompts = section.get("prompt_config_file")
    key = {
        "files": files,
        "edges": [_edges(path) for path in paths],
        "settings": settings,
        "data_loader": json.loads(json.dumps(options, default=str)),
        "prompts": _digest(Path(prompts).read_bytes()) if prompts else None,
        "vocabulary": _digest(tokenizer.vocabulary.model.serialized_model_proto()),
        "code": _code(),
    }
    try:
        folder = cache_folder(paths[0], cache_dir)
        for name in remove_outdated(folder):
            log.info("removed %s/%s: its data has changed", folder, name)
        cache = TokenCache(folder, paths[0].name, key, len(samples), tokenizer.vocab_size, log)
    except OSError as error:
        log.warning("tokens are not cached: %s", error)
        return None
    log.info("tokens are kept in %s; set cache_tokens: False to keep none", cache.folder)
    return cache


# keys of the data_loader section on which tokens do not depend
_WITHOUT_EFFECT = (
    "dataset_dir",
    "shuffle",
    "seed",
    "num_shards",
    "shard_id",
    "column_names",
    "phase",
    "version",
    "num_parallel_workers",
    "python_multiprocessing",
    "cache_dir",
    "prompt_config_file",
)


def _edges(path):
    """str: digest of a file's first and last bytes; its size and time are in the key, too."""
    with open(path, "rb") as file:
        head = file.read(_EDGE)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _EDGE))
        return _digest(head + file.read(_EDGE))


def _code():
    package = Path(__file__).resolve().parents[1]
    return _digest(b"\0".join((package / name).read_bytes() for name in _CODE))


def _digest(content):
    return hashlib.sha256(content).hexdigest()[:32]
