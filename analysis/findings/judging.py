"""Judge what is stored: the samples that claims ask for are read, and no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from analysis.findings.claims import judge
from analysis.findings.finding import Finding
from analysis.findings.sentences import wanted_samples
from analysis.inputs import Inputs
from analysis.significance import Margins, SampleKey, Samples, sample_keys


class _Asked(Mapping[SampleKey, Samples]):
    """No samples, but what was asked for."""

    def __init__(self) -> None:
        self.keys_asked: set[SampleKey] = set()

    def __getitem__(self, key: SampleKey) -> Samples:
        self.keys_asked.add(key)
        raise KeyError(key)

    def __iter__(self) -> Iterator[SampleKey]:
        return iter(())

    def __len__(self) -> int:
        return 0


def wanted_by_claims(df: pd.DataFrame, long_df: pd.DataFrame) -> dict[str, SampleKey]:
    """Measurement key -> (cell key, eval) of the outcomes that ``judge`` asks for.

    Args:
        df: a wide result table.
        long_df: the long one, which knows the measurements.
    """
    asked = _Asked()
    judge(df, asked)
    if not asked.keys_asked:
        return {}
    found = long_df[long_df["eval"].isin({e for _, e in asked.keys_asked})]
    return {measurement: of for measurement, of in sample_keys(found).items() if of in asked.keys_asked}


def compared_samples(inputs: Inputs) -> dict[SampleKey, Samples]:
    """Read the outcomes that findings, claims and figures compare: all of a large study don't fit into memory."""
    return inputs.samples({**wanted_samples(inputs.df, inputs.long), **wanted_by_claims(inputs.df, inputs.long)})


def judge_inputs(inputs: Inputs, *, margins: Margins | None = None) -> list[Finding]:
    """``judge`` of one study or several directories, with the samples that it asks for.

    Args:
        inputs: tables, and where samples are.
        margins: as of ``judge``.
    """
    samples = inputs.samples(wanted_by_claims(inputs.df, inputs.long))
    return judge(inputs.df, samples, margins=margins)
