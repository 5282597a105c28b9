"""Tokenized samples on disk: written one by one while training goes on, by any number of processes, never half-valid.

    <name>-<digest of the key>.tokens/
        key.json         what the tokens depend on: data files, vocabulary, truncation, lengths, …
        table            one record a sample (RECORD): where its tokens are; zeros where they are not there yet
        segment-<n>      tokens, appended by the one process that made the file

A process that has tokenized a sample appends it to its own segment and then writes the sample's record. A record has a
check sum of itself and one of the tokens, so what an interrupted process left behind, or a disk spoiled, counts as
missing and is made again. Nothing is locked: two processes that tokenize the same sample write the same.

The table is memory-mapped and tokens are read with pread, so the memory that a process holds does not grow with the
data. One token takes 2 bytes where the vocabulary allows it.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import struct
import threading
import weakref
import zlib
from pathlib import Path

import numpy as np

from mindformers_glm32k.data.encode import IGNORED, Row
from mindformers_glm32k.files import atomic_path

VERSION = 1
RECORD = np.dtype(
    [
        ("segment", "<u4"),
        ("bytes", "<u4"),
        ("offset", "<u8"),
        ("tokens", "<u4"),
        ("crc", "<u4"),
        ("check", "<u4"),
        ("unused", "<u4"),
    ]
)
_FACTORS = {
    "segment": 0x9E3779B97F4A7C15,
    "bytes": 0xC2B2AE3D27D4EB4F,
    "offset": 0x165667B19E3779F9,
    "tokens": 0x27D4EB2F165667C5,
    "crc": 0x85EBCA77C2B2AE63,
}  # odd, so every bit counts
_HEAD = struct.Struct("<QIII")  # sample, tokens, spans of labels, bytes of the other fields
_FIELDS = tuple(field.name for field in dataclasses.fields(Row) if field.name not in ("input_ids", "labels"))


class TokenCache:
    """Rows of tokens by the sample's number.

    Args:
        folder (str | os.PathLike): where caches are kept.
        name (str): of the data, for people.
        key (dict): JSON-able; what the tokens depend on. Each key has a cache of its own. `files` in it, a list of
            (path, size, mtime in ns), are the data files; see `remove_outdated`.
        size (int): number of samples.
        vocabulary_size (int): ids are smaller.
        log: has warning(format, …).
    """

    def __init__(self, folder, name, key, size, vocabulary_size, log):
        self._size, self._log = size, log
        self._dtype = np.uint16 if vocabulary_size <= 1 << 16 else np.int32
        key = json.dumps(
            {
                "version": VERSION,
                "fields": _FIELDS,
                "samples": size,
                "bytes_per_token": np.dtype(self._dtype).itemsize,
                **key,
            },
            indent=1,
            sort_keys=True,
        )
        self.folder = Path(folder) / f"{name}-{hashlib.sha256(key.encode('utf-8')).hexdigest()[:16]}.tokens"
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.folder / "key.json") as temporary:
            temporary.write_text(key, encoding="utf-8")
        self._open()

    def _open(self):
        descriptor = os.open(self.folder / "table", os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(descriptor, self._size * RECORD.itemsize)  # new records are zeros; no change to one that is there
        self._descriptors = {0: descriptor}  # 0 is the table, others are segments
        self._closer = weakref.finalize(self, _close, self._descriptors)
        self._table = np.memmap(self.folder / "table", RECORD, "r", shape=(self._size,))
        self._own, self._own_process, self._end = 0, None, 0  # segment that this process appends to
        self._lock = threading.Lock()

    def __getstate__(self):
        return {name: getattr(self, name) for name in ("folder", "_size", "_log", "_dtype")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._open()

    def lengths(self):
        """np.ndarray: int32 (size,), tokens of each sample's row, -1 where it is not in the cache."""
        lengths = np.empty(self._size, np.int32)
        for start in range(0, self._size, 1 << 16):
            stop = min(start + (1 << 16), self._size)
            lengths[start:stop] = self.lengths_of(np.arange(start, stop))
        return lengths

    def lengths_of(self, samples):
        """np.ndarray: int32, the same of the samples with these numbers (int array)."""
        records = self._table[samples]
        good = (records["segment"] > 0) & (records["check"] == _check(samples, records))
        return np.where(good, records["tokens"].astype(np.int32), np.int32(-1))

    def get(self, sample):
        """Row: the tokens of a sample; None where they are not there or damaged."""
        record = self._table[sample]
        if not record["segment"] or record["check"] != _check(np.uint64(sample), record):
            return None
        payload = self._read(int(record["segment"]), int(record["offset"]), int(record["bytes"]))
        if payload is None or zlib.crc32(payload) != record["crc"]:
            return None
        owner, tokens, spans, others = _HEAD.unpack_from(payload)
        if owner != sample or tokens != record["tokens"]:
            return None
        at = _HEAD.size
        borders = np.frombuffer(payload, "<i4", 2 * spans, at).reshape(-1, 2)
        at += borders.nbytes
        ids = np.frombuffer(payload, self._dtype, tokens, at).astype(np.int32)
        values = json.loads(payload[at + tokens * np.dtype(self._dtype).itemsize :])
        labels = np.full(tokens, IGNORED, np.int32)
        for start, stop in borders:
            labels[start:stop] = ids[start + 1 : stop + 1]
        return Row(
            ids,
            labels,
            **{name: tuple(value) if isinstance(value, list) else value for name, value in zip(_FIELDS, values)},
        )

    def put(self, sample, row):
        """Keeps a row; not one whose labels are no tokens of its own, nor when the disk is full (with a warning).

        Args:
            sample (int): its number.
            row (Row): not padded.
        """
        ids, labels = row.input_ids, row.labels
        learnt = np.flatnonzero(labels != IGNORED)
        if len(learnt) and (learnt[-1] + 1 >= len(ids) or (labels[learnt] != ids[learnt + 1]).any()):
            return
        steps = np.flatnonzero(np.diff(learnt) > 1)
        starts = np.concatenate((learnt[:1], learnt[steps + 1]))
        stops = np.concatenate((learnt[steps], learnt[-1:])) + 1
        borders = np.stack((starts, stops), 1).astype("<i4")
        others = json.dumps([getattr(row, name) for name in _FIELDS]).encode("utf-8")
        payload = b"".join(
            (
                _HEAD.pack(sample, len(ids), len(borders), len(others)),
                borders.tobytes(),
                np.asarray(ids, self._dtype).tobytes(),
                others,
            )
        )
        try:
            self._append(sample, len(ids), payload)
        except OSError as error:
            self._log.warning("%s: cannot be written (%s); tokens are not kept", self.folder, error.strerror)

    def _append(self, sample, tokens, payload):
        with self._lock:
            if self._own_process != os.getpid():  # the first time, or in a forked worker
                self._new_segment()
            offset, self._end = self._end, self._end + len(payload)
            segment = self._own
        os.pwrite(self._descriptors[segment], payload, offset)
        record = np.zeros(1, RECORD)
        record["segment"], record["bytes"], record["offset"] = segment, len(payload), offset
        record["tokens"], record["crc"] = tokens, zlib.crc32(payload)
        record["check"] = _check(np.uint64(sample), record)
        os.pwrite(self._descriptors[0], record.tobytes(), sample * RECORD.itemsize)

    def _new_segment(self):
        number = 1 + max((int(path.name.partition("-")[2]) for path in self.folder.glob("segment-*")), default=0)
        while True:
            try:
                descriptor = os.open(self._segment(number), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                break
            except FileExistsError:
                number += 1
        self._descriptors[number] = descriptor
        self._own, self._own_process, self._end = number, os.getpid(), 0

    def _segment(self, number):
        return self.folder / f"segment-{number:06d}"

    def _read(self, segment, offset, size):
        """bytes: a part of a segment; None where there is none."""
        descriptor = self._descriptors.get(segment)
        try:
            if descriptor is None:
                descriptor = os.open(self._segment(segment), os.O_RDONLY)
                with self._lock:  # another thread may have been faster
                    first = self._descriptors.setdefault(segment, descriptor)
                if first != descriptor:
                    os.close(descriptor)
                    descriptor = first
            payload = os.pread(descriptor, size, offset)
        except OSError:
            return None
        return payload if len(payload) == size else None


def remove_outdated(folder):
    """Removes the caches in a folder whose data files are not what they were.

    Args:
        folder (str | os.PathLike): where caches are kept.

    Returns:
        list[str]: the names of those that were removed.
    """
    removed = []
    for key_file in sorted(Path(folder).glob("*.tokens/key.json")):
        try:
            files = json.loads(key_file.read_text(encoding="utf-8"))["files"]
            outdated = any(_state(path) != (size, mtime) for path, size, mtime in files)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not ours to judge
        if outdated:
            shutil.rmtree(key_file.parent, ignore_errors=True)
            removed.append(key_file.parent.name)
    return removed


def _state(path):
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def _check(sample, record):
    """np.ndarray: uint32, a check sum over the other fields of records, by number."""
    with np.errstate(over="ignore"):  # modulo 2^64 on purpose
        mixed = (np.asarray(sample, np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
        for name, factor in _FACTORS.items():
            mixed = mixed ^ (np.asarray(record[name], np.uint64) + np.uint64(1)) * np.uint64(factor)
            mixed = mixed ^ (mixed >> np.uint64(29))
    return (mixed ^ (mixed >> np.uint64(32))).astype(np.uint32)


def _close(descriptors):
    for descriptor in descriptors.values():
        os.close(descriptor)
