"""Settings that a worker gets when it starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from sweeps.store.schema import Scalar


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Settings of a pool's workers.

    Attributes:
        batch_tokens: tokens in a batch, where memory allows.
        trust_remote_code: run code that a checkpoint brings.
        provenance: columns that every row gets (commit, versions, launch, ...).
        gpus: over how many GPUs a model is spread.
        ignore_sigterm: leave SIGTERM to the pool's owner, since SLURM sends it to every process of a job.
        witness: a file of the results directory, relative to it, without which it is another one.
        load_again: where the first model can't be loaded, end, since another node may do better.
    """

    batch_tokens: int
    trust_remote_code: bool
    provenance: Mapping[str, Scalar]
    gpus: int = 1
    ignore_sigterm: bool = False
    load_again: bool = False
    witness: str = ""


@dataclass(frozen=True, kw_only=True)
class WorkerArguments:
    """The command line of one worker: how it measures, on what, and where results go."""

    out: str
    device: str
    threads: int
    settings: WorkerSettings

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerArguments:
        data = json.loads(text)
        return cls(settings=WorkerSettings(**data.pop("settings")), **data)
