"""Metadata of a packed model (``kbit.json``): written by ``kbit.packed.files``, checked key by key when read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from kbit.errors import CheckpointError
from kbit.packed.base import BLOCK_FLOAT_VERSION, PackedLinear
from kbit.packed.block_float import BlockFloatLinear
from kbit.packed.linear import LATER, KBitLinear
from kbit.spec import QuantSpec, spec_from_canonical
from kbit.specs.block_float import BlockFloatSpec

VERSION: Final = BLOCK_FLOAT_VERSION
"""The last."""
METADATA: Final = "kbit.json"
FORMAT: Final = "kbit-packed"
_KEYS: Final = {"model": dict, "layers": dict, "tied": dict}
_MODEL_KEYS: Final = {"class": str, "transformers": str | None, "attention": str | None}
_LAYER_KEYS: Final = {
    "in_features": int,
    "out_features": int,
    "spec": dict,
    "storage_dtype": str,
    "dtype": str,
    "bias": bool,
    "batch_invariant": bool,
}
_CODES_KEYS: Final = {"kept": int}
"""Of layers whose spec names no method: codes with absmax and a codebook, which versions 1 and 2 have alone."""


def arguments_of(layer: PackedLinear) -> dict[str, Any]:
    """Return what makes a layer of the same shapes, as JSON."""
    kept = {}
    if isinstance(layer, KBitLinear):
        kept = {"kept": 0 if layer.kept_columns is None else layer.kept_columns.numel()}
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        **layer.about(),
        "dtype": str(layer.dtype).removeprefix("torch."),
        **kept,
        "bias": layer.bias is not None,
        "batch_invariant": layer.batch_invariant,
    }


def layer_of(arguments: Mapping[str, Any]) -> PackedLinear:
    """Make the layer, without values.

    Raises:
        ValueError: there is no such layer.
    """
    storage_dtype, dtype = (_dtype(key, arguments) for key in ("storage_dtype", "dtype"))
    layer: PackedLinear
    if "method" in arguments["spec"]:
        spec = spec_from_canonical(arguments["spec"])
        if not isinstance(spec, BlockFloatSpec):
            raise ValueError(f"method={spec.method!r} has no layers of its own")
        layer = BlockFloatLinear(
            arguments["in_features"],
            arguments["out_features"],
            spec,
            storage_dtype=storage_dtype,
            dtype=dtype,
            bias=arguments["bias"],
            device="meta",
        )
    else:
        later = {key: arguments.get(key, False) for key in LATER}
        for key, value in later.items():
            if not isinstance(value, bool):
                raise ValueError(f"{key} is {value!r}")
        layer = KBitLinear(
            arguments["in_features"],
            arguments["out_features"],
            QuantSpec(**arguments["spec"]),
            storage_dtype=storage_dtype,
            dtype=dtype,
            kept=arguments["kept"],
            **later,
            bias=arguments["bias"],
            device="meta",
        )
    layer.batch_invariant = arguments["batch_invariant"]
    return layer


def _dtype(key: str, arguments: Mapping[str, Any]) -> torch.dtype:
    found = getattr(torch, arguments[key], None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{key}={arguments[key]!r} is no dtype")
    return found


def read_metadata(directory: Path) -> dict[str, Any]:
    """Read all of a directory's ``kbit.json``.

    Raises:
        CheckpointError: it isn't there, is damaged, of another program or of a later version.
    """
    try:
        metadata = json.loads((directory / METADATA).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{directory} is no packed model: it has no {METADATA} (save_packed writes it)") from None
    except ValueError as error:
        raise CheckpointError(f"{directory}/{METADATA} is not valid JSON: {error}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(f"{directory}/{METADATA} does not say format={FORMAT!r}: it is another program's file")
    version = metadata.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{directory} has version {version!r} of the format, and this kbit reads 1 to {VERSION}: a newer one may do"
        )
    where = f"{directory}/{METADATA}"
    _check_keys(metadata, _KEYS, where)
    _check_keys(metadata["model"], _MODEL_KEYS, f"{where}: model")
    for name, arguments in metadata["layers"].items():
        of_layer = f"{where}: layers: {name}"
        _check_keys(arguments, _LAYER_KEYS, of_layer)
        _check_keys(arguments, {} if "method" in arguments["spec"] else _CODES_KEYS, of_layer)
    _check_keys(metadata["tied"], dict.fromkeys(metadata["tied"], str), f"{where}: tied")
    return metadata


def _check_keys(entry: Any, keys: Mapping[str, Any], where: str) -> None:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is damaged: it is {entry!r}, not an object")
    for key, kind in keys.items():
        if key not in entry:
            raise CheckpointError(f"{where} is damaged: it has no {key}")
        # A bool is an int too.
        if not isinstance(entry[key], kind) or (kind is int and isinstance(entry[key], bool)):
            raise CheckpointError(f"{where} is damaged: {key} is {entry[key]!r}")
