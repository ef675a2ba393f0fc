"""The request of a SLURM job: the keys of conf/executor/slurm.yaml, checked, and the shape of each pack's job."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Self

from sweeps.errors import UserError
from sweeps.executors.settings import ExecutorSettings, setting
from sweeps.files import JsonObject
from sweeps.text import counted
from sweeps.worker.devices import MODEL_BYTES_PER_PARAM, WORKER_BYTES

if TYPE_CHECKING:
    from sweeps.executors.slurm.query import Request
    from sweeps.launches.launch import Shape
    from sweeps.study.cell import ModelRef

GIB: Final = 2**30
GPU_WORK_BYTES: Final = 6e9
"""Of a GPU, besides the weights: a batch's activations and logits, the widest layer being quantized."""
GPU_SHARE: Final = 0.9
"""Of a GPU's memory that is counted on."""
HOST_BYTES_PER_PARAM: Final = 4
"""Of a GPU job's host: the checkpoint while it is loaded, and the original weights kept for restoring."""
HOST_WORK_BYTES: Final = 8e9
START_SECONDS: Final = 30.0
"""From a job's begin until its worker has imported what it needs; on a file system that many share it takes longer."""
JOB_BYTES: Final = 0.4e9
"""Of the process that watches over the worker."""
MIRROR_BYTES: Final = 0.8e9
"""Of W&B's mirror beside it, which holds what was planned, and reads the store: its most at 360,000 measurements."""
MINUTES: Final = 240
ASSUMED_GPU_GB: Final = 80.0
GPU_GB: Final[Mapping[str, float]] = {
    **{
        "h100": 80,
        "h200": 139,
        "gh200": 94,
        "b200": 178,
        "l40": 44,
        "l40s": 44,
        "a40": 44,
        "a6000": 47,
        "rtx_a6000": 47,
    },
    **{"a30": 24, "a10": 22, "a10g": 22, "l4": 22, "t4": 15, "rtx_3090": 24, "rtx_4090": 24, "rtx_5090": 32},
}
"""Memory of one GPU in GiB, as the driver tells it, by the names that clusters give types of one size (an A100 has 40
or 80).
"""
CODE: Final = ("snapshot", "checkout")
OURS: Final = (
    *(
        "job-name",
        "array",
        "dependency",
        "signal",
        "nodes",
        "ntasks",
        "ntasks-per-node",
        "output",
        "error",
        "open-mode",
    ),
    *("requeue", "no-requeue", "kill-on-invalid-dep", "time", "chdir", "export", "partition", "account", "qos"),
)
"""Options of sbatch that make a launch what it is, or have a key of their own."""
MOST_MINUTES: Final = 14 * 24 * 60
"""Longer walltimes are written D-HH."""
MOST_GPUS: Final = 8
"""On one node; a model that needs more is asked for with models.FAMILY.members.NAME.gpus."""


@dataclass(frozen=True, kw_only=True)
class SlurmSettings(ExecutorSettings):
    """The executor's keys, checked. See conf/executor/slurm.yaml for what each means."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus: int | None = setting()
    gpu_type: str | None = None
    gpu_memory_gb: float | None = None
    cpus: int = 4
    mem_gb: float | None = setting()
    minutes: int = setting(MINUTES, key="time")
    constraint: str | None = None
    exclude: str | None = None
    max_parallel: int | None = None
    cells_per_job: int | None = setting()
    setup: tuple[str, ...] = ()
    extra: JsonObject = field(default_factory=dict)
    requeues: int = 3
    signal_seconds: int = 120
    preflight: bool = True
    code: str = "snapshot"
    baseline_gate: bool = False
    baseline_tolerance: float = 0.02

    @classmethod
    def from_config(cls, executor: JsonObject) -> Self:
        """Check and convert.

        Raises:
            UserError: names the key, its value, and what is allowed.
        """
        given = {f.name: executor[f.name] for f in fields(cls) if executor.get(f.name) is not None}
        for key in ("gpus", "mem_gb", "cells_per_job"):
            if given.get(key) == "auto":
                del given[key]
        _check_numbers(given)
        if given.get("code", CODE[0]) not in CODE:
            raise UserError(f"executor.code={given['code']!r} is not valid: one of {', '.join(CODE)}")
        given["setup"] = _setup_lines(given.get("setup", ()))
        if not isinstance(given.get("extra", {}), Mapping):
            raise UserError(
                f"executor.extra={given['extra']!r} is not valid: long options of sbatch with their values, "
                "e.g. 'executor.extra={mail-type: FAIL}'"
            )
        for name in given.get("extra", {}):
            if str(name).replace("_", "-") in OURS:
                raise UserError(
                    f"executor.extra={{{name}: ...}} is not for {name}: a key of its own or the launch sets that"
                )
        minutes = parse_time(executor.get("time") or MINUTES)
        warned = given.get("signal_seconds", cls.signal_seconds)
        if warned >= 60 * minutes:
            raise UserError(
                f"executor.signal_seconds={warned} is not valid: less than the walltime, executor.time, "
                f"which is {60 * minutes} s"
            )
        return cls(**given, minutes=minutes)

    @property
    def known_gpu_gb(self) -> float | None:
        """Memory of one GPU in GiB: as given, else by its type; None where neither tells."""
        if self.gpu_memory_gb is not None or self.gpu_type is None:
            return self.gpu_memory_gb
        kind = self.gpu_type.lower()
        said = re.search(r"(\d+)_?gb?$", kind)
        return float(said[1]) if said else GPU_GB.get(kind.removeprefix("nvidia_"))

    def shape(self, model: ModelRef, device: str, rung: int, overrides: JsonObject, *, mirrored: bool = False) -> Shape:
        """Return the resources of a job for a model.

        Args:
            model: what the job measures.
            device: 'cpu' or 'cuda'.
            rung: step of the out-of-memory ladder: each doubles the memory, and on GPUs their number.
            overrides: the model's own gpus and mem_gb, where its configuration gives them.
            mirrored: it runs W&B's mirror, too.
        """
        from sweeps.launches.launch import Shape

        params = model.params or 1_000_000_000
        gpus = overrides.get("gpus") or self.gpus
        if gpus is None:
            usable = GPU_SHARE * (self.known_gpu_gb or ASSUMED_GPU_GB) * GIB
            gpus = math.ceil((2 * params + GPU_WORK_BYTES) / usable) if device == "cuda" else 0
        memory = overrides.get("mem_gb") or self.mem_gb
        if memory is None:
            bytes_ = (
                HOST_BYTES_PER_PARAM * params + HOST_WORK_BYTES
                if device == "cuda"
                else MODEL_BYTES_PER_PARAM * params + WORKER_BYTES
            )
            memory = float(math.ceil((bytes_ + JOB_BYTES + mirrored * MIRROR_BYTES) / GIB))
        if rung:
            memory *= 2**rung
            gpus = min(gpus * 2**rung, max(gpus, MOST_GPUS)) if device == "cuda" else gpus
        return Shape(gpus=gpus, cpus=self.cpus, mem_gb=memory, minutes=self.minutes, rung=rung)

    def request(self, shape: Shape, exclude: str | None = None) -> Request:
        """Return what a shape means to SLURM."""
        from sweeps.executors.slurm.query import Request

        return Request(
            partition=self.partition,
            account=self.account,
            qos=self.qos,
            gpus=shape.gpus,
            gpu_type=self.gpu_type,
            cpus=shape.cpus,
            mem_gb=shape.mem_gb,
            minutes=shape.minutes,
            constraint=self.constraint,
            extra=self.extra,
            exclude=exclude or self.exclude,
        )


_LEAST: Final = {
    "gpus": (0, int),
    "gpu_memory_gb": (1, float),
    "cpus": (1, int),
    "mem_gb": (0.25, float),
    "max_parallel": (1, int),
    "cells_per_job": (1, int),
    "requeues": (0, int),
    "signal_seconds": (1, int),
    "baseline_tolerance": (0, float),
}
_AUTO: Final = ("gpus", "mem_gb", "cells_per_job")


def _check_numbers(given: dict[str, Any]) -> None:
    for key, (least, kind) in _LEAST.items():
        if key not in given:
            continue
        value = given[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or value < least or (kind is int and value != int(value)):
            auto = "auto, or " if key in _AUTO else ""
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"executor.{key}={value!r} is not valid: {auto}{what} of at least {least}")
        given[key] = kind(value)


def _setup_lines(value: object) -> tuple[str, ...]:
    lines = [value] if isinstance(value, str) else value
    if not isinstance(lines, list | tuple) or not all(isinstance(line, str) for line in lines):
        raise UserError(
            f"executor.setup={value!r} is not valid: a shell line or a list of them, "
            "e.g. 'executor.setup=[module load cuda]'"
        )
    return tuple(lines)


def shape_text(shape: Shape) -> str:
    """Return a shape in words: '2 GPUs, 4 cores, 22 GB'."""
    gpus = counted(shape.gpus, "GPU") if shape.gpus else "no GPU"
    return f"{gpus}, {counted(shape.cpus, 'core')}, {shape.mem_gb:g} GB"


def parse_time(value: object) -> int:
    """Return minutes of a walltime, as SLURM writes it; seconds round up.

    It writes minutes, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Raises:
        UserError: it can't be read, or is less than a minute.
    """
    text = str(value).strip()
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None or isinstance(value, bool):
        raise _bad_time(value)
    days, first, second, third = (int(part) if part is not None else None for part in match.groups())
    assert first is not None
    if days is not None:
        seconds = (days * 24 + first) * 3600 + (second or 0) * 60 + (third or 0)
    elif third is not None:
        seconds = first * 3600 + (second or 0) * 60 + third
    elif second is not None:
        # sbatch would read MM:SS, people mean HH:MM: a walltime that is read wrongly costs a study.
        raise UserError(f"executor.time={value!r} is ambiguous: write HH:MM:SS, or minutes")
    else:
        seconds = first * 60
    if seconds < 60:
        raise _bad_time(value)
    if isinstance(value, int) and value > MOST_MINUTES:
        # YAML reads 10:00:00 without quotes as the number 36000.
        raise UserError(f"executor.time={value!r} would be {value} minutes: in a file, write HH:MM:SS in quotes")
    return math.ceil(seconds / 60)


def _bad_time(value: object) -> UserError:
    return UserError(
        f"executor.time={value!r} is not valid: minutes, HH:MM:SS or D-HH:MM:SS, at least a minute, "
        "e.g. executor.time=04:00:00"
    )
