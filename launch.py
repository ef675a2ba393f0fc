"""The command: ``python launch.py [key=value ...]``, also installed as ``kbit-sweep``. See ``--help``.

Hydra composes and checks the configuration; everything the user can get wrong ends in one message and exit code 2.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Final, cast

from sweeps.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED
from sweeps.terminal import adapt_streams, flush, silence

if TYPE_CHECKING:
    from omegaconf import DictConfig

GARBAGE: Final = 50_000
"""Objects made before those among them that nobody uses are looked for."""
_interrupts: list[int] = []
"""The signals of each Ctrl-C."""


def main() -> None:
    """Entry point of ``kbit-sweep``."""
    adapt_streams()
    # A plan's objects live as long as the command. Looked through for garbage as often as by default, they cost a
    # fourth of its time.
    gc.set_threshold(GARBAGE)
    # Tables are read, reduced and dropped one after the other. What was dropped Arrow's allocator else keeps for a
    # while, beside the next table: a tenth to a fifth of a command's memory. Arrow reads it as it is imported.
    os.environ.setdefault("MIMALLOC_PURGE_DELAY", "0")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have told its jobs to ignore it
        signal.signal(signal.SIGINT, _interrupt)
    try:
        code = _main()
        flush()
        sys.exit(code)
    except BrokenPipeError:
        silence()
        sys.exit(EXIT_FAILED)
    except (KeyboardInterrupt, Exception) as error:
        if not (_interrupts or isinstance(error, KeyboardInterrupt)):
            raise
        print("\ninterrupted: what was finished is stored; the same command goes on from there", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupts.append(number)
    signal.default_int_handler(number, frame)


def _main() -> int:
    if "--version" in sys.argv[1:]:  # Hydra would answer with its own
        from sweeps.provenance import version_text

        print(version_text())
        return 0
    # Everything that takes time to import is imported here, so that an early Ctrl-C ends in one line.
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from sweeps.commands import say_error
    from sweeps.commands.arguments import prepare
    from sweeps.config import CONFIG_DIR, register
    from sweeps.errors import UserError
    from sweeps.hydra_errors import explain

    try:
        sys.argv[1:] = prepare(sys.argv[1:])
    except UserError as error:
        say_error(str(error))
        return EXIT_BAD_INPUT
    register()
    if {"-sc", "--shell-completion"} & set(sys.argv[1:]):
        from sweeps.completion import complete_values

        complete_values()
    # Hydra then raises its errors instead of printing them and leaving with exit code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    codes: list[int] = []
    composed: list[DictConfig] = []

    def dispatch(cfg: DictConfig) -> None:
        # Late, so that --help and mistakes in the command line are answered at once.
        import logging

        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        from sweeps.commands import run_mode

        # Hydra's own logging is off; warnings (a damaged file) go to the user.
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
        logging.getLogger("analysis").setLevel(logging.ERROR)  # a figure that a study has no cells for is no news
        composed.append(cfg)
        # As they were written: an interpolation in one of them is of our configuration, and not of Hydra's own.
        arguments = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        try:
            codes.append(run_mode(cfg, cast(list[str], arguments)))
        except Exception as error:
            # Arrow's functions take a Ctrl-C that comes while they import another library for an argument's error.
            if _interrupts:
                raise KeyboardInterrupt from error
            raise

    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")(dispatch)()
    except BrokenPipeError:
        raise
    except Exception as error:
        # Hydra stumbles over some arguments with exceptions of any kind; what a mode raises is not its doing.
        if _interrupts or (composed and not isinstance(error, HydraException | OmegaConfBaseException)):
            raise
        say_error(explain(error))
        return EXIT_BAD_INPUT
    return max(codes, default=0)


if __name__ == "__main__":
    main()
