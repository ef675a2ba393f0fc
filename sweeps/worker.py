"""A worker runs packs: load a model once; for each cell quantize, measure, restore; record every measurement at once.

``python -m sweeps.worker`` is the process behind the local executor. It reads packs as JSON lines from standard input,
says what happens as JSON lines on the descriptor named by ``--events``, and writes results itself. Only functions that
compute import torch.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kbit.evaluation.spec import EvalResult, EvalSpec
from sweeps.cell import Cell, Measurement, ModelRef
from sweeps.plan import Pack
from sweeps.results import measurement_row
from sweeps.store import Store

if TYPE_CHECKING:
    from kbit.evaluation.prepared import PreparedEval
    from kbit.loading import LoadedModel
    from kbit.model import QuantHandle

SEED: Final = 0
PR_SET_PDEATHSIG: Final = 1

Emit = Callable[[Mapping[str, Any]], None]


@dataclass(kw_only=True)
class Worker:
    """Runs packs on one device, keeping the model and the prepared evaluations between them.

    Attributes:
        store: where measurements go.
        device: 'cpu' or 'cuda'.
        batch_tokens: tokens in a batch.
        provenance: columns that every row gets (commit, versions, launch, job, ...).
        emit: told what happens: 'loaded', 'started', 'measured', 'pack_done'.
        trust_remote_code: run code that a checkpoint brings; only when the user asked for it by name.
    """

    store: Store
    device: str
    batch_tokens: int
    provenance: Mapping[str, Any]
    emit: Emit
    trust_remote_code: bool = False
    _loaded: tuple[tuple[ModelRef, str], LoadedModel] | None = None
    _prepared: dict[tuple[EvalSpec, str], PreparedEval] = field(default_factory=dict)
    _load_seconds: float = 0.0
    _load_error: tuple[tuple[ModelRef, str], Exception] | None = None

    def run_pack(self, pack: Pack) -> None:
        """Measure everything in a pack; a failure is recorded and the rest goes on."""
        for cell, evals in pack.items:
            # One arithmetic a model load: cells whose evaluations ask for another dtype load the model anew.
            for dtype in dict.fromkeys(e.compute_dtype for e in evals):
                self._run_cell(pack, cell, [e for e in evals if e.compute_dtype == dtype], dtype)
        self.store.compact(pack.id)
        self.emit({"event": "pack_done", "pack": pack.id})

    def _run_cell(self, pack: Pack, cell: Cell, evals: list[EvalSpec], dtype: str) -> None:
        self.emit({"event": "started", "pack": pack.id, "cell": cell.key, "label": cell.label})
        started = datetime.now(UTC)
        try:
            loaded = self._load(cell.model, dtype)
            began = time.perf_counter()
            handle = _quantize(loaded, cell)
        except Exception as error:
            for spec in evals:
                self._record_failure(pack, Measurement(cell=cell, eval=spec), error, started)
            self._recover(error)
            return
        quantize_seconds = 0.0 if cell.quant.is_baseline else time.perf_counter() - began
        try:
            for spec in evals:
                measurement = Measurement(cell=cell, eval=spec)
                self._measure(pack, measurement, loaded, handle, quantize_seconds)
        finally:
            handle.restore()

    def _measure(
        self, pack: Pack, measurement: Measurement, loaded: LoadedModel, handle: QuantHandle, quantize_seconds: float
    ) -> None:
        import torch

        started = datetime.now(UTC)
        self.emit({"event": "measuring", "pack": pack.id, "measurement": measurement.key})
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(SEED)
        try:
            prepared = self._prepare(measurement, loaded)
            began = time.perf_counter()
            result = prepared.run(loaded.model, batch_tokens=self.batch_tokens)
            seconds = time.perf_counter() - began
        except Exception as error:
            self._record_failure(pack, measurement, error, started)
            self._recover(error)
            return
        row = {
            **self._common(pack, measurement, started),
            **_result_columns(result),
            **_handle_columns(handle),
            "compute_dtype": str(loaded.model.dtype).removeprefix("torch."),
            "seconds": seconds,
            "quantize_seconds": quantize_seconds,
            "load_seconds": self._load_seconds,
            "peak_memory_bytes": _peak_memory(self.device),
        }
        self._record(row)

    def _load(self, model: ModelRef, dtype: str) -> LoadedModel:
        from kbit.loading import load_model

        wanted = (model, dtype)
        if self._load_error is not None and self._load_error[0] == wanted:
            # What can't be loaded fails all its cells at once; trying again for each may take hours.
            raise self._load_error[1]
        if self._loaded is None or self._loaded[0] != wanted:
            # The old model goes first: two at once may not fit.
            self._loaded = None
            self._recover(None)
            began = time.perf_counter()
            try:
                _check_unchanged(model)
                loaded = load_model(
                    model.path or str(model.hub_id),
                    revision=model.commit,
                    device=self.device,
                    compute_dtype=dtype,
                    trust_remote_code=self.trust_remote_code,
                )
            except Exception as error:
                self._load_error = (wanted, error)
                raise
            self._load_seconds = time.perf_counter() - began
            self._loaded = (wanted, loaded)
            self.emit({"event": "loaded", "model": model.label, "seconds": self._load_seconds})
        return self._loaded[1]

    def _prepare(self, measurement: Measurement, loaded: LoadedModel) -> PreparedEval:
        """Requests and tokens are built once for all cells of models that share a tokenizer."""
        from kbit.evaluation import prepare

        spec = measurement.eval
        context, vocab_size = loaded.context, loaded.vocab_size
        key = (spec, f"{loaded.tokenizer_hash}/{context}/{vocab_size}")
        if key not in self._prepared:
            self._prepared[key] = prepare(spec, loaded.tokenizer, context=context, vocab_size=vocab_size)
        return self._prepared[key]

    def _common(self, pack: Pack, measurement: Measurement, started: datetime) -> dict[str, Any]:
        return {
            **measurement_row(measurement),
            **self.provenance,
            "sweep": pack.sweep,
            "pack": pack.id,
            "started": started,
            "finished": datetime.now(UTC),
            "device": _device_name(self.device),
            "kernel": "torch",
            "seed": SEED,
            "batch_tokens": self.batch_tokens,
        }

    def _record_failure(self, pack: Pack, measurement: Measurement, error: Exception, started: datetime) -> None:
        text = "".join(traceback.format_exception(error))
        print(f"{measurement.cell.label} on {measurement.eval.name} failed:\n{text}", file=sys.stderr, flush=True)
        row = {
            **self._common(pack, measurement, started),
            "status": "failed",
            "error_type": type(error).__name__,
            "error": text,
        }
        self._record(row)

    def _record(self, row: dict[str, Any]) -> None:
        self.store.write(row)
        told = {k: v for k, v in row.items() if k not in ("samples", "error", "versions")}
        self.emit({"event": "measured", "row": told})

    def _recover(self, error: Exception | None) -> None:
        """Give back memory that an exception's frames, or the model before, still hold."""
        import gc

        import torch

        if error is not None:
            if "CUDA error" in str(error):
                # The process can't use its device any more; a new worker goes on with the rest.
                sys.exit(f"the device is lost to this process: {error}")
            traceback.clear_frames(error.__traceback__)
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _check_unchanged(model: ModelRef) -> None:
    """Refuse a local model that has changed since the launch: its numbers would go by another's name."""
    if model.path is None:
        return
    from sweeps.hub import local_model

    if local_model(Path(model.path)).content_hash != model.weights_hash:
        raise ValueError(
            f"{model.path} has changed since the study was launched: launch it again to measure what is there"
        )


def _quantize(loaded: LoadedModel, cell: Cell) -> QuantHandle:
    from kbit.model import quantize_model

    return quantize_model(loaded.model, cell.quant, storage_dtype=loaded.storage_dtype)


def _result_columns(result: EvalResult) -> dict[str, Any]:
    return {
        "status": "diverged" if result.diverged else "done",
        "metrics": dict(result.metrics),
        "stderr": dict(result.stderr),
        "samples": dict(result.samples),
        "n_samples": result.n_samples,
        "n_tokens": result.n_tokens,
        "dataset_hash": result.dataset_hash,
    }


def _handle_columns(handle: QuantHandle) -> dict[str, Any]:
    return {
        "bits_per_param": handle.bits_per_param,
        "total_bits": float(handle.total_bits),
        "total_bits_nominal": handle.total_bits_nominal,
        "codebook_hash": handle.codebook_hash,
    }


def _peak_memory(device: str) -> int:
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _device_name(device: str) -> str:
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    return f"cpu ({os.uname().machine})"


def _read_packs() -> Iterator[Pack]:
    for line in sys.stdin:
        yield Pack.from_dict(json.loads(line))


def _die_with_launcher() -> None:
    """Have the kernel end this worker when its launcher dies, so that a new launch never measures beside it (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """The local executor's worker process: runs packs from standard input until it ends."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--events", type=int, required=True, help="file descriptor for events")
    parser.add_argument("--settings", required=True, help="JSON: out, device, batch_tokens, threads, provenance, ...")
    args = parser.parse_args()
    settings = json.loads(args.settings)
    # The launcher ends a study with SIGTERM: only the measurement in flight is lost, as parts are written atomically.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    events = os.fdopen(args.events, "w", buffering=1)
    parent = os.getppid()
    _die_with_launcher()

    def emit(event: Mapping[str, Any]) -> None:
        if os.getppid() != parent:
            sys.exit("the launcher is gone: stopping")
        events.write(json.dumps(event, default=str) + "\n")

    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(settings["threads"])
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    worker = Worker(
        store=Store(out=Path(settings["out"])),
        device=settings["device"],
        batch_tokens=settings["batch_tokens"],
        provenance={**settings["provenance"], "job": f"local/{os.getpid()}", "host": socket.gethostname()},
        emit=emit,
        trust_remote_code=settings["trust_remote_code"],
    )
    for pack in _read_packs():
        worker.run_pack(pack)


if __name__ == "__main__":
    main()
