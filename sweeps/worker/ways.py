"""In which way a pack's model runs here: whole, spread, packed or layer by layer, by its size and the memory."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from kbit.evaluation.evaluators import EVALUATORS
from kbit.models.sizes import GUESSED, parts_of
from kbit.models.ways import Way, choose_way
from sweeps.plan.ways import known_sizes
from sweeps.study.hub import ModelConfig
from sweeps.worker.devices import usable_memory

if TYPE_CHECKING:
    from kbit.models.sizes import Sizes
    from sweeps.plan.packs import Pack
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


def runs_layered(pack: Pack, *, device: str, gpus: int, batch_tokens: int) -> bool:
    """Tell whether a pack runs layer by layer: one of its cells fits in no other way.

    The others then run with it, also those that would fit packed: they need no further reading, and have the numbers of
    the whole model. So does a pack of cells that fit packed but are compared with the 16-bit model, which doesn't.
    """
    for cell, evals in pack.items:
        for spec in evals:
            way = way_of(cell, spec.compute_dtype, device=device, gpus=gpus, batch_tokens=batch_tokens)
            if way is Way.LAYERED or (way is Way.PACKED and EVALUATORS[spec.kind].compares):
                return True
    return False


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
