"""Stand in for a worker: take packs and tell of measurements as ``sweeps.worker`` does, but measure and store nothing.

What is left is the launcher's own work: the benchmark measures that.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator

from sweeps.bench.synthetic import results
from sweeps.events import Event, Loaded, Measured, Measuring, PackDone, Started, Teller
from sweeps.plan.pack import Pack
from sweeps.store.rows import told_part
from sweeps.study.cell import Measurement


def events(pack: Pack, number: int) -> Iterator[Event]:
    """Yield what a worker tells of a pack, with made-up results."""
    yield Loaded(model=pack.model.label, seconds=1.0)
    for cell, evals in pack.items:
        measurements = [Measurement(cell=cell, eval=spec) for spec in evals]
        yield Started(pack=pack.id, cell=cell.key, label=cell.label, measurement=measurements[0].key)
        for measurement, row in zip(measurements, results(pack.id, measurements, seed=number), strict=True):
            yield Measuring(pack=pack.id, measurement=measurement.key)
            yield Measured(row=told_part(row))
    yield PackDone(pack=pack.id)


def main() -> None:
    """Tell of each pack that standard input names."""
    parser = argparse.ArgumentParser(description=(main.__doc__ or "").partition("\n")[0])
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--settings")
    teller = Teller()
    with os.fdopen(parser.parse_args().events, "w") as out:
        for number, line in enumerate(sys.stdin):
            for event in events(Pack.from_dict(json.loads(line)), number):
                out.write(teller.line(event))
            out.flush()


if __name__ == "__main__":
    main()
