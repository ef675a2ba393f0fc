"""``python -m sweeps.worker``: the process behind every executor.

It reads packs as JSON lines from standard input, each with the time ``until`` when it must be done (epoch seconds, or
null), reports what happens as JSON lines on the descriptor named by ``--events``, and writes results itself.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from sweeps.events import Event, Teller
from sweeps.plan.pack import Pack
from sweeps.provenance import PROJECT, package_versions
from sweeps.store.parts import Store
from sweeps.store.schema import Scalar
from sweeps.worker.settings import WorkerArguments
from sweeps.worker.worker import Stop, Worker

PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    """The executors' worker process: runs packs from standard input until it ends."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--events", type=int, required=True, help="file descriptor for events")
    parser.add_argument("--settings", required=True, help="JSON of sweeps.worker.settings.WorkerArguments")
    args = parser.parse_args()
    arguments = WorkerArguments.from_json(args.settings)
    settings = arguments.settings
    stop = Stop()
    _handle_signals(stop, ignore_sigterm=settings.ignore_sigterm)
    events = os.fdopen(args.events, "w", buffering=1)
    parent, teller = os.getppid(), Teller()
    _die_with_launcher()

    def emit(event: Event) -> None:
        if os.getppid() != parent:
            sys.exit("the launcher is gone: stopping")
        events.write(teller.line(event))

    # What libraries make as they are imported stays. Looking through it for garbage, again and again, took a third of a
    # worker's start (4.7 against 3.0 CPU seconds), and as much of each look for garbage after it.
    gc.disable()
    # Parquet too: an out-of-memory failure is recorded without loading libraries.
    import pyarrow.parquet  # noqa: F401
    import torch
    import transformers.modeling_utils  # noqa: F401
    from transformers.utils import logging as transformers_logging

    gc.freeze()
    gc.enable()
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    here = {"job": f"local/{os.getpid()}", "host": socket.gethostname()}
    worker = Worker(
        store=Store(out=Path(arguments.out), made=True, witness=settings.witness),
        device=arguments.device,
        batch_tokens=settings.batch_tokens,
        # The launch's machine may have other packages than this one.
        provenance={**here, **settings.provenance, "versions": _versions(settings.provenance)},
        emit=emit,
        gpus=settings.gpus,
        trust_remote_code=settings.trust_remote_code,
        load_again=settings.load_again,
        stop=stop,
    )
    try:
        for pack, until in _read_packs():
            worker.run_pack(pack, until=until)
    finally:
        worker.store.close()
        gc.unfreeze()  # libraries that look for leaks as the process ends take what is left for leaks


def _read_packs() -> Iterator[tuple[Pack, float | None]]:
    for line in sys.stdin:
        data = json.loads(line)
        yield Pack.from_dict(data), data.get("until")


def _die_with_launcher() -> None:
    """Have the kernel end this worker with its launcher, so that it never measures next to a new launch (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _handle_signals(stop: Stop, *, ignore_sigterm: bool) -> None:
    """Handle signals: SIGUSR1 asks to stop; SIGTERM ends the process.

    Only the measurement in flight is lost then. SLURM sends SIGUSR2, and SIGTERM, to
    every process of a job: there the launcher decides.
    """
    signal.signal(signal.SIGUSR1, stop.ask)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if ignore_sigterm else lambda *_: sys.exit(0))
    # A launcher blocks them while it starts a worker, so that none comes before this and is fatal.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM})


def _versions(launched: Mapping[str, Scalar]) -> str:
    """Return this environment's packages, but the project's version as launched: a copy of its code has none."""
    known = json.loads(str(launched["versions"])) if "versions" in launched else {}
    return json.dumps({**json.loads(package_versions()), **{k: v for k, v in known.items() if k == PROJECT}})


if __name__ == "__main__":
    main()
    # Everything is written. Python would free what libraries made piece by piece, for a second and more, while the
    # launcher waits; the kernel does it at once.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
