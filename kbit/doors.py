"""Doors: data types, methods, evaluations and executors are entries of a mapping, never branches.

A door maps a name to what stands behind it. An entry is the thing itself, or ``"module:attribute"``, which is imported
when it is first asked for. Another package adds an entry by an entry point of the door's group in its pyproject.toml:

    [project.entry-points."kbit_sweep.dtypes"]
    posit = "my_package.posit:POSIT"

No door has a default: a name that nobody entered is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from kbit.errors import SpecError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


def load(reference: Any) -> Any:
    """Import what "module:attribute" names; anything else is the thing itself.

    Raises:
        ImportError, AttributeError: the module can't be imported, or lacks the attribute.
    """
    if not isinstance(reference, str):
        return reference
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


class Door(Mapping[str, T], Generic[T]):
    """A mapping from name to entry, open to other packages.

    Args:
        group: entry points of this group are entries too; a name of ours can't be taken over.
        key: the key under which users give a name, for errors.
        entries: name to the thing itself, or to "module:attribute".
    """

    def __init__(self, group: str, key: str, entries: Mapping[str, T | str]) -> None:
        self.group, self.key = group, key
        self._entries: dict[str, T | str] = dict(entries)
        self._others: dict[str, EntryPoint] | None = None

    def __getitem__(self, name: str) -> T:
        """Return the entry of a name.

        Raises:
            SpecError: nobody entered it. Names what is allowed.
            ImportError, AttributeError: the entry's module can't be imported, or lacks the attribute.
        """
        entry = self._entries.get(name)
        if entry is None:
            other = self._from_others().get(name)
            if other is None:
                raise self.unknown(name)
            entry = self._entries[name] = cast(T, other.load())  # the door's reader knows what a T is
        elif isinstance(entry, str):
            entry = self._entries[name] = cast(T, load(entry))
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._from_others()

    def __iter__(self) -> Iterator[str]:
        """Yield names, ours first, in their order; imports no entry."""
        return iter(dict.fromkeys([*self._entries, *self._from_others()]))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def unknown(self, name: object) -> SpecError:
        """Return the error for a name that nobody entered."""
        return SpecError(self.key, name, "one of " + ", ".join(self))

    def _from_others(self) -> dict[str, EntryPoint]:
        """Entry points of installed packages, looked up once."""
        if self._others is None:
            from importlib.metadata import entry_points  # late: workers and --help open few doors

            found = {point.name: point for point in entry_points(group=self.group)}
            taken = sorted(found.keys() & self._entries.keys())
            if taken:
                where = found[taken[0]].value
                raise SpecError(self.key, taken[0], f"the entry point {where} of {self.group} takes a name of ours")
            self._others = found
        return self._others
