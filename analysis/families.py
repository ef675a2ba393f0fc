"""Tell architectures apart that a study put into one family: a curve over sizes is of one of them."""

from __future__ import annotations

import re
from typing import Final

import pandas as pd

_STEM_AND_SIZE: Final = re.compile(
    r"(?P<stem>[a-z].*)-(xs|s|m|l|xl|xxl|small|medium|large|\d+(\.\d+)?[mbt]\d*)", re.IGNORECASE
)


def told_apart(family: pd.Series[str], model: pd.Series[str]) -> pd.Series[str]:
    """Return the family of each row, divided where its models' names say that they are of several kinds.

    A family of 'opt-xs', 'opt-s' and 'bloom-xs' (a YAML of local directories) becomes 'FAMILY: opt' and
    'FAMILY: bloom'. Models whose names are no name with a size ('gpt2', 'tiny') stay where they are; so does a family
    whose names have one beginning.

    Args:
        family: by row, e.g. 'opt'.
        model: by row, e.g. 'opt-125m' or 'opt-125m@step1000'.
    """
    names = pd.DataFrame({"family": family.astype("string"), "model": model.astype("string")})
    unique = names.drop_duplicates().dropna().copy()
    bare = unique["model"].str.split("@").str[0]
    found = [_STEM_AND_SIZE.fullmatch(name) for name in bare]
    unique["stem"] = pd.Series([m["stem"].lower() if m else None for m in found], index=unique.index, dtype="string")
    several = unique.groupby("family")["stem"].transform("nunique") > 1
    divided = unique[several & unique["stem"].notna()]
    if divided.empty:
        return family
    new = dict(zip(zip(divided["family"], divided["model"], strict=True), divided["stem"], strict=True))
    pairs = zip(names["family"], names["model"], strict=True)
    return pd.Series(
        [f"{f}: {new[f, m]}" if not pd.isna(f) and (f, m) in new else f for f, m in pairs],
        index=family.index,
        dtype=family.dtype,
    )
