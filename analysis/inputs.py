"""What commands of ``python -m analysis`` and modes of ``launch.py`` work on: tables, samples, what to say of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pandas as pd

from analysis.cells import SIZE, quantized_alone
from analysis.significance import SampleKey, Samples


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The results of one study, or of all studies of one or several directories.

    Attributes:
        name: of the study, or 'all'; names files.
        title: for people.
        df: the wide table, one row per planned cell (``sweeps.load_results``).
        long: one row per measurement.
        read_samples: per-sample outcomes of measurements, by their keys.
        notes: what was left out, and why.
    """

    name: str
    title: str
    df: pd.DataFrame
    long: pd.DataFrame
    read_samples: Callable[[Sequence[str]], Mapping[str, Samples]]
    notes: Sequence[str] = ()

    def samples(self, wanted: Mapping[str, SampleKey]) -> dict[SampleKey, Samples]:
        """Return outcomes by (cell key, eval) of the measurements wanted, e.g. by ``findings.wanted_samples``."""
        return {wanted[m]: outcome for m, outcome in self.read_samples(list(wanted)).items()}


def directory_of(out: Path) -> Path:
    """Return where a command writes unless it is told: into a results directory, or beside a file of results."""
    return out if out.is_dir() else out.parent


BITS_OF: Final = "what sizes count: the model (default), or the quantized weights alone, without embedding and head"


def counting(inputs: Inputs, bits_of: str) -> tuple[Inputs, str]:
    """Return inputs whose sizes count what ``--bits-of`` asks for, 'model' or 'quantized', and what to call them."""
    if bits_of == "model":
        return inputs, SIZE
    return replace(inputs, df=quantized_alone(inputs.df)), "Bits of the quantized weights"
