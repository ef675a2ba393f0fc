"""What config.json says when a study is planned: a model's reading (``kbit.models.readings``), and what can't be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from kbit.errors import CheckpointError, SpecError
from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import EvalSpec
from kbit.models.checkpoint import read_config
from kbit.models.limits import as_namespace, named_context
from kbit.models.orders import why_unordered
from kbit.models.prequantized.layouts import KEY, LAYOUTS, stored_as
from kbit.models.readings import has_experts, reading_of
from kbit.spec import METHODS, Spec
from kbit.specs.checkpoint import STORED_BITS
from sweeps.errors import UserError
from sweeps.study.cell import ModelRef, canonical_json
from sweeps.study.hub import ModelConfig, model_config


def config_of(model: ModelRef, *, ask: bool = True) -> ModelConfig | None:
    """Return a model's config.json; None where it isn't on this machine and the hub isn't, or can't be, asked."""
    if model.path is None:
        return model_config(str(model.hub_id), str(model.commit), ask=ask)
    try:
        return read_config(Path(model.path))
    except (CheckpointError, OSError):
        return None


def with_reading(model: ModelRef, *, ask: bool = True) -> ModelRef:
    """Return a model with the reading that this version gives it; as it is where its config.json can't be had.

    A worker refuses a model that turns out to have a later reading than it was planned with.
    """
    config = config_of(model, ask=ask)
    if config is None:
        return model
    reading, reason = reading_of(config)
    return replace(model, reading=reading, reading_reason=reason)


def unfit(config: ModelConfig | None, spec: Spec) -> SpecError | None:
    """Return the error that a model would end a quantization with, as far as config.json tells; None for the others."""
    if config is None or spec.is_baseline:
        return None
    misfit = _unfit_to_stored(config, spec)
    if misfit is not None:
        return misfit
    fraction = spec.axis_values().get("outlier_fraction")
    if fraction and (why := why_unordered(config)) is not None:
        return SpecError("outlier_fraction", fraction, f"0, since {why}")
    if spec.replaces_layers and has_experts(config):
        why = f"one that quantizes weights alone, for {config.get('model_type')}: its experts are no layers to replace"
        return SpecError("method", spec.method, why)
    return None


def _unfit_to_stored(config: ModelConfig, spec: Spec) -> SpecError | None:
    """Return the error of a quantization of weights that others quantized, or of none where they did not."""
    try:
        stored = stored_as(config)
    except CheckpointError as error:
        return SpecError("method", spec.method, f"none for this model: {error}")
    if stored is None:
        if not spec.measures_stored or config.get(STORED_BITS):
            return None
        made = "one of others for this model: its config.json has no"
        return SpecError(
            "method",
            spec.method,
            f"{made} {STORED_BITS!r}, which python -m kbit.gguf writes, and no {KEY!r}, which checkpoints have that "
            f"others quantized ({', '.join(LAYOUTS)})",
        )
    layout, bits = stored
    if not spec.measures_stored:
        allowed = (
            f"checkpoint for this model, whose weights are quantized already (quant_method={layout.quant_method!r}): "
            "name the checkpoint that was quantized for other methods"
        )
        return SpecError("method", spec.method, allowed)
    if spec.bits not in bits:
        return SpecError("bits", spec.bits, f"{', '.join(map(str, sorted(bits)))} for this model, by its {KEY}")
    return None


def check_packed(
    evals: Iterable[EvalSpec], specs: Iterable[Spec], configs: Mapping[ModelRef, ModelConfig | None]
) -> None:
    """Refuse evaluations of layers held in k bits where they can't be held so: of experts, and by some methods.

    Raises:
        UserError: names the evaluation, and the model or the method.
    """
    packed = [spec.name for spec in evals if EVALUATORS[spec.kind].packed]
    if not packed:
        return
    mixtures = [model.label for model, config in configs.items() if config is not None and has_experts(config)]
    if mixtures:
        raise UserError(
            f"eval {packed[0]!r} holds layers in k bits, and the experts of {mixtures[0]} can't be held so: measure it "
            "in a study without mixtures of experts"
        )
    unpacked = [spec for spec in specs if not spec.is_baseline and spec.why_not_packed is not None]
    of_spec = next((spec for spec in unpacked if spec.packs), None)
    if of_spec is not None:
        raise UserError(
            f"eval {packed[0]!r} holds layers in k bits, and those of {of_spec.label!r} can't be held so: "
            f"{of_spec.why_not_packed}. Measure it in a study without them"
        )
    others = list(dict.fromkeys(spec.method for spec in unpacked))
    if others:
        can = ", ".join(name for name in METHODS if METHODS[name].packs)
        raise UserError(
            f"eval {packed[0]!r} holds layers in k bits, and those of method={others[0]} can't be held so (those of "
            f"{can} can): measure it in a study without {', '.join(others)}"
        )


def check_context(evals: Iterable[EvalSpec], configs: Mapping[ModelRef, ModelConfig | None]) -> None:
    """Refuse evaluations that need a longer context than a model has, as far as config.json tells.

    Raises:
        UserError: names the evaluation and the models.
    """
    for spec in evals:
        needed = EVALUATORS[spec.kind].context
        known = {m.label: named_context(as_namespace(c)) for m, c in configs.items() if c is not None}
        short = [f"{name} ({n})" for name, n in known.items() if n is not None and needed is not None and n < needed]
        if short:
            raise UserError(
                f"eval {spec.name!r} needs a context of {needed} tokens, which {', '.join(short)} does not have: leave "
                "the evaluation or those models (sweep.sizes) out"
            )


def check_baselines(
    evals: Iterable[EvalSpec], specs: Iterable[Spec], configs: Mapping[ModelRef, ModelConfig | None]
) -> None:
    """Refuse evaluations of 16-bit baselines where there is none, where other cells would have nothing to measure, and
    those that need to know which layer follows which of models in which it isn't known.

    Raises:
        UserError: names the evaluation, and the models.
    """
    evals, specs = list(evals), list(specs)
    only = [spec.name for spec in evals if EVALUATORS[spec.kind].baseline_only]
    if only and specs and not any(spec.is_baseline for spec in specs):
        raise UserError(
            f"eval {only[0]!r} is of 16-bit baselines, and the study has none: add {{bits: 16}} to sweep.quant"
        )
    other = next((spec for spec in specs if not spec.is_baseline), None)
    if only and len(only) == len(evals) and other is not None:
        raise UserError(
            f"eval {only[0]!r} is of 16-bit baselines, and nothing is measured of {other.label!r}: leave quantized "
            "cells out of sweep.quant, or name a text set in eval.perplexity"
        )
    ordering = [spec.name for spec in evals if EVALUATORS[spec.kind].needs_order]
    unknown = {m.label: why for m, c in configs.items() if c is not None and (why := why_unordered(c)) is not None}
    if ordering and unknown:
        name, why = next(iter(unknown.items()))
        raise UserError(
            f"eval {ordering[0]!r} needs to know which layer follows which, and in {name} that isn't known: {why}. "
            "Leave the evaluation or the model (sweep.sizes) out"
        )


def superseded(models: Iterable[ModelRef]) -> dict[ModelRef, str]:
    """Return the models of an earlier reading, each with the reason why what was measured of it doesn't count.

    A model is superseded where another has the same files and a later reading, or where its config.json on this
    machine gives it a later one. The hub is not asked.

    Args:
        models: those of every manifest of a results directory.
    """
    found = dict.fromkeys(models)
    latest: dict[str, ModelRef] = {}
    for model in sorted((m for own in found for m in (own, with_reading(own, ask=False))), key=lambda m: m.reading):
        latest[canonical_json(model.origin)] = model
    newest = {model: latest[canonical_json(model.origin)] for model in found}
    return {
        model: f"{new.reading_reason} (reading {new.reading} of its weights counts)"
        for model, new in newest.items()
        if new.reading > model.reading
    }
