"""Shell completion: Hydra's, which knows groups and keys, and the values of keys that have few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from hydra.plugins.completion_plugin import CompletionPlugin

from sweeps.commands.modes import MODES
from sweeps.config import Config
from sweeps.status import RETRY, State
from sweeps.worker.devices import DEVICES

VALUES: Final[Mapping[str, Sequence[str]]] = {
    "mode": tuple(MODES),
    "status": tuple(State),
    "retry": (*RETRY, "all", "none"),
    "executor.device": DEVICES,
    **{name: ("true", "false") for name, field in Config.__dataclass_fields__.items() if field.type == "bool"},
}
"""Values by key."""


def complete_values() -> None:
    """Have Hydra's completion offer the values of ``VALUES``; of a key that is no group it offers its default alone."""
    of_hydra = CompletionPlugin._get_matches

    def matches(config: Any, word: str) -> list[str]:  # noqa: ANN401  # as Hydra declares it
        key, is_given, start = word.partition("=")
        if is_given and key in VALUES:
            return [f"{key}={value}" for value in VALUES[key] if value.startswith(start)]
        return of_hydra(config, word)

    CompletionPlugin._get_matches = staticmethod(matches)  # type: ignore[method-assign]
