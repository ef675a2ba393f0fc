"""The resources that a job asks for, in the words of submitit and of sbatch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sweeps.files import JsonObject


@dataclass(frozen=True, kw_only=True)
class Request:
    """One resource shape. mem_gb is in GiB, as SLURM's G; extra's keys are sbatch's long options."""

    partition: str | None
    account: str | None
    qos: str | None
    gpus: int
    gpu_type: str | None
    cpus: int
    mem_gb: float
    minutes: int
    constraint: str | None
    extra: JsonObject
    exclude: str | None

    def parameters(self) -> dict[str, Any]:
        """Return what submitit's SlurmExecutor.update_parameters takes; what is not asked for is left out."""
        values = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "cpus_per_task": self.cpus,
            "mem": f"{math.ceil(self.mem_gb * 1024)}M",
            "time": self.minutes,
            "constraint": self.constraint,
            "exclude": self.exclude,
            "gres": f"gpu:{self.gpu_type}:{self.gpus}" if self.gpus and self.gpu_type else None,
            "gpus_per_node": self.gpus if self.gpus and not self.gpu_type else None,
            "additional_parameters": dict(self.extra) or None,
        }
        return {k: v for k, v in values.items() if v is not None}

    def flags(self) -> list[str]:
        """Return the same for sbatch's command line, with what submitit adds by itself."""
        values = {"nodes": 1, "wckey": "submitit", **self.parameters()}
        values |= values.pop("additional_parameters", {})
        options = {key.replace("_", "-"): value for key, value in values.items()}
        return [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()]
