"""Settings of every job of a launch, as ``launch.json`` keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields

from sweeps.errors import StoreError
from sweeps.files import JsonObject
from sweeps.store.schema import Scalar


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Settings of a launch's jobs. The second group is known when the launch is planned.

    Attributes:
        device: 'cpu' or 'cuda'.
        batch_tokens: tokens in a batch, where memory allows.
        trust_remote_code: run code that a checkpoint brings.
        requeues: how often a job may put itself back into the queue.
        signal_seconds: SLURM's warning comes so long before the walltime.
        tracking: fields of ``TrackingConfig``.
        references: expected values of baselines by model and ``{eval}_{metric}``.
        baseline_tolerance: relative difference from a reference that the gate allows.
        manifest: name of what the study planned.
        report_code: the installation whose ``analysis`` writes the report, once nothing of the study is missing; empty
            is no report.

        code_hash: of the code that jobs must find.
        kill_wait: seconds between SLURM's SIGTERM and SIGKILL.
        parallel: how many jobs of the launch may run at once; None is all.
        baselines: measurements of baselines by model, which the gate looks at.
        provenance: columns that every row gets.
        store_launched: the store's clock at launch.
        allowances: device-seconds that a pack's jobs may take, by pack; empty without a budget.
    """

    device: str
    batch_tokens: int
    trust_remote_code: bool
    requeues: int
    signal_seconds: int
    tracking: JsonObject
    references: Mapping[str, Mapping[str, float]]
    baseline_tolerance: float
    manifest: str = ""
    report_code: str = ""

    code_hash: str = ""
    kill_wait: float = 0.0
    parallel: int | None = None
    baselines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    provenance: Mapping[str, Scalar] = field(default_factory=dict)
    store_launched: float = 0.0
    allowances: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: JsonObject) -> JobSettings:
        """Read what a launch wrote. Keys of later versions are left out; those that an earlier one lacks are default.

        Raises:
            StoreError: a key without a default is missing.
        """
        known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
        missing = [name for name, is_required in known.items() if is_required and name not in data]
        if missing:
            raise StoreError(
                f"launch.json: its settings lack {', '.join(missing)}: it is of another version, or damaged"
            )
        return cls(**{name: value for name, value in data.items() if name in known})
