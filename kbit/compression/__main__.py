"""Command: ``python -m kbit.compression MODEL --spec '{bits: 4, dtype: float}'``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from rich.console import Console

from kbit.bench.report import Record, Report, Table, environment
from kbit.calibration import Calibration
from kbit.compression.figure import write_figure
from kbit.compression.measure import Compression, TensorReport, measure
from kbit.errors import SpecError
from kbit.evaluation.calibration import calibration_windows
from kbit.models.loadable import LoadedModel
from kbit.models.loading import load_model
from kbit.models.quantize import Calibrated
from kbit.sources import LocalFile
from kbit.spec import Spec, spec_of

EXAMPLE: Final = """examples:
  python -m kbit.compression sweeps/demo/models/neox-m --spec '{bits: 4, dtype: float}' --out report
  python -m kbit.compression MODEL --text my.jsonl --calibration other.jsonl \\
      --spec '{bits: 3, dtype: int}' '{method: gptq, bits: 3, dtype: int, blocksize: 64}'
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print where the bits go and what layers lose; write the numbers and a figure with --out."""
    args = _parser().parse_args(arguments)
    began = time.perf_counter()
    try:
        specs = [_spec(text) for text in args.spec]
        if args.calibration is None and (calibrating := [spec for spec in specs if spec.calibrates]):
            raise SpecError("--calibration", None, f"a text file: {calibrating[0].label} calibrates")
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_model(args.model, device=device, compute_dtype="storage" if device == "cuda" else "float32")
        tokens = None if args.text is None else _windows(loaded, args.text, args.samples, args.length)
        calibration = _windows(loaded, args.calibration, 128, args.length) if args.calibration else None
        found = [
            measure(
                loaded.model,
                spec,
                tokens=tokens,
                storage_dtype=loaded.storage_dtype,
                calibration=None if calibration is None or not spec.calibrates else Calibrated(tokens=calibration),
                say=partial(_say, spec.label),
            )
            for spec in specs
        ]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    tables = [table(number, one) for number, one in enumerate(found)]
    console = Console()
    for one in tables:
        one.print(console)
    if args.out is not None:
        seconds = time.perf_counter() - began
        report = Report(
            name="compression", tables=tables, options=vars(args), environment=environment(device), seconds=seconds
        )
        for path in (*report.write(Path(args.out)), *write_figure(found, Path(args.model).name, Path(args.out))):
            console.print(f"  {path}", highlight=False)
    return 0


def table(number: int, found: Compression) -> Table:
    """Return a row per kind of tensor; its records are of each tensor."""
    total = sum(t.bits for t in found.tensors)
    body = []
    for kind, tensors in found.by_kind().items():
        bits, weights = sum(t.bits for t in tensors), sum(t.numel for t in tensors)
        body.append(
            [
                kind,
                f"{len(tensors)}",
                f"{weights:,}",
                f"{bits / weights:.3f}" if tensors[0].quantized else "16",
                f"{bits / 8e6:.2f}",
                f"{bits / total:.1%}",
                _mean([t.weight_error for t in tensors]),
                _mean([t.output_error for t in tensors]),
            ]
        )
    return Table(
        name=f"compression-{number + 1}",
        title=f"{found.label}: {found.bits_per_param:.4f} bits a quantized weight, {found.total_bits / 8e6:,.2f} MB",
        header=("tensors", "count", "values", "bits", "MB", "of all", "error of weights", "of outputs"),
        body=body,
        notes=("Errors are relative (Frobenius), root mean squares over the tensors; inputs are the 16-bit model's.",),
        records=[_record(found.label, t) for t in found.tensors],
    )


def _say(label: str, text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{label}: {text}\033[K", end="", file=sys.stderr, flush=True)


def _mean(errors: Sequence[float | None]) -> str:
    known = [e for e in errors if e is not None]
    return f"{(sum(e * e for e in known) / len(known)) ** 0.5:.4f}" if known else "-"


def _record(label: str, tensor: TensorReport) -> Record:
    return {
        "spec": label,
        "name": tensor.name,
        "block": tensor.block,
        "shape": "x".join(map(str, tensor.shape)),
        "bits": tensor.bits,
        "quantized": int(tensor.quantized),
        "weight_error": tensor.weight_error,
        "output_error": tensor.output_error,
    }


def _spec(text: str) -> Spec:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())
        raise SpecError("--spec", text, f"axes as a study writes them: '{{bits: 4, dtype: float}}' ({what})") from error
    if not isinstance(values, dict):
        raise SpecError("--spec", text, "axes as a study writes them: '{bits: 4, dtype: float}'")
    return spec_of(values)


def _windows(loaded: LoadedModel, path: str, samples: int, length: int) -> Any:
    """Return token windows of a text file, drawn as a calibration's."""
    data = Calibration(
        dataset=path, samples=samples, length=length, name=path, source=LocalFile(path=str(Path(path).expanduser()))
    )
    return calibration_windows(data, loaded.tokenizer, context=loaded.context, vocab_size=loaded.vocab_size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kbit.compression",
        description="Where the bits of a quantized model go, and what its layers lose.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a Hugging Face directory or hub id")
    parser.add_argument("--spec", nargs="+", required=True, help="axes of a quantization, as YAML; one or more")
    parser.add_argument("--text", metavar="FILE", help="JSONL or .txt: outputs are compared on windows of it")
    parser.add_argument("--samples", type=int, default=2, help="windows of --text (default 2)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (default 512)")
    parser.add_argument(
        "--calibration", metavar="FILE", help="text for methods that calibrate: 128 windows of --length"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--out", metavar="DIR", help="write every number (JSON, CSV, Markdown) and the figure there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
