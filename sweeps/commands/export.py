"""``mode=export``: write a cell for another program, load it again, and compare the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Final

from rich.console import Console

from kbit.errors import SpecError
from kbit.exporting.base import EXPORTS, Export
from sweeps.commands.selection import chosen_results
from sweeps.errors import EXIT_FAILED, UserError
from sweeps.options import Options
from sweeps.store.first import stored_slopes
from sweeps.store.parts import Store
from sweeps.study.manifest import load_manifests
from sweeps.study.reading import config_of
from sweeps.text import counted
from sweeps.worker.devices import resolve_device
from sweeps.worker.execution import batch_tokens

if TYPE_CHECKING:
    from kbit.evaluation.spec import EvalSpec
    from kbit.models.loadable import LoadedModel
    from kbit.models.quantize import Calibrated, QuantHandle
    from sweeps.study.cell import Cell
    from sweeps.worker.model_cache import Warm

TOLERANCE: Final = 2e-3
"""Nats a token by which the loss of what is loaded again may differ: sums come in another order in k bits."""
MOST_SHOWN: Final = 5


def export(options: Options, console: Console) -> int:
    """Write the chosen cell.

    Raises:
        UserError: no cell, or several; no format or place; a study that has no perplexity to compare.
        SpecError: the format can't hold this cell.
    """
    if options.to is None or options.format is None:
        missing = "to" if options.to is None else "format"
        raise UserError(
            f"mode=export needs {missing}=: cell=KEY_PREFIX format=({', '.join(EXPORTS)}) to=PATH, e.g. "
            "mode=export cell=3fa9 format=gguf to=model.gguf"
        )
    cell, spec = _cell(options)
    exporter, to = EXPORTS[options.format], options.to.absolute()
    if to.exists() and (to.is_file() or any(to.iterdir())):
        raise UserError(f"to={options.to} is there already: name another, or remove it")
    exporter.check(cell.quant, config_of(cell.model, ask=False) or {}, to)
    from transformers.utils import logging

    from sweeps.worker.model_cache import Warm

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = resolve_device(str(options.executor.get("device") or "auto"))
    tokens = batch_tokens(options.executor.get("batch_tokens") or "auto", device)
    warm = Warm(device=device, gpus=1, trust_remote_code=options.trust_remote_code)
    loaded = _load(warm, cell, spec)
    prepared = warm.prepare(spec, loaded)
    calibration = cache(partial(_calibration, Store(out=options.out), warm, loaded, cell))
    quantize = partial(_quantize, loaded, cell, calibration)
    with quantize(False):
        before = prepared.run(loaded.model, batch_tokens=tokens).metrics["loss"]
    asked = Export(loaded=loaded, spec=cell.quant, to=to, quantize=quantize, calibration=calibration)
    written = exporter.write(asked)
    # Two models at once may not fit.
    del loaded, quantize, calibration, asked
    warm = Warm(device=device, gpus=1, trust_remote_code=options.trust_remote_code)
    after = prepared.run(written.load(), batch_tokens=tokens).metrics["loss"]
    return _say(f"{cell.model.label} {written.words}", written.nbytes, spec, (before, after), options, console)


def _say(
    what: str, nbytes: int, spec: EvalSpec, losses: tuple[float, float], options: Options, console: Console
) -> int:
    before, after = losses
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(f"Wrote {what}: {options.to}, {nbytes / 1e6:,.1f} MB.")
    say(f"Loss on {spec.name}: {before:.6f} of the cell, {after:.6f} of what was written, loaded again.")
    if abs(after - before) <= TOLERANCE:
        return 0
    say(f"They differ by {abs(after - before):.2g} nats a token, more than {TOLERANCE:g}: don't use the file.")
    return EXIT_FAILED


def _cell(options: Options) -> tuple[Cell, EvalSpec]:
    """Return the chosen cell, and what its loss is measured by."""
    if not options.choice:
        raise UserError("mode=export needs cell=KEY_PREFIX: the column 'key' of mode=table has the keys")
    chosen = chosen_results(options).drop_duplicates("key")
    if len(chosen) != 1:
        rows = chosen.head(MOST_SHOWN).to_dict("records")
        first = "; ".join(f"{row['key'][:10]} {row['model']} {row['label']}" for row in rows)
        more = "; …" if len(chosen) > MOST_SHOWN else ""
        raise UserError(f"{options.choice} chooses {counted(len(chosen), 'cell')}, and one is written: {first}{more}")
    key = chosen.iloc[0]["key"]
    for manifest in reversed(load_manifests(options.out, options.asked_sweep)):
        cell = next((c for c in manifest.cells if c.key == key), None)
        spec = next((e for e in manifest.evals if e.kind == "perplexity"), None)
        if cell is not None and spec is not None:
            return cell, spec
    raise UserError(
        f"{options.choice}: no study of this cell measures perplexity, by which what is written is compared: launch "
        "one with eval.perplexity=[SET]"
    )


def _load(warm: Warm, cell: Cell, spec: EvalSpec) -> LoadedModel:
    try:
        return warm.load(cell.model, spec.compute_dtype)
    except SpecError:
        raise
    except ValueError as error:
        raise UserError(f"{cell.model.label} can't be loaded: {error}") from error


def _calibration(store: Store, warm: Warm, loaded: LoadedModel, cell: Cell) -> Calibrated | None:
    import torch

    from kbit.models.quantize import Calibrated

    if cell.calibration is None:
        return None
    dtype = cell.calibration.compute_dtype
    return Calibrated(
        tokens=warm.calibration(cell.calibration, loaded),
        dtype=loaded.storage_dtype if dtype == "storage" else getattr(torch, dtype),
        slopes=stored_slopes(store, cell),
    )


def _quantize(
    loaded: LoadedModel, cell: Cell, calibration: Callable[[], Calibrated | None], packed: bool
) -> QuantHandle:
    from kbit.models.quantize import quantize_model

    return quantize_model(
        loaded.model, cell.quant, storage_dtype=loaded.storage_dtype, packed=packed, calibration=calibration()
    )
