"""The command line before Hydra reads it: what people write that isn't in its grammar is put into it, or explained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from sweeps.commands.modes import MODES
from sweeps.config import config_dirs, options_of
from sweeps.errors import UserError, did_you_mean

_QUOTED: Final = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')""")
_FUNCTION: Final = re.compile(r"\b(range|choice)\(([^()]*)\)")
_WORDS: Final = {"help": "--help", "version": "--version"}


def prepare(arguments: Sequence[str]) -> list[str]:
    """Return a command line that Hydra reads as its user means it.

    ``range(3,9)`` and ``choice(3,5)`` are lists, but with ``--multirun``, where Hydra makes a launch of each value.

    Args:
        arguments: of the command line, without the program.

    Raises:
        UserError: an argument is none, or would replace our configuration.
    """
    from hydra._internal.utils import get_args_parser

    known, _ = get_args_parser().parse_known_intermixed_args(list(arguments))
    for option, value in (("--config-path", known.config_path), ("--config-name", known.config_name)):
        if value is not None:
            raise UserError(
                f"{option}={value} is not valid: it would replace all of our configuration. --config-dir DIR adds "
                "yours: studies in DIR/sweep, model families in DIR/model"
            )
    for index, argument in enumerate(known.overrides):
        if "=" not in argument and not argument.startswith("~"):
            raise UserError(_bare(known.overrides, index, known.config_dir))
    # Hydra itself takes none after an option that comes later.
    options = [a for a in arguments if a not in known.overrides]
    return options + [a if known.multirun else _with_lists(a) for a in known.overrides]


def _bare(overrides: Sequence[str], index: int, config_dir: str | None) -> str:
    """Explain an argument without '='."""
    word = overrides[index]
    usage = "arguments are written key=value"
    if word in MODES:
        return f"{word!r} is no argument: write mode={word}; {usage}"
    if word in _WORDS:
        return f"{word!r} is no argument: write {_WORDS[word]}; {usage}"
    studies = options_of("sweep", config_dirs(config_dir))
    if word in studies:
        return f"{word!r} is no argument: write sweep={word}; {usage}"
    if index and "=" in overrides[index - 1]:
        key, _, value = overrides[index - 1].partition("=")
        rest = [value]
        for argument in overrides[index:]:
            if "=" in argument:
                break
            rest.append(argument)
        return (
            f"{word!r} is no argument: {usage}. If it belongs to the value before it, put quotes around all of it: "
            f"'{key}=\"{' '.join(rest)}\"'"
        )
    hint = did_you_mean(word, [*MODES, *_WORDS, *studies])
    return f"{word!r} is no argument: {usage}, e.g. mode=plan, sweep=demo; --help lists keys.{hint}"


def _with_lists(argument: str) -> str:
    """Write ranges and choices in an argument's value as the lists that they stand for."""
    key, equals, value = argument.partition("=")
    pieces = _QUOTED.split(value)
    depth = ""
    for i, piece in enumerate(pieces):
        if i % 2:
            continue
        written, at = "", 0
        for match in _FUNCTION.finditer(piece):
            depth = _brackets(depth, piece[at : match.start()])
            items = _items(match[1], match[2])
            inside = ",".join(items or [])
            # In a list, its items are items of that list.
            is_item = depth.endswith("[")
            written += piece[at : match.start()] + (match[0] if items is None else inside if is_item else f"[{inside}]")
            at = match.end()
        depth = _brackets(depth, piece[at:])
        pieces[i] = written + piece[at:]
    return key + equals + "".join(pieces)


def _brackets(before: str, text: str) -> str:
    """Return the brackets that are still open after ``text``, given those before it."""
    for character in text:
        if character in "[{(":
            before += character
        elif character in "]})":
            before = before[:-1]
    return before


def _items(function: str, arguments: str) -> list[str] | None:
    """Return the items of a range or choice; None where it is neither numbers nor names, which Hydra then refuses."""
    given = [a.strip() for a in arguments.split(",")]
    if function == "choice":
        return given if all(given) else None
    try:
        values = range(*map(int, given))
    except (TypeError, ValueError):
        return None
    return [str(v) for v in values] or None
