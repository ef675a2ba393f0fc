"""An axis is declared once, on the field of a spec; everything that lists axes is read from there.

From the declarations follow Hydra's schema of a block, the grid, ``where=`` and ``by=``, the store's columns and
SCHEMA.md, labels, W&B's configuration, and what analysis takes for "everything else neutral".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Final, Literal, cast

AxisType = Literal["string", "int64", "float64", "bool"]


class _Varied:
    """The neutral value of an axis that has none, since figures vary it."""

    def __repr__(self) -> str:
        return "VARIED"


VARIED: Final = _Varied()


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a study.

    Attributes:
        name: as users write it, and the column of results.
        type: of the column.
        doc: what it means, one phrase.
        unit: of its numbers.
        neutral: the value at which it changes nothing, as a missing one does; ``VARIED`` where figures vary the axis.
        since: version of the keys that the axis came with. An axis that came after version 1 is left out of a spec's
            identity at its neutral value, so that adding it changes no key.
        optional: None says that the axis does not apply to the spec, and is left out of its identity.
        baseline: what a 16-bit cell shows; None is nothing.
        label: format of a value that isn't neutral, in a spec's label; None is "name=value", or the name of a flag.
        names: of values that keys and columns hold as numbers: (name, number).
    """

    name: str
    type: AxisType
    doc: str
    unit: str = ""
    neutral: object = VARIED
    since: int = 1
    optional: bool = False
    baseline: object = None
    label: str | None = None
    names: tuple[tuple[str, int], ...] = ()

    def number(self, value: Any) -> Any:
        """Return the number that a name stands for; any other value as it is."""
        return dict(self.names).get(value, value) if isinstance(value, str) else value

    def name_of(self, value: Any) -> Any:
        """Return the name that a number stands for, for people to read; any other value as it is."""
        return {number: name for name, number in self.names}.get(value, value) if self.names else value

    def is_neutral(self, value: object) -> bool:
        """Tell whether a value changes nothing."""
        return value is None or (self.neutral is not VARIED and value == self.neutral)

    def is_identity(self, value: object) -> bool:
        """Tell whether a value belongs to the identity of a spec that has this axis."""
        return not (self.optional and value is None) and not (self.since > 1 and self.is_neutral(value))

    def words(self, value: object) -> str:
        """Return a value as labels spell it; '' for a neutral one."""
        if self.is_neutral(value):
            return ""
        if self.label is not None:
            return self.label.format(value)
        return self.name if value is True else f"{self.name}={value}"


def axis(default: Any = MISSING, *, type: AxisType, doc: str, **more: Any) -> Any:
    """Declare an axis: a dataclass field.

    Args:
        default: the field's; without one the axis must be given.
        type: of the column.
        doc: what it means, one phrase.
        **more: the other attributes of ``Axis``.
    """
    declared = {"axis": {"type": type, "doc": doc, **more}}
    return field(metadata=declared) if default is MISSING else field(default=default, metadata=declared)


def like(cls: type[object], name: str, default: Any = MISSING) -> Any:
    """Declare an axis that another spec has, with the same meaning.

    Args:
        cls: the other spec's class.
        name: of the axis.
        default: of the field; without one the axis must be given.
    """
    metadata = next(f.metadata for f in fields(cast(Any, cls)) if f.name == name)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def axis_of(declared: Field[Any]) -> Axis:
    """Return the axis that a field declares.

    Raises:
        TypeError: it declares none. An undeclared field would be in no key, label, column or schema.
    """
    if "axis" not in declared.metadata:
        raise TypeError(f"field {declared.name!r} declares no axis: write {declared.name}: TYPE = axis(DEFAULT, ...)")
    return Axis(name=declared.name, **declared.metadata["axis"])


def axes_of(cls: type[object]) -> Mapping[str, Axis]:
    """Return the axes of a spec's class by name, in the order of its fields."""
    known = _DECLARED.get(cls)
    if known is None:
        known = _DECLARED[cls] = {f.name: axis_of(f) for f in fields(cast(Any, cls))}
    return known


_DECLARED: Final[dict[type[object], Mapping[str, Axis]]] = {}
