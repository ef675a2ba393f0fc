"""The cells that ``cell=``, ``where=`` and a study's name choose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sweeps.errors import UserError
from sweeps.options import Options
from sweeps.results.table import load_results
from sweeps.study.cell import axis_names
from sweeps.study.grid import check_axes, matches
from sweeps.study.manifest import load_manifests

if TYPE_CHECKING:
    import pandas as pd


def chosen_results(options: Options, *, long: bool = False) -> pd.DataFrame:
    """Return the results of the chosen cells, as ``load_results`` does.

    Raises:
        UserError: nothing is chosen, or where= names what is no axis.
    """
    where, prefixes = options.where, options.cells
    check_axes(where, "where")
    results = load_results(options.out, long=long, sweep=options.asked_sweep)
    if prefixes:
        results = results[results["key"].str.startswith(prefixes)]
    if where:
        names = list(axis_names())
        axes = results[names].astype(object).where(results[names].notna(), None)
        results = results[[matches(dict(zip(names, row, strict=True)), where) for row in axes.itertuples(index=False)]]
    if not len(results):
        known = ", ".join(sorted({m.sweep for m in load_manifests(options.out)}))
        raise UserError(f"no cell matches cell={list(prefixes)} where={where} (studies there: {known})")
    return results
