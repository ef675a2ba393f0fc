"""The command: ``python launch.py [key=value ...]``, also installed as ``kbit-sweep``. See ``--help``.

Hydra composes and checks the configuration; everything the user can get wrong ends in one message and exit code 2.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from kbit.spec import SpecError
from sweeps.config import MODES, register
from sweeps.errors import UserError, did_you_mean

CONFIG_DIR = Path(__file__).resolve().parent / "conf"
EXIT_BAD_INPUT = 2


def main() -> None:
    """Entry point of ``kbit-sweep``."""
    register()
    # Hydra then raises its errors instead of printing them and leaving with exit code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    codes: list[int] = []

    def dispatch(cfg: DictConfig) -> None:
        codes.append(_run_mode(cfg))

    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")(dispatch)()
    except (HydraException, OmegaConfBaseException, OSError) as error:
        _say(_explain(error))
        sys.exit(EXIT_BAD_INPUT)
    sys.exit(max(codes, default=0))


def _run_mode(cfg: DictConfig) -> int:
    # Late, so that --help and mistakes in the command line are answered at once.
    from sweeps import commands

    console = Console()
    try:
        if cfg.mode not in MODES:
            raise UserError(
                f"mode={cfg.mode!r} is not valid: one of {', '.join(MODES)}.{did_you_mean(cfg.mode, MODES)}"
            )
        return commands.MODES[cfg.mode](cfg, console)
    except (UserError, SpecError) as error:
        _say(str(error))
        return EXIT_BAD_INPUT


def _say(message: str) -> None:
    Console(stderr=True).print(f"[red]error:[/] {_escaped(message)}", highlight=False, soft_wrap=True)


def _escaped(message: str) -> str:
    from rich.markup import escape

    return escape(message)


def _explain(error: Exception) -> str:
    """Hydra's error in our form: the key, the value, what is allowed, what to do."""
    text = str(error)
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OmegaConfBaseException):
        text += f"\n{cause}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        return _explain_unknown(unknown.group(1))
    if "mismatched input" in text or "token recognition error" in text or "extraneous input" in text:
        given = _unreadable_argument()
        quoted = f"'{given.partition('=')[0]}=\"{given.partition('=')[2]}\"'"
        return (
            f"{given!r} can't be read: {text.splitlines()[0]}. "
            f"Put double quotes around the value and single quotes around all of it: {quoted}"
        )
    if "Ambiguous value" in text:
        return text.replace("argument '", "'").replace("\\'", "'") + "\n   e.g. 'key=[a,b]', quoted for the shell"
    search_path = text.find("Config search path:")
    return text[:search_path].strip() if search_path >= 0 else text.strip()


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
