"""Read local files of documents, JSON lines and plain text; what is wrong with one is said with its file and line.

Planning checks a file with the same functions as a worker reads it. Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

_ENCODING: Final = "utf-8-sig"
"""UTF-8, and a byte-order mark at the beginning, which many editors write, is no text."""
_NOT_UTF8: Final = re.compile("[\udc80-\udcff]")
"""Bytes as ``surrogateescape`` gives them."""
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of each line of a JSONL file that is not blank.

    Raises:
        ValueError: no such file, or a line that isn't UTF-8, isn't an object of JSON, or has half a surrogate pair;
            names file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    # Escaped, because a decoder's error would not say which line it is.
    with path.open(encoding=_ENCODING, errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            if _NOT_UTF8.search(line):
                raise ValueError(f"{where}: not UTF-8: write the file in that encoding")
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected an object, not a {type(row).__name__}")
            for field, value in row.items():
                # Only an escape of JSON can give one.
                if "\\u" in line and _SURROGATE.search(f"{field}{json.dumps(value, ensure_ascii=False)}"):
                    raise ValueError(
                        f"{where}: half a surrogate pair in field {field!r}, which is no character: write the whole "
                        "character, or leave it out"
                    )
            yield number, row


def file_documents(path: Path, field: str) -> Iterator[str]:
    """Yield the documents of a text set's file, in order: a .txt file is one, a JSONL file has one per line.

    Args:
        path: the file.
        field: of a line of JSON, the field that holds the text.

    Raises:
        ValueError: as ``read_jsonl``; also a file of another kind, and a line without text in the field.
    """
    if path.suffix == ".txt":
        yield _plain_text(path)
        return
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{path}: a text set is a .jsonl file (one object a line) or a .txt file (one document)")
    for number, row in read_jsonl(path):
        if not isinstance(row.get(field), str):
            lack = f"no field {field!r}" if field not in row else f"no text in field {field!r} but {_shown(row[field])}"
            raise ValueError(f"{path}, line {number}: {lack}; it has: {', '.join(row) or 'none'}")
        yield row[field]


def has_byte_order_mark(path: Path) -> bool:
    """Tell whether a file begins with UTF-8's byte-order mark."""
    with path.open("rb") as file:
        return file.read(3) == b"\xef\xbb\xbf"


def _plain_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return path.read_text(encoding=_ENCODING)
    except UnicodeDecodeError:
        lines = path.read_text(encoding=_ENCODING, errors="surrogateescape").split("\n")
        number = next(n for n, line in enumerate(lines, 1) if _NOT_UTF8.search(line))
        raise ValueError(f"{path}, line {number}: not UTF-8: write the file in that encoding") from None


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)[:40]
