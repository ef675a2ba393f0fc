"""``mode=fetch``: download a study's models and data, so that runs need no network."""

from __future__ import annotations

from rich.console import Console

from kbit.sources import HubData, documents_of
from sweeps.executors.base import chosen
from sweeps.options import Options
from sweeps.study import hub
from sweeps.study.resolve import build_study


def fetch(options: Options, console: Console) -> int:
    """Download the study's models and data, so that runs need no network."""
    executor = chosen(options.executor)
    device = executor.device()
    with console.status("resolving models and data") as status:
        study = build_study(
            options.study, device=device, device_name=executor.device_name, strict=True, progress=status.update
        )
        models = {(c.model.hub_id, c.model.commit) for c in study.manifest.cells if c.model.hub_id}
        read = [documents_of(source) for source in study.manifest.sources()]
        datasets = [documents for documents in read if isinstance(documents, HubData)]
        status.update("downloading")
        hub.fetch(
            sorted((str(m), str(c)) for m, c in models),
            datasets,
            report=lambda line: console.print(line, markup=False, highlight=False),
        )
    console.print(f"{len(models)} model(s) and {len(datasets)} data set(s) of {study.manifest.sweep} are in the cache.")
    return 0
