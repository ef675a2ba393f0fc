"""What a report says, before it is a page: findings, warnings, tables, what is missing, where the numbers come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pandas as pd

from analysis.cells import some_eval_diverged
from analysis.figures.results import Results
from analysis.figures.style import BITS_STYLE, DTYPE_STYLE, family_name
from analysis.metrics import direction_warnings, headline_metrics
from analysis.mixtures import mixture_warnings
from analysis.report.cells import NONE, Cells, report_cells
from analysis.report.parts import Parts, Section, TablePart
from analysis.report.sections import paper_section, references_section, scaling_section
from analysis.significance import SampleKey, Samples

_PROVENANCE: Final = {
    "commit": "Commit",
    "dirty": "Uncommitted changes",
    "versions": "Packages",
    "device": "Device",
    "kernel": "Kernel",
    "compute_dtype": "Compute dtype",
    "host": "Host",
}
_OF_AN_EVAL: Final = ("dataset", "eval_version", "num_fewshot", "window", "limit", "compute_dtype")
_MOST_SHOWN: Final = 5


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a report says.

    Attributes:
        title: of the page.
        name: of the study; names files, and stands in the notes of figures.
        summary: what was measured, in a sentence or two.
        warnings: what must be known before numbers are compared.
        verdicts: judged claims, as JSON-ready mappings (``analysis.findings``), with the effect in words (said).
        sentences: what the data say, with their numbers.
        cells: the measured cells.
        sections: laws, references, what is missing, provenance.
        styles: colour and marker by column and value, those of the figures.
        results: what figures and tables are made from; what was made of the table is kept there for all of them.
    """

    title: str
    name: str
    summary: str
    warnings: Sequence[str]
    verdicts: Sequence[Mapping[str, Any]]
    sentences: Sequence[str]
    cells: Cells
    sections: Sequence[Section]
    styles: Mapping[str, Mapping[str, tuple[str, str]]]
    results: Results = field(repr=False)


def build_report(
    df: pd.DataFrame,
    long_df: pd.DataFrame,
    samples: Mapping[SampleKey, Samples] | None = None,
    *,
    title: str,
    name: str | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """Collect what results say. A part that can't be made costs a warning, not the others.

    Args:
        df: a wide result table (``sweeps.load_results``); any: empty, partial, of one model, all diverged.
        long_df: the long one.
        samples: per-sample outcomes by (cell key, eval), for intervals (``findings.wanted_samples``).
        title: of the page.
        name: of the study, for files and the notes of figures; the title where it is left out.
        notes: further warnings, e.g. what was left out of the tables.
    """
    parts = Parts()
    samples = samples or {}
    results = Results.of(df, sweep=name or title, samples=samples)
    rows = results.rows
    sections = [
        *parts.optional("scaling laws", lambda: scaling_section(df, samples)),
        *parts.optional("the paper's figures", lambda: paper_section(results)),
        *parts.optional("outliers of 16-bit models", lambda: _outliers(df, long_df)),
        *parts.optional("published scores", lambda: references_section(long_df)),
        *parts.optional("what is missing", lambda: _missing(df, rows)),
        *parts.optional("where the numbers come from", lambda: _provenance(rows, long_df)),
    ]
    return Report(
        title=title,
        name=name or title,
        summary=_summary(df, rows),
        verdicts=parts.made("verdicts", lambda: _verdicts(df, samples) if len(rows) else [], []),
        sentences=parts.made("findings", lambda: _sentences(df, samples), []),
        cells=report_cells(rows),
        sections=sections,
        styles={
            "bits": {str(bits): (look.colour, look.marker) for bits, look in BITS_STYLE.items()},
            # The 16-bit model has no data type.
            "dtype": {d: (k.colour, k.marker) for d, k in {**DTYPE_STYLE, NONE: BITS_STYLE[16]}.items()},
        },
        warnings=[*notes, *mixture_warnings(long_df), *direction_warnings(df), *parts.problems],
        results=results,
    )


def _verdicts(df: pd.DataFrame, samples: Mapping[SampleKey, Samples]) -> list[dict[str, Any]]:
    """The paper's claims held against the data: headlines first, and what could be decided before what could not."""
    from analysis.findings import judge
    from analysis.findings.text import effect_text

    found = [{**f.as_dict(), "said": effect_text(f)} for f in judge(df, samples)]
    return sorted(found, key=lambda f: (not f["headline"], f["verdict"] not in ("holds", "fails")))


def _sentences(df: pd.DataFrame, samples: Mapping[SampleKey, Samples]) -> list[str]:
    from analysis.findings import findings

    return findings(df, samples)


def _summary(df: pd.DataFrame, rows: pd.DataFrame) -> str:
    if rows.empty:
        planned = f"{len(df):,} cells are planned" if len(df) else "no cell is planned"
        return f"Nothing is measured yet: {planned}. mode=run measures them; this page is made again at its end."
    families = [family_name(str(f)) for f in dict.fromkeys(rows["family"].dropna())]
    models = rows["model"].nunique()
    diverged = int(some_eval_diverged(rows).sum())
    partly = int((~rows["status"].isin(["done", "diverged"])).sum())
    more = [f"{diverged:,} diverged"] * bool(diverged) + [f"{partly:,} in part"] * bool(partly)
    text = (
        f"{_counted(models, 'model')} of {_counted(len(families), 'family', 'families')} ({', '.join(families[:8])}); "
        f"{len(rows):,} of {_counted(len(df), 'cell')} measured" + (f" ({', '.join(more)})" if more else "")
    )
    headline = [m.name for m in headline_metrics(rows)]
    last = rows["finished"].max() if "finished" in rows else pd.NaT
    when = f" Latest measurement: {last:%Y-%m-%d %H:%M} UTC." if pd.notna(last) else ""
    return f"{text}. Headline: {'; '.join(headline) or 'no metric'}.{when}"


def _outliers(df: pd.DataFrame, long_df: pd.DataFrame) -> Section | None:
    from analysis.outliers import outlier_section

    return outlier_section(df, long_df)


def _missing(df: pd.DataFrame, rows: pd.DataFrame) -> Section | None:
    """Which cells are not measured, by state and model."""
    from kbit.specs.base import BASELINE_BITS

    if "status" not in df:
        return None
    left = df[~df["status"].isin(["done", "diverged"])]
    if left.empty:
        return None
    counts = left.groupby(["model", "status"], dropna=False).size().rename("cells").reset_index()
    without = sorted(set(df["model"].dropna()) - set(rows.loc[rows["bits"] == BASELINE_BITS, "model"]))
    none = f" Without a measured 16-bit cell, so without changes from it: {', '.join(without)}." if without else ""
    return Section(
        anchor="missing",
        title="Not measured",
        intro="The same command goes on with what is missing; mode=status says what each state means." + none,
        tables=[TablePart(title="Cells by model and state", frame=counts)],
    )


def _provenance(rows: pd.DataFrame, long_df: pd.DataFrame) -> Section | None:
    if rows.empty:
        return None
    done = long_df[long_df["status"].isin(["done", "diverged"])]
    found = [(title, _listed(done[column])) for column, title in _PROVENANCE.items() if column in done]
    tables = [TablePart(title="Measurements", frame=pd.DataFrame(found, columns=["what", "values"]))]
    columns = [c for c in _OF_AN_EVAL if c in done]
    evals = done.groupby("eval").agg(measurements=("eval", "size"), **{c: (c, _listed) for c in columns})
    tables.append(TablePart(title="Evaluations", frame=evals.reset_index()))
    models = rows.drop_duplicates("model")[["family", "model", "params", "model_id", "revision", "weights_hash"]]
    short = models.assign(weights_hash=models["weights_hash"].astype("string").str[:12])
    tables.append(TablePart(title="Models", frame=short.fillna("—").astype(str).replace("<NA>", "—")))
    return Section(anchor="provenance", title="Where the numbers come from", tables=tables)


def _listed(values: pd.Series[Any]) -> str:
    """'cpu (120), cuda (3)': the commonest values with their counts."""
    counts = values.astype("string").fillna("none").map(_short).value_counts()
    parts = [str(v) if len(counts) == 1 else f"{v} ({n:,})" for v, n in counts.head(_MOST_SHOWN).items()]
    return ", ".join(parts) + (f" and {len(counts) - _MOST_SHOWN:,} more" if len(counts) > _MOST_SHOWN else "")


def _short(value: str) -> str:
    """Package versions as 'torch 2.11'; long hashes by their beginning."""
    if value.startswith("{"):
        return ", ".join(f"{name} {version}" for name, version in json.loads(value).items())
    return value[:12] if len(value) >= 40 and not set(value) - set("0123456789abcdef") else value


def _counted(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"
