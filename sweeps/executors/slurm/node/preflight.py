"""Setup errors found on a compute node before a thousand jobs are queued: one short job, every check, one line each.

What a node can lack that the launch had: packages, GPUs, the file system with models and data, room in the store, the
network, the right time. Each problem says what to do.
"""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from kbit.calibration import Calibration
from kbit.errors import CheckpointError
from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import EvalSpec
from kbit.models.checkpoint import model_files, safetensors_header
from kbit.sources import HubData, Source, TaskSource, documents_of, place_of
from sweeps.errors import UserError
from sweeps.files import store_time, write_atomically
from sweeps.store.parts import Store
from sweeps.study.cell import ModelRef
from sweeps.study.devices import check_device
from sweeps.study.hub import cached_snapshot, local_model
from sweeps.study.snapshot import check_data, check_eval
from sweeps.study.task_index import load_task_yaml

ALWAYS: Final = ("torch", "transformers", "pyarrow")
FOR_HUB_DATA: Final = ("datasets",)
OWN: Final = ("sweeps.worker.worker", "kbit.models.loading", "kbit.models.quantize")
CLOCK_SECONDS: Final = 300.0
"""Clocks further apart put results in the wrong order and make claims look abandoned."""
FULL_BYTES: Final = 100_000_000
LOW_BYTES: Final = 1_000_000_000
HUB_SECONDS: Final = 10.0
"""To wait for the hub to answer."""


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """The needs of the jobs of one resource shape.

    Attributes:
        out: the results directory.
        device: 'cpu' or 'cuda'.
        gpus: GPUs of a job; 0 with 'cpu'.
        models, evals, calibrations: what will be loaded and read.
        launched: the login node's clock at launch, in seconds since 1970.
        store_launched: the store's clock then: the modification time of a file written at launch.
    """

    out: Path
    device: str
    gpus: int
    models: tuple[ModelRef, ...]
    evals: tuple[EvalSpec, ...]
    calibrations: tuple[Calibration, ...] = ()
    launched: float
    store_launched: float

    def problems(self) -> list[str]:
        """Make every check, say a line on each on standard output, and return what is wrong, one line per problem."""
        _say("node", f"{socket.gethostname()}, {sys.executable}")
        found: list[str] = []
        for check in self._checks():
            try:
                _say("ok", check())
            except Exception as error:
                # Whatever it is, the checks after it are worth making.
                if not isinstance(error, UserError):
                    traceback.print_exc()
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                found.append(" ".join(f"{kind}{error}".split()))
                _say("FAIL", found[-1])
        return found

    def _checks(self) -> Iterator[Callable[[], str]]:
        """Yield checks, each of which returns what is well, or raises what is not.

        What comes later may depend on what was imported.
        """
        for module in self._packages():
            yield partial(_check_import, module)
        # Without torch these fail for a reason that has been said.
        if {"torch", "transformers"} <= sys.modules.keys():
            for module in OWN:
                yield partial(_check_import, module)
            if self.device == "cuda":
                yield self._check_gpus
        for model in dict.fromkeys(self.models):
            yield partial(_check_model, model)
        for spec in self.evals:
            yield partial(_check_eval, spec)
        for calibration in self.calibrations:
            yield partial(_check_source, f"calibration {calibration.name}", calibration.source)
        for spec in self.evals:
            if spec.device is not None:
                yield partial(self._check_measured, spec)
        yield self._check_store
        yield self._check_clock

    def _packages(self) -> tuple[str, ...]:
        wanted = list(ALWAYS)
        for spec in self.evals:
            wanted += EVALUATORS[spec.kind].modules
        sources = [*(spec.source for spec in self.evals), *(c.source for c in self.calibrations)]
        if any(isinstance(documents_of(source), HubData) for source in sources):
            wanted += FOR_HUB_DATA
        return tuple(dict.fromkeys(wanted))

    def _check_gpus(self) -> str:
        import torch

        count = torch.cuda.device_count()
        if count < self.gpus or not count:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
            build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
            raise UserError(
                f"executor.device=cuda with {self.gpus} GPU(s) a job, but torch sees {count} on "
                f"{socket.gethostname()} (CUDA_VISIBLE_DEVICES: {visible}; torch is built for {build}): ask for a "
                "partition that has them (executor.partition, executor.gpus, executor.gpu_type), install a torch for "
                "its driver, or use executor.device=cpu"
            )
        for index in range(self.gpus):
            try:
                computed = float((torch.ones(1024, device=f"cuda:{index}") * 2).sum())
            except RuntimeError as error:
                raise UserError(
                    f"GPU {index} of {socket.gethostname()} can't compute ({_brief(error)}): exclude the node, or "
                    "install a torch for its driver"
                ) from error
            if computed != 2048:
                raise UserError(f"GPU {index} of {socket.gethostname()} computes wrong numbers: exclude the node")
        return f"device {self.gpus} x {torch.cuda.get_device_name()}"

    def _check_measured(self, spec: EvalSpec) -> str:
        check_device(spec, self.device)
        return f"eval {spec.name}: measures {spec.device}"

    def _check_store(self) -> str:
        # The launch has written there, so a directory that is missing is another file system; making it would hide it.
        if not self.out.is_dir():
            raise UserError(
                f"out={str(self.out)!r} is not there on {socket.gethostname()}: give a directory on a file system that "
                "login and compute nodes share"
            )
        Store(out=self.out).check_writable()
        try:
            self._write_probe()
        except OSError as error:
            raise UserError(
                f"out={str(self.out)!r} takes no data on {socket.gethostname()}: {error.strerror or error}. Free some "
                "space or quota, or repair the file system"
            ) from error
        free = shutil.disk_usage(self.out).free
        if free < FULL_BYTES:
            raise UserError(
                f"out={str(self.out)!r} has {free / 1e6:.0f} MB left: free at least {LOW_BYTES / 1e9:.0f} GB, or give "
                "another out="
            )
        if free < LOW_BYTES:
            _say("note", f"store {self.out} has only {free / 1e6:.0f} MB left")
        return f"store {self.out}, {free / 1e9:.1f} GB free"

    def _write_probe(self) -> None:
        """Write a file as results are written, read it back, remove it."""
        probe, data = self.out / f".preflight-{uuid.uuid4().hex}", os.urandom(1 << 16)
        self.out.stat()  # writing would make a directory that is missing
        try:
            write_atomically(probe, data)
            if probe.read_bytes() != data:
                raise OSError("what was written reads back differently")
        finally:
            probe.unlink(missing_ok=True)

    def _check_clock(self) -> str:
        host, advice = socket.gethostname(), "have its clock set (NTP), or exclude the node"
        try:
            ahead_of_store = time.time() - store_time(self.out)
        except OSError:
            ahead_of_store = self.launched - self.store_launched  # the store's problem has been said
        # Of this node to the login node: the job may have waited for days, but the store's clock saw both.
        ahead = ahead_of_store - (self.launched - self.store_launched)
        if abs(ahead_of_store) > CLOCK_SECONDS:
            raise UserError(f"the clock of {host} is {_apart(ahead_of_store)} the store's ({self.out}): {advice}")
        if abs(ahead) > CLOCK_SECONDS:
            raise UserError(f"the clock of {host} is {_apart(ahead)} the login node's: {advice}")
        early = self.launched - time.time()
        if early > CLOCK_SECONDS:
            raise UserError(f"by the clock of {host} the study is launched in {early / 60:.0f} minutes: {advice}")
        return f"clock {ahead_of_store:+.1f} s by the store's, {ahead:+.1f} s by the login node's"


def _check_import(name: str) -> str:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        # A shared library that is missing, or packages that don't fit each other, may raise anything.
        raise UserError(
            f"{name} can't be imported on {socket.gethostname()} by {sys.executable} ({type(error).__name__}: "
            f"{_brief(error)}): install {name.partition('.')[0]} in the environment that jobs use, or activate the "
            "right one in executor.setup"
        ) from error
    where = getattr(module, "__version__", None) or getattr(module, "__file__", "")
    return f"{name} {where}"


def _check_model(model: ModelRef) -> str:
    if model.path is None:
        return _check_hub_model(model)
    try:
        found = local_model(model.path)
    except UserError as error:
        raise UserError(
            f"model {model.label} on {socket.gethostname()}: {error}. Is it on a file system that compute nodes share?"
        ) from error
    if found.content_hash != model.weights_hash:
        raise UserError(
            f"model {model.label}: {model.path} has changed since the study was launched: launch it again to measure "
            "what is there"
        )
    return f"model {model.label}: {model.path}"


def _check_hub_model(model: ModelRef) -> str:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    repo, commit = str(model.hub_id), str(model.commit)
    cached = cached_snapshot(repo, commit)
    if cached is not None:
        for name in model_files(cached):
            if name.endswith(".safetensors"):
                try:
                    safetensors_header(cached / name)
                except (CheckpointError, OSError) as error:
                    raise UserError(f"model {model.label}: {cached}: {error}. {_fetch_advice()}") from error
        return f"model {model.label}: {cached}"

    def ask() -> object:
        # Not the repository's page: that of a gated model answers to all, its files to those with access.
        return get_hf_file_metadata(hf_hub_url(repo, "config.json", revision=commit), timeout=HUB_SECONDS)

    return _reach(f"model {model.label} ({repo}@{commit[:12]})", ask)


def _check_eval(spec: EvalSpec) -> str:
    if isinstance(spec.source, TaskSource):
        load_task_yaml(Path(spec.source.task_file))
    check_eval(spec)
    return _check_source(f"eval {spec.name}", spec.source)


def _check_source(what: str, source: Source | None) -> str:
    check_data(what, source)
    documents = documents_of(source)
    if isinstance(documents, HubData):
        return _check_hub_data(what, documents, of_task=isinstance(source, TaskSource))
    return f"{what}: {place_of(source)}"


def _check_hub_data(reader: str, documents: HubData, *, of_task: bool) -> str:
    from huggingface_hub import HfApi, constants

    repo, commit = documents.hub, documents.revision
    what = f"{reader} ({repo}@{commit[:12]})"
    if not constants.HF_HUB_OFFLINE:
        return _reach(what, lambda: HfApi().dataset_info(repo, revision=commit, timeout=HUB_SECONDS))
    import datasets

    from kbit.evaluation.texts import DEFAULT_SPLIT, require_commit

    # All splits of a task's data: its examples may be of another than its questions.
    split = None if of_task else documents.split or DEFAULT_SPLIT
    kwargs = documents.kwargs or {}
    try:
        data = datasets.load_dataset(repo, documents.config, revision=commit, split=split, **kwargs)
        require_commit(data, repo, commit)
    except Exception as error:
        raise UserError(f"{what} is not in the cache ({_brief(error)}). {_fetch_advice()}") from error
    return f"{what}: in the cache"


def _reach(what: str, ask: Callable[[], object]) -> str:
    """Ask the hub for what is not in the cache."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{what} is not in the cache, and HF_HUB_OFFLINE is set. {_fetch_advice()}")
    try:
        ask()
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # the HTTP client's base class
        raise UserError(f"{what} could not be fetched from the hub ({_brief(error)}). {_fetch_advice()}") from error
    return f"{what}: available from {constants.ENDPOINT}"


def _fetch_advice() -> str:
    from huggingface_hub import constants

    return (
        f"Run the study's command with mode=fetch where there is a network, into a cache that compute nodes share "
        f"(HF_HOME; {socket.gethostname()} reads {constants.HF_HUB_CACHE}), and set HF_HUB_OFFLINE=1 in executor.setup "
        "where nodes have no network"
    )


def _apart(seconds: float) -> str:
    return f"{abs(seconds) / 60:.0f} minutes {'ahead of' if seconds > 0 else 'behind'}"


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _say(mark: str, text: str) -> None:
    # At once: a check that never ends is the one after the last line.
    print(f"{mark:<5}{text}", flush=True)
