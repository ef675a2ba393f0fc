"""The modes of a launch, and what each runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

MODES: Final[Mapping[str, str]] = {
    "run": "sweeps.commands.run:run",
    "plan": "sweeps.commands.plan:plan",
    "status": "sweeps.commands.status:status",
    "table": "sweeps.commands.table:table",
    "best": "sweeps.commands.best:best",
    "report": "sweeps.commands.report:report",
    "findings": "sweeps.commands.findings:findings",
    "compare": "sweeps.commands.compare:compare",
    "logs": "sweeps.commands.logs:logs",
    "cancel": "sweeps.commands.cancel:cancel",
    "fetch": "sweeps.commands.fetch:fetch",
    "drop": "sweeps.commands.drop:drop",
    "export": "sweeps.commands.export:export",
    "audit": "sweeps.commands.audit:audit",
    "merge": "sweeps.commands.merge:merge",
    "keep": "sweeps.commands.keep:keep",
    "sync": "sweeps.commands.sync:sync",
}
"""Mode to what it runs, imported when it is asked for."""
