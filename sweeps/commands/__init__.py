"""A MODE PER FILE: each is a function of a launch's options and the console, and returns the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.commands.modes import MODES
from sweeps.errors import EXIT_BAD_INPUT, EXIT_FAILED, UserError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run_mode(cfg: DictConfig, overrides: Sequence[str]) -> int:
    """Run the mode that a configuration names; says what is wrong with it.

    Args:
        cfg: as Hydra composed it.
        overrides: the command line's arguments, without those about Hydra itself.
    """
    from importlib import import_module

    from rich.console import Console

    from kbit.errors import SpecError
    from sweeps.commands.keys import check_keys
    from sweeps.config import unknown_keys
    from sweeps.hydra_errors import explain_unknown
    from sweeps.options import Options, plain

    try:
        plain(cfg)  # what can't be resolved is said before anything is looked at
        if cfg.mode not in MODES:
            hint = did_you_mean(str(cfg.mode), MODES)
            raise UserError(f"mode={cfg.mode!r} is not valid: one of {', '.join(MODES)}.{hint}")
        unknown = unknown_keys(cfg)
        if unknown:
            raise UserError(explain_unknown(unknown[0]))
        check_keys(cfg, overrides)
        module, _, function = MODES[cfg.mode].partition(":")
        code: int = getattr(import_module(module), function)(Options.from_config(cfg, overrides), Console())
    except (UserError, SpecError) as error:
        say_error(str(error))
        return EXIT_BAD_INPUT
    except BrokenPipeError:
        raise  # nobody reads any more; launch.main knows
    except OSError as error:
        from sweeps.files import not_allowed

        said = not_allowed(error, Path(str(cfg.out)))
        say_error(said or f"{error}: nothing that was stored is lost; the same command goes on from there")
        return EXIT_FAILED if said is None else EXIT_BAD_INPUT
    return code


def say_error(message: str) -> None:
    """Print one message in red on standard error."""
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True).print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
