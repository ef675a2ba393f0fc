"""Hydra's errors in our form: the key, the value, what is allowed, what to do."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from sweeps.config import CONFIG_DIR, BlockConfig, MemberConfig, config_dirs, options_of, schema
from sweeps.errors import did_you_mean
from sweeps.files import JsonObject
from sweeps.study.grid import block_axes

_KINDS: Final = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}
_BARE: Final = re.compile(r"[\w/\\+.$%*@?|:\- ]+", re.ASCII)
"""A value that Hydra reads without quotes."""


def explain(error: Exception) -> str:
    """Return one message for what Hydra or OmegaConf refused, or could not do."""
    text = str(error)
    unreadable = _unreadable_argument()
    if unreadable is not None:
        return _explain_unreadable(unreadable)
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    unknown = re.search(r"Could not override '([^']+)'", text)
    asked = unknown.group(1) if unknown else ""
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.object_type is BlockConfig:
        # A block that is written whole doesn't know its place in the list.
        return explain_unknown(asked if asked.startswith("sweep.quant.") else f"sweep.quant.N.{cause.key}")
    if asked:
        # The key itself, or one within the mapping that it is given.
        within = str(getattr(cause, "full_key", None) or "")
        return explain_unknown(within if within.startswith(f"{asked}.") else asked)
    missing = re.search(r"Could not (?:find|load) '([^/'\s]+)/([^'\s]+)'", text)
    if missing:
        return _explain_option(missing.group(1), missing.group(2))
    if "requires --multirun" in text:
        return f"{text.replace('Sweep parameters', 'a sweep over').replace('requires', 'needs')}; a list is [a,b]"
    if "Ambiguous value" in text:
        said = " ".join(text.replace("argument '", "'").replace("\\'", "'").split())
        return f"{said}; e.g. 'key=[a,b]', quoted for the shell"
    added = re.search(r"An item is already at '([^']+)'", text)
    if added:
        return (
            f"{added.group(1)} has a value already, which '+' doesn't change: write {added.group(1)}=VALUE without it"
        )
    if isinstance(cause, OmegaConfBaseException):
        return _explain_value(text, cause)
    if not isinstance(error, HydraException):
        return _explain_offender(error)
    search_path = text.find("Config search path:")
    return text[:search_path].strip() if search_path >= 0 else text.strip()


def explain_unknown(key: str) -> str:
    """Return a message for a key that the schema doesn't have: the nearest known one, and what is allowed there."""
    first, _, rest = key.partition(".")
    member = re.match(r"models\.([^.]+)(?:\.members\.([^.]+))?", key)
    if member:
        return f"{key!r} is not a key: {_members(member.group(1), member.group(2))}"
    if re.match(r"sweep\.quant\.\d+$", key):
        return f"{key!r} is not a key: {_blocks()}"
    if first == "where":
        return f"{key!r} is not a key: axis values are given together, e.g. 'where={{{rest}: VALUE}}'"
    if key in block_axes():
        return (
            f"{key!r} is not a key but an axis of the study's blocks: sweep.quant.N.{key}=VALUE changes it in block N, "
            f"'where={{{key}: VALUE}}' chooses cells by it"
        )
    known = list(_known_keys(OmegaConf.structured(schema()), ""))
    block = re.match(r"(sweep\.quant\.(?:\d+|N))\.", key)
    if block:
        known += [f"{block.group(1)}.{name}" for name in OmegaConf.structured(BlockConfig)]
    parent = key.rpartition(".")[0]
    siblings = [k for k in known if k.rpartition(".")[0] == parent] or [k for k in known if "." not in k]
    return f"{key!r} is not a key.{did_you_mean(key, known)} Allowed there: {', '.join(siblings)}"


def _explain_value(text: str, cause: OmegaConfBaseException) -> str:
    """Explain a value of a wrong kind, or a place that doesn't exist, without the names of OmegaConf's internals."""
    override = re.search(r"Error merging override ([^\n]+)", text)
    said = str(cause.msg or cause).splitlines()[0]
    where = override.group(1) if override else str(cause.full_key or "")
    key, _, value = where.lstrip("+").partition("=")
    if override and "DictConfig with ListConfig" in said:
        if value.startswith("["):
            return f"{where} is not valid: a mapping is needed there, e.g. '{key}={{NAME: VALUE}}'"
        return f"{where} is not valid: Hydra can't put a mapping in the place of a list; write '{key}=[{value}]'"
    member = re.match(r"models\.([^.]+)(?:\.members\.([^.]+))?", key)
    if override and member and "is not a subclass of" in said:
        return f"{where} is not valid: {_members(member.group(1), member.group(2))}"
    if override and key.startswith("sweep.quant."):
        return f"{where} is not valid: {_blocks()}"
    kind = re.search(r"could not be converted to (Integer|Float)|is not a valid (bool)", said)
    if kind:
        null = " or null" if _may_be_null(key) else ""
        return f"{where} is not valid: {_KINDS[kind.group(1) or kind.group(2)]}{null} is needed"
    if "is not a ListConfig" in said:
        return f"{where} is not valid: a list is needed, e.g. '{key}=[a,b]'"
    if "Unexpected type annotation: Set" in said:
        return f"{where} is not valid: a mapping is written {{name: value}}, and a list [a,b]"
    return f"{where} is not valid: {said}" if where else said


def _explain_option(group: str, option: str) -> str:
    """Explain a choice of a group that isn't there."""
    directories = config_dirs(_config_dir())
    options = options_of(group, directories)
    message = f"{group}={option} is not valid: one of {', '.join(options)}.{did_you_mean(option, options)}"
    for directory in directories[1:]:
        misplaced = directory / f"{option}.yaml"
        if misplaced.is_file():
            message += f" {misplaced} is there, but is looked for in {directory / group}: move it there"
    return message


def _explain_unreadable(argument: str) -> str:
    """Explain an argument that is not in Hydra's grammar: which characters need quotes, and how to write it."""
    key, _, value = argument.partition("=")
    if not _parses(f"{key}=0"):
        hint = _blocks() if key.startswith("sweep.quant.") else "its parts are letters, digits and '_', a letter first"
        nested = re.fullmatch(r"([A-Za-z_.]+)\.(\d[^.]*)\.([A-Za-z_]+)", key)
        if nested:
            hint = f"write '{nested.group(1)}={{{nested.group(2)}: {{{nested.group(3)}: {value}}}}}'"
        return f"{argument!r} can't be read: {key!r} is not a key that Hydra can read: {hint}"
    listed = value.startswith("[") and value.endswith("]") and not any(c in value[1:-1] for c in "[]{}'\"")
    values = value[1:-1].split(",") if listed else [value]
    odd = dict.fromkeys(c for v in values for c in v if not _BARE.fullmatch(c) and c not in "[]{}'\"")
    quoted = ",".join('"{}"'.format(v.replace("\\", "\\\\").replace('"', '\\"')) for v in values)
    why = f"{' and '.join(map(repr, odd))} must be in quotes" if odd else "its quotes or brackets don't match"
    return (
        f"{argument!r} can't be read: {why}. Put double quotes around each value and single quotes around all of it: "
        f"'{key}={f'[{quoted}]' if listed else quoted}'"
    )


def _explain_offender(error: Exception) -> str:
    """Explain what Hydra stumbled over: the first argument that can't be applied."""
    for argument in _overrides():
        _, problem = _composed([argument])
        if problem is None:
            continue
        key, _, value = argument.lstrip("+~").partition("=")
        if (CONFIG_DIR / key).is_dir():
            options = options_of(key, config_dirs(_config_dir()))
            return f"{argument} is not valid: {key} is one of {', '.join(options)}.{did_you_mean(value, options)}"
        if key.startswith("sweep.quant."):
            return f"{argument} is not valid: {_blocks()}"
        return f"{argument} can't be applied: {problem}. --help lists keys"
    return f"the command line can't be applied: {type(error).__name__}: {error}. --help lists keys"


def _members(family: str, member: str | None) -> str:
    """Say which models there are, and how to add one."""
    cfg, _ = _composed([a for a in _overrides() if not a.lstrip("+~").startswith("models.")])
    families: JsonObject = cfg.models if cfg is not None else {}
    add = "path=DIR measures a local model, --config-dir DIR with DIR/model/FAMILY.yaml adds a family"
    if family not in families:
        return f"the families of this study are {', '.join(families)} (model= chooses others); {add}"
    if member not in families[family].members:
        return f"the members of {family} are {', '.join(families[family].members)}; {add}"
    return f"keys of a member: {', '.join(OmegaConf.structured(MemberConfig))}"


def _blocks() -> str:
    """Say which blocks of the grid there are, and how to have another."""
    cfg, _ = _composed([a for a in _overrides() if not a.lstrip("+~").startswith("sweep.quant.")])
    count = len(cfg.sweep.quant) if cfg is not None else 0
    there = f"this study has the blocks sweep.quant.0 to sweep.quant.{count - 1}" if count else "there are no blocks"
    return f"{there}, each a mapping of axes; another needs them all: 'sweep.quant=[{{bits: 16}}, {{bits: 4}}]'"


def _known_keys(node: DictConfig, prefix: str) -> Iterator[str]:
    for name in map(str, node):
        yield f"{prefix}{name}"
        below = None if OmegaConf.is_missing(node, name) else node._get_node(name)
        if isinstance(below, DictConfig) and not below._is_none():
            yield from _known_keys(below, f"{prefix}{name}.")


def _may_be_null(key: str) -> bool:
    node: Any = OmegaConf.structured(schema())
    for name in key.split("."):
        node = node._get_node(name) if isinstance(node, DictConfig) and not node._is_none() else None
    return node is not None and bool(node._is_optional())


def _composed(overrides: Sequence[str]) -> tuple[DictConfig | None, Exception | None]:
    """Return the configuration with some arguments only, or why there is none."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    added = _config_dir()
    search = [f'hydra.searchpath=["file://{Path(added).absolute()}"]'] if added else []
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return compose("config", [*overrides, *search]), None
    except Exception as error:
        return None, error


def _overrides() -> list[str]:
    from hydra._internal.utils import get_args_parser

    overrides: list[str] = get_args_parser().parse_known_args(sys.argv[1:])[0].overrides
    return overrides


def _config_dir() -> str | None:
    from hydra._internal.utils import get_args_parser

    directory: str | None = get_args_parser().parse_known_args(sys.argv[1:])[0].config_dir
    return directory


def _parses(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def _unreadable_argument() -> str | None:
    return next((a for a in _overrides() if not _parses(a)), None)
