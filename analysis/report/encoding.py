"""Columns of a table as few bytes: whole numbers in byte planes, compressed once; ``page.js`` reads them back.

A column is a number of quanta (steps of a fixed size, or of a logarithm), or an index into its distinct values. Missing
is 0, the smallest value 1. Neighbouring rows are alike, so that differences often compress better: then those are
stored, zigzag (0, -1, 1, -2 … as 0, 1, 2, 3 …). The bytes of one significance lie together.
"""

from __future__ import annotations

import base64
import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

LOG_STEP: Final = 1e-4
"""Relative precision of what is stored as a logarithm."""
_MOST_STEPS: Final = 2**31


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column as bytes.

    Attributes:
        head: what is needed to read it, for JSON.
        planes: its bytes, those of one significance together [width x rows].
    """

    head: dict[str, Any]
    planes: bytes

    @property
    def compressed(self) -> int:
        """Size of the column compressed by itself, in bytes."""
        return len(zlib.compress(self.planes, 6))


def number_column(name: str, values: Sequence[float] | NDArray[np.float64] | pd.Series[float], step: float) -> Column:
    """Encode numbers [rows] as multiples of ``step``, coarser only where their range needs it; NaN is missing.

    Infinities are missing, too: the column of states says which cells diverged.
    """
    found = np.asarray(values, dtype=np.float64)
    known = np.isfinite(found)
    spread = float(np.ptp(found[known])) if known.any() else 0.0
    step = max(step, spread / _MOST_STEPS)
    quanta = np.rint(np.where(known, found, 0.0) / step)
    least = float(quanta[known].min()) if known.any() else 0.0
    head = {"name": name, "kind": "number", "step": step, "least": least}
    return _column(head, np.where(known, quanta - least + 1, 0).astype(np.int64))


def log_column(name: str, values: Sequence[float] | NDArray[np.float64] | pd.Series[float]) -> Column:
    """Encode positive numbers [rows] to a relative precision of ``LOG_STEP``; anything else is missing."""
    found = np.asarray(values, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(found)
    column = number_column(name, logs, LOG_STEP)
    return Column(head={**column.head, "kind": "log"}, planes=column.planes)


def name_column(name: str, values: pd.Series[str], order: Sequence[str] = ()) -> Column:
    """Encode names [rows] as indices into the distinct ones: those of ``order`` first, then others as they come."""
    texts = values.astype("string")
    distinct = list(dict.fromkeys([*(o for o in order if (texts == o).any()), *texts.dropna()]))
    index = {text: i + 1 for i, text in enumerate(distinct)}
    codes = texts.map(index).fillna(0).to_numpy(dtype=np.int64)
    return _column({"name": name, "kind": "name", "values": distinct}, codes)


def key_column(name: str, keys: pd.Series[str], digits: int) -> Column:
    """Encode the first ``digits`` (an even number) of hexadecimal keys [rows]."""
    raw = np.frombuffer(b"".join(bytes.fromhex(k[:digits]) for k in keys), dtype=np.uint8).reshape(
        len(keys), digits // 2
    )
    return Column(head={"name": name, "kind": "key", "width": digits // 2}, planes=raw.T.tobytes())


def packed(columns: Sequence[Column]) -> str:
    """Return the bytes of all columns, one after the other, as base64 of gzip; the same for the same columns."""
    joined = b"".join(c.planes for c in columns)
    return base64.b64encode(gzip.compress(joined, 9, mtime=0)).decode()


def _column(head: dict[str, Any], whole: NDArray[np.int64]) -> Column:
    """Choose between the numbers and their differences by what compresses better."""
    steps = np.diff(whole, prepend=0)
    zigzag = np.where(steps < 0, -2 * steps - 1, 2 * steps)
    both = [
        Column(head={**head, "delta": delta, "width": width}, planes=planes)
        for delta, (width, planes) in ((False, _planes(whole)), (True, _planes(zigzag)))
    ]
    return min(both, key=lambda c: c.compressed)


def _planes(whole: NDArray[np.int64]) -> tuple[int, bytes]:
    width = max(1, (int(whole.max(initial=0)).bit_length() + 7) // 8)
    return width, b"".join(((whole >> (8 * i)) & 255).astype(np.uint8).tobytes() for i in range(width))
