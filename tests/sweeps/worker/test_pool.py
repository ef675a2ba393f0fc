"""What the pool's owner does for each measurement: little, and no file."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from sweeps.bench.synthetic import Synthetic, counted_flushes
from sweeps.events import Event
from sweeps.launches.claims import Claims
from sweeps.plan.cost import CostModel
from sweeps.plan.pack import Pack
from sweeps.plan.packs import Known, Packing, make_plan
from sweeps.store.parts import Store
from sweeps.worker import pool
from sweeps.worker.devices import Workers
from sweeps.worker.settings import WorkerSettings


def test_what_is_measured_quickly_is_told_now_and_then_and_costs_no_flush_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of measurements in a moment, by a worker that makes them up: a few beats, each of what was begun."""
    monkeypatch.setattr(pool, "WORKER", "sweeps.bench.stand_in")
    manifest = Synthetic(out=tmp_path, measurements=1000).manifest()
    packs = make_plan(
        manifest, Known(), retry=(), cost=lambda: CostModel(device="cpu"), packing=Packing(cells=45)
    ).packs[:2]
    expected = {m.key for pack in packs for m in pack.measurements()}
    assert len(expected) > 300
    events: Counter[str] = Counter()
    beats: list[Sequence[str]] = []
    warm: list[bool] = []

    def take(event: Event, worker: int) -> None:
        events[event.name] += 1

    claims = Claims(out=tmp_path)
    claim = claims.create(1, launch="l", sweep="s", packs={})

    def beat(running: Sequence[str]) -> None:
        beats.append(running)
        claims.heartbeat(claim, running)

    def predict(pack: Pack, is_warm: bool) -> Pack:
        warm.append(is_warm)
        return pack

    monkeypatch.setattr(os, "fsync", os.fsync)  # is put back
    working = pool.WorkerPool(
        store=Store(out=tmp_path),
        workers=Workers(device="cpu", count=1, threads=1),
        settings=WorkerSettings(batch_tokens=1, trust_remote_code=False, provenance={}),
        log=lambda _: tmp_path / "log",
        on_event=take,
        beat=beat,
        predict=predict,
    )
    flushes, began = counted_flushes(), time.monotonic()
    assert working.run(packs) == "finished"
    assert (events["measured"], events["pack_done"]) == (len(expected), 2)
    assert warm == [False, packs[0].model == packs[1].model]
    assert len(beats) <= 2 + (time.monotonic() - began) / pool.NEWS_SECONDS
    assert flushes() == len(beats)
    named = [key for beat in beats for key in beat]
    assert named
    assert set(named) <= expected
