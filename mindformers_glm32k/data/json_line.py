"""One line of a JSON-lines file: read without taking what is too long into memory, parsed, and what is wrong with it."""

import json

from mindformers_glm32k.errors import InputError

MAX_PROBLEMS = 5  # lines named in one message
MAX_LINE_BYTES = 64 << 20  # some 16 million tokens; a longer line is no record, and is not read into memory


class Problems:
    """The damaged lines of one file: how many, and what is wrong with the first ones.

    Attributes:
        path (str | os.PathLike): the file.
        count (int): damaged lines.
    """

    def __init__(self, path):
        self.path, self.count, self._first = path, 0, []

    def add(self, line, problem):
        """Counts a line (int, its number from 1); `problem` says what is wrong with it."""
        self.count += 1
        if len(self._first) < MAX_PROBLEMS:
            self._first.append((line, str(problem)))

    def text(self, all_counted=True):
        """str: the lines named in one sentence; without `all_counted` the search ended before the file did."""
        more = self.count - len(self._first)
        named = "; ".join(f"line {line}: {problem}" for line, problem in sorted(self._first))
        rest = f"; and {more} more" if all_counted else "; and more"
        return f"{self.path}: {named}" + (rest if more else "")


def raw_lines(file, limit=MAX_LINE_BYTES):
    """Reads a binary file line by line; what is longer than `limit` bytes is passed over in pieces.

    Args:
        file: open for reading bytes, at its beginning.
        limit (int): bytes.

    Yields:
        tuple[int, bytes | None]: the line's number from 1, and the line with its end; None for one that is too long.
    """
    number = 0
    while True:
        raw = file.readline(limit + 1)
        if not raw:
            return
        number += 1
        piece = raw
        if len(raw) > limit:
            raw = None
        while len(piece) and raw is None and not piece.endswith(b"\n"):
            piece = file.readline(1 << 20)
        yield number, raw


def parse_line(raw, first=False):
    """Parses one line.

    Args:
        raw (bytes | None): the line; None stands for one that is longer than MAX_LINE_BYTES.
        first (bool): whether it is the file's first one, which may have a byte order mark.

    Returns:
        dict

    Raises:
        InputError: says what is wrong with the line, but not where it stands.
    """
    if raw is None:
        raise InputError(
            f"longer than {MAX_LINE_BYTES >> 20} MB, which no record is; does the file have line breaks "
            "between its records? Split or remove the line"
        )
    if not raw.strip():
        raise InputError("empty line; remove it")
    try:
        record = json.loads(raw.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    except RecursionError as error:
        raise InputError("brackets nested too deeply for a record") from error
    except ValueError as error:
        if first and raw.strip() == b"[":
            raise InputError("the file is one JSON array over many lines; write one object per line") from error
        raise InputError(f"broken JSON ({error}): {_shorten(raw)}; mend or remove the line") from error
    if not isinstance(record, dict):
        hint = (
            "the file is one JSON array; write one object per line"
            if isinstance(record, list)
            else 'a line looks like {"content": "…", "summary": "…"}'
        )
        raise InputError(f"a JSON object is needed, found {type(record).__name__} {_shorten(raw)}; {hint}")
    return record


def _shorten(raw, limit=60):
    text = raw.decode("utf-8", errors="replace").strip()
    return text if len(text) <= limit else text[:limit] + "…"
