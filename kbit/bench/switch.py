"""Change the cell of a loaded model: seconds from one quantized model to the next, by data type and place of originals.

The least that has to move, in bytes per quantized value of w bytes, stored in s = (k + 16 / B) / 8: quantizing reads w
and writes s, dequantizing reads s and writes w; from the host w more come over the link at the same time. What a fitted
codebook takes the first time is added: a histogram reads w; Lloyd's reads w, writes 4, sorts in four passes that read
and write 4 each, and reads 4 for its sums (its rounds are not counted). The peer is the old way, in the same run:
quantize with a copy of each original on the host, and restore.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor, nn

from kbit.bench.checkpoint import opt_config
from kbit.bench.decode import PRESETS, Architecture
from kbit.bench.report import Record, Table, device_name
from kbit.bench.timing import copy_rate
from kbit.models.architectures import block_layers
from kbit.models.originals import Originals
from kbit.models.places import Place
from kbit.models.quantize import QuantHandle, quantize_model
from kbit.quantizer.blockwise import dequantize, quantize
from kbit.spec import QuantSpec

DTYPES: Final = ("int", "float", "normal", "dynamic", "quantile", "lloyd")
SMALL: Final = Architecture(name="small", hidden=256, ffn=1024, layers=4, heads=4, vocab=1024, positions=64)
"""For a CPU: 3 million weights in its layers."""
SHAPES: Final[Mapping[str, Architecture]] = {SMALL.name: SMALL, **PRESETS}
_FIRST_BYTES: Final = {"quantile": lambda width: width, "lloyd": lambda width: width + 4 + 4 * 8 + 4}
"""By data type, bytes per value of a first fit."""
_LINK_BYTES: Final = 2**28
_STD: Final = 0.02
_COPIED: Final = 2**28
_COPIED_ON_CPU: Final = 2**24


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The model whose cells are changed.

    Attributes:
        device: 'cpu' (weights in float32) or 'cuda' (float16).
        repeats: later switches, of which the median counts.
    """

    model: Architecture
    blocksize: int
    device: str
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Switch:
    """What changing to one cell took, in seconds.

    Attributes:
        place: where the originals lay.
        first, later: with what the data type fits to the tensors, and with that known.
        first_limit, later_limit: of the bytes that have to move.
        old: to quantize and restore with a copy a cell.
        equal: weights, bits and codebooks are those of the old way.
    """

    spec: QuantSpec
    place: str
    first: float
    later: float
    first_limit: float
    later_limit: float
    old: float
    equal: bool


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Bytes a second: of a copy on the device, read plus written, and from page-locked memory to it (None: no link)."""

    copy: float
    link: float | None


@torch.no_grad()
def measure(setting: Setting, specs: Sequence[QuantSpec], *, say: Callable[[str], None]) -> Table:
    """Time each spec's cell on one model, from another quantized cell, with originals in each place.

    On a GPU the 6.7B shape takes about 45 GB of its memory and 30 GB of the host's.

    Args:
        setting: the model, and how often.
        specs: the cells.
        say: told what is being measured.
    """
    on_gpu = setting.device == "cuda"
    say("rates of copies")
    rates = Rates(
        copy=copy_rate(_COPIED if on_gpu else _COPIED_ON_CPU, device=setting.device),
        link=link_rate() if on_gpu else None,
    )
    say(f"{setting.model.name}: making it")
    model = random_model(setting.model, setting.device)
    other = QuantSpec(bits=8, dtype="int", blocksize=setting.blocksize)
    kept, notes = {}, []
    for place in (Place.GPU, Place.LOCKED) if on_gpu else (Place.GPU,):
        originals = Originals(model=model, place=place)
        _warm_up(model, other)
        seconds, _ = _timed(lambda o=originals: quantize_model(model, other, originals=o))  # type: ignore[misc]
        back, _ = _timed(originals.restore)
        name = place.value if on_gpu else Place.HOST.value
        locking = f", {originals.lock_seconds:.2f} s of it page-locking" if place is Place.LOCKED else ""
        notes.append(
            f"{name}: the first cell, which keeps them, took {seconds:.2f} s{locking}; restoring {back:.3f} s."
        )
        kept[name] = originals
    found = []
    for spec in specs:
        say(f"{spec.label}: the old way")
        old, expected = _old_way(model, spec)
        for name, originals in kept.items():
            say(f"{spec.label}: originals in {name}")
            first, later, equal = _switch(originals, (other, spec), expected, setting.repeats)
            linked = name == Place.LOCKED.value
            switch = Switch(
                spec=spec,
                place=name,
                first=first,
                later=later,
                first_limit=limit_seconds(model, spec, rates, linked=linked, first=True),
                later_limit=limit_seconds(model, spec, rates, linked=linked, first=False),
                old=old,
                equal=equal,
            )
            found.append(switch)
        del expected  # a model's size
    return table(found, setting, rates, notes)


def random_model(a: Architecture, device: str) -> nn.Module:
    """Return an OPT model of normally distributed weights, made on the device."""
    from transformers import AutoModelForCausalLM

    config = opt_config(a)
    with torch.device(device):
        dtype = torch.float16 if device == "cuda" else torch.float32
        made: Any = AutoModelForCausalLM
        model: nn.Module = made.from_config(config, dtype=dtype).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for layer in block_layers(model):
        layer.parameter.data.normal_(0, _STD, generator=generator)
    return model


def link_rate() -> float:
    """Bytes a second from page-locked memory to the current GPU."""
    host = torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device="cuda")
    times = [_timed(lambda: target.copy_(host, non_blocking=True))[0] for _ in range(6)]
    return host.nbytes / median(times[1:])


def limit_seconds(model: nn.Module, spec: QuantSpec, rates: Rates, *, linked: bool, first: bool) -> float:
    """Return the least seconds of a switch, by the bytes that have to move."""
    layers = block_layers(model)
    values, width = sum(layer.weight.numel() for layer in layers), layers[0].weight.itemsize
    stored = (spec.bits + 16 / (spec.blocksize or values)) / 8
    fitted = _FIRST_BYTES[str(spec.dtype)](width) if first and spec.dtype in _FIRST_BYTES else 0
    seconds = values * (2 * width + 2 * stored + fitted) / rates.copy
    return max(seconds, values * width / rates.link) if linked and rates.link is not None else seconds


def _old_way(model: nn.Module, spec: QuantSpec) -> tuple[float, tuple[list[Tensor], tuple[Any, ...]]]:
    """Seconds to quantize and restore; and the quantized weights, with what the handle says."""
    _warm_up(model, spec)
    seconds, handle = _timed(lambda: quantize_model(model, spec))
    expected = [layer.working.clone() for layer in block_layers(model)], _numbers(handle)
    back, _ = _timed(handle.restore)
    return seconds + back, expected


def _switch(
    originals: Originals,
    cells: tuple[QuantSpec, QuantSpec],
    expected: tuple[list[Tensor], tuple[Any, ...]],
    repeats: int,
) -> tuple[float, float, bool]:
    """Change from one cell to another: seconds of the first time and of later ones, and whether all gave what is true.

    The model is restored in the end.
    """
    model, (other, spec) = originals.model, cells
    times, equal = [], True
    for _ in range(repeats + 1):
        quantize_model(model, other, originals=originals)
        seconds, handle = _timed(lambda: quantize_model(model, spec, originals=originals))
        times.append(seconds)
        weights = zip(block_layers(model), expected[0], strict=True)
        equal &= _numbers(handle) == expected[1] and all(torch.equal(layer.working, true) for layer, true in weights)
    originals.restore()
    return times[0], median(times[1:]), equal


def _numbers(handle: QuantHandle) -> tuple[Any, ...]:
    return handle.layers, handle.bits_per_param, handle.total_bits, handle.codebook_hash


def _warm_up(model: nn.Module, spec: QuantSpec) -> None:
    """Compile the kernels that the cell takes."""
    for layer in {tuple(layer.weight.shape): layer for layer in block_layers(model)}.values():
        dequantize(quantize(layer.weight, spec))


def _timed(operation: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, with all that the GPU has to do for it; and its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = operation()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def table(found: Sequence[Switch], setting: Setting, rates: Rates, notes: Sequence[str]) -> Table:
    """Return a table of a row per cell and place."""
    body, records = [], []
    for s in found:
        first, later = s.first / s.first_limit, s.later / s.later_limit
        body.append(
            [
                f"{s.spec.label}, {s.place}",
                *(f"{s.first:.3f}", f"{s.first_limit:.3f}", f"{first:.1f}x"),
                *(f"{s.later:.3f}", f"{s.later_limit:.3f}", f"{later:.1f}x"),
                *(f"{s.old:.3f}", f"{s.old / s.later:.1f}x"),
                "yes" if s.equal else "NO",
            ]
        )
        records.append(_record(s, setting, rates))
    link = "" if rates.link is None else f"; from page-locked memory {rates.link / 1e9:,.1f} GB/s"
    return Table(
        name="switch",
        title=f"Changing the cell of a model of {setting.model.name}'s shape ({setting.model.linear_weights:,} weights "
        f"to quantize), on {device_name(setting.device)}",
        header=(
            "cell, originals",
            *("first s", "limit s", "of limit"),
            *("later s", "limit s", "of limit", "old way s", "speedup"),
            "same bits",
        ),
        body=body,
        notes=[
            "First: the data type fits its codebooks to the tensors. Old way: quantize with a copy of each original, "
            "and restore. Same bits: weights, bits stored and codebooks are those of the old way.",
            f"Limit: bytes that have to move, by a copy on the device, {rates.copy / 1e9:,.1f} GB/s{link}.",
            *notes,
        ],
        records=records,
    )


def _record(s: Switch, setting: Setting, rates: Rates) -> Record:
    return {
        **{"model": setting.model.name, "dtype": s.spec.dtype, "bits": s.spec.bits, "blocksize": s.spec.blocksize},
        **{"originals": s.place, "first_seconds": s.first, "later_seconds": s.later},
        **{"first_limit_seconds": s.first_limit, "later_limit_seconds": s.later_limit, "old_seconds": s.old},
        **{"equal": int(s.equal), "copy_bytes_per_second": rates.copy, "link_bytes_per_second": rates.link},
    }
