"""The typed schema that Hydra validates a study's configuration against, and the resolvers its files use.

Plain, mutable dataclasses of strings and numbers, as Hydra's merge needs; what runs is the frozen types built from
them. ``MISSING`` marks an axis that a block of the grid doesn't name; ``null`` is a value (blocksize=null is the whole
tensor).
"""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Optional, TypeAlias, get_args, get_type_hints

from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from kbit.axes import Axis
from kbit.evaluation.spec import eval_axes
from sweeps.study.grid import block_axes

DEMO_DIR = Path(__file__).parent / "demo"
CONFIG_DIR = Path(__file__).resolve().parents[1] / "conf"
Raw: TypeAlias = Any
"""A value as it was written: Hydra has no type for it, and what reads it checks it."""


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
    reference: Raw = None


@dataclass
class FamilyConfig:
    members: dict[str, MemberConfig] = field(default_factory=dict)
    family: str | None = None
    tokens_per_step: int | None = None


if TYPE_CHECKING:

    class BlockConfig:
        """One product of the grid: a list is an axis, a scalar a constant; ``linked`` zips axes together."""

else:
    BlockConfig = make_dataclass("BlockConfig", [(n, Raw, field(default=MISSING)) for n in (*block_axes(), "linked")])


@dataclass
class ExcludeConfig:
    when: dict[str, Raw] = MISSING
    reason: str = MISSING


@dataclass
class SweepConfig:
    name: str = MISSING
    quant: list[BlockConfig] = MISSING
    exclude: list[ExcludeConfig] = field(default_factory=list)
    sizes: Raw = None
    revisions: Raw = None


@dataclass
class TextSetConfig:
    """The source of a text set's documents: a hub dataset, or a local file."""

    hub: str | None = None
    revision: str = "main"
    config: str | None = None
    split: str | None = None
    field: str = "text"
    local: str | None = None
    path: str | None = None


FOUND: Final = ("device", "definition", "seed")
"""Fields of evaluations that no key sets."""


@dataclass
class EvalSettings:
    """The keys of ``eval``: names by kind, where their data lie, and the fields of evaluations that came first."""

    perplexity: Raw = field(default_factory=list)
    tasks: Raw = field(default_factory=list)
    kinds: Raw = None
    sets: dict[str, TextSetConfig] = field(default_factory=dict)
    task_data: dict[str, str] = field(default_factory=dict)
    task_dirs: Raw = field(default_factory=list)
    data_dir: str | None = None
    window: int = 2048
    tokens: int | None = None
    limit: int | None = None
    num_fewshot: int = 0
    compute_dtype: str = "auto"


def eval_config(declared: Mapping[str, Axis]) -> type:
    """Add a key for each field of evaluations that came later, under its own name, but for those that are found."""
    later = [(n, Raw, field(default=a.neutral)) for n, a in declared.items() if a.since > 1 and n not in FOUND]
    return make_dataclass("EvalConfig", later, bases=(EvalSettings,))


if TYPE_CHECKING:

    class EvalConfig(EvalSettings):
        """``EvalSettings`` and the later fields of evaluations."""

else:
    EvalConfig = eval_config(eval_axes())


@dataclass
class CalibrationConfig:
    """The data of methods that calibrate; others ignore it. A list of seeds is an axis: a cell each, as replicates."""

    set: str | None = None
    samples: int = 128
    length: int = 2048
    seed: Raw = 0
    compute_dtype: str = "storage"


@dataclass
class Config:
    mode: str = "run"
    out: str = "results"
    path: Raw = None
    retry: Raw = "lost"
    order: Raw = "cheapest"
    budget: Raw = None
    by: Raw = None
    memory: Raw = None
    context: Raw = None
    batch: Raw = None
    columns: Raw = None
    metrics: Raw = None
    sort: Raw = None
    top: Raw = None
    cell: Raw = None
    where: Raw = None
    status: Raw = None
    yes: bool = False
    undo: bool = False
    to: str | None = None
    a: Raw = None
    b: Raw = None
    margins: Raw = None
    format: str | None = None
    long: bool = False
    samples: Raw = None
    watch: bool = False
    script: bool = False
    report: bool = True
    trust_remote_code: bool = False
    prefer: str | None = None
    models: dict[str, FamilyConfig] = field(default_factory=dict)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    # ``schema`` puts the keys of executors and tracking in place of these.
    executor: Raw = None
    tracking: Raw = None


@cache
def schema() -> type:
    """Return what Hydra checks keys against: ``Config``, with the keys of every executor that is installed."""
    from sweeps.executors.base import EXECUTORS
    from sweeps.tracking.config import TrackingConfig

    settings = [EXECUTORS[name].Settings for name in EXECUTORS]
    executor = _keys_of("ExecutorKeys", *settings, name="local", device="auto", batch_tokens="auto")
    tracking = _keys_of("TrackingKeys", TrackingConfig, mode="disabled", project="kbit-sweep")
    groups = {"executor": executor, "tracking": tracking}
    # ``from`` is a word of Python's: a class that has it as a field can't be called, and Hydra doesn't.
    of_merge: type = dataclass(init=False, repr=False, eq=False)(
        type("MergeKeys", (), {"__annotations__": {"from": Raw}, "from": None})
    )
    fields_of = [(n, t, field(default_factory=t)) for n, t in groups.items()]
    return make_dataclass("Config", fields_of, bases=(Config, of_merge), init=False, repr=False, eq=False)


def _keys_of(title: str, /, *classes: type, **defaults: str) -> type:
    """Make a schema with the fields of some frozen dataclasses, each None by default.

    Hydra checks types that are one of str, int, float and bool, or None. A field's metadata may say how users write its
    key (``key``), and that its class checks the type (``unchecked``).

    Args:
        title: name of the schema.
        *classes: whose fields.
        **defaults: of keys that are not None; the text of one that no class has is a key too.
    """
    types: dict[str, Raw] = dict.fromkeys(defaults, str)
    for of in classes:
        hints = get_type_hints(of)
        for f in fields(of):
            key = f.metadata.get("key") or f.name
            kinds = set(get_args(hints[f.name]) or (hints[f.name],)) - {type(None)}
            simple = len(kinds) == 1 and kinds <= {str, int, float, bool} and not f.metadata.get("unchecked")
            kind = Optional[kinds.pop()] if simple else Raw  # noqa: UP045  # made of a value
            types[key] = kind if types.get(key, kind) in (kind, str) else Raw
    return make_dataclass(title, [(key, kind, field(default=defaults.get(key))) for key, kind in types.items()])


@cache
def _scratch_dir() -> str:
    """Make a directory for the file that Hydra's multirun insists on writing; gone when the process ends."""
    directory = tempfile.mkdtemp(prefix="kbit-sweep-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def asked_keys(overrides: Sequence[str]) -> list[str]:
    """Return the top-level keys, or groups, that arguments of the command line set or add, each once.

    Raises:
        HydraException: an argument is not in Hydra's grammar.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return list(dict.fromkeys(re.split(r"[./]", o.key_or_group)[0] for o in parsed))


def unknown_keys(cfg: DictConfig) -> list[str]:
    """Return the keys that a composed configuration has and the schema doesn't: what ``+key=value`` added.

    Hydra adds what it is told to; where names are free (``where``, members of a family), every key is known.
    """
    found: list[str] = []

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, ListConfig) and not node._is_none():
            for index in range(len(node)):
                walk(node._get_node(index), f"{prefix}{index}.")
        if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
            return
        of = OmegaConf.get_type(node)
        known = {f.name for f in fields(of)} if of is not None and is_dataclass(of) else None
        for name in map(str, node):
            if known is not None and name not in known:
                found.append(f"{prefix}{name}")
            else:
                walk(node._get_node(name), f"{prefix}{name}.")

    walk(cfg, "")
    return found


def config_dirs(added: str | None) -> list[Path]:
    """Return where configuration files are looked for: ours, and the user's (``--config-dir``)."""
    return [CONFIG_DIR, *([Path(added)] if added else [])]


def options_of(group: str, directories: Iterable[Path]) -> list[str]:
    """Return what can be chosen of a group: the files of its directories."""
    return sorted({path.stem for directory in directories for path in (directory / group).glob("*.yaml")})


@cache
def _compose_once() -> None:
    """Let Hydra compose a command's configuration once.

    It does so twice, the first time for ``hydra.mode`` alone, in a third to a half of a plan's time. Only an argument
    or a configuration of others can set that; else it is null, which Hydra takes for what ``--multirun`` says.
    """
    read = Hydra.get_mode

    def get_mode(self: Hydra, config_name: str | None, overrides: list[str]) -> object:
        providers = {element.provider for element in self.config_loader.get_search_path().get_path()}
        may_be_set = bool(providers - {"hydra", "main", "schema"}) or any("hydra" in o for o in overrides)
        return read(self, config_name, overrides) if may_be_set else None

    Hydra.get_mode = get_mode  # type: ignore[method-assign]


def register() -> None:
    """Make the schema and the resolvers known to Hydra. Safe to call twice."""
    _compose_once()
    ConfigStore.instance().store(name="schema", node=schema())
    OmegaConf.register_new_resolver("demo", lambda name: str(DEMO_DIR / str(name)), replace=True)
    OmegaConf.register_new_resolver("scratch", _scratch_dir, replace=True)
