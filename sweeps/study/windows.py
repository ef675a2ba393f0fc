"""Refuse a calibration or text set with too few windows before anything runs, as each model's tokenizer counts them.

The library ``tokenizers`` reads a tokenizer, and loads neither torch nor transformers. What can't be read here (a data
set that only the nodes reach, a tokenizer without tokenizer.json) is left to the worker, which counts again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kbit.calibration import Calibration
from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import EvalSpec
from kbit.sources import LocalFile, Source
from sweeps.errors import UserError
from sweeps.study import hub
from sweeps.study.cell import Cell, ModelRef

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS: Final = 2
"""A text set that lacks no more tokens than these isn't refused here: transformers may add a BOS and an EOS."""


def check_windows(cells: Iterable[Cell], progress: Callable[[str], None]) -> None:
    """Count the windows of every calibration for every tokenizer that reads it.

    Args:
        cells: the study's.
        progress: called with what is being read, where that takes time.

    Raises:
        UserError: a text set has fewer windows than ``calibration.samples``.
    """
    counted: dict[tuple[Calibration, str, int], int | None] = {}
    for model, calibration in dict.fromkeys((c.model, c.calibration) for c in cells):
        read = None if calibration is None else _tokenizer_file(model)
        length = None if calibration is None else _length(model, calibration.length)
        if calibration is None or read is None or length is None:
            continue
        # Seeds draw from the same windows.
        key = (calibration.with_seed(0), hub.file_hash(read), length)
        if key not in counted:
            progress(f"windows of {calibration.name} for {model.label}")
            counted[key] = count_tokens(calibration, read, length)
        tokens = counted[key]
        if tokens is not None and (tokens + SPECIAL_TOKENS) // length < calibration.samples:
            windows = tokens // length
            raise UserError(
                f"calibration.samples={calibration.samples} is not valid with {model.label}: {calibration.name} has "
                f"{windows} windows of {length} tokens for it. Ask for at most {windows}, for shorter windows "
                "(calibration.length), or name a longer text (calibration.set)"
            )


def check_texts(models: Iterable[ModelRef], evals: Iterable[EvalSpec]) -> None:
    """Check that each model has one window at least of each text that it is measured on.

    Tokens are counted for local models and files alone: a text of the hub is longer, and would have to be fetched.

    Raises:
        UserError: ``eval.tokens``, or the text, is shorter than a window.
    """
    texts = [spec for spec in evals if "window" in EVALUATORS[spec.kind].settings and spec.window is not None]
    short: dict[tuple[str | None, str, int], int | None] = {}
    for model, spec in ((model, spec) for model in dict.fromkeys(models) for spec in texts):
        length = _length(model, spec.window or 0)
        if length is None:
            continue
        of_text = length - (spec.bos == "each")
        if spec.limit is not None and spec.limit < of_text:
            raise UserError(
                f"{spec.limit_key}={spec.limit} is not valid with {model.label}: at least one window of {of_text} "
                f"tokens for the text set {spec.name!r}, or null for all"
            )
        read = _tokenizer_file(model) if model.path is not None else None
        if read is None or not isinstance(spec.source, LocalFile):
            continue
        key = (spec.source.sha256, hub.file_hash(read), of_text)
        if key not in short:
            short[key] = _tokens(spec.source, read, of_text, spec.name)
        tokens = short[key]
        if tokens is not None and tokens + SPECIAL_TOKENS < of_text:
            raise UserError(
                f"{spec.source.path}: the text set {spec.name!r} has {tokens} tokens for {model.label}, less than one "
                f"window of {of_text}: name a longer text, or give shorter windows (eval.window)"
            )


def count_tokens(calibration: Calibration, tokenizer_file: Path, length: int) -> int | None:
    """Return how many tokens a text set has, but no more than ``samples`` windows of ``length`` need.

    None where it can't be read here.

    Raises:
        UserError: a local file is damaged.
    """
    name = f"calibration.set={calibration.name!r}"
    return _tokens(calibration.source, tokenizer_file, calibration.samples * length, name)


def _tokens(source: Source | None, tokenizer_file: Path, wanted: int, what: str) -> int | None:
    from tokenizers import Tokenizer

    from kbit.evaluation.texts import encode_text, read_documents

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception:  # the library raises nothing narrower; the worker says what is wrong with the file
        return None
    try:
        return len(encode_text(read_documents(source), _Encoder(tokenizer), limit=wanted).tokens)
    except (OSError, ValueError) as error:
        if isinstance(source, LocalFile):
            raise UserError(f"{what} can't be read: {error}") from error
        return None


@dataclass(frozen=True)
class _Encoder:
    """A tokenizer of the library as ``encode_text`` calls those of transformers."""

    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        # As transformers calls it: the whole text, whatever the file says of training.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def __call__(self, text: str, **_: object) -> Mapping[str, list[int]]:
        return {"input_ids": self.tokenizer.encode(text).ids}


def _length(model: ModelRef, asked: int) -> int | None:
    """Return the tokens of a window; None where config.json leaves the context to the architecture's own default."""
    from kbit.models.limits import as_namespace, named_context

    config = model_file(model, "config.json")
    context = None if config is None else named_context(as_namespace(json.loads(config.read_bytes())))
    return None if context is None else min(context, asked)


def _tokenizer_file(model: ModelRef) -> Path | None:
    return model_file(model, "tokenizer.json")


def model_file(model: ModelRef, name: str) -> Path | None:
    """Return a file of a model that is here, or can be fetched."""
    if model.path is not None:
        path = Path(model.path) / name
        return path if path.is_file() else None
    return hub.small_file(str(model.hub_id), str(model.commit), name)
