"""Read the documents of text sets, and encode the first tokens of their concatenation without encoding all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kbit.evaluation.documents import file_documents
from kbit.sources import DEFAULT_FIELD, HubData, LocalFile, Source

DEFAULT_SPLIT: Final = "test"
SEPARATOR: Final = "\n\n"
CUT_MARGIN: Final = 256
"""Tokens encoded beyond the limit, so that where the text was cut can't change a token within it (see
``encode_text``).
"""
CHARS_PER_TOKEN: Final = 6
"""First guess of the characters that a limit of tokens needs; doubled until it is enough."""


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """The first tokens of a text set.

    Attributes:
        tokens: int64 [n].
        ends: int64 [n], the number of UTF-8 bytes of text up to the end of each token; None where the tokenizer keeps
            no offsets.
    """

    tokens: NDArray[np.int64]
    ends: NDArray[np.int64] | None


def read_documents(source: Source | None) -> Iterator[str]:
    """Yield the documents of a text set, in order, read as they are asked for.

    Args:
        source: a local JSONL file, or .txt, which is one document; or a dataset of the hub, streamed, so that a limit
            does not download all of it (without a network it is read from the cache).

    Raises:
        ValueError: a file that is missing, of another kind, or has a line without the field.
    """
    if isinstance(source, LocalFile):
        return file_documents(Path(source.path), source.field or DEFAULT_FIELD)
    if isinstance(source, HubData):
        return _hub_documents(source, source.field or DEFAULT_FIELD)
    raise ValueError(f"a text set is a local file or a dataset of the hub, not {source!r}")


def _hub_documents(source: HubData, field: str) -> Iterator[str]:
    import datasets
    from huggingface_hub.constants import HF_HUB_OFFLINE

    split = source.split or DEFAULT_SPLIT
    rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
        source.hub,
        name=source.config,
        revision=source.revision,
        split=split,
        streaming=not HF_HUB_OFFLINE,
    )
    if HF_HUB_OFFLINE:
        require_commit(rows, source.hub, source.revision)
    for number, row in enumerate(rows):
        if not isinstance(row.get(field), str):
            where = f"{source.hub}, split {split}, row {number}"
            raise ValueError(f"{where}: no text in field {field!r}; fields present: {', '.join(row)}")
        yield row[field]


def require_commit(dataset: Any, name: str, commit: str | None) -> None:
    """Refuse data of another commit: without a network, ``datasets`` takes the newest in its cache, whatever was asked.

    Raises:
        ValueError: the dataset's files are in the cache, and none of them is of ``commit``.
    """
    cached = dataset.cache_files
    files = [f for split in cached.values() for f in split] if isinstance(cached, dict) else list(cached)
    if commit and files and not any(commit in file["filename"] for file in files):
        raise ValueError(f"{name}: the cache holds another commit than {commit}: mode=fetch, where there is a network")


def encode_text(
    documents: Iterable[str], tokenizer: Any, *, limit: int | None = None, special: bool = True
) -> EncodedText:
    """Encode the documents, joined by blank lines, once with the tokenizer's defaults: the first ``limit`` tokens, or
    all with None. Without ``special`` tokens, those of the text alone.

    With a limit only a beginning of the text is read and encoded: one that gives at least ``CUT_MARGIN`` tokens beyond
    the limit. The tokens within it are those of the whole text, because where a text is cut changes no token that far
    away: tokenizers split text at blanks and punctuation before they merge, so a cut reaches back to the last split
        only.
    """
    stream = _joined(documents)
    if limit is None:
        return _encode("".join(stream), tokenizer, special)
    text, wanted = "", CHARS_PER_TOKEN * (limit + CUT_MARGIN)
    while True:
        text, ended = _extend(text, stream, wanted)
        encoded = _encode(text[:wanted], tokenizer, special)
        if len(encoded.tokens) >= limit + CUT_MARGIN or (ended and len(text) <= wanted):
            ends = None if encoded.ends is None else encoded.ends[:limit]
            return EncodedText(tokens=encoded.tokens[:limit], ends=ends)
        wanted *= 2


def _joined(documents: Iterable[str]) -> Iterator[str]:
    for index, document in enumerate(documents):
        if index:
            yield SEPARATOR
        yield document


def _extend(text: str, stream: Iterator[str], length: int) -> tuple[str, bool]:
    """``text`` with pieces of the stream added until it has ``length`` characters; and whether the stream ended
    before.
    """
    pieces, total = [text], len(text)
    while total < length:
        piece = next(stream, None)
        if piece is None:
            return "".join(pieces), True
        pieces.append(piece)
        total += len(piece)
    return "".join(pieces), False


def _encode(text: str, tokenizer: Any, special: bool) -> EncodedText:
    options = {} if special else {"add_special_tokens": False}
    fast = bool(getattr(tokenizer, "is_fast", False))
    # verbose=False: a text longer than the model's context is what we want here, and needs no warning.
    encoding = tokenizer(text, return_offsets_mapping=fast, verbose=False, **options)
    tokens = np.asarray(encoding["input_ids"], dtype=np.int64)
    if not fast or not len(tokens):
        return EncodedText(tokens=tokens, ends=None)
    char_ends = np.asarray(encoding["offset_mapping"], dtype=np.int64)[:, 1]
    # A special token has the offset (0, 0), wherever it stands: the running maximum puts it in its place.
    char_ends = np.maximum.accumulate(char_ends)
    code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    widths = 1 + (code_points >= 0x80).astype(np.int64) + (code_points >= 0x800) + (code_points >= 0x10000)
    byte_ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(widths)])
    return EncodedText(tokens=tokens, ends=byte_ends[char_ends])
