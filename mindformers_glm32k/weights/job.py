"""Carries a planned conversion out: streams, journals, resumes, verifies, and only then publishes.

Everything is written in a hidden folder beside the output. Its journal gets a line when a group of tensors is
written, so a killed conversion goes on where it stopped; files move to their final names after every tensor has
been read back and compared with the values computed.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import threading
import zlib
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import lock_file, require_space
from mindformers_glm32k.weights.checkpoint import read_file
from mindformers_glm32k.weights.dtypes import ITEM_SIZE, cast, count_overflow
from mindformers_glm32k.weights.tensors import StoredTensor

_CHUNK_BYTES = 2 << 20  # of source values; with what is made of it, it fits a core's cache
_FLUSH_SECONDS = 0.25
_PLAN_VERSION = 1


class Job:
    """One conversion into a working folder.

    Args:
        work (pathlib.Path): the working folder, on the same disk as the destination.
        destination (pathlib.Path): the folder that takes the files in the end; created then.
        files (list[layout.OutputFile]): what to write.
        groups (list[plan.Group]): how.
        workers (int): threads; reading, casting, hashing and writing all run outside Python's lock.
        progress (bool): whether to show a bar in bytes of output.
        check_crc (bool): whether to compare the checksums that .bin files carry.
    """

    def __init__(self, work, destination, files, groups, workers=2, progress=True, check_crc=True):
        self.work, self.destination = Path(work), Path(destination)
        self.files, self.groups, self.workers = files, groups, workers
        self.progress, self.check_crc = progress, check_crc
        self._places = {name: (file, segments) for file in files for name, segments in file.segments.items()}
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def __enter__(self):
        self.work.parent.mkdir(parents=True, exist_ok=True)
        self._lock_file = lock_file(self.work.with_name(self.work.name + ".lock"))
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None and issubclass(kind, Exception):  # a kill or Ctrl-C leaves the folder for the next run
            self.discard()
        os.unlink(self._lock_file.name)
        self._lock_file.close()

    def run(self):
        """Writes and verifies all files in the working folder; to be called within `with job:`.

        Returns:
            dict[str, list]: SHA-256 (hexadecimal) and CRC-32 (number) of each tensor's values, the little-endian
            bytes without framing.

        Raises:
            InputError: no space, a corrupt source, values that the dtype cannot hold, or an output that reads back
                differently. The working folder is gone then; after a kill it stays, for the next run to resume.
        """
        try:
            self._check_space()
            self.work.mkdir(exist_ok=True)
            digests = self._resume()
            with ThreadPoolExecutor(1) as flusher:  # the disk is busy while the processor converts and compares
                written = threading.Event()
                early = flusher.submit(self._flush_until, written)
                try:
                    self._write(digests)
                finally:
                    written.set()
                flushed = flusher.submit(self._flush)
                self._verify(digests)
                early.result()
                flushed.result()
            return digests
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(
                    f"{self.destination}: the disk is full; free some space or choose another folder"
                ) from error
            raise

    def publish(self, extra=()):
        """Moves the verified files to their final names, in order, then the `extra` ones, then cleans up.

        Args:
            extra (list[tuple[str, str]]): name and text of small files that go last, as the index.
        """
        for name, text in extra:
            (self.work / name).write_text(text, encoding="utf-8")
        names = [file.name for file in self.files] + [name for name, _ in extra]
        self.destination.mkdir(parents=True, exist_ok=True)
        for name in names:
            os.replace(self.work / name, self.destination / name)
        self.discard()

    def discard(self):
        """Removes the working folder."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _check_space(self):
        held = sum(path.stat().st_blocks * 512 for path in self.work.glob("*")) if self.work.is_dir() else 0
        require_space(self.destination, sum(file.size for file in self.files) - held, self.work.parent)

    def fingerprint(self):
        """What must be equal for a partial output to be gone on with: sources, options and layout."""
        plan = [_PLAN_VERSION, [[file.name, file.size, sorted(file.segments.items())] for file in self.files]]
        for path in sorted({source.file for group in self.groups for source in group.sources}):
            status = os.stat(path)
            plan.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
        for group in self.groups:
            plan.append(
                [
                    [
                        m.source.name,
                        m.source_start,
                        m.source.dtype,
                        m.target.name,
                        m.target_start,
                        m.target.dtype,
                        m.count,
                    ]
                    for m in group.moves
                ]
            )
        return hashlib.sha256(json.dumps(plan).encode("utf-8")).hexdigest()

    def _resume(self):
        """Returns the digests of what an earlier run finished; prepares the folder afresh where nothing fits."""
        stamp, journal = self.work / "plan", self.work / "journal"
        fingerprint = self.fingerprint()
        fits = (
            stamp.is_file()
            and stamp.read_text(encoding="utf-8") == fingerprint
            and all(
                (self.work / file.name).is_file() and (self.work / file.name).stat().st_size == file.size
                for file in self.files
            )
        )
        if fits:
            digests = {}
            lines = journal.read_bytes().split(b"\n")[:-1] if journal.is_file() else []  # a last line may be cut off
            for line in lines:
                digests.update(json.loads(line))
            journal.write_bytes(b"".join(line + b"\n" for line in lines))
            return digests
        for path in self.work.iterdir():
            path.unlink()
        for file in self.files:
            with open(self.work / file.name, "wb") as handle:
                os.truncate(handle.fileno(), file.size)
                for offset, framing in file.framing:
                    os.pwrite(handle.fileno(), framing, offset)
        stamp.write_text(fingerprint, encoding="utf-8")  # last: without it the folder counts for nothing
        return {}

    def _write(self, digests):
        todo = [group for group in self.groups if not all(target.name in digests for target in group.targets)]
        total = sum(target.nbytes for group in self.groups for target in group.targets)
        left = sum(target.nbytes for group in todo for target in group.targets)
        if left < total and self.progress:
            print(
                f"{self.work}: {total - left:,} of {total:,} bytes were written by an earlier run; going on from there",
                file=sys.stderr,
            )
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(
                tqdm(
                    total=total,
                    initial=total - left,
                    unit="B",
                    unit_scale=True,
                    desc="convert",
                    disable=not self.progress,
                )
            )
            handles = {
                file.name: stack.enter_context(open(self.work / file.name, "rb+", buffering=0)) for file in self.files
            }
            journal = stack.enter_context(open(self.work / "journal", "ab", buffering=0))

            def work(group):
                done = self._write_group(group, handles, bar)
                with self._lock:
                    journal.write(json.dumps(done).encode("ascii") + b"\n")
                    digests.update(done)

            self._in_parallel(work, todo)

    def _write_group(self, group, handles, bar):
        digests = {target.name: hashlib.sha256() for target in group.targets}
        sums = dict.fromkeys(digests, 0)  # CRC-32 of what is written
        checks = dict.fromkeys(group.sources, 0)  # CRC-32 of what is read
        for move in group.moves:
            source, target = move.source, move.target
            checked = source.crc32 is not None and self.check_crc
            copied = len(group.moves) == 1 and source.dtype == target.dtype
            file, segments = self._places[target.name]
            output = StoredTensor(target.name, target.shape, target.dtype, self.work / file.name, segments)
            handle = handles[file.name].fileno()
            start, item = move.source_start * ITEM_SIZE[source.dtype], ITEM_SIZE[target.dtype]
            position = move.target_start * item
            stop = start + move.count * ITEM_SIZE[source.dtype]
            for values in source.chunks(_CHUNK_BYTES, start, stop):
                if self._stop.is_set():
                    return {}
                if checked:
                    checks[source] = zlib.crc32(values, checks[source])
                result = cast(values, source.dtype, target.dtype)
                lost = count_overflow(values, result, source.dtype, target.dtype)
                if lost:
                    raise InputError(
                        f"{source.file}: key {source.name!r}: {lost} values are too large for "
                        f"{target.dtype}; choose bf16 or fp32"
                    )
                view = memoryview(result).cast("B")
                digests[target.name].update(view)
                sums[target.name] = checks[source] if checked and copied else zlib.crc32(view, sums[target.name])
                written = 0
                for offset, nbytes in output.ranges(position, position + len(view)):
                    _write_exactly(handle, view[written : written + nbytes], offset)
                    written += nbytes
                position += len(view)
                with self._lock:
                    bar.update(len(view))
        for source, found in checks.items():
            if source.crc32 is not None and self.check_crc and found != source.crc32:
                raise InputError(
                    f"{source.file}: key {source.name!r} is corrupt: the file's checksum (CRC-32) of it "
                    f"is {source.crc32:08x}, its bytes give {found:08x}; download it again"
                )
        return {name: [digest.hexdigest(), sums[name]] for name, digest in digests.items()}

    def _verify(self, digests):
        """Reads every output file back with the readers that anyone would use, and compares the CRC-32."""
        expected = {target.name: target for group in self.groups for target in group.targets}
        tensors = [tensor for file in self.files for tensor in read_file(self.work / file.name)]
        if sorted(tensor.name for tensor in tensors) != sorted(expected):
            raise InputError(f"{self.work}: the files do not list the tensors that were written; try another disk")
        bar = tqdm(
            total=sum(tensor.nbytes for tensor in tensors),
            unit="B",
            unit_scale=True,
            desc="verify",
            disable=not self.progress,
        )

        def check(tensor):
            found = 0
            for values in tensor.chunks(_CHUNK_BYTES):
                if self._stop.is_set():
                    return
                found = zlib.crc32(values, found)
                with self._lock:
                    bar.update(values.nbytes)
            target = expected[tensor.name]
            if (tensor.shape, tensor.dtype, found) != (target.shape, target.dtype, digests[tensor.name][1]):
                raise InputError(
                    f"{tensor.file.name}: key {tensor.name!r} reads back differently from what was "
                    "written (faulty disk or memory, or the file was touched); convert again"
                )

        with bar:
            self._in_parallel(check, tensors)

    def _flush_until(self, written):
        """Hands what is written to the disk again and again: left to itself, the system waits for the last flush."""
        while not written.wait(_FLUSH_SECONDS):
            self._flush()

    def _flush(self):
        for file in self.files:
            with open(self.work / file.name, "rb+") as handle:
                os.fsync(handle.fileno())

    def _in_parallel(self, function, items):
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                failed = [future for future in done if future.exception()]
                if failed:
                    raise failed[0].exception()
            except BaseException:
                self._stop.set()
                for future in futures:
                    future.cancel()
                raise


def _write_exactly(handle, view, offset):
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
