"""What commands of ``python -m analysis`` and modes of ``launch.py`` work on: tables, samples, what to say of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

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
