"""A document for the context: the text of a file, or a line that says what is taken instead."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from mindformers_glm32k.errors import InputError

_TAKES = "/file takes one text file, such as .txt, .md, .py or .json"
# first bytes -> what the file is, and what makes text of it; {0} is its name
_KNOWN = (
    (b"%PDF", "a PDF; make text of it: pdftotext {0} {0}.txt"),
    (b"PK\x03\x04", "an archive (.docx, .xlsx, .epub and .zip are); save it as text: pandoc -t plain {0} -o {0}.txt"),
    (b"\xd0\xcf\x11\xe0", "an old Office file; save it as text"),
    (b"\x1f\x8b", "compressed; unpack it: gunzip {0}"),
    (b"\x89PNG", "a picture, and the model reads text only"),
    (b"\xff\xd8\xff", "a picture, and the model reads text only"),
)
_MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_MOST_BYTES = 16 << 20  # the context holds some 200 KB


def read_document(path: str | os.PathLike) -> str:
    """The text of a file, UTF-8 or by its byte order mark UTF-16 and UTF-32, line ends as line feeds.

    Raises:
        InputError: a folder, a PDF and the like, no text, another encoding, nothing in it, or no such file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise InputError(f"{path}: is a folder; {_TAKES}, one at a time")
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise InputError(f"{path}: has {size >> 20} MB, far more than the context holds; take a part of it")
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {_TAKES}") from error
    for magic, what in _KNOWN:
        if raw.startswith(magic):
            raise InputError(f"{path}: is {what.format(path.name)} ({_TAKES})")
    encoding = next((encoding for mark, encoding in _MARKS if raw.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in raw:
        raise InputError(f"{path}: has zero bytes, so it is no text; {_TAKES}")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 at byte {error.start}; convert it (from GBK: iconv -f GB18030 -t UTF-8)"
        ) from error
    if not text.strip():
        raise InputError(f"{path}: there is no text in it")
    return text.replace("\r\n", "\n").replace("\r", "\n")
