"""Hydra's errors in our form: the key, the value, what is allowed, what to do."""

from __future__ import annotations

import re
import sys

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sweeps.config import BlockConfig, schema
from sweeps.errors import did_you_mean


def explain(error: Exception) -> str:
    """Return one message for what Hydra or OmegaConf refused."""
    text = str(error)
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        return explain_unknown(unknown.group(1))
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if isinstance(cause, OmegaConfBaseException):
        return _explain_value(text, cause)
    if any(words in text for words in ("mismatched input", "token recognition", "extraneous input", "no viable")):
        key, _, value = _unreadable_argument().partition("=")
        value = f'["{value[1:-1]}"]' if value.startswith("[") and value.endswith("]") else f'"{value}"'
        return (
            f"{_unreadable_argument()!r} can't be read: {text.splitlines()[0]}. "
            f"Put double quotes around each value and single quotes around all of it: '{key}={value}'"
        )
    if "Ambiguous value" in text:
        return text.replace("argument '", "'").replace("\\'", "'") + "\n   e.g. 'key=[a,b]', quoted for the shell"
    missing = re.search(r"Could not find '(\S+)/(\S+)'.*Available options in '\1':\s*(.*)", text, re.DOTALL)
    if missing:
        group, option = missing.group(1), missing.group(2)
        known = [line.strip() for line in missing.group(3).partition("Config search path:")[0].splitlines()]
        options = [name for name in known if name]
        return f"{group}={option} is not valid: one of {', '.join(options)}.{did_you_mean(option, options)}"
    search_path = text.find("Config search path:")
    return text[:search_path].strip() if search_path >= 0 else text.strip()


def _explain_value(text: str, cause: OmegaConfBaseException) -> str:
    """Explain a value of a wrong kind, or a place that doesn't exist, without the names of OmegaConf's internals."""
    override = re.search(r"Error merging override ([^\n]+)", text)
    said = str(cause.msg or cause).splitlines()[0]
    where = override.group(1) if override else str(cause.full_key or "")
    if override and "DictConfig with ListConfig" in said:
        key, _, value = where.partition("=")
        return f"{where} is not valid: Hydra can't put a mapping in the place of a list; write '{key}=[{value}]'"
    return f"{where} is not valid: {said}" if where else said


def explain_unknown(key: str) -> str:
    """Return a message for a key that the schema doesn't have: the nearest known one, and what is allowed there."""
    known: list[str] = []

    def walk(node: object, prefix: str) -> None:
        if OmegaConf.is_dict(node):
            for name in node:  # type: ignore[attr-defined]
                known.append(f"{prefix}{name}")
                if not OmegaConf.is_missing(node, name):
                    walk(node._get_node(name), f"{prefix}{name}.")  # type: ignore[attr-defined]

    walk(OmegaConf.structured(schema()), "")
    block = re.match(r"(sweep\.quant\.\d+)\.", key)
    if block:
        known += [f"{block.group(1)}.{name}" for name in OmegaConf.structured(BlockConfig)]
    parent = key.rpartition(".")[0]
    siblings = [k for k in known if k.rpartition(".")[0] == parent] or [k for k in known if "." not in k]
    return f"{key!r} is not a key.{did_you_mean(key, known)} Allowed there: {', '.join(siblings)}"


def _unreadable_argument() -> str:
    parser = OverridesParser.create()
    for argument in sys.argv[1:]:
        if not argument.startswith("-"):
            try:
                parser.parse_override(argument)
            except HydraException:
                return argument
    return " ".join(sys.argv[1:])
