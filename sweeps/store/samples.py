"""Per-sample outcomes as the column ``samples`` has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

Outcomes = NDArray[np.bool_] | NDArray[np.float32] | NDArray[np.int32]
Samples = dict[str, Outcomes]
"""Per-sample outcomes by name: bool for right or wrong, float32 nats and means, int32 tokens."""


class EncodedSample(TypedDict):
    """One item of the column ``samples``."""

    name: str
    dtype: str
    count: int
    data: bytes


def encode_samples(samples: Mapping[str, Outcomes]) -> list[EncodedSample]:
    """Arrays by name as the ``samples`` column: bool as packed bits, the rest as little-endian float32 or int32."""
    encoded: list[EncodedSample] = []
    for name, values in samples.items():
        array = np.asarray(values)
        if array.dtype == np.bool_:
            dtype, data = "bits", np.packbits(array.astype(np.bool_), bitorder="little").tobytes()
        elif np.issubdtype(array.dtype, np.integer):
            dtype, data = "int32", array.astype("<i4").tobytes()
        else:
            dtype, data = "float32", array.astype("<f4").tobytes()
        encoded.append(EncodedSample(name=name, dtype=dtype, count=len(array), data=data))
    return encoded


def decode_samples(encoded: Iterable[EncodedSample]) -> Samples:
    """Return the inverse of ``encode_samples``."""
    samples: Samples = {}
    for item in encoded:
        if item["dtype"] == "bits":
            bits = np.unpackbits(np.frombuffer(item["data"], np.uint8), count=item["count"], bitorder="little")
            samples[item["name"]] = bits.astype(np.bool_)
        else:
            samples[item["name"]] = np.frombuffer(item["data"], "<i4" if item["dtype"] == "int32" else "<f4")
    return samples
