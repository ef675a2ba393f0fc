"""Say which cells of a study are superseded, and by what: those that its newest launch does not plan any more."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from sweeps.study.cell import Cell, Measurement, ModelRef
from sweeps.study.manifest import Manifest
from sweeps.text import counted, written

_SHOWN = 12
"""Characters of a hash or commit."""


def newest_launches(manifests: Sequence[Manifest]) -> dict[str, Manifest]:
    """Return the newest launch of each study.

    Args:
        manifests: oldest first.
    """
    return {manifest.sweep: manifest for manifest in manifests}


def planned_now(manifests: Sequence[Manifest]) -> frozenset[str]:
    """Return the measurements, by key, that the newest launches of studies plan."""
    return frozenset(m.key for manifest in newest_launches(manifests).values() for m in manifest.measurements())


def what_superseded(manifests: Sequence[Manifest], done: Collection[str]) -> list[str]:
    """Say, of one study, what its earlier launches planned and the newest does not, and by what that was superseded.

    Args:
        manifests: of the study, oldest first.
        done: measurements that have a result, by key. Cells that are done and that no launch took back, as those of a
            directory that was joined to this one, are not spoken of.
    """
    *earlier, newest = manifests
    now = {cell.key for cell in newest.cells}
    gone = {cell.key: (cell, manifest) for manifest in earlier for cell in manifest.cells if cell.key not in now}
    return [*_models(list(gone.values()), newest, done), *_evaluations(earlier, newest, now)]


def _models(gone: Sequence[tuple[Cell, Manifest]], newest: Manifest, done: Collection[str]) -> Iterator[str]:
    today = {_name(cell.model): cell.model for cell in newest.cells}
    by_model: dict[ModelRef, int] = {}
    left = 0
    for cell, manifest in gone:
        new = today.get(_name(cell.model))
        if new is None or new.identity == cell.model.identity:
            left += any(Measurement(cell=cell, eval=spec).key not in done for spec in manifest.evals)
        else:
            by_model[cell.model] = by_model.get(cell.model, 0) + 1
    for model, count in by_model.items():
        new = today[_name(model)]
        yield (
            f"{counted(count, 'cell')} of {newest.sweep} superseded: {model.label} had "
            f"{_difference(model.identity, new.identity)}, by its newest launch"
        )
    if left:
        yield (
            f"{counted(left, 'cell')} of {newest.sweep} superseded: its newest launch does not plan them; the earlier "
            "command runs those that are not done"
        )


def _evaluations(earlier: Sequence[Manifest], newest: Manifest, now: frozenset[str] | set[str]) -> Iterator[str]:
    """Speak of the cells that are still planned, whose evaluations changed."""
    today = {spec.name: spec for spec in newest.evals}
    said: dict[str, None] = {}
    for manifest in earlier:
        cells = sum(1 for cell in manifest.cells if cell.key in now)
        for spec in manifest.evals:
            new = today.get(spec.name)
            if not cells or (new is not None and new.canonical() == spec.canonical()):
                continue
            what = (
                "which its newest launch does not measure"
                if new is None
                else f"which had {_difference(spec.canonical(), new.canonical())}, by its newest launch"
            )
            said[f"{counted(cells, 'measurement')} of {newest.sweep} superseded: {spec.name}, {what}"] = None
    yield from said


def _name(model: ModelRef) -> tuple[str, str, str | None]:
    return model.family, model.name, model.checkpoint


def _difference(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """Return what differs, as 'weights 1a2b3c, now 4d5e6f'."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(f"{name} {_short(old.get(name))}, now {_short(new.get(name))}" for name in names)


def _short(value: object) -> str:
    return written(value)[:_SHOWN]
