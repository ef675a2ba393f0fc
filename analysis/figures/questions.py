"""Questions that single studies ask: outlier dimensions, exponent bits, and options on against off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import pandas as pd

from analysis.cells import numbers, one_exponent, ordered_dtypes, with_baseline
from analysis.figures import style
from analysis.figures.chart import Chart
from analysis.figures.comparisons import FROM_16_BIT
from analysis.figures.results import HELD, NotAskedError, Results, block_text, held
from kbit.spec import axes

OPTIONS: Final[Mapping[str, tuple[str, str]]] = {
    "center": ("centering", "Centering"),
    "scheme": ("groups", "Groups of a row"),
    "absmax_dtype": ("absmax_dtype", "How absmax is stored"),
    "zero_point": ("zero_point", "Zero points"),
    "clip": ("clipping", "Clipping"),
    "rotation": ("rotation", "Rotation"),
    "weighting": ("weighting", "Weighting"),
    "subnormals": ("subnormals", "Subnormals"),
    "dynamic_interval": ("dynamic_interval", "The interval of dynamic"),
    "act_order": ("act_order", "Order of columns"),
    "static_groups": ("static_groups", "Static groups"),
    "group_scales": ("group_scales", "Scales of groups"),
    "scale_rounding": ("scale_rounding", "Rounding of scales"),
}
"""Axes that are on or off: the name of their figure, and what it calls them."""
_MOST_PANELS: Final = 10


def outliers_chart(results: Results) -> Chart:
    """Return the chart of outlier dimensions kept in 16 bits, a panel per family and precision (Figure 4).

    Beside each precision stands the next one that was measured, without outlier dimensions: what its bits could buy.

    Raises:
        NotAskedError: no fraction of them was measured.
    """
    cells = results.plain(free=("outlier_fraction", "outlier_criterion"))
    cells = cells.assign(outlier_fraction=numbers(cells, "outlier_fraction").fillna(0.0))
    kept = results.at(cells[cells["outlier_fraction"] > 0], *HELD)
    kept = held(kept, ["dtype", "blocksize"], over="outlier_fraction", at_least=1)
    if kept.empty:
        raise NotAskedError(f"no figure of outlier dimensions: no cell that keeps some has {results.metric.column}")
    dtype, blocksize = kept["dtype"].iloc[0], int(kept["blocksize"].iloc[0])
    same = cells[(cells["dtype"] == dtype) & (cells["blocksize"] == blocksize)]
    same = same[(same["outlier_fraction"] == 0) | same["bits"].isin(kept["bits"])]
    same = same[same["exponent_bits"].isna() | _same_exponent(same, kept)]
    criterion = same["outlier_criterion"].astype("object").fillna("std").where(same["outlier_fraction"] > 0, "std")
    same = same.assign(_by=criterion)
    panels, looks = [], _fraction_looks(same)
    for (family, bits), own in same.groupby(["family", "bits"], sort=True):
        if not (own["outlier_fraction"] > 0).any():
            continue
        names = [_fraction_name(f, by) for f, by in zip(own["outlier_fraction"], own["_by"], strict=True)]
        own = own.assign(curve=names)
        more = same[(same["family"] == family) & (same["bits"] > bits) & (same["outlier_fraction"] == 0)]
        beside = more[more["bits"] == more["bits"].min()]
        beside = one_exponent(beside, ["family", "dtype", "bits"])
        beside = beside.assign(curve=[f"{b}-bit, none" for b in beside["bits"]])
        looks |= {str(name): style.REFERENCE for name in beside["curve"].unique()}
        name = f"{style.family_name(str(family))}, {bits} bits"
        panels.append(pd.concat([c for c in (own, beside) if len(c)]).assign(panel=name))
    return Chart(
        results=results,
        cells=with_baseline(pd.concat(panels), results.base),
        looks=looks,
        title=f"Outlier dimensions in 16 bits: {results.metric.phrase} ({dtype}, {block_text(blocksize)})",
        legend="Kept in 16 bits",
        changes=FROM_16_BIT,
        side="Kept in 16 bits",
    )


def exponents_chart(results: Results) -> Chart:
    """Return the chart of a float's exponent bits, a panel per precision (Figure 12).

    Of several families the one with the most cells is drawn, and the note names the others.

    Raises:
        NotAskedError: no precision has two numbers of them.
    """
    cells = results.plain()
    cells = results.at(cells[cells["dtype"] == "float"], "bits", "blocksize")
    cells = held(cells, ["blocksize"], over="exponent_bits")
    cells = cells[cells.groupby(["family", "bits"])["exponent_bits"].transform("nunique") > 1]
    if cells.empty:
        raise NotAskedError(
            f"no figure of exponent bits: no float has {results.metric.column} with two numbers of them"
        )
    counts = cells["family"].value_counts(sort=False)
    family = "opt" if counts.get("opt", 0) == counts.max() else str(counts.idxmax())
    others = [style.family_name(str(f)) for f in counts.index if f != family]
    cells = cells[cells["family"] == family]
    exponents = sorted(cells["exponent_bits"].unique())
    blocksize = int(cells["blocksize"].iloc[0])
    cells = with_baseline(cells, results.base)
    title = f"Exponent bits of float: {results.metric.phrase} ({style.family_name(family)}, {block_text(blocksize)})"
    return Chart(
        results=results,
        cells=cells.sort_values(["bits", "params"], kind="stable").assign(
            panel=[f"{b} bits" for b in sorted(cells["bits"])],
            curve=cells["exponent_bits"].map("{:.0f}".format),
            exponent_bits=float("nan"),
        ),
        looks=dict(zip(map("{:.0f}".format, exponents), style.ordinal_styles(len(exponents)), strict=True)),
        title=title,
        legend="Exponent bits",
        changes=FROM_16_BIT,
        side="Exponent bits",
        notes=f"Not drawn: {', '.join(others)}." if others else "",
    )


def option_chart(results: Results, axis: str) -> Chart:
    """Return the chart of an option on against off: curves of both, and below what it changes, paired (Appendix B).

    Raises:
        NotAskedError: no two cells differ in it alone.
    """
    _, words = OPTIONS[axis]
    neutral = axes()[axis].neutral
    cells = results.plain(every_method=True, free=(axis,))
    value = cells[axis].astype(object)
    on = ~(value.isna() | (value == neutral))
    same = ["family", "model", "method", "dtype", "bits", "blocksize", "exponent_bits"]
    off_cells = cells[~on].drop_duplicates(same)
    # Where the one differs in how its blocks lie, its partner does too: an option is the only difference.
    partners = off_cells[[*same, "key", "value"]].rename(columns={"key": "baseline_key", "value": "baseline"})
    paired = cells[on].drop_duplicates([*same, axis]).merge(partners, on=same, how="inner")
    floats = paired["exponent_bits"].notna()
    paired = pd.concat([one_exponent(paired[floats], ["family", "dtype", "bits"], axis=axis), paired[~floats]])
    if paired.empty:
        raise NotAskedError(f"no figure of {axis}: no two cells with {results.metric.column} differ in it alone")
    paired = paired.assign(change=paired["value"] - paired["baseline"])
    alone = off_cells[off_cells["key"].isin(paired["baseline_key"])]
    alone = alone.assign(baseline=float("nan"), baseline_key=None, change=float("nan"))
    both = pd.concat([alone, paired], ignore_index=True)
    both, dropped = _fullest_panels(both)
    kind = [_kind(m, d) for m, d in zip(both["method"], both["dtype"], strict=True)]
    both = both.assign(kind=kind, word=[_option_word(axis, v, neutral) for v in both[axis].astype(object)])
    looks = _option_looks(both)
    blocks = " and ".join(block_text(int(b)) for b in sorted(both["blocksize"].unique()))
    return Chart(
        results=results,
        cells=both.assign(
            panel=[f"{style.family_name(str(f))}, {b} bits" for f, b in zip(both["family"], both["bits"], strict=True)],
            curve=[f"{k}, {w}" if w else str(k) for k, w in zip(both["kind"], both["word"], strict=True)],
        ).sort_values(["family", "bits"], kind="stable"),
        looks=looks,
        title=f"{words}: {results.metric.phrase} ({blocks})",
        legend="Quantization",
        changes=f"Change by\n{words[0].lower()}{words[1:]}",
        side="Quantization",
        notes=f"Not drawn: {', '.join(dropped)}." if dropped else "",
    )


def _fullest_panels(cells: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return the cells at one block size, of as many families and bits as there is room for, and what is left out."""
    chosen = held(cells, ["blocksize"], over="bits", at_least=1)
    blocks = sorted(set(cells["blocksize"]) - set(chosen["blocksize"]))
    counts = chosen.groupby(["family", "bits"]).size().sort_values(ascending=False, kind="stable")
    kept = set(counts.index[:_MOST_PANELS])
    others = [f"{style.family_name(str(f))} at {b} bits" for f, b in counts.index[_MOST_PANELS:]]
    there = [pair in kept for pair in zip(chosen["family"], chosen["bits"], strict=True)]
    return chosen[there], [*map(block_text, blocks), *others]


def _kind(method: str, dtype: object) -> str:
    """'int', 'gptq int', 'hqq'."""
    named = dtype if isinstance(dtype, str) else ""
    return named if method == "blockwise" else f"{method} {named}".rstrip()


def _option_word(axis: str, value: object, neutral: object) -> str:
    if value is None or value is pd.NA or value != value or value == neutral:
        return ""
    found = axes()[axis]
    return found.words(value) or f"{axis}={value}"


def _option_looks(cells: pd.DataFrame) -> dict[str, style.Look]:
    """Colours by data type (or method), line styles by the option's value."""
    kinds = ordered_dtypes(cells.assign(dtype=cells["kind"]))
    others = dict(zip(kinds, style.ordinal_styles(len(kinds)), strict=True))
    words = ["", *sorted({w for w in cells["word"] if w})]
    lines = dict(zip(words, ["-", style.DASHED, style.DOTTED, *["-."] * len(words)], strict=False))
    looks = {}
    for kind in kinds:
        base = style.DTYPE_STYLE.get(kind, others[kind])
        for word in words:
            if ((cells["kind"] == kind) & (cells["word"] == word)).any():
                looks[f"{kind}, {word}" if word else kind] = base._replace(line=lines[word])
    return looks


def _fraction_name(fraction: float, criterion: str) -> str:
    return "none" if fraction == 0 else f"{100 * fraction:.3g} %" + (f", {criterion}" if criterion != "std" else "")


def _fraction_looks(cells: pd.DataFrame) -> dict[str, style.Look]:
    fractions = sorted(cells["outlier_fraction"].unique())
    base = dict(zip(fractions, style.ordinal_styles(len(fractions)), strict=True))
    looks: dict[str, style.Look] = {}
    for by in sorted(cells["_by"].unique(), reverse=True):
        line = "-" if by == "std" else style.DASHED
        looks |= {_fraction_name(f, by): base[f]._replace(line=line) for f in fractions if f > 0 or by == "std"}
    return looks


def _same_exponent(cells: pd.DataFrame, kept: pd.DataFrame) -> pd.Series[bool]:
    """Tell which floats have the exponent bits that cells with outlier dimensions of that precision have."""
    wanted = set(zip(kept["bits"], kept["exponent_bits"], strict=True))
    of_more = ~cells["bits"].isin(kept["bits"])
    pairs = [pair in wanted for pair in zip(cells["bits"], cells["exponent_bits"], strict=True)]
    return pd.Series(pairs, index=cells.index) | of_more
