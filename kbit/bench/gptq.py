"""GPTQ of a model of random weights: seconds and peak memory, whole and layer by layer, beside what it should take.

The memory that it should take, at most: the model with its layers in k bits, two layers in 16 bits, four matrices of
the largest second moments, and one batch at its widest. Calibration is on random tokens: time and memory don't depend
on them, and neither does the comparison of codes between the two ways.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from kbit.bench.decode import Architecture
from kbit.bench.report import Record, Table, device_name
from kbit.bench.switch import random_model
from kbit.calibration import WINDOWS_PER_BATCH
from kbit.layered.blocks import HostBlocks
from kbit.layered.cells import PassCell
from kbit.layered.hollow import Hollow
from kbit.layered.run import LayeredPass
from kbit.models.quantize import Calibrated, quantize_model
from kbit.spec import spec_of
from kbit.specs.gptq import GptqSpec

CELLS: Final = 3
"""Cells that share a pass, in the last run."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is quantized.

    Attributes:
        model: the shape.
        layers: of its layers, those that are measured.
        device: 'cpu' (weights in float32) or 'cuda' (float16).
        bits, blocksize: of integers with zero points, in groups of a row.
        samples, length: calibration windows, and tokens in each.
    """

    model: Architecture
    layers: int
    device: str
    bits: int
    blocksize: int
    samples: int
    length: int

    @property
    def part(self) -> Architecture:
        """The shape with the layers that are measured."""
        return replace(self.model, layers=self.layers)

    @property
    def scale(self) -> float:
        """By what times of the measured layers are multiplied for those of all."""
        return self.model.layers / self.layers

    def spec(self, bits: int) -> GptqSpec:
        made = spec_of(
            {"method": "gptq", "bits": bits, "dtype": "int", "zero_point": True, "blocksize": self.blocksize}
        )
        assert isinstance(made, GptqSpec)
        return made

    def tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.model.vocab, (self.samples, self.length), generator=generator)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One run.

    Attributes:
        seconds: that it took for all its cells.
        peak: bytes of the GPU at most; None on a CPU.
        hashes: of each cell's codes.
    """

    way: str
    cells: int
    seconds: float
    peak: int | None
    hashes: Sequence[str | None]


def measure(setting: Setting, *, say: Callable[[str], None]) -> Table:
    """Quantize the model whole, layer by layer, and layer by layer with several cells.

    Args:
        setting: what and how.
        say: told what is being measured.
    """
    say("warming up")
    warm = replace(setting, model=replace(setting.model, layers=1), layers=1, samples=min(2, setting.samples))
    _whole(warm)
    _layered(warm, 1)
    found = []
    say("whole")
    found.append(_whole(setting))
    for cells in (1, CELLS):
        say(f"layer by layer, {cells} at once")
        found.append(_layered(setting, cells))
    return table(found, setting, device_name(setting.device))


def limit(setting: Setting) -> dict[str, int]:
    """Return the bytes that GPTQ of the measured layers should take at most, by what takes them."""
    a, width = setting.part, 4 if setting.device == "cpu" else 2
    layer = 4 * a.hidden**2 + 2 * a.hidden * a.ffn
    bits = setting.spec(setting.bits).bits_per_param_nominal
    outside = (a.vocab + a.positions) * a.hidden
    tokens = min(WINDOWS_PER_BATCH, setting.samples) * setting.length
    return {
        "packed model": round(a.layers * layer * bits / 8) + width * outside,
        "2 layers": 2 * width * layer,
        "4 x largest second moments": 4 * 4 * max(a.hidden, a.ffn) ** 2,
        "one batch": tokens * width * (4 * a.hidden + max(4 * a.hidden, 3 * a.ffn)),
    }


def table(found: Sequence[Found], setting: Setting, device: str) -> Table:
    """Lay the runs out.

    Args:
        found: the first is of the whole model.
        setting: what they are of.
        device: its name.
    """
    terms, a = limit(setting), setting.model
    least = sum(terms.values())
    first = found[0].hashes[0]
    body, records = [], list[Record]()
    for run in found:
        same = "yes" if run.hashes[0] == first else "no"
        peak = "" if run.peak is None else f"{run.peak / 1e9:,.2f} GB\n{run.peak / least:.2f}x"
        each = run.seconds * setting.scale / run.cells
        body.append([run.way, str(run.cells), f"{run.seconds:,.1f} s", f"{each:,.1f} s", peak, same])
        about: Record = {
            "way": run.way,
            "cells": run.cells,
            "seconds": run.seconds,
            "seconds_per_cell_of_all_layers": each,
        }
        records.append(
            {
                **about,
                **{"model": a.name, "layers": setting.layers, "layers_of_model": a.layers, "bits": setting.bits},
                **{"blocksize": setting.blocksize, "samples": setting.samples, "length": setting.length},
                **{"peak_bytes": run.peak, "limit_bytes": least, "codes_as_whole": same},
            }
        )
    part = (
        "" if setting.layers == a.layers else f"; {setting.layers} of {a.layers} layers measured, a cell's time scaled"
    )
    return Table(
        name="gptq",
        title=f"GPTQ of {a.name}: int{setting.bits} in groups of {setting.blocksize}, {setting.samples} x "
        f"{setting.length} tokens, on {device}{part}",
        header=["way", "cells", "all", "a cell, all layers", "GPU at most, of limit", "codes as whole"],
        body=body,
        notes=[f"limit: {least / 1e9:,.2f} GB = " + " + ".join(f"{n / 1e9:,.2f} {what}" for what, n in terms.items())],
        records=records,
    )


def _whole(setting: Setting) -> Found:
    model = _model(setting)
    tokens = setting.tokens()
    began = _begin(setting.device)
    handle = quantize_model(model, setting.spec(setting.bits), calibration=Calibrated(tokens=tokens))
    seconds, peak = _end(setting.device, began)
    return Found(way="whole", cells=1, seconds=seconds, peak=peak, hashes=[handle.codes_hash])


def _layered(setting: Setting, cells: int) -> Found:
    model = _model(setting).to("cpu")
    tokens = setting.tokens()
    began = _begin(setting.device)
    blocks = HostBlocks(model, setting.device)
    hollow = Hollow(blocks)
    calls = hollow.record_windows(tokens)
    widths = [setting.bits, *(b for b in (2, 3, 4, 5) if b != setting.bits)][:cells]
    wanted = [PassCell(key=str(b), spec=setting.spec(b), calls=[], calibration=calls) for b in widths]
    one = LayeredPass(blocks=blocks, hollow=hollow, cells=wanted)
    one.run(lambda *_: False)
    seconds, peak = _end(setting.device, began)
    for cell in wanted:
        if cell.error is not None:
            raise cell.error
    hashes = [cell.handle().codes_hash for cell in wanted]
    return Found(way="layer by layer", cells=cells, seconds=seconds, peak=peak, hashes=hashes)


def _model(setting: Setting) -> nn.Module:
    """The same each time, its embeddings too."""
    torch.manual_seed(0)
    return random_model(setting.part, setting.device)


def _begin(device: str) -> float:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


def _end(device: str, began: float) -> tuple[float, int | None]:
    if device != "cuda":
        return time.perf_counter() - began, None
    torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated()
