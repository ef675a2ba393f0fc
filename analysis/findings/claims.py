"""The paper's claims, each held against a study's results.

A claim is a function from the evidence to findings with p-values, and its entry in ``CLAIMS``; ``judge`` adjusts them
for each other and gives the verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import pandas as pd

from analysis.findings import about_gptq, about_quantizers, about_scaling
from analysis.findings.evidence import Evidence
from analysis.findings.finding import Finding, settled
from analysis.significance import Margins, SampleKey, Samples

CLAIMS: Final[Mapping[str, Callable[[Evidence], list[Finding]]]] = {
    about_scaling.OPTIMAL.name: about_scaling.four_bits_optimal,
    about_scaling.PARALLEL.name: about_scaling.curves_parallel,
    about_scaling.UNSTABLE_3.name: about_scaling.three_bits_unstable,
    about_quantizers.SMALL_BLOCKS.name: about_quantizers.small_blocks_help,
    about_quantizers.SMALL_BLOCKS_HIGH.name: about_quantizers.small_blocks_high_bits,
    about_quantizers.DATA_TYPES.name: about_quantizers.data_types,
    about_quantizers.HIGH_BITS.name: about_quantizers.high_bits_unimproved,
    about_quantizers.PROXY_3.name: about_quantizers.proxy_helps_3_bits,
    about_quantizers.PROXY_4.name: about_quantizers.proxy_not_4_bits,
    about_quantizers.PROXY_BELOW.name: about_quantizers.proxy_3_below_4_bits,
    about_quantizers.CENTERING.name: about_quantizers.centering_never_helps,
    about_quantizers.BLOOMZ.name: about_quantizers.bloomz_like_bloom,
    about_quantizers.EXPONENTS.name: about_quantizers.exponent_bits_half,
    about_scaling.PEARSON.name: about_scaling.perplexity_predicts_zero_shot,
    about_gptq.NEEDS_BLOCKING.name: about_gptq.gptq_needs_blocking,
    about_gptq.TWO_BITS.name: about_gptq.gptq_2_bits_beats_float_3,
}
"""Name to claim, in the order in which they are shown."""


def judge(
    df: pd.DataFrame, samples: Mapping[SampleKey, Samples] | None = None, *, margins: Margins | None = None
) -> list[Finding]:
    """Hold each claim of the paper against results.

    Args:
        df: a wide result table.
        samples: per-sample outcomes (``wanted_by_claims``): a model that stands alone is compared on them, and with
            them it is known how many documents would decide.
        margins: what is too small to matter; by default 0.01 nats and 0.5 points.

    Returns:
        Findings in the order of ``CLAIMS``; of one claim the headline first, then by metric and scope. Empty where
        nothing that can be ranked is measured.
    """
    evidence = Evidence(df=df, samples={} if samples is None else samples, margins=margins or Margins())
    if not evidence.metrics:
        return []
    return settled([finding for claim in CLAIMS.values() for finding in claim(evidence)])
