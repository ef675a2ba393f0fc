"""The command: ``python launch.py [key=value ...]``, also installed as ``kbit-sweep``. See ``--help``.

Hydra composes and checks the configuration; everything the user can get wrong ends in one message and exit code 2.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, UserError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

CONFIG_DIR = Path(__file__).resolve().parent / "conf"


def main() -> None:
    """Entry point of ``kbit-sweep``."""
    try:
        sys.exit(_main())
    except KeyboardInterrupt:
        print("\ninterrupted: what was finished is stored; the same command goes on from there", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _main() -> int:
    # Everything that takes time to import is imported here, so that an early Ctrl-C ends in one line.
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from sweeps.config import register

    register()
    # Hydra then raises its errors instead of printing them and leaving with exit code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    codes: list[int] = []

    def dispatch(cfg: DictConfig) -> None:
        codes.append(_run_mode(cfg))

    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")(dispatch)()
    except (HydraException, OmegaConfBaseException) as error:
        _say(_explain(error))
        return EXIT_BAD_INPUT
    return max(codes, default=0)


def _run_mode(cfg: DictConfig) -> int:
    # Late, so that --help and mistakes in the command line are answered at once.
    import logging

    from rich.console import Console

    from kbit.errors import SpecError
    from sweeps.commands import modes as commands

    # Hydra's own logging is off; warnings (a damaged file) go to the user.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    logging.getLogger("analysis").setLevel(logging.ERROR)  # a figure that a study has no cells for is no news
    try:
        if cfg.mode not in commands.MODES:
            known = ", ".join(commands.MODES)
            hint = did_you_mean(str(cfg.mode), commands.MODES)
            raise UserError(f"mode={cfg.mode!r} is not valid: one of {known}.{hint}")
        return commands.MODES[cfg.mode](cfg, Console())
    except (UserError, SpecError) as error:
        _say(str(error))
        return EXIT_BAD_INPUT
    except OSError as error:
        _say(f"{error}: nothing that was stored is lost; the same command goes on from there")
        return EXIT_FAILED


def _say(message: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True).print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)


def _explain(error: Exception) -> str:
    """Hydra's error in our form: the key, the value, what is allowed, what to do."""
    from omegaconf.errors import OmegaConfBaseException

    text = str(error)
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        return _explain_unknown(unknown.group(1))
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
        from sweeps.errors import did_you_mean

        group, option = missing.group(1), missing.group(2)
        known = [line.strip() for line in missing.group(3).partition("Config search path:")[0].splitlines()]
        options = [name for name in known if name]
        return f"{group}={option} is not valid: one of {', '.join(options)}.{did_you_mean(option, options)}"
    search_path = text.find("Config search path:")
    return text[:search_path].strip() if search_path >= 0 else text.strip()


def _explain_value(text: str, cause: OmegaConfBaseException) -> str:
    """A value of a wrong kind, or a place that doesn't exist: without the names of OmegaConf's internals."""
    override = re.search(r"Error merging override (\S+)", text)
    said = str(cause.msg or cause).splitlines()[0]
    where = override.group(1) if override else str(cause.full_key or "")
    return f"{where} is not valid: {said}" if where else said


def _explain_unknown(key: str) -> str:
    from omegaconf import OmegaConf

    from sweeps.config import BlockConfig, Config

    known: list[str] = []

    def walk(node: object, prefix: str) -> None:
        if OmegaConf.is_dict(node):
            for name in node:  # type: ignore[attr-defined]
                known.append(f"{prefix}{name}")
                if not OmegaConf.is_missing(node, name):
                    walk(node._get_node(name), f"{prefix}{name}.")  # type: ignore[attr-defined]

    walk(OmegaConf.structured(Config), "")
    block = re.match(r"(sweep\.quant\.\d+)\.", key)
    if block:
        known += [f"{block.group(1)}.{name}" for name in OmegaConf.structured(BlockConfig)]
    parent = key.rpartition(".")[0]
    siblings = [k for k in known if k.rpartition(".")[0] == parent] or [k for k in known if "." not in k]
    return f"{key!r} is not a key.{did_you_mean(key, known)} Allowed there: {', '.join(siblings)}"


def _unreadable_argument() -> str:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for argument in sys.argv[1:]:
        if not argument.startswith("-"):
            try:
                parser.parse_override(argument)
            except HydraException:
                return argument
    return " ".join(sys.argv[1:])


if __name__ == "__main__":
    main()
