"""A worker that stores made-up results: for what launches, plans and tables make of results, whatever these are.

It tells and stores as ``sweeps.worker`` does, without torch and a model: a study takes 1 CPU second, not 4 or more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from sweeps.bench.synthetic import results
from sweeps.events import Event, Loaded, Measured, Measuring, PackDone, Started, Teller
from sweeps.plan.pack import Pack
from sweeps.store.parts import Store
from sweeps.store.rows import Origin, run_row, told_part
from sweeps.study.cell import Measurement
from sweeps.worker.settings import WorkerArguments


def main() -> None:
    """Store a result of each measurement of each pack that standard input names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--settings", required=True)
    args = parser.parse_args()
    arguments, teller = WorkerArguments.from_json(args.settings), Teller()
    store = Store(out=Path(arguments.out), made=True, witness=arguments.settings.witness)
    with os.fdopen(args.events, "w", buffering=1) as events:

        def tell(event: Event) -> None:
            events.write(teller.line(event))

        for line in sys.stdin:
            pack = Pack.from_dict(json.loads(line))
            tell(Loaded(model=pack.model.label, seconds=1.0))
            origin = Origin(sweep=pack.sweep, pack=pack.id, rung=pack.rung, provenance=arguments.settings.provenance)
            for cell, evals in pack.items:
                measurements = [Measurement(cell=cell, eval=spec) for spec in evals]
                tell(Started(pack=pack.id, cell=cell.key, label=cell.label, measurement=measurements[0].key))
                for measurement, made in zip(measurements, results(pack.id, measurements), strict=True):
                    tell(Measuring(pack=pack.id, measurement=measurement.key))
                    row = {**made, **run_row(measurement, origin, datetime.now(UTC))}
                    store.write(row)
                    tell(Measured(row=told_part(row)))
            tell(PackDone(pack=pack.id))
    store.close()


if __name__ == "__main__":
    main()
