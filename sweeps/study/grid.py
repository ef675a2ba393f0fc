"""Expand a sweep's blocks to cells: a union of products, whose excluded combinations keep their reasons.

A block is a mapping of axes: a list is an axis of the product, a scalar a constant, ``linked`` zips several into one.
A value that no combination of its block allows is a mistake and refused; a combination that can't exist among others
that do (exponent_bits=3 at bits=3) is excluded, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from kbit.calibration import Calibration
from kbit.data_types import EXPONENT_RULES
from kbit.errors import SpecError
from kbit.spec import Spec, spec_of
from kbit.spec import axes as all_axes
from sweeps.errors import UserError, did_you_mean
from sweeps.study.cell import Cell, ModelRef, axis_names


@dataclass(frozen=True, kw_only=True)
class Excluded:
    """A combination that is not run, and why."""

    axes: Mapping[str, object]
    reason: str


def block_axes() -> tuple[str, ...]:
    """Return the names that a block of the grid may set; a data type from a file brings its codebook itself."""
    return ("method", *(name for name in all_axes() if name != "codebook"))


def excluded_counts(excluded: Iterable[Excluded]) -> dict[str, int]:
    """Return how many combinations each reason left out, the most frequent first."""
    return dict(Counter(e.reason for e in excluded).most_common())


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The cells of a sweep, each once, in the order of its models and blocks; and what was left out."""

    cells: tuple[Cell, ...]
    excluded: tuple[Excluded, ...]
    duplicates: int = 0

    def excluded_counts(self) -> dict[str, int]:
        return excluded_counts(self.excluded)


def _no_calibration(what: str) -> Sequence[Calibration]:
    raise UserError(f"{what} calibrates: name a text set or a file, e.g. calibration.set=wikitext2")


def expand(
    blocks: Sequence[Mapping[str, object]],
    models: Sequence[ModelRef],
    exclude: Sequence[Mapping[str, object]] = (),
    calibrations: Callable[[str], Sequence[Calibration]] = _no_calibration,
    unfit: Callable[[ModelRef, Spec], SpecError | None] = lambda *_: None,
) -> Grid:
    """Expand to all cells of ``models`` x the union of ``blocks``, minus ``exclude``.

    Args:
        blocks: axis values of the study, each a value or a list of them.
        models: the study's.
        exclude: rules: axis values of the cells to leave out.
        calibrations: asked, with what calibrates ('method=gptq'), for what that reads: a cell for each.
        unfit: tells why a model can't be quantized so. The cell is left out with that reason, where others can.

    Raises:
        UserError: an unknown axis, a rule that can't be read, or a method that calibrates without data.
        SpecError: a value that is not allowed, or that none of the models can have.
    """
    rules = [_rule(rule, number) for number, rule in enumerate(exclude)]
    specs: list[Spec] = []
    invalid: list[Excluded] = []
    for number, block in enumerate(blocks):
        block_specs, block_invalid = _expand_block(block, f"sweep.quant.{number}")
        specs += block_specs
        invalid += block_invalid
    unique = list(dict.fromkeys(specs))
    cells: list[Cell] = []
    excluded = [
        Excluded(axes={"family": m.family, "model": m.label, **e.axes}, reason=e.reason)
        for m in models
        for e in invalid
    ]
    misfits: dict[Spec, SpecError] = {}
    fit: set[Spec] = set()
    for model in models:
        wanted = (
            (s, data) for s in unique for data in (calibrations("=".join(s.calibrating)) if s.calibrates else (None,))
        )
        for spec, data in wanted:
            cell = Cell(model=model, quant=spec, calibration=data)
            reason = next((why for when, why in rules if matches(cell.axes(), when)), None)
            misfit = unfit(model, spec) if reason is None else None
            if misfit is not None:
                misfits[spec], reason = misfit, str(misfit)
            if reason is None:
                fit.add(spec)
                cells.append(cell)
            else:
                excluded.append(Excluded(axes=cell.axes(), reason=reason))
    for spec, misfit in misfits.items():
        if spec not in fit:
            raise misfit
    distinct = {cell.key: cell for cell in cells}
    duplicates = (len(specs) - len(unique)) * len(models) + len(cells) - len(distinct)
    return Grid(cells=tuple(distinct.values()), excluded=tuple(excluded), duplicates=duplicates)


def matches(axes: Mapping[str, object], when: Mapping[str, object]) -> bool:
    """Tell whether every axis named in ``when`` has its value (or one of its list of values)."""
    return all(
        any(_same(axes.get(name), _number(name, v)) for v in (value if isinstance(value, list | tuple) else [value]))
        for name, value in when.items()
    )


def _number(name: str, value: object) -> object:
    """Return what cells have for a value of an axis: the number that a name stands for."""
    declared = all_axes().get(name)
    return value if declared is None else declared.number(value)


def _same(axis: object, value: object) -> bool:
    """Equal, whether the value was written as a number or quoted; true is not 1."""
    return isinstance(axis, bool) == isinstance(value, bool) and (axis == value or str(axis) == str(value))


def check_axes(names: Iterable[str], key: str, more: Sequence[str] = ()) -> None:
    """Refuse names that are no axis, and none of ``more``."""
    known = (*axis_names(), *more)
    for name in names:
        if name not in known:
            raise UserError(f"{key}: {name!r} is not an axis;{did_you_mean(name, known)} Axes: {', '.join(known)}")


def _rule(rule: Mapping[str, object], number: int) -> tuple[Mapping[str, object], str]:
    when, reason = rule.get("when"), rule.get("reason")
    key = f"sweep.exclude.{number}"
    if not isinstance(when, Mapping) or not when or not reason:
        raise UserError(f"{key}={dict(rule)!r} is not valid: needs `when: {{axis: value}}` and `reason: text`")
    check_axes(when, f"{key}.when")
    return when, str(reason)


def _expand_block(block: Mapping[str, object], where: str) -> tuple[list[Spec], list[Excluded]]:
    specs: list[Spec] = []
    invalid: list[Excluded] = []
    failed: dict[tuple[str, str], SpecError] = {}
    fine: set[tuple[str, str]] = set()
    for combination in _combinations(block, where):
        try:
            spec = spec_of(combination)
        except SpecError as error:
            failed[_value_id(error.key, combination.get(error.key))] = error
            by_bits = "bits" in combination and error.key != "bits"
            why = f" can't be combined with bits={combination['bits']}" if by_bits else f": {error.allowed}"
            reason = f"{error.key}={error.value}{why}"
            invalid.append(Excluded(axes=combination, reason=reason))
        else:
            specs.append(spec)
            # An axis that was normalised away (exponent_bits of an int) says nothing of its value.
            matters = spec.canonical()
            fine.update(_value_id(axis, value) for axis, value in combination.items() if axis in matters)
    for value_id, mistake in failed.items():
        if value_id not in fine:
            raise SpecError(f"{where}.{mistake.key}", mistake.value, mistake.allowed) from mistake
    return specs, invalid


def _combinations(block: Mapping[str, object], where: str) -> Iterator[dict[str, object]]:
    """Yield every combination of a block's axes, the last named varying fastest."""
    axes: list[list[dict[str, object]]] = []
    for name, value in block.items():
        if name == "linked":
            axes.append(_linked(value, where))
            continue
        if name not in block_axes():
            raise UserError(
                f"{where}.{name}={value!r}: {name!r} is not an axis.{did_you_mean(name, block_axes())} "
                f"Axes: {', '.join(block_axes())}, and linked"
            )
        values = value if isinstance(value, list | tuple) else [value]
        if not values:
            raise UserError(f"{where}.{name}=[] is not valid: an axis needs at least one value")
        axes.append([{name: v} for v in values])
    for parts in product(*axes):
        combination: dict[str, object] = {}
        for part in parts:
            twice = combination.keys() & part.keys()
            if twice:
                raise UserError(f"{where}: {', '.join(sorted(twice))} is given both alone and in `linked`: keep one")
            combination |= part
        yield combination


def _linked(value: object, where: str) -> list[dict[str, object]]:
    usage = "lists of equal length by axis, e.g. {bits: [3, 4], exponent_bits: [2, 3]}"
    if not isinstance(value, Mapping) or not value or not all(isinstance(v, list | tuple) for v in value.values()):
        raise UserError(f"{where}.linked={value!r} is not valid: give {usage}")
    lengths = {len(v) for v in value.values()}
    if len(lengths) != 1 or 0 in lengths:
        sizes = ", ".join(f"{k} has {len(v)}" for k, v in value.items())
        raise UserError(f"{where}.linked is not valid ({sizes}): give {usage}")
    for name in value:
        if name not in block_axes():
            hint = did_you_mean(name, block_axes())
            raise UserError(f"{where}.linked.{name}: not an axis.{hint} Axes: {', '.join(block_axes())}")
    return [dict(zip(value, values, strict=True)) for values in zip(*value.values(), strict=True)]


def _value_id(axis: str, value: object) -> tuple[str, str]:
    # Rules such as 'paper' are right at every width, so only numbers can clash; repr tells 1 from True and '1'.
    return axis, "rule" if isinstance(value, str) and value in EXPONENT_RULES else repr(value)
