"""A report as one HTML page that needs nothing else: style, script and cells are inside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from string import Template
from typing import Any, Final
from urllib.parse import quote

import pandas as pd

from analysis.cells import fullest_dtype, plain
from analysis.figures.drawing import LOSS_CAP, loss_cap
from analysis.metrics import headline_metrics
from analysis.report.cells import PLAIN
from analysis.report.content import Report
from analysis.report.parts import Section, TablePart
from analysis.significance import LEVEL, Margins

_SCRIPTS: Final = ("decode.js", "study.js", "marks.js", "chart.js", "table.js", "main.js")
_MANY: Final = 1500
"""Cells of which a page shows the paper's main setting first; the filters show the others."""
_MOST_ROWS: Final = 200
_FIRST: Final = 20
"""Verdicts that are shown open where none is a headline."""
_MUCH: Final = 240
"""Characters of a claim's evidence beyond which it is folded below the effect that decides."""
_HOW: Final = (
    "Each card checks a claim of the paper (Dettmers and Zettlemoyer, 2023) on what is stored here. It holds or fails "
    f"with {LEVEL:.0%} confidence over models, adjusted for the number of claims; else the data can't tell. Every part "
    "of a claim must hold, so the number is that of its weakest part, or of the part that fails; its interval is not "
    f"adjusted. Less than {Margins().loss:g} nats per token or {Margins().points:g} points of accuracy is no effect."
)
_VERDICTS: Final = {"holds": "holds", "fails": "fails"}


def page(report: Report, *, figures: Sequence[tuple[str, str]] = (), problems: Sequence[str] = ()) -> str:
    """Return the HTML of a report; the same for the same data.

    Args:
        report: what it says.
        figures: (title, address relative to the page) of figures and tables that lie beside it.
        problems: further warnings, of those files.
    """
    sections = [*map(_section, report.sections), *([_files(figures)] if figures else [])]
    names = [("findings", "Findings"), ("figures", "Figures"), ("cells", "Cells")]
    names += [(s.anchor, s.title) for s in report.sections] + ([("files", "Files")] if figures else [])
    return _template().substitute(
        title=escape(report.title),
        summary=escape(report.summary),
        navigation=" ".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title in names),
        warnings=_warnings(report, problems),
        findings=_findings(report),
        sections="\n".join(sections),
        head=_json(_head(report)),
        cells=report.cells.data,
        style=_resource("page.css"),
        script="\n".join(_resource(name) for name in _SCRIPTS),
    )


def _head(report: Report) -> dict[str, Any]:
    """What the page's script reads besides the cells."""
    rows = report.results.rows
    losses = [m for m in headline_metrics(rows) if m.metric == "loss"]
    bits = pd.to_numeric(rows["bits"], errors="coerce")
    values = pd.to_numeric(rows[losses[0].column], errors="coerce") if losses else None
    cut = loss_cap(pd.DataFrame({"value": values, "bits": bits}), losses[0]) if values is not None else LOSS_CAP
    return {
        "count": report.cells.count,
        "columns": report.cells.heads,
        "metrics": report.cells.metrics,
        "styles": report.styles,
        "cut": cut,
        "shown": _shown_first(rows),
    }


def _shown_first(rows: pd.DataFrame) -> dict[str, list[str]]:
    """Filters of a page with very many cells: the paper's main setting, of the fullest data type at block size 64."""
    cells = plain(rows)
    if len(rows) <= _MANY or cells.empty:
        return {}
    dtype = fullest_dtype(cells[cells["blocksize"] == 64], "bits")
    own = {"dtype": [dtype, "—"], "blocksize": ["64", "—"]} if dtype else {}
    return {"options": [PLAIN], "method": ["baseline", "blockwise"], **own}


def _warnings(report: Report, problems: Sequence[str]) -> str:
    said = [*report.warnings, *problems]
    if report.cells.left_out:
        said.append(f"Left out of this page, for its size: {', '.join(report.cells.left_out)}. mode=table has them.")
    if not said:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in said)
    return f'<section class="warnings" id="warnings"><h2>Before you compare</h2><ul>{items}</ul></section>'


def _findings(report: Report) -> str:
    """Verdicts as cards, the headlines open; below them the sentences, or those alone."""
    first = [f for f in report.verdicts if f.get("headline")] or report.verdicts[:_FIRST]
    others = [f for f in report.verdicts if not any(f is one for one in first)]
    items = "".join(f"<li>{escape(text)}</li>" for text in report.sentences)
    if not first and not items:
        return (
            '<p class="note">The data support no finding: they need a 16-bit cell and two precisions or data types.</p>'
        )
    if not first:
        return f'<ul class="plain">{items}</ul>'
    cards = "\n".join(map(_finding, first))
    more = _folded(
        f"{len(others)} more findings, of single families and other metrics", "\n".join(map(_finding, others))
    )
    return (
        f'<p class="note">{_HOW}</p>'
        + cards
        + (more if others else "")
        + (_folded("The numbers in sentences", f'<ul class="plain">{items}</ul>'))
    )


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _finding(found: Mapping[str, Any]) -> str:
    verdict = str(found["verdict"])
    about = [str(found[name]) for name in ("source", "scope", "metric") if found.get(name)]
    needs = f"<p>To tell: {escape(str(found['needs']))}</p>" if found.get("needs") else ""
    said = f"<p>{escape(str(found['said']))}</p>" if found.get("said") else ""
    evidence = f"<p>{escape(str(found['evidence']))}</p>" if found["evidence"] else ""
    if said and len(evidence) > _MUCH:
        evidence = _folded("Each comparison", evidence)
    return (
        f'<article class="finding {_VERDICTS.get(verdict, "unclear")}">'
        f'<p><span class="verdict">{escape(verdict)}</span> {escape(str(found["statement"]))}</p>'
        f"{said}{evidence}{needs}"
        f'<p class="scope">{escape("; ".join(about))}</p></article>'
    )


def _section(section: Section) -> str:
    intro = f"<p>{escape(section.intro)}</p>" if section.intro else ""
    tables = "".join(map(_table, section.tables))
    return f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>{intro}{tables}</section>'


def _table(table: TablePart) -> str:
    frame = table.frame.head(_MOST_ROWS)
    head = "".join(f'<th scope="col">{escape(str(c))}</th>' for c in frame.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in frame.itertuples(index=False))
    cut = f" The first {_MOST_ROWS} of {len(table.frame):,} rows." if len(table.frame) > _MOST_ROWS else ""
    note = f'<p class="note">{escape((table.note + cut).strip())}</p>' if table.note or cut else ""
    return (
        f'<h3>{escape(table.title)}</h3><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(table.title)}"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}'
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f'<td class="number">{value:.4g}</td>' if pd.notna(value) else '<td class="number">—</td>'
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    text = "—" if value is None or value is pd.NA else str(value)
    if text.startswith("python "):
        return f'<td class="wrap"><code>{escape(text)}</code></td>'
    return f'<td class="wrap">{escape(text)}</td>' if len(text) > 40 else f"<td>{escape(text)}</td>"


def _files(figures: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<li><a href="{escape(quote(address))}">{escape(title)}</a></li>' for title, address in figures)
    return f'<section id="files"><h2>Files beside this page</h2><ul class="plain">{items}</ul></section>'


def _json(value: object) -> str:
    """JSON that can't end the script element that it stands in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


@cache
def _resource(name: str) -> str:
    text = files("analysis.report").joinpath("page", name).read_text(encoding="utf-8")
    return re.sub(r"^ +", "", text, flags=re.MULTILINE) if name.endswith(".css") else text


def _template() -> Template:
    return Template(_resource("page.html"))
