"""Power is lost at any moment: what was acknowledged is there once, whatever of the rest came to the disk."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sweeps.launches.claims import Claims
from sweeps.store import folding, records
from sweeps.store.parts import Store
from tests.filesystem import compiled_layer, under_layer
from tests.filesystem.replay import crashes, read_log, rebuild, whole
from tests.sweeps.store.test_folding import DEAD
from tests.sweeps.store.test_parts import row


def work(out: Path, log: Path) -> None:
    """Do what launches and workers do with a store, in one process; say in the layer's log what was acknowledged."""
    said = os.open(log, os.O_WRONLY | os.O_APPEND)

    def say(*words: object) -> None:
        os.write(said, b"said " + " ".join(map(str, words)).encode() + b"\n")

    def write(store: Store, name: str) -> None:
        store.write({"row_id": name, **row(f"of-{name}", seconds=float(name[1:]))})
        say("stored", name)

    folding.GRACE_SECONDS, records.ROTATE_BYTES = -1.0, 1200  # type: ignore[misc]
    claims = Claims(out=out)
    claim = claims.create(1, launch="a", sweep="s", packs={"p": ["m1"]})
    say("claimed", 1)
    alive = Store(out=out)
    write(alive, "a1")
    records.this_process, mine = lambda: DEAD, records.this_process
    dead = Store(out=out)
    write(dead, "b1")
    alive.fold()
    records.this_process = mine
    write(dead, "b2")
    write(alive, "a2")
    write(alive, "a3")
    alive.fold()
    say("dropping", "a2")
    alive.drop(["a2"], "wrong")
    say("dropped", "a2")
    other = Store(out=out.with_name("other"))
    other.write({"row_id": "c1", **row("of-c1", seconds=1.0)})
    (table,) = other.scan()
    alive.add(table)
    say("stored", "c1")
    write(dead, "b3")
    dead.close()
    claims.heartbeat(claim, ["m1"])
    alive.fold()
    say("undoing", "a2")
    alive.undo_drop()
    say("undone", "a2")
    alive.close()
    alive.fold()
    say("releasing", 1)
    claims.release(claim)
    say("released", 1)


@dataclass
class Promised:
    """What a program was told by the moment at which power was lost."""

    said: list[str]
    stored: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.stored = self.of("stored")

    def of(self, word: str) -> set[str]:
        return {s.split()[1] for s in self.said if s.split()[0] == word}

    def check(self, out: Path) -> None:
        store = Store(out=out)
        found = {r["row_id"]: r for r in store.history(["measurement", "seconds"])}
        assert self.stored <= found.keys()
        assert {name: (f"of-{name}", float(name[1:])) for name in found} == {
            name: (r["measurement"], r["seconds"]) for name, r in found.items()
        }
        read = store.read(["row_id"]).column("row_id").to_pylist()
        assert len(read) == len(set(read))
        dropped = store.dropped_ids()
        must, may = self.of("dropped") - self.of("undoing"), self.of("dropping") - self.of("undone")
        assert must <= dropped <= may
        assert set(read) == found.keys() - dropped
        numbers = {str(claim.number) for claim in Claims(out=out).open()}
        if "claimed 1" in self.said:
            assert numbers == {"1"} - self.of("released") or "releasing 1" in self.said


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(root, log) of the work, every change of which the layer noted."""
    home = tmp_path_factory.mktemp("disk")
    root, log = home / "root", home / "log"
    root.mkdir()
    log.touch()
    code = f"import sys, pathlib; from {__name__} import work; work(*map(pathlib.Path, sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(root / "results"), str(log)]
    subprocess.run(command, env=under_layer(compiled_layer(home), root, log=log), check=True)
    return root, log


def test_the_layer_notes_every_change(history: tuple[Path, Path], tmp_path: Path) -> None:
    """Bytes that Arrow's or another library's code wrote past it would be missing here."""
    root, log = history
    rebuild(whole(read_log(log)), str(root), tmp_path)

    def held(at: Path) -> dict[str, bytes | None]:
        return {str(p.relative_to(at)): None if p.is_dir() else p.read_bytes() for p in at.rglob("*")}

    assert held(tmp_path) == held(root)
    assert len(held(root)) > 10


def lose_power(
    history: tuple[Path, Path], home: Path, *, randoms: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Check what is read after each loss of power, and of some of them after the next folds; return how many."""
    root, log = history
    monkeypatch.setattr(folding, "GRACE_SECONDS", -1.0)
    number = 0
    for number, (said, state) in enumerate(crashes(read_log(log), randoms=randoms)):
        out = home / str(number) / "results"
        rebuild(state, str(root), out.parent)
        promised = Promised(said)
        promised.check(out)
        if number % every == 0:
            for _ in range(2):
                Store(out=out).fold()
            promised.check(out)
    return number


def test_what_was_acknowledged_outlives_a_loss_of_power(
    history: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lose_power(history, tmp_path, randoms=0, every=8, monkeypatch=monkeypatch) > 200


@pytest.mark.slow
def test_the_same_of_many_reorderings(
    history: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lose_power(history, tmp_path, randoms=60, every=1, monkeypatch=monkeypatch) > 600
