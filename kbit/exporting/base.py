"""EXPORTS: formats that a cell can be written in, and their protocol. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from kbit.doors import Door
from kbit.errors import SpecError

if TYPE_CHECKING:
    from kbit.models.loadable import LoadedModel
    from kbit.models.quantize import Calibrated, QuantHandle
    from kbit.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Export:
    """A cell that is to be written.

    Attributes:
        loaded: its model, in its 16-bit form.
        spec: how it is quantized.
        to: the file or directory.
        quantize: quantizes the model in place, or packed into k bits; the handle takes it back.
        calibration: gives the data that its method calibrates on; None of other methods.
    """

    loaded: LoadedModel
    spec: Spec
    to: Path
    quantize: Callable[[bool], QuantHandle]
    calibration: Callable[[], Calibrated | None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written.

    Attributes:
        words: what it holds, for people.
        nbytes: its size.
        load: reads it as a model, in the dtype and on the device of the one that it was made from.
    """

    words: str
    nbytes: int
    load: Callable[[], Any]


class Exporter(Protocol):
    """Writes cells in one format."""

    def check(self, spec: Spec, config: Mapping[str, Any], to: Path) -> None:
        """Refuse what can't be written, before a model is loaded.

        Args:
            spec: the cell's.
            config: the model's config.json; empty where it isn't known.
            to: the file or directory.

        Raises:
            SpecError: names format or to, and what is allowed.
        """

    def write(self, export: Export) -> Written:
        """Write a cell; the model is in its 16-bit form afterwards.

        Raises:
            SpecError: it can't be written in this format.
            OSError: the file can't be written.
        """


def check_directory(to: Path, format_: str) -> None:
    """Refuse a file where a format writes a directory.

    Raises:
        SpecError: names to.
    """
    if to.is_file():
        raise SpecError("to", str(to), f"a directory for format={format_}, and this is a file")


def bytes_in(directory: Path) -> int:
    """Return the bytes of a directory's files."""
    return sum(file.stat().st_size for file in directory.iterdir() if file.is_file())


def check_weights_alone(spec: Spec, format_: str) -> None:
    """Refuse a method that changes more than weights: no file says how its layers compute.

    Raises:
        SpecError: names format.
    """
    if spec.replaces_layers:
        allowed = f"none for {spec.label!r}: its layers quantize what they are given, which no file says"
        raise SpecError("format", format_, allowed)


EXPORTS: Final = Door[Exporter](
    "kbit_sweep.exports",
    "format",
    {
        "gguf": "kbit.exporting.gguf:EXPORTER",
        "packed": "kbit.exporting.packed:EXPORTER",
        "compressed-tensors": "kbit.exporting.compressed_tensors:EXPORTER",
    },
)
"""The formats: name to what writes them."""
