"""Studies of the mirror's tests: planned and measured by hand, in a results directory, and what a mirror says."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from kbit.evaluation.spec import EvalSpec
from sweeps.store.parts import Store
from sweeps.store.rows import measurement_row
from sweeps.study.cell import Measurement, ModelRef
from sweeps.study.grid import expand
from sweeps.study.manifest import Manifest
from sweeps.tracking.config import TrackingConfig
from sweeps.tracking.messages import Answer, Job, Mirrored
from sweeps.tracking.mirror import Mirror

MODELS = tuple(
    ModelRef(family="neox", name=f"neox-1.{n}", params=10**6 * n, path=f"/models/{n}", weights_hash=str(n) * 64)
    for n in (1, 2, 3)
)
THREE: tuple[dict[str, object], ...] = ({"bits": 16}, {"bits": [3, 4], "dtype": "int", "blocksize": 64})
SIZES = [32, 64, 96, 128, 160]
TWENTY: tuple[dict[str, object], ...] = ({"bits": [3, 4], "dtype": ["int", "float"], "blocksize": SIZES},)


def evaluation(name: str = "pile_cc", tokens: int = 512) -> EvalSpec:
    data = "sha256:" + "x" * 64
    return EvalSpec(kind="perplexity", name=name, dataset=data, compute_dtype="float32", window=tokens)


def planned(
    *quants: dict[str, object],
    sweep: str = "demo",
    models: Sequence[ModelRef] = MODELS[:1],
    evals: Sequence[EvalSpec] = (evaluation(),),
) -> Manifest:
    cells = expand(list(quants or THREE), list(models)).cells
    return Manifest(sweep=sweep, cells=cells, evals=tuple(evals), excluded=(), config={})


def measure(out: Path, measurements: Iterable[Measurement], *, loss: float = 3.0, status: str = "done") -> None:
    """Store results: of the first `loss`, of each that follows an eighth more."""
    store = Store(out=out)
    for number, m in enumerate(measurements):
        metrics = {"loss": loss + number / 8, "perplexity": float("inf")} if status == "done" else {}
        about = {
            "sweep": "demo",
            "pack": "p",
            "status": status,
            "seconds": 1.5,
            "total_bits": 4e6,
            "bits_per_param": 4.0,
        }
        result = {"metrics": metrics, "stderr": {"loss": 0.01} if metrics else {}, "finished": datetime.now(UTC)}
        store.write({**measurement_row(m), **about, **result})
    store.close()


def study(out: Path, *quants: dict[str, object], sweep: str = "demo") -> Manifest:
    """Plan and measure a study of one model."""
    manifest = planned(*quants, sweep=sweep)
    manifest.save(out)
    measure(out, manifest.measurements())
    return manifest


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.1)


def processes_naming(text: object) -> list[str]:
    """Processes (on Linux) that were started with this in their environment."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if str(text).encode() in environ.read_bytes():
                found.append(environ.parent.name)
    return found


def job_of(config: TrackingConfig, out: Path, name: str) -> Job:
    return Job(tracking=config.message(), out=str(out), sweep=name)


def mirrored(config: TrackingConfig, out: Path, name: str) -> Mirrored:
    """What a last look found, in the test's process."""
    answers: list[Answer] = []
    Mirror(job_of(config, out, name), answers.append).look(last=True)
    (said,) = [answer for answer in answers if isinstance(answer, Mirrored)]
    return said


def digest_of(name: str, *files: Path) -> str:
    """The digest by which W&B knows an artifact of these files: of their names and contents."""
    import wandb

    artifact = wandb.Artifact(name, type="results")
    for file in files:
        artifact.add_file(str(file))
    return str(artifact.digest)
