"""Claims about zero-shot quantization (section 5.2, Appendices B and C): blocks, data types, outliers, centring."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from analysis.findings.contrasts import Contrast, contrast
from analysis.findings.evidence import Cell, Evidence
from analysis.findings.finding import Finding
from analysis.findings.selections import (
    at,
    block,
    families,
    main_block,
    main_stratum,
    named,
    one_exponent,
    plain,
    small_and_large,
)
from analysis.findings.testing import Claim, Kind, Part, finding
from analysis.metrics import Metric
from analysis.significance import over_models

_LOW: Final = (3, 4, 5)
_HIGH: Final = (6, 7, 8)
_GOOD: Final = ("quantile", "float")
_PLAIN_CODES: Final = ("int", "dynamic")
_DTYPE_AXES: Final = frozenset({"dtype", "exponent_bits", "subnormals", "dynamic_interval", "codebook"})
_OUTLIER_AXES: Final = frozenset({"outlier_fraction", "outlier_criterion"})
_SWITCHES: Final = {"center": ("centred", frozenset({"center"})), "outlier_fraction": ("outliers", _OUTLIER_AXES)}

SMALL_BLOCKS: Final = Claim(
    name="small_blocks_help",
    statement="Small blocks improve scaling at 3 to 5 bits: at equal model bits they beat large ones.",
    source="Section 5.2, Figures 3 and 8",
    run="sweep=fig3_block_size 'sweep.quant.1.bits=[3,4,5]' on your models (model= or path=)",
)
SMALL_BLOCKS_HIGH: Final = Claim(
    name="small_blocks_high_bits",
    statement="Small blocks do not improve scaling at 6 to 8 bits.",
    source="Section 5.2, Appendix C.3, Figure 11",
    run="sweep=fig3_block_size 'sweep.quant.1.bits=[6,7,8]' on your models",
)
DATA_TYPES: Final = Claim(
    name="data_types",
    statement="At 4 bits, quantile and float data types are better than int and dynamic ones.",
    source="Section 5.2, Figures 3 and 9",
    run="sweep=fig3_data_types on your models",
)
HIGH_BITS: Final = Claim(
    name="high_bits_unimproved",
    statement="No data type, block size, centring or outlier dimensions improve scaling at 6 to 8 bits.",
    source="Section 5.2, Appendix C.3, Figures 10 and 11",
    run="sweep=paper_all 'where={bits: [6,7,8,16]}' on your models",
)
PROXY_3: Final = Claim(
    name="proxy_helps_3_bits",
    statement="Proxy quantization of outlier dimensions improves scaling at 3 bits.",
    source="Section 5.2, Figure 4 (left)",
    run="sweep=fig4_proxy on your models",
)
PROXY_4: Final = Claim(
    name="proxy_not_4_bits",
    statement="Proxy quantization does not improve scaling at 4 bits.",
    source="Section 5.2, Figure 4 (right)",
    run="sweep=fig4_proxy on your models",
)
PROXY_BELOW: Final = Claim(
    name="proxy_3_below_4_bits",
    statement="3 bits with proxy quantization stay behind 4 bits without at equal bits of the model.",
    source="Section 5.2",
    run="sweep=fig4_proxy on your models",
)
CENTERING: Final = Claim(
    name="centering_never_helps",
    statement="Centring weights before quantizing does not improve scaling in any scenario.",
    source="Appendix B",
    run="sweep=centering on your models",
)
EXPONENTS: Final = Claim(
    name="exponent_bits_half",
    statement="At least half of a float's bits, rounded up, should be exponent bits: fewer are not better.",
    source="Appendix C.4, Figure 12",
    run="sweep=fig12_exponent_bits on your models",
)
BLOOMZ: Final = Claim(
    name="bloomz_like_bloom",
    statement="BLOOM and BLOOMZ lose alike: finetuning does not change how a model bears quantization.",
    source="Appendix C.1, observation 2",
    run="sweep=fig2_bit_scaling 'model=[bloom,bloomz]'",
)


def small_blocks_help(evidence: Evidence) -> list[Finding]:
    return _blocks(evidence, SMALL_BLOCKS, _LOW, "better")


def small_blocks_high_bits(evidence: Evidence) -> list[Finding]:
    return _blocks(evidence, SMALL_BLOCKS_HIGH, _HIGH, "not better")


def data_types(evidence: Evidence) -> list[Finding]:
    """Headline at 4 bits; the other precisions below 6 as they are."""
    found = []
    for i, metric in enumerate(evidence.metrics):
        own = plain(evidence.cells(metric))
        for bits in sorted({4, *(c.bits for c in own if c.bits < min(_HIGH))}, key=lambda b: (b != 4, b)):
            cells = one_exponent(at(own, bits=bits))
            size = main_block([c for c in cells if c.axis("dtype") in (*_GOOD, *_PLAIN_CODES)])
            cells = [c for c in cells if block(c) == size]
            parts = []
            for good in _GOOD:
                for other in _PLAIN_CODES:
                    between = _types(evidence, metric, cells, good, other)
                    parts.append(_part(evidence, metric, f"{good} than {other}", between, "better"))
            scope = f"{families(cells)}, {bits} bits, block size {named(size)}"
            statement = DATA_TYPES.statement.replace("4 bits", f"{bits} bits")
            said = finding(metric, DATA_TYPES, parts, scope=scope, headline=i == 0 and bits == 4)
            found.append(replace(said, statement=statement))
    return found


def high_bits_unimproved(evidence: Evidence) -> list[Finding]:
    found = []
    for i, metric in enumerate(evidence.metrics):
        cells = [c for c in evidence.cells(metric) if c.bits in _HIGH]
        own = plain(cells)
        types = sorted({str(c.axis("dtype")) for c in own})
        reference = "int" if "int" in types else next(iter(types), "int")
        tried: dict[str, list[Part]] = {"data types": [], "block sizes": []}
        for bits in sorted({c.bits for c in own}):
            here = at(own, bits=bits)
            size = main_block(here)
            of_block = one_exponent([c for c in here if block(c) == size])
            for dtype in types:
                if dtype != reference:
                    between = _types(evidence, metric, of_block, dtype, reference)
                    tried["data types"].append(
                        _part(evidence, metric, f"{bits} bits: {dtype} than {reference}", between, "not better")
                    )
            tried["block sizes"] += _block_parts(evidence, metric, [bits], "not better")
        tried["centring"] = _switched(evidence, metric, cells, "center", "not better")
        tried["outlier dimensions"] = _switched(evidence, metric, cells, "outlier_fraction", "not better")
        missing = [name for name, own_parts in tried.items() if not any(p.effect.n for p in own_parts)]
        parts = [p for own_parts in tried.values() for p in own_parts]
        parts = [p for p in parts if p.effect.n] or parts
        bits_there = ", ".join(str(b) for b in sorted({c.bits for c in own})) or "6 to 8"
        scope = f"{families(own)}, {bits_there} bits"
        said = finding(metric, HIGH_BITS, parts, scope=scope, headline=i == 0)
        if said.evidence and missing:
            said = replace(said, evidence=f"{said.evidence} Not measured: {', '.join(missing)}.")
        found.append(said)
    return found


def proxy_helps_3_bits(evidence: Evidence) -> list[Finding]:
    return _outliers(evidence, PROXY_3, 3, "better")


def proxy_not_4_bits(evidence: Evidence) -> list[Finding]:
    return _outliers(evidence, PROXY_4, 4, "not better")


def proxy_3_below_4_bits(evidence: Evidence) -> list[Finding]:
    found = []
    for i, metric in enumerate(evidence.metrics):
        cells = plain(evidence.cells(metric), free=_OUTLIER_AXES)
        threes = [c for c in at(cells, bits=3) if c.axis("outlier_fraction") is not None]
        fours = at(cells, bits=4, outlier_fraction=None)
        kinds = {(c.axis("dtype"), c.axis("blocksize")) for c in threes}
        fours = one_exponent([c for c in fours if (c.axis("dtype"), c.axis("blocksize")) in kinds])
        ignoring = {"bits", "exponent_bits", *_OUTLIER_AXES}
        between = contrast(evidence, metric, fours, threes, ignoring=ignoring)
        parts = [_part(evidence, metric, "4 bits than 3 with outliers", between, "better")]
        found.append(finding(metric, PROXY_BELOW, parts, scope=families(threes), headline=i == 0))
    return found


def centering_never_helps(evidence: Evidence) -> list[Finding]:
    found = []
    for i, metric in enumerate(evidence.metrics):
        cells = evidence.cells(metric)
        parts = _switched(evidence, metric, cells, "center", "not better")
        scope = families([c for c in cells if c.axis("center")])
        found.append(finding(metric, CENTERING, parts, scope=scope, headline=i == 0))
    return found


def exponent_bits_half(evidence: Evidence) -> list[Finding]:
    found = []
    for i, metric in enumerate(evidence.metrics):
        floats = at(plain(evidence.cells(metric)), dtype="float")
        parts = []
        for bits in sorted({c.bits for c in floats}):
            half = (bits + 1) // 2
            here = at(floats, bits=bits)
            for fewer in range(1, half):
                firsts, seconds = (at(here, exponent_bits=float(e)) for e in (fewer, half))
                between = contrast(evidence, metric, firsts, seconds, ignoring={"exponent_bits"}, at_equal_bits=False)
                if between.effect.n or between.gone:
                    parts.append(_part(evidence, metric, f"{bits} bits: {fewer} than {half}", between, "not better"))
        scope = families(floats)
        found.append(finding(metric, EXPONENTS, parts, scope=scope, headline=i == 0))
    return found


def bloomz_like_bloom(evidence: Evidence) -> list[Finding]:
    """Compare changes from 16 bits of models of one architecture: pairs by their number of parameters."""
    found = []
    for i, metric in enumerate(evidence.metrics):
        own = [c for c in evidence.cells(metric) if c.family.lower() in ("bloom", "bloomz")]
        dtype, size, cells = main_stratum(own)
        parts = []
        for bits in sorted({c.bits for c in cells}):
            pairs = _changes(evidence, metric, [c for c in cells if c.bits == bits])
            between = Contrast(effect=over_models(pairs), families=("bloom", "bloomz"))
            if pairs:
                parts.append(_part(evidence, metric, f"{bits} bits: BLOOMZ", between, "alike"))
        scope = f"BLOOM and BLOOMZ, {dtype}, block size {named(size)}" if dtype else "no BLOOM beside BLOOMZ"
        found.append(finding(metric, BLOOMZ, parts, scope=scope, headline=i == 0))
    return found


def _blocks(evidence: Evidence, claim: Claim, precisions: Sequence[int], kind: Kind) -> list[Finding]:
    found = []
    for i, metric in enumerate(evidence.metrics):
        parts = _block_parts(evidence, metric, precisions, kind)
        cells = [c for c in plain(evidence.cells(metric)) if c.bits in precisions]
        types = ", ".join(sorted({str(c.axis("dtype")) for c in cells}))
        scope = f"{families(cells)}, {types}" if cells else "no such cells"
        found.append(finding(metric, claim, parts, scope=scope, headline=i == 0))
    return found


def _block_parts(evidence: Evidence, metric: Metric, precisions: Iterable[int], kind: Kind) -> list[Part]:
    parts = []
    for bits in precisions:
        here = at(plain(evidence.cells(metric)), bits=bits)
        sizes = small_and_large(here)
        if sizes is None:
            continue
        firsts, seconds = ([c for c in here if block(c) == size] for size in sizes)
        between = contrast(evidence, metric, firsts, seconds, ignoring={"blocksize"})
        if between.effect.n or between.alone:
            name = f"{bits} bits: blocks of {named(sizes[0])} than {named(sizes[1])}"
            parts.append(_part(evidence, metric, name, between, kind))
    return parts


def _types(evidence: Evidence, metric: Metric, cells: Sequence[Cell], first: str, second: str) -> Contrast:
    both = (at(cells, dtype=name) for name in (first, second))
    return contrast(evidence, metric, *both, ignoring=_DTYPE_AXES)


def _outliers(evidence: Evidence, claim: Claim, bits: int, kind: Kind) -> list[Finding]:
    found = []
    for i, metric in enumerate(evidence.metrics):
        cells = at(plain(evidence.cells(metric), free=_OUTLIER_AXES), bits=bits)
        parts = _switched(evidence, metric, cells, "outlier_fraction", kind)
        scope = families([c for c in cells if c.axis("outlier_fraction") is not None]) or "no such cells"
        found.append(finding(metric, claim, parts, scope=scope, headline=i == 0))
    return found


def _switched(evidence: Evidence, metric: Metric, cells: Sequence[Cell], axis: str, kind: Kind) -> list[Part]:
    """A part for each precision and value: cells with an axis switched on against those without, alike in all else."""
    name, ignoring = _SWITCHES[axis]
    parts = []
    for bits in sorted({c.bits for c in cells}):
        here = at(cells, bits=bits)
        without = [c for c in here if c.axis(axis) is None]
        for value in sorted({str(c.axis(axis)) for c in here} - {"None"}):
            with_ = [c for c in here if str(c.axis(axis)) == value]
            between = contrast(evidence, metric, with_, without, ignoring=ignoring)
            if between.effect.n or between.alone:
                share = "" if value == "True" else f" {value}"
                parts.append(_part(evidence, metric, f"{bits} bits: {name}{share} than without", between, kind))
    return parts


def _changes(evidence: Evidence, metric: Metric, cells: Sequence[Cell]) -> list[float]:
    """How much less BLOOMZ loses than BLOOM, a number for each pair of models."""
    base = evidence.baselines(metric)
    changes: dict[str, dict[float, float]] = {"bloom": {}, "bloomz": {}}
    for c in cells:
        reference = base.get((c.family, c.model))
        if reference is not None:
            changes[c.family.lower()][c.params] = metric.sign * (c.value - reference.value)
    both = sorted(set(changes["bloom"]) & set(changes["bloomz"]))
    found = [changes["bloom"][p] - changes["bloomz"][p] for p in both]
    return [x for x in found if not np.isnan(x)]


def _part(evidence: Evidence, metric: Metric, name: str, found: Contrast, kind: Kind) -> Part:
    return Part(name=name, found=found, kind=kind, margin=evidence.margin(metric))
