"""Measure llama.cpp's formats: values a second, beside its own quantizer, and recipes over a whole model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import torch

from kbit.bench import llama_cpp
from kbit.bench.decode import Architecture
from kbit.bench.report import Record, Table, device_name
from kbit.bench.switch import random_model
from kbit.bench.timing import call_seconds
from kbit.ggml.formats import QUANTIZED
from kbit.ggml.quantize import ggml_dequantize, ggml_quantize
from kbit.models.originals import Originals
from kbit.models.quantize import quantize_model
from kbit.specs.ggml import GgmlSpec

COLUMNS: Final = 4096
RECIPES: Final = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K")
Say = Callable[[str], None]


def measure_formats(values: int, *, device: str, repeats: int, say: Say) -> Table:
    """Quantize and dequantize random rows of 4,096 values in each format.

    Args:
        values: how many, at least a row.
        device: 'cpu' (with torch's threads; llama.cpp has one) or 'cuda'.
        repeats: timings, of which the median counts.
        say: told what is measured.
    """
    x = torch.randn(max(1, values // COLUMNS), COLUMNS, generator=torch.Generator().manual_seed(0)).to(device)
    theirs = device == "cpu" and llama_cpp.package() is not None
    records: list[dict[str, str | int | float | None]] = []
    for name in QUANTIZED:
        say(name)
        stored = ggml_quantize(x, name)

        def ours(name: str = name) -> object:
            return ggml_quantize(x, name)

        def back(name: str = name, stored: torch.Tensor = stored) -> object:
            return ggml_dequantize(stored, name)

        def other(name: str = name) -> object:
            return llama_cpp.quantized(x, name)

        rates = [x.numel() / call_seconds(f, device=device, repeats=repeats) for f in (ours, back)]
        peer = x.numel() / call_seconds(other, device=device, repeats=repeats) if theirs else None
        same = bool(torch.equal(stored, other())) if theirs else None  # type: ignore[arg-type]
        records.append(
            {"format": name, "quantize": rates[0], "dequantize": rates[1], "llama_cpp": peer, "same_bytes": same}
        )
    return _formats_table(records, x.numel(), device, theirs)


def _formats_table(records: Sequence[Record], values: int, device: str, theirs: bool) -> Table:
    def rate(value: object) -> str:
        return "" if value is None else f"{float(str(value)) / 1e6:,.1f}"

    def ratio(record: Record) -> str:
        ours, peer = record["quantize"], record["llama_cpp"]
        return "" if peer is None else f"{float(str(ours)) / float(str(peer)):.2f}"

    body = [
        [str(r["format"]), rate(r["quantize"]), rate(r["dequantize"]), rate(r["llama_cpp"]), ratio(r)] for r in records
    ]
    notes = ["llama.cpp: ggml_quantize_chunk, one thread." if theirs else ""]
    if device == "cpu" and not theirs:
        notes = [f"llama.cpp isn't here: pip install llama-cpp-python, or {llama_cpp.DIRECTORY} names its directory."]
    return Table(
        name="ggml_formats",
        title=f"llama.cpp's formats on {device_name(device)}: millions of values a second, of {values:,}",
        header=("format", "quantize", "dequantize", "llama.cpp quantizes", "ours / llama.cpp"),
        body=body,
        notes=[note for note in notes if note],
        records=records,
    )


def measure_recipes(a: Architecture, *, device: str, say: Say) -> Table:
    """Quantize a model of random weights by each recipe, twice: the first keeps the originals, or finds them kept."""
    model = random_model(a, device)
    originals = Originals(model=model)
    weights = sum(p.numel() for p in model.parameters())
    records: list[dict[str, str | int | float | None]] = []
    for recipe in RECIPES:
        spec = GgmlSpec(recipe=recipe)
        seconds = []
        for _ in range(2):
            say(f"{a.name} {recipe}")
            _wait(device)
            began = time.perf_counter()
            handle = quantize_model(model, spec, storage_dtype=torch.float16, originals=originals)
            _wait(device)
            seconds.append(time.perf_counter() - began)
        record: dict[str, str | int | float | None] = {
            "recipe": recipe,
            "first": seconds[0],
            "later": seconds[1],
            "bits": handle.bits_per_param,
        }
        records.append(record)
    body = [[str(r["recipe"]), *(f"{r[k]:.2f}" for k in ("first", "later", "bits"))] for r in records]
    return Table(
        name="ggml_recipes",
        title=f"Recipes over {a.name} ({weights / 1e9:.2f} billion random weights) on {device_name(device)}: seconds",
        header=("recipe", "first", "later", "bits a weight"),
        body=body,
        records=records,
    )


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
