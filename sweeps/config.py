"""The typed schema that Hydra validates a study's configuration against, and the resolvers its files use.

Plain, mutable dataclasses of strings and numbers, as Hydra's merge needs; what runs is the frozen types built from
them. ``MISSING`` marks an axis that a block of the grid doesn't name; ``null`` is a value (blocksize=null is the whole
tensor).
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from kbit.axes import Axis
from kbit.evaluation.spec import eval_axes
from sweeps.study.grid import block_axes

DEMO_DIR = Path(__file__).parent / "demo"


@dataclass
class MemberConfig:
    """A model of a family: on the hub (id, revision), or a local directory (path)."""

    id: str | None = None
    revision: str = "main"
    path: str | None = None
    params: int | None = None
    compute_dtype: str | None = None
    gpus: int | None = None
    mem_gb: float | None = None
    reference: Any = None


@dataclass
class FamilyConfig:
    members: dict[str, MemberConfig] = field(default_factory=dict)
    family: str | None = None


if TYPE_CHECKING:

    class BlockConfig:
        """One product of the grid: a list is an axis, a scalar a constant; ``linked`` zips axes together."""

else:
    BlockConfig = make_dataclass("BlockConfig", [(n, Any, field(default=MISSING)) for n in (*block_axes(), "linked")])


@dataclass
class ExcludeConfig:
    when: dict[str, Any] = MISSING
    reason: str = MISSING


@dataclass
class SweepConfig:
    name: str = MISSING
    quant: list[BlockConfig] = MISSING
    exclude: list[ExcludeConfig] = field(default_factory=list)
    sizes: Any = None


@dataclass
class TextSetConfig:
    """Where a text set's documents come from: a hub dataset, or a local file."""

    hub: str | None = None
    revision: str = "main"
    config: str | None = None
    split: str | None = None
    field: str = "text"
    local: str | None = None
    path: str | None = None


@dataclass
class EvalSettings:
    """What is measured: names by kind, where their data lie, and the fields of evaluations that came first."""

    perplexity: Any = field(default_factory=list)
    tasks: Any = field(default_factory=list)
    kinds: Any = None
    sets: dict[str, TextSetConfig] = field(default_factory=dict)
    task_data: dict[str, str] = field(default_factory=dict)
    task_dirs: Any = field(default_factory=list)
    data_dir: str | None = None
    window: int = 2048
    tokens: int | None = None
    limit: int | None = None
    num_fewshot: int = 0
    compute_dtype: str = "auto"


def eval_config(declared: Mapping[str, Axis]) -> type:
    """Add a key for each field of evaluations that came later, under its own name. A device is found, not given."""
    later = [(n, Any, field(default=a.neutral)) for n, a in declared.items() if a.since > 1 and n != "device"]
    return make_dataclass("EvalConfig", later, bases=(EvalSettings,))


if TYPE_CHECKING:

    class EvalConfig(EvalSettings):
        """``EvalSettings`` and the later fields of evaluations."""

else:
    EvalConfig = eval_config(eval_axes())


@dataclass
class ExecutorConfig:
    """Keys of both executors; those of SLURM are None where conf/executor/slurm.yaml does not give them."""

    name: str = "local"
    device: str = "auto"
    batch_tokens: Any = "auto"
    workers: Any = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus: Any = None
    gpu_type: str | None = None
    gpu_memory_gb: float | None = None
    cpus: int | None = None
    mem_gb: Any = None
    time: Any = None
    constraint: str | None = None
    exclude: str | None = None
    max_parallel: int | None = None
    cells_per_job: Any = None
    setup: Any = None
    extra: Any = None
    requeues: int | None = None
    signal_seconds: int | None = None
    preflight: bool | None = None
    code: str | None = None
    baseline_gate: bool | None = None
    baseline_tolerance: float | None = None


@dataclass
class TrackingConfig:
    mode: str = "disabled"
    project: str = "kbit-sweep"
    entity: str | None = None
    base_url: str | None = None
    dir: str | None = None


@dataclass
class Config:
    mode: str = "run"
    out: str = "results"
    path: Any = None
    retry: Any = "lost"
    by: Any = None
    cell: Any = None
    where: Any = None
    to: str | None = None
    long: bool = False
    watch: bool = False
    trust_remote_code: bool = False
    models: dict[str, FamilyConfig] = field(default_factory=dict)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@cache
def _scratch_dir() -> str:
    """Where Hydra's multirun puts the file it insists on writing; gone when the process ends."""
    directory = tempfile.mkdtemp(prefix="kbit-sweep-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def register() -> None:
    """Make the schema and the resolvers known to Hydra. Safe to call twice."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("demo", lambda name: str(DEMO_DIR / str(name)), replace=True)
    OmegaConf.register_new_resolver("scratch", _scratch_dir, replace=True)
