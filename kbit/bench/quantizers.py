"""Quantize and dequantize: GB/s, compared with bitsandbytes' and with a copy, which is the limit.

A quantizer has to read 2 bytes per weight and write its codes and absmax, so it can't be faster than a copy of as many
bytes read and written. On a GPU, calls follow each other without a wait, as bitsandbytes' do, so that what Python does
for one is hidden behind the one before, if that takes longer. Where ``quantize`` waits for its only kernel to hear
whether all values are finite, its own figure, of which Python's part depends on the CPU, is given next to that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kbit.bench.report import Table, device_name
from kbit.bench.timing import call_seconds, copy_rate
from kbit.quantizer.blockwise import dequantize, quantize, quantize_async
from kbit.spec import QuantSpec

PEERS = ("8 bits", "nf4", "fp4")
_WAIT = (
    "With wait: calls that each wait to hear whether all values are finite, as kbit.quantize does; the CPU's part in "
    "them counts. The others follow each other without that wait."
)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """One quantizer: seconds of both directions, and the bytes that each must read and write.

    Attributes:
        waited_seconds: of ``quantize`` where it waits at its end, and ``quantize_async`` doesn't; else None.
    """

    name: str
    bits: int
    values: int
    nbytes: float
    quantize_seconds: float
    dequantize_seconds: float
    waited_seconds: float | None


def measure(
    values: int,
    specs: Sequence[QuantSpec],
    *,
    impls: Sequence[str],
    device: str,
    repeats: int,
    say: Callable[[str], None],
) -> Table:
    """Time ours and bitsandbytes' on one float16 weight of normally distributed values.

    Args:
        values: how many.
        specs: of one block size, which bitsandbytes' take too.
        impls: ours to time.
        device: 'cpu' or 'cuda'.
        repeats: turns of each; the median counts.
        say: told what is being measured.

    Raises:
        ValueError: an impl that can't run here.
    """
    weight = torch.randn(values, generator=torch.Generator(device).manual_seed(0), device=device, dtype=torch.float16)
    blocksize = specs[0].blocksize
    assert blocksize is not None
    limit = copy_rate(values, device=device, repeats=repeats)
    found = []
    for impl in impls:
        for spec in specs:
            say(f"{spec.label} ({impl})")
            found.append(_ours(weight, spec, impl, repeats))
    for peer in PEERS:
        say(f"bitsandbytes, {peer}")
        try:
            found += _peer(weight, peer, blocksize, repeats)
        except ValueError as error:  # it takes few block sizes, on each device others
            say(f"bitsandbytes, {peer}, is left out: {error}")
    return table(found, limit, blocksize, device)


def _ours(weight: Tensor, spec: QuantSpec, impl: str, repeats: int) -> Rates:
    packed, bad = quantize_async(weight, spec, impl=impl)
    return _rates(
        spec.label if impl == "auto" else f"{spec.label} ({impl})",
        spec.bits,
        weight,
        packed.nbits / 8,
        _Calls(
            there=partial(quantize_async, weight, spec, impl=impl),
            back=partial(dequantize, packed, impl=impl),
            waited=None if bad is None else partial(quantize, weight, spec, impl=impl),
        ),
        repeats,
    )


def _peer(weight: Tensor, kind: str, blocksize: int, repeats: int) -> Iterator[Rates]:
    """bitsandbytes: its 8-bit codebook, or 4 bits; nothing where it isn't installed."""
    try:
        from bitsandbytes import functional as bnb
    except ImportError:
        return
    if kind == "8 bits":
        there = partial(bnb.quantize_blockwise, weight, blocksize=blocksize)
        back: Callable[..., object] = bnb.dequantize_blockwise
    else:
        there = partial(bnb.quantize_4bit, weight, blocksize=blocksize, quant_type=kind)
        back = bnb.dequantize_4bit
    packed, state = there()
    bits, nbytes = 8 if kind == "8 bits" else 4, packed.nbytes + state.absmax.nbytes
    calls = _Calls(there=there, back=partial(back, packed, state))
    yield _rates(f"bitsandbytes, {kind}", bits, weight, nbytes, calls, repeats)


@dataclass(frozen=True, kw_only=True)
class _Calls:
    """Quantize, dequantize; and quantize with a wait, where that differs."""

    there: Callable[[], object]
    back: Callable[[], object]
    waited: Callable[[], object] | None = None


def _rates(name: str, bits: int, weight: Tensor, stored: float, calls: _Calls, repeats: int) -> Rates:
    seconds = partial(call_seconds, device=weight.device.type, repeats=repeats)
    return Rates(
        name=name,
        bits=bits,
        values=weight.numel(),
        nbytes=weight.nbytes + stored,
        quantize_seconds=seconds(calls.there),
        dequantize_seconds=seconds(calls.back),
        waited_seconds=None if calls.waited is None else seconds(calls.waited),
    )


def table(found: Sequence[Rates], limit: float, blocksize: int, device: str) -> Table:
    """Return one row per quantizer; ``limit`` is that of a copy, in bytes per second."""
    body, records = [], []
    has_waits = any(r.waited_seconds is not None for r in found)
    for r in found:
        cells = [r.name]
        record: dict[str, str | int | float | None] = {"name": r.name, "bits": r.bits, "blocksize": blocksize}
        record["values"] = r.values
        for direction, seconds in (("quantize", r.quantize_seconds), ("dequantize", r.dequantize_seconds)):
            rate = r.nbytes / seconds
            cells += [_figure(rate / 1e9), f"{rate / limit:.1%}", f"{r.values / seconds / 1e6:,.0f}"]
            numbers = {"seconds": seconds, "bytes_per_second": rate, "of_limit": rate / limit}
            record |= {f"{direction}_{key}": value for key, value in numbers.items()}
        if has_waits:
            waited = None if r.waited_seconds is None else r.nbytes / r.waited_seconds
            cells.append("-" if waited is None else _figure(waited / 1e9))
            record |= {"quantize_waited_seconds": r.waited_seconds, "quantize_waited_bytes_per_second": waited}
        body.append(cells)
        records.append(record | {"bytes": r.nbytes, "copy_bytes_per_second": limit})
    return Table(
        name="quantizers",
        title=f"Quantizing {found[0].values:,} float16 values, block {blocksize}, on {device_name(device)}",
        header=(
            "",
            *(c for d in ("quantize", "dequantize") for c in (f"{d}\nGB/s", "of limit", "M values/s")),
            *(["with wait\nGB/s"] if has_waits else []),
        ),
        body=body,
        notes=[
            f"GB/s: read plus written. Limit: a copy on the device, {limit / 1e9:,.1f} GB/s.",
            *([_WAIT] if has_waits else []),
        ],
        records=records,
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
