"""Keep the last loaded model warm, and the evaluations prepared for its tokenizer."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, cast

from kbit.errors import NotStreamableError
from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import EvalSpec
from kbit.sources import source_to_dict
from sweeps.study.cell import ModelRef, canonical_json, eval_to_dict

if TYPE_CHECKING:
    from torch import Tensor

    from kbit.calibration import Calibration
    from kbit.evaluation.prepared import ComparingEval, PreparedEval
    from kbit.layered.blocks import Blocks
    from kbit.models.loadable import LoadedModel
    from kbit.models.originals import Originals
    from kbit.models.streaming.packing import Packing


@dataclass(kw_only=True)
class Warm:
    """One model at a time, on one device, and all evaluations that were asked for.

    Attributes:
        device, gpus, trust_remote_code: as in ``kbit.models.loading.load_model``.
        holds: the model that is loaded, with its compute dtype.
        load_seconds: what loading it took.
        total_seconds: what loading took so far, failures and ``refer`` too.
    """

    device: str
    gpus: int
    trust_remote_code: bool
    holds: tuple[ModelRef, str] | None = None
    load_seconds: float = 0.0
    total_seconds: float = 0.0
    _loaded: LoadedModel | None = None
    _layered: tuple[LoadedModel, Blocks] | None = None
    _packing: Packing | None = None
    _whole_only: tuple[ModelRef, str] | None = None
    _originals: Originals | None = None
    _failed: tuple[tuple[ModelRef, str], Exception, TracebackType | None] | None = None
    _prepared: dict[str, PreparedEval] = field(default_factory=dict)
    _windows: dict[str, Tensor] = field(default_factory=dict)
    _references: dict[str, tuple[int, PreparedEval]] = field(default_factory=dict)
    """Evaluations that have what they compare the loaded model with, each with the batch in which it was taken."""

    def load(self, model: ModelRef, dtype: str) -> LoadedModel:
        """Return the model with this compute dtype, as the last cell left it (``as_loaded``).

        Raises:
            ValueError, HubError: a local model that has changed since the launch, or one that can't be loaded; the same
                error each time.
        """
        if self._loaded is None or self.holds != (model, dtype):

            def read() -> None:
                self._loaded = self._read(model, dtype)

            self._take((model, dtype), read)
        assert self._loaded is not None
        return self._loaded

    def _take(self, wanted: tuple[ModelRef, str], read: Callable[[], None]) -> None:
        """Hold another model. Why it can't be loaded is kept: trying again for each of its cells may take hours."""
        if self._failed is None or self._failed[0] != wanted:
            self._let_go()
            began = time.perf_counter()
            try:
                read()
                self.holds = wanted
            except NotStreamableError:
                raise  # it can be loaded in another way
            except Exception as error:
                self._failed = (wanted, error, error.__traceback__)
            finally:
                self.load_seconds = time.perf_counter() - began
                self.total_seconds += self.load_seconds
        self._raise_known_failure(wanted)

    def _raise_known_failure(self, wanted: tuple[ModelRef, str]) -> None:
        """Raise what a model couldn't be loaded for, from one place, with the traceback of the first time.

        An exception's own grows whenever it is raised, and cells that failed alike would have other words each.
        """
        if self._failed is not None and self._failed[0] == wanted:
            _, failure, frames = self._failed
            raise failure.with_traceback(frames and frames.tb_next)

    def load_layered(self, model: ModelRef, dtype: str) -> tuple[LoadedModel, Blocks]:
        """Return the model without the weights of its blocks, and what fetches these one at a time.

        Raises:
            As ``load``.
        """
        if self._layered is None or self.holds != (model, dtype):

            def read() -> None:
                check_unchanged(model)
                self._layered = open_blocks(model, self.device, dtype, trust_remote_code=self.trust_remote_code)

            self._take((model, dtype), read)
        assert self._layered is not None
        return self._layered

    def load_packed(self, model: ModelRef, dtype: str) -> Packing | None:
        """Return the model without its weights, to be quantized as they are read.

        None where its files can't be read tensor by tensor (``NotStreamableError``): it has to be loaded whole.

        Raises:
            As ``load``.
        """
        wanted = (model, dtype)
        if self._whole_only == wanted:
            return None
        if self._packing is None or self.holds != wanted:

            def read() -> None:
                self._packing = self._open(model, dtype)

            try:
                self._take(wanted, read)
            except NotStreamableError as error:
                self._whole_only = wanted
                print(f"{model.label} has to be loaded whole: {error}", file=sys.stderr, flush=True)
                return None
        return self._packing

    @property
    def packing(self) -> Packing | None:
        """What quantizes the held model as it is read; None where it was loaded whole."""
        return self._packing

    def _open(self, model: ModelRef, dtype: str) -> Packing:
        from kbit.models.streaming.packing import Packing
        from kbit.models.streaming.streamed import open_streamed

        check_unchanged(model)
        streamed = open_streamed(
            model.path or str(model.hub_id),
            revision=model.commit,
            compute_dtype=dtype,
            trust_remote_code=self.trust_remote_code,
        )
        check_reading(model, streamed.loaded)
        return Packing(streamed, device=self.device, gpus=self.gpus)

    def _let_go(self) -> None:
        """Let the held model go, before another is loaded: two at once may not fit."""
        self._loaded = self._originals = self._layered = self._packing = self.holds = None
        self._references.clear()
        free_memory(self.device)

    def originals(self, loaded: LoadedModel) -> Originals:
        """Return what the cells of the loaded model begin from."""
        from kbit.models.originals import Originals

        if self._originals is None or self._originals.model is not loaded.model:
            self._originals = Originals(model=loaded.model)
        return self._originals

    def as_loaded(self) -> None:
        """Make sure that the loaded model is in its 16-bit form now: no cell's weights, no cell's modules."""
        if self._originals is not None:
            self._originals.restore()

    def make_room(self) -> bool:
        """Move what is kept of the model beside it off the GPUs, for as long as it is loaded; tell whether it was."""
        moved = self._originals is not None and self._originals.make_room()
        if moved:
            free_memory(self.device)
        return moved

    @property
    def kept_gpu_bytes(self) -> int:
        """Bytes of GPU memory that hold the originals of the loaded model, which no cell needs there."""
        return 0 if self._originals is None else self._originals.gpu_bytes

    def _read(self, model: ModelRef, dtype: str) -> LoadedModel:
        from kbit.models.loading import load_model

        check_unchanged(model)
        loaded = load_model(
            model.path or str(model.hub_id),
            revision=model.commit,
            device=self.device,
            compute_dtype=dtype,
            gpus=self.gpus,
            trust_remote_code=self.trust_remote_code,
        )
        check_reading(model, loaded)
        return loaded

    def prepare(self, spec: EvalSpec, loaded: LoadedModel) -> PreparedEval:
        """Return requests and tokens, built once for all cells of models that share a tokenizer.

        What compares has the loaded model's reference, if ``refer`` was called.
        """
        from kbit.evaluation import prepare
        from sweeps.study.snapshot import check_eval

        context, vocab_size = loaded.context, loaded.vocab_size
        # Where data are read from is no part of a spec's equality, but decides what is there.
        key = _key(eval_to_dict(spec), loaded)
        if key in self._references:
            return self._references[key][1]
        if key not in self._prepared:
            check_eval(spec)
            self._prepared[key] = prepare(spec, loaded.tokenizer, context=context, vocab_size=vocab_size)
        return self._prepared[key]

    def lacks_reference(self, spec: EvalSpec, loaded: LoadedModel, *, batch_tokens: int) -> bool:
        """Tell whether an evaluation compares with the 16-bit model, and was given none in this batch."""
        if not EVALUATORS[spec.kind].compares:
            return False
        taken_in, _ = self._references.get(_key(eval_to_dict(spec), loaded), (None, None))
        return taken_in != batch_tokens

    def refer(self, spec: EvalSpec, loaded: LoadedModel, *, batch_tokens: int) -> None:
        """Give an evaluation that lacks it the loaded model in its 16-bit form; until another model is loaded."""
        if not self.lacks_reference(spec, loaded, batch_tokens=batch_tokens):
            return
        key = _key(eval_to_dict(spec), loaded)
        # An earlier one goes first: two at once may not fit.
        self._references.pop(key, None)
        comparing = cast("ComparingEval", self.prepare(spec, loaded))
        began = time.perf_counter()
        self.as_loaded()
        try:
            self._references[key] = (batch_tokens, comparing.refer(loaded.model, batch_tokens=batch_tokens))
        finally:
            # As loading, it is once for all cells, and no cell's own time.
            self.total_seconds += time.perf_counter() - began

    def calibration(self, calibration: Calibration, loaded: LoadedModel) -> Tensor:
        """Return token windows, drawn once for all cells of models that share a tokenizer: int64 [samples, length]."""
        from kbit.evaluation.calibration import calibration_windows
        from sweeps.study.snapshot import check_data

        context, vocab_size = loaded.context, loaded.vocab_size
        key = _key({**calibration.canonical(), "source": source_to_dict(calibration.source)}, loaded)
        if key not in self._windows:
            check_data(f"calibration {calibration.name}", calibration.source)
            tokenizer = loaded.tokenizer
            self._windows[key] = calibration_windows(calibration, tokenizer, context=context, vocab_size=vocab_size)
        return self._windows[key]


def _key(what: Mapping[str, object], loaded: LoadedModel) -> str:
    """Return the key of data encoded for a model: everything that they are made from."""
    model = {"tokenizer": loaded.tokenizer_hash, "context": loaded.context, "vocab_size": loaded.vocab_size}
    return canonical_json({"of": what, **model})


def open_blocks(model: ModelRef, device: str, dtype: str, *, trust_remote_code: bool) -> tuple[LoadedModel, Blocks]:
    """Return a model of which a block at a time is on the device: read from its files, or where these can't be read
    tensor by tensor, from the host's memory.
    """
    from kbit.errors import NotStreamableError
    from kbit.layered.blocks import HostBlocks, StreamedBlocks
    from kbit.models.loading import load_model
    from kbit.models.streaming.streamed import open_streamed

    where, code = model.path or str(model.hub_id), trust_remote_code
    try:
        streamed = open_streamed(where, revision=model.commit, compute_dtype=dtype, trust_remote_code=code)
    except NotStreamableError:
        loaded = load_model(where, revision=model.commit, device="cpu", compute_dtype=dtype, trust_remote_code=code)
        check_reading(model, loaded)
        return loaded, HostBlocks(loaded.model, device)
    check_reading(model, streamed.loaded)
    return streamed.loaded, StreamedBlocks(streamed, device)


def is_lost(error: Exception) -> bool:
    """Tell whether the process can't use its GPU any more."""
    from kbit.memory import is_out_of_memory

    return "CUDA error" in str(error) and not is_out_of_memory(error)


def recover(error: Exception, device: str) -> None:
    """Give back the memory that the frames of an exception, and of those before it, hold."""
    if is_lost(error):
        return
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    free_memory(device)


def free_memory(device: str) -> None:
    """Give what nothing refers to back to the device."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def check_reading(model: ModelRef, loaded: LoadedModel) -> None:
    """Refuse a model with a later reading than it was planned with: its numbers would go by an earlier one's key."""
    from kbit.models.readings import reading_of
    from kbit.models.stacks import has_stacks

    reading, reason = reading_of(loaded.model.config.to_dict())
    if reading == 1 and has_stacks(loaded.model):
        reason = f"its architecture {type(loaded.model).__name__} has experts that its config.json doesn't name"
    elif reading <= model.reading:
        return
    raise ValueError(
        f"{model.label} was planned with reading {model.reading} of its weights, but {reason}: "
        "launch it again where its config.json can be read (mode=fetch gets it)"
    )


def check_unchanged(model: ModelRef) -> None:
    """Refuse a local model that has changed since the launch: its numbers would go by another's name."""
    if model.path is None:
        return
    from sweeps.study.hub import local_model

    if local_model(Path(model.path)).content_hash != model.weights_hash:
        raise ValueError(
            f"{model.path} has changed since the study was launched: launch it again to measure what is there"
        )
