"""Findings as text: in the terminal, and as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from analysis.findings.finding import Finding, Verdict
from analysis.significance import LEVEL, Margins

if TYPE_CHECKING:
    from rich.console import Console

_STYLES: Final = {Verdict.HOLDS: "green", Verdict.FAILS: "red", Verdict.UNKNOWN: "yellow"}
_LEAST_P: Final = 1e-4
NOTHING: Final = (
    "nothing to judge: no cell has a loss or an accuracy yet, or all of them diverged. mode=status says what is missing"
)


def render_findings(findings: Sequence[Finding], console: Console, *, margins: Margins | None = None) -> None:
    """Print the claims with their verdicts; below each the other metrics and families.

    Args:
        findings: of ``judge``.
        console: of rich.
        margins: those that were used, to say them.
    """
    from rich.padding import Padding
    from rich.text import Text

    if not findings:
        console.print(NOTHING)
        return
    console.print(summary(findings, margins or Margins()), highlight=False, soft_wrap=True)
    for claim, own in _by_claim(findings).items():
        head = next((f for f in own if f.headline), own[0])
        title = Text.assemble(
            (f"{head.verdict:<10} ", _STYLES[head.verdict]), head.statement, (f"  {head.source}", "dim")
        )
        console.print(title, soft_wrap=True)
        lines = [line for line in (effect_text(head), head.scope, head.evidence) if line]
        lines += [f"To tell: {head.needs}"] if head.needs else []
        for f in own:
            if f is not head and not math.isnan(f.effect):
                where = f.metric if f.scope == head.scope else f"{f.metric}, {f.scope.partition(' (exponent')[0]}"
                lines.append(f"{where}: {f.verdict}, {effect_text(f)}")
        console.print(Padding(Text("\n".join([*lines, f"({claim})"])), (0, 0, 1, 11)), highlight=False)


def summary(findings: Sequence[Finding], margins: Margins) -> str:
    """'16 claims of the paper: 5 hold, 3 fail, 8 can't be told (95 %, Holm); ...'."""
    counts = Counter(f.verdict for f in findings if f.headline)
    return (
        f"{sum(counts.values())} claims of the paper: {counts[Verdict.HOLDS]} hold, {counts[Verdict.FAILS]} fail, of "
        f"{counts[Verdict.UNKNOWN]} the data can't tell. Verdicts at {LEVEL:.0%}, adjusted for each other (Holm; below "
        f"them by Benjamini and Hochberg); less than {margins.loss:g} nats or {margins.points:g} points is no effect."
    )


def effect_text(finding: Finding) -> str:
    """'+0.0102 nats/token better (95 % CI +0.0080 to +0.0124), 5 models, p = 0.002'; empty without an effect."""
    if math.isnan(finding.effect):
        return ""
    digits = 2 if "points" in finding.unit or finding.unit == "correlation" else 4
    models = "1 model" if finding.models == 1 else f"{finding.models} models"
    said = f"{finding.effect:+.{digits}f} {finding.unit}".rstrip()
    if not math.isnan(finding.low):
        said += f" (95 % CI {finding.low:+.{digits}f} to {finding.high:+.{digits}f})"
    return f"{said}, {models}{_p_text(finding.p_adjusted)}"


def _p_text(p: float) -> str:
    """', p = 0.043', or ', p < 0.0001': no difference is impossible by chance; empty where it is unknown."""
    if math.isnan(p):
        return ""
    return ", p < 0.0001" if p < _LEAST_P else f", p = {p:.2g}"


def to_json(findings: Sequence[Finding], *, name: str, margins: Margins) -> str:
    """Return findings as JSON: study, margins, level, and a list with ``Finding.as_dict`` of each."""
    found = {
        "study": name,
        "level": LEVEL,
        "margins": {"loss": margins.loss, "points": margins.points},
        "findings": [f.as_dict() for f in findings],
    }
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_markdown(findings: Sequence[Finding]) -> str:
    """Return a table of the claims: what the paper says and where, the verdict, and the effect with its interval."""
    lines = ["| the paper says | verdict | effect (95 % interval) |", "| --- | --- | --- |"]
    for own in _by_claim(findings).values():
        head = next((f for f in own if f.headline), own[0])
        effect = effect_text(head).partition(", p ")[0] or "not measured"
        about = f"{head.statement} ({head.source})"
        lines.append(f"| {about} | **{head.verdict}** | {effect.replace('95 % CI ', '')} |")
    return "\n".join(lines) + "\n"


def _by_claim(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for f in findings:
        found.setdefault(f.claim, []).append(f)
    return found
