"""Checks of a request that need no study: what ``mode=run`` refuses, ``mode=plan`` refuses too."""

from __future__ import annotations

from typing import Any

from sweeps.errors import UserError
from sweeps.executors.base import Executor, chosen
from sweeps.options import Options
from sweeps.worker.execution import batch_tokens


def accepted(options: Options) -> tuple[Executor[Any], str]:
    """Return the executor that a launch names, and the device that it will use: 'cpu' or 'cuda'.

    Raises:
        UserError, SpecError: a key of it is not valid.
    """
    executor = chosen(options.executor)
    if options.watch and not executor.detached:
        raise UserError(
            f"watch=true has no effect with executor={executor.name}, which shows its run until it ends: leave it out. "
            "executor=slurm follows jobs"
        )
    executor.check_budget(options.budget)
    device: str = executor.device()
    batch_tokens(executor.settings.batch_tokens, device)
    executor.check_out(options.out)
    return executor, device
