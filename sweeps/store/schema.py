"""The store's columns: one list gives the parquet schema, the documentation and the empty table.

``python -m sweeps.store.schema`` prints the documentation as Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from kbit.spec import axes
from sweeps.study.cell import eval_columns

if TYPE_CHECKING:
    import pyarrow as pa

Scalar = str | int | float | bool | None
"""A value of a column of one value."""
Row = Mapping[str, Any]
"""A row of the store, or some of its columns: values by column name, each of the type that ``columns()`` gives it."""

SCHEMA_VERSION: Final = 9
"""Written into every part. A change of columns raises it; readers fill columns that older parts lack with null."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the store: a row is one measurement."""

    name: str
    type: str
    doc: str
    unit: str = ""
    of_cell: bool = False


def _c(name: str, type_: str, doc: str, unit: str = "") -> Column:
    return Column(name=name, type=type_, doc=doc, unit=unit)


def _cell(name: str, type_: str, doc: str, unit: str = "") -> Column:
    return Column(name=name, type=type_, doc=doc, unit=unit, of_cell=True)


@cache
def columns() -> tuple[Column, ...]:
    """Return every column, in the order of the schema. Installed packages may bring axes, so they are looked up."""
    return (
        # Identity
        _c("row_id", "string", "unique id of this row; what `mode=drop` retires"),
        _cell("key", "string", "cell: SHA-256 of model and quantization"),
        _c("measurement", "string", "measurement: SHA-256 of cell and evaluation"),
        _c("sweep", "string", "study that ran it"),
        _c("status", "string", "done, diverged or failed"),
        # The cell
        _cell("family", "string", "model family"),
        _cell("model", "string", "model, e.g. pythia-70m"),
        _cell("model_id", "string", "hub id or local path"),
        _cell("revision", "string", "hub commit; null for a local path"),
        _cell("weights_hash", "string", "SHA-256 of a local model's files; null for the hub"),
        _cell("params", "int64", "parameters, tied ones once", "count"),
        _cell("method", "string", "name of the method, e.g. blockwise"),
        *(_cell(a.name, a.type, a.doc, a.unit) for a in axes().values() if a.since == 1),
        _cell("label", "string", "the quantization in short"),
        _cell("bits_per_param", "float64", "stored bits of the quantized weights, all overhead counted", "bit/weight"),
        _cell("bits_per_param_nominal", "float64", "k + 16/B + p(16 - k), the paper's count", "bit/weight"),
        _cell("total_bits", "float64", "whole model as stored, everything not quantized at 16 bits", "bit"),
        _cell("total_bits_nominal", "float64", "whole model by the nominal count", "bit"),
        _cell("codebook_hash", "string", "SHA-256 of the codebooks used"),
        # The evaluation
        *(_c(column, a.type, a.doc, a.unit) for column, a in eval_columns().items() if a.since == 1),
        _c("dataset_hash", "string", "SHA-256 of what was evaluated"),
        # The result
        _c(
            "metrics",
            "map<string,float64>",
            "by metric (loss: nats per token; acc: fraction); NaN and inf are kept",
        ),
        _c("stderr", "map<string,float64>", "standard errors by metric"),
        _c("n_samples", "int64", "documents or windows", "count"),
        _c("n_tokens", "int64", "tokens that went through the model", "tokens"),
        _c("samples", "samples", "outcome of every sample: packed bits, float32 or int32, by name"),
        _c("error_type", "string", "exception of a failed measurement"),
        _c("error", "string", "its traceback"),
        # Provenance
        _c("seconds", "float64", "evaluating", "s"),
        _c("quantize_seconds", "float64", "quantizing the model, shared by the cell's evaluations", "s"),
        _c("load_seconds", "float64", "loading the model, shared by the pack", "s"),
        _c("peak_memory_bytes", "int64", "peak of the device, or of the process on a CPU", "byte"),
        _c("started", "timestamp", "start", "UTC"),
        _c("finished", "timestamp", "end", "UTC"),
        _c("commit", "string", "git commit of the project, or its version where it is installed"),
        _c("dirty", "bool", "the checkout had changes"),
        _c("versions", "string", "JSON of package versions"),
        _c("device", "string", "GPU or CPU"),
        _c("gpus", "int64", "GPUs the model was spread over; 0 on a CPU; null in rows of version 1", "count"),
        _c("kernel", "string", "implementation of the quantizer: torch or triton; both give the same codes"),
        _c("seed", "int64", "seed of torch's generator"),
        _c("batch_tokens", "int64", "tokens in a batch, after any halving when memory ran out", "tokens"),
        _c("oom_rung", "int64", "step of the out-of-memory ladder: each doubles a job's memory or GPUs", "steps"),
        _c("launch", "string", "launch that planned it"),
        _c("pack", "string", "pack it ran in"),
        _c("job", "string", "scheduler's job, or the worker"),
        _c("host", "string", "machine"),
        # What came later, at the end, so that columns stay where they were
        _cell("checkpoint", "string", "revision that the study asks for by name, e.g. step1000; null for none"),
        _cell("tokens_seen", "int64", "tokens that the checkpoint was trained on; null where unknown", "tokens"),
        _cell("calibration", "string", "JSON of the data that a method calibrated on; null for other methods"),
        *(_cell(a.name, a.type, a.doc, a.unit) for a in axes().values() if a.since == 2),
        *(_c(column, a.type, a.doc, a.unit) for column, a in eval_columns().items() if a.since == 2),
        _c("higher_is_better", "map<string,bool>", "direction of metrics that no kind declares, by the task"),
        *(_c(column, a.type, a.doc, a.unit) for column, a in eval_columns().items() if a.since == 3),
        _cell("calibration_seed", "int64", "seed of the draw of calibration data, by which replicates differ"),
        _c("prefixes", "string", "of a task: shared where requests shared their beginnings, else why not"),
        *(_c(column, a.type, a.doc, a.unit) for column, a in eval_columns().items() if a.since in (4, 5)),
        _c(
            "predicted_seconds",
            "float64",
            "predicted for it as its pack began: its part of quantizing and evaluating",
            "s",
        ),
        _c("held", "string", "how the model was held: whole, spread, packed or layer by layer; null in earlier rows"),
        *(_cell(a.name, a.type, a.doc, a.unit) for a in axes().values() if a.since > 2),
        _cell("codes_hash", "string", "SHA-256 of the codes of a method that calibrates; null for others"),
        _c(
            "outlier_share",
            "float64",
            "input dimensions that llm_int8 multiplied in 16 bits; null for others",
            "fraction",
        ),
        _cell("allocation_hash", "string", "SHA-256 of the bits of each layer that mixed chose; null for others"),
        _cell(
            "predicted_loss_change",
            "float64",
            "predicted for the loss on mixed's calibration data, against 16 bits; null for others",
            "nats",
        ),
        *(_c(column, a.type, a.doc, a.unit) for column, a in eval_columns().items() if a.since > 5),
        _cell(
            "kv_values",
            "int64",
            "keys and values of one token in the cache, in all layers; null where unknown",
            "values",
        ),
        _cell("context", "int64", "longest sequence that the model's configuration names; null for none", "tokens"),
        _cell(
            "least_tokens",
            "int64",
            "fewest calibration tokens that reached a layer (few are sent to an expert); null for other methods",
            "tokens",
        ),
        _cell(
            "unseen_layers",
            "int64",
            "layers that no calibration token reached, quantized without; null for other methods",
            "count",
        ),
    )


@cache
def cell_columns() -> tuple[str, ...]:
    """Return the names of the columns that a cell's measurements share."""
    return tuple(c.name for c in columns() if c.of_cell)


@cache
def arrow_schema() -> pa.Schema:
    """Return the parquet schema of a part."""
    import pyarrow as pa

    types = {
        "string": pa.string(),
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "timestamp": pa.timestamp("us", tz="UTC"),
        "map<string,float64>": pa.map_(pa.string(), pa.float64()),
        "map<string,bool>": pa.map_(pa.string(), pa.bool_()),
        "samples": pa.list_(
            pa.struct([("name", pa.string()), ("dtype", pa.string()), ("count", pa.int64()), ("data", pa.binary())])
        ),
    }
    fields = [pa.field(c.name, types[c.type], metadata={"unit": c.unit, "doc": c.doc}) for c in columns()]
    return pa.schema(fields, metadata={"schema_version": str(SCHEMA_VERSION)})


def markdown() -> str:
    """Return the columns as a Markdown table."""
    rows = [f"| `{c.name}` | {c.type} | {c.unit} | {c.doc} |" for c in columns()]
    return "\n".join(["| column | type | unit | what it is |", "| --- | --- | --- | --- |", *rows])


if __name__ == "__main__":
    print(markdown())
