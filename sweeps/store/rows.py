"""Rows of the store: what is known of a measurement before it runs, and the columns that its result or failure adds."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np

from kbit.evaluation.spec import EvalResult
from kbit.models.kv_cache import kv_values_per_token
from kbit.models.limits import as_namespace, named_context
from sweeps.status import State
from sweeps.store.schema import Row, Scalar
from sweeps.study.cell import Cell, Measurement, ModelRef, canonical_json, eval_columns
from sweeps.study.reading import config_of

if TYPE_CHECKING:
    import pyarrow as pa

    from kbit.models.quantize import QuantHandle

OOM_ERROR: Final = "OutOfMemoryError"
"""error_type of a failed row that ran out of memory at the smallest batch."""
_UNTOLD: Final = frozenset(
    {
        *("samples", "error", "versions", "commit", "dirty", "kernel", "host", "seed", "batch_tokens", "oom_rung"),
        *("dataset", "dataset_hash", "eval_definition", "codebook_hash", "codes_hash", "allocation_hash"),
    }
)
"""Columns that are long, or that nobody who is told of a row needs: views, predictions, budgets and W&B's mirror."""
_STATES: Final[Mapping[str, State]] = {state.value: state for state in State}


def moment(value: datetime | str) -> datetime:
    """Return a row's time: a stored row has datetimes, one that came through a worker's pipe has text."""
    return value if isinstance(value, datetime) else datetime.fromisoformat(value)


def recorded_state(row: Row) -> State:
    """Return what a stored row (columns status, error_type) says of its measurement."""
    return State.OOM if row["error_type"] == OOM_ERROR else State(row["status"])


def recorded_states(stored: pa.Table) -> list[State]:
    """Return what stored rows (columns status, error_type) say of their measurements."""
    if not stored.num_rows:
        return []  # Arrow would import pandas for it: 50 MB and 0.2 seconds of a plan
    import pyarrow.compute as pc

    found = pc.dictionary_encode(stored.column("status").cast("string").combine_chunks())
    states = np.array([_STATES[status] for status in found.dictionary.to_pylist()], dtype=object)[found.indices]
    states[pc.fill_null(pc.equal(stored.column("error_type").cast("string"), OOM_ERROR), False).to_numpy()] = State.OOM
    return list(states)


def rows_digest(row_ids: Iterable[str]) -> str:
    """Return what tells the rows that a report is made of from all others: no clock does, of several machines."""
    return hashlib.sha256("\n".join(sorted(row_ids)).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The origin of a row: what ran its measurement.

    Attributes:
        sweep, pack: the study, and the pack in it.
        rung: step of the out-of-memory ladder.
        provenance: more columns (commit, versions, launch, job, device, ...).
    """

    sweep: str
    pack: str
    rung: int = 0
    provenance: Mapping[str, Scalar] = field(default_factory=dict)


def cell_row(cell: Cell) -> Row:
    """Return what is known of a cell before it runs, by column name."""
    model = cell.model
    return {
        "key": cell.key,
        **cell.axes(),
        "model_id": model.hub_id or model.path,
        "revision": model.commit,
        "weights_hash": model.weights_hash,
        "params": model.params,
        "tokens_seen": model.tokens_seen,
        "label": cell.quant_label,
        "calibration": None if cell.calibration is None else canonical_json(cell.calibration.canonical()),
        # What depends on the layers' shapes is known once they are quantized.
        "bits_per_param_nominal": None if cell.quant.nominal_by_layer else cell.quant.bits_per_param_nominal,
    }


def measurement_row(measurement: Measurement) -> Row:
    """Return what is known of a measurement before it runs, by column name."""
    return {
        **cell_row(measurement.cell),
        "measurement": measurement.key,
        **{column: getattr(measurement.eval, declared.name) for column, declared in eval_columns().items()},
    }


def run_row(measurement: Measurement, origin: Origin, started: datetime) -> Row:
    """Return what every row says of a run that ends now, whatever came of it."""
    return {
        **measurement_row(measurement),
        **_cache_columns(measurement.cell.model),
        **origin.provenance,
        "sweep": origin.sweep,
        "pack": origin.pack,
        "oom_rung": origin.rung,
        "started": started,
        "finished": datetime.now(UTC),
    }


@cache
def _cache_columns(model: ModelRef) -> Row:
    """Return what config.json, which is there where a model runs, says of the key-value cache."""
    config = config_of(model, ask=False)
    if config is None:
        return {}
    return {"kv_values": kv_values_per_token(config), "context": named_context(as_namespace(config))}


def failed_row(
    measurement: Measurement, origin: Origin, *, error_type: str, error: str, started: datetime | None = None
) -> Row:
    """Return the row of a failure.

    Args:
        measurement: what failed.
        origin: where it ran.
        error_type: name of the exception, or what took its place.
        error: what a user reads.
        started: None is now, where nobody knows.
    """
    return {
        **run_row(measurement, origin, started or datetime.now(UTC)),
        "status": State.FAILED.value,
        "error_type": error_type,
        "error": error,
    }


def result_columns(result: EvalResult) -> Row:
    """Return the columns of an evaluation's result."""
    return {
        "status": (State.DIVERGED if result.diverged else State.DONE).value,
        "metrics": dict(result.metrics),
        "stderr": dict(result.stderr),
        "higher_is_better": dict(result.higher_is_better) or None,
        "samples": dict(result.samples),
        "n_samples": result.n_samples,
        "n_tokens": result.n_tokens,
        "dataset_hash": result.dataset_hash,
        "prefixes": result.prefixes,
    }


def handle_columns(handle: QuantHandle) -> Row:
    """Return the columns of a quantized model's counted bits."""
    return {
        "bits_per_param": handle.bits_per_param,
        "bits_per_param_nominal": handle.bits_per_param_nominal,
        "total_bits": float(handle.total_bits),
        "total_bits_nominal": handle.total_bits_nominal,
        "codebook_hash": handle.codebook_hash,
        "codes_hash": handle.codes_hash,
        "least_tokens": handle.least_tokens,
        "unseen_layers": handle.unseen_layers,
        "outlier_share": handle.outlier_share(),
        "allocation_hash": handle.allocation_hash,
        "predicted_loss_change": handle.predicted_change,
    }


def told_part(row: Row) -> Row:
    """Return what is told of a stored row: nothing null, as most axes are, and nothing of ``_UNTOLD``."""
    return {name: value for name, value in row.items() if value is not None and name not in _UNTOLD}


def error_type(error: Exception) -> str:
    """Return the column of that name for an exception."""
    from kbit.memory import is_out_of_memory

    return OOM_ERROR if is_out_of_memory(error) else type(error).__name__


def error_text(error: Exception) -> str:
    """Return the column 'error' for an exception: its traceback."""
    return "".join(traceback.format_exception(error))
