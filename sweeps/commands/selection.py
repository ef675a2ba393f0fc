"""The part of a study that ``cell=``, ``where=`` and ``status=`` choose, and the results of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from sweeps.errors import UserError
from sweeps.launches.in_flight import InFlight
from sweeps.options import Options
from sweeps.results.frames import state_columns, state_frame
from sweeps.results.inputs import read_inputs
from sweeps.results.superseded import newest_launches
from sweeps.results.table import States, load_results, load_states, load_tables, planned_there, rows_of
from sweeps.status import Runs
from sweeps.study.cell import Measurement, axis_names
from sweeps.study.choice import MORE, Candidate, Choice
from sweeps.study.manifest import Manifest

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from analysis.inputs import Inputs


def chosen_results(options: Options, *, long: bool = False) -> pd.DataFrame:
    """Return the results of the chosen cells, or with ``long`` measurements, as ``load_results`` does.

    Raises:
        UserError: nothing is chosen.
    """
    results = load_results(options.out, long=long, sweep=options.asked_sweep)
    return chosen_rows(options, results)


def chosen_tables(options: Options) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the results of the chosen cells as (wide, long) tables: a row per cell, a row per measurement.

    Raises:
        UserError: nothing is chosen.
    """
    return _chosen(options, *load_tables([options.out], sweep=options.asked_sweep))


def chosen_measurements(options: Options, columns: Collection[str]) -> pa.Table:
    """Return the rows of the chosen cells' measurements, with some columns at least: of a large study half the memory.

    Raises:
        UserError: nothing is chosen.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    asked = _choosing() if options.choice else ()
    needed = dict.fromkeys([*columns, *state_columns(asked)])
    rows = rows_of(options.out, options.asked_sweep, list(needed))
    if not options.choice:
        return rows
    chosen = chosen_rows(options, state_frame(rows, asked))
    return rows.filter(pc.is_in(rows.column("key"), pa.array(chosen["key"].to_numpy(), pa.string())))


def _chosen(options: Options, wide: pd.DataFrame, long: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Restrict both tables to the chosen cells: a cell has all of its measurements, whatever the state of each."""
    if not options.choice:
        return wide, long
    wide = chosen_rows(options, wide)
    return wide, long[long["key"].isin(set(wide["key"]))]


def chosen_inputs(options: Options) -> Inputs:
    """Return the tables of the chosen cells, a row per cell and one per measurement, and where their samples are.

    Raises:
        UserError: nothing is chosen.
    """
    inputs = read_inputs([options.out], sweep=options.asked_sweep)
    df, long = _chosen(options, inputs.df, inputs.long)
    return replace(inputs, df=df, long=long)


def say_notes(inputs: Inputs, console: Console) -> None:
    """Say what was left out, and what is mixed."""
    from analysis.mixtures import mixture_warnings

    for note in inputs.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
    for warning in mixture_warnings(inputs.long):
        console.print(f"[yellow]{escape(warning)}[/]", soft_wrap=True)


def chosen_states(options: Options, columns: Collection[str], flight: InFlight, *, by_study: bool) -> pd.DataFrame:
    """Return the states of the chosen cells, with some of their columns (``sweeps.results.frames.state_frame``).

    Args:
        options: with the choice.
        columns: of cells.
        flight: who is at what.
        by_study: a cell has a row for each study that planned it, else one.

    Raises:
        UserError: nothing is chosen.
    """
    needed = dict.fromkeys([*columns, *(_choosing() if options.choice else ())])
    states = load_states(options.out, needed, by_study=by_study, sweep=options.asked_sweep, flight=flight)
    return chosen_rows(options, states)


def chosen_rows(options: Options, results: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the chosen cells, of a wide table or a long one."""
    return results[options.choice.of(candidates(results))] if options.choice else results


def chosen_part(choice: Choice, out: Path, manifest: Manifest, states: States | None = None) -> Manifest:
    """Return a study restricted to the measurements that a launch may run.

    Args:
        choice: what is chosen.
        out: the results directory.
        manifest: the study.
        states: of the directory's measurements; None looks.

    Raises:
        UserError: nothing is chosen.
    """
    if not choice:
        return manifest
    measurements = list(manifest.measurements())
    states = States(out=out) if states is None else states
    axes = {cell: cell.chosen_by() for cell in dict.fromkeys(m.cell for m in measurements)}
    chosen = choice.of(Candidate(key=m.cell.key, axes=axes[m.cell], state=states.of(m.key)) for m in measurements)
    taken = [m for m, is_chosen in zip(measurements, chosen, strict=True) if is_chosen]
    first = [m.cell.first for m in taken if m.cell.first is not None]
    return manifest.restricted(frozenset(m.key for m in [*taken, *first]))


def planned_parts(options: Options) -> tuple[dict[str, Measurement], dict[str, Measurement]]:
    """Return what the newest launches of studies plan, by key, and what only earlier ones did; of what is chosen.

    Raises:
        UserError: nothing was planned there, or nothing of it is chosen.
    """
    manifests = planned_there(options.out, options.asked_sweep)
    newest, states = newest_launches(manifests), States(out=options.out)
    now = _measurements(options, newest.values(), states)
    before = _measurements(options, [m for m in manifests if newest[m.sweep] is not m], states)
    if not now and not before:
        raise UserError(f"{options.choice} chooses nothing of what was planned in out={str(options.out)!r}")
    return now, {key: m for key, m in before.items() if key not in now}


def _measurements(options: Options, manifests: Iterable[Manifest], states: States) -> dict[str, Measurement]:
    found: dict[str, Measurement] = {}
    for manifest in manifests:
        try:
            part = chosen_part(options.choice, options.out, manifest, states)
        except UserError:
            continue  # what was chosen is of other launches
        found |= {m.key: m for m in part.wanted()}
    return found


def say_what_stays(options: Options, console: Console) -> None:
    """Say which states are chosen that a launch leaves alone, and what would run them."""
    states = [s.value for s in options.choice.states if s.runs is Runs.IF_ASKED and s not in options.retry]
    if states:
        again = ",".join(sorted(states))
        console.print(
            f"status= chooses cells that stay as they are: 'retry=\\[{again}]' runs them again", style="yellow"
        )


def candidates(results: pd.DataFrame) -> Iterator[Candidate]:
    """Yield the cells of a wide table, for a choice."""
    names = _choosing()
    axes = results[names].astype(object).where(results[names].notna(), None)
    # A label ends with its calibration in words; the column has the data's identity.
    words = axes["label"].astype("string").str.partition(", ")[2]
    axes["calibration"] = words.astype(object).where(axes["calibration"].notna(), None)
    for key, state, row in zip(results["key"], results["status"], axes.itertuples(index=False), strict=True):
        yield Candidate(key=key, axes=dict(zip(names, row, strict=True)), state=state)


def _choosing() -> list[str]:
    """Return the columns of cells that choices go by."""
    return [*axis_names(), *MORE]
