"""In which way a pack's model runs here: whole, spread, packed or layer by layer, by its size and the memory."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from kbit.evaluation.evaluators import EVALUATORS
from kbit.models.sizes import GUESSED, parts_of
from kbit.models.ways import Way, choose_way
from sweeps.plan.ways import known_sizes
from sweeps.study.cell import Measurement
from sweeps.study.hub import ModelConfig
from sweeps.worker.devices import usable_memory

if TYPE_CHECKING:
    from kbit.models.sizes import Sizes
    from sweeps.plan.pack import Pack
    from sweeps.study.cell import Cell, ModelRef


def way_of(cell: Cell, compute_dtype: str, *, device: str, gpus: int, batch_tokens: int) -> Way | None:
    """Return how a cell's model runs here; None where its sizes aren't known, or nothing fits.

    Args:
        cell: the cell.
        compute_dtype: as evaluations name it.
        device: 'cpu' or 'cuda'.
        gpus: that the model may be spread over.
        batch_tokens: tokens of a batch, where memory allows.
    """
    sizes, config = sizes_of_model(cell.model)
    if sizes is None or sizes.known_from == GUESSED:
        return None
    width, data = _width(compute_dtype), cell.calibration
    parts = parts_of(sizes, cell.quant, config, compute_bytes=width, device=device, calibration=data)
    choice = choose_way(parts, device_memory(device), gpus=max(1, gpus), batch_tokens=batch_tokens)
    return None if choice is None else choice.way


def by_way(pack: Pack, *, device: str, gpus: int, batch_tokens: int) -> tuple[Pack | None, Pack | None]:
    """Return the parts of a pack that run with the model in memory, and layer by layer; None for one that is empty.

    What fits whole runs so, whatever else the pack holds. What fits packed joins a pass that is made anyway, as it
    needs no further reading there and has the numbers of the whole model; but not what a pass can't give. What fits in
    no way fails there by name.

    Args:
        pack: the pack.
        device: 'cpu' or 'cuda'.
        gpus: that the model may be spread over.
        batch_tokens: tokens of a batch, where memory allows.
    """
    ways = {
        Measurement(cell=cell, eval=spec): way_of(
            cell, spec.compute_dtype, device=device, gpus=gpus, batch_tokens=batch_tokens
        )
        for cell, evals in pack.items
        for spec in evals
    }
    if not any(_needs_a_pass(measurement, way) for measurement, way in ways.items()):
        return pack, None
    in_memory = {measurement.key for measurement, way in ways.items() if _stays_in_memory(measurement, way)}
    return pack.without({m.key for m in ways} - in_memory), pack.without(in_memory)


def _needs_a_pass(measurement: Measurement, way: Way | None) -> bool:
    """Tell whether it runs layer by layer: it fits so only, or the 16-bit model does that it is compared with."""
    return way is Way.LAYERED or (way is Way.PACKED and EVALUATORS[measurement.eval.kind].compares)


def _stays_in_memory(measurement: Measurement, way: Way | None) -> bool:
    evaluator = EVALUATORS[measurement.eval.kind]
    if way is Way.PACKED and not evaluator.compares:
        return evaluator.packed or evaluator.looks_inside or measurement.cell.quant.why_not_layered is not None
    return way in (Way.WHOLE, Way.SPREAD)


@cache
def sizes_of_model(model: ModelRef) -> tuple[Sizes | None, ModelConfig | None]:
    """Return ``known_sizes``, looked for once: a job's files are there, and stay as they are."""
    return known_sizes(model)


def device_memory(device: str) -> int:
    """Return the bytes of one GPU that this process may use, or of the machine."""
    if device == "cpu":
        return usable_memory()
    import torch

    _, total = torch.cuda.mem_get_info()
    return int(total * torch.cuda.get_per_process_memory_fraction())


def _width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
