"""format=compressed-tensors: integers in groups of a row, packed (pack-quantized), as transformers loads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from kbit.errors import SpecError
from kbit.exporting.base import Export, Exporter, Written, bytes_in, check_directory
from kbit.methods.blockwise import StoredCodes
from kbit.models.architectures import block_layers, key_of
from kbit.models.loading import load_model
from kbit.models.prequantized.layouts import KEY
from kbit.models.prequantized.words import pack_words
from kbit.models.quantize import stored_layers
from kbit.models.readings import has_experts
from kbit.quantizer.packing import unpack
from kbit.spec import Spec
from kbit.specs.base import ROW
from kbit.specs.blockwise import QuantSpec
from kbit.specs.gptq import GptqSpec

if TYPE_CHECKING:
    from kbit.quantizer.blockwise import QuantizedTensor

FORMAT: Final = "compressed-tensors"
_HELD: Final = (
    "a cell of method=blockwise or gptq with dtype=int and scheme=group (blocksize row or a number), "
    "with zero_point or not"
)


class CompressedTensorsExporter:
    """Cells of integers with a scale, and perhaps a zero point, per group of a row."""

    def check(self, spec: Spec, config: Mapping[str, Any], to: Path) -> None:
        check_directory(to, FORMAT)
        if type(spec) not in (QuantSpec, GptqSpec) or spec.is_baseline:
            raise SpecError("format", FORMAT, f"gguf or packed for {spec.label!r}: this one holds {_HELD}")
        assert isinstance(spec, QuantSpec)
        reason = _why_not(spec)
        if reason is not None:
            raise SpecError("format", FORMAT, f"gguf or packed for {spec.label!r}: {reason}; it holds {_HELD}")
        if has_experts(config):
            raise SpecError("format", FORMAT, "gguf for a mixture of experts: its matrices are no linear layers")

    def write(self, export: Export) -> Written:
        loaded, spec = export.loaded, export.spec
        assert isinstance(spec, QuantSpec)
        model: Any = loaded.model
        parameter = next(model.parameters())
        wide = parameter.dtype != loaded.storage_dtype
        _check_layers(model, spec)
        state = _state(model, loaded.storage_dtype)
        layers = set()
        for layer, stored in stored_layers(
            model, spec, storage_dtype=loaded.storage_dtype, calibration=export.calibration()
        ):
            assert isinstance(stored, StoredCodes)
            del state[f"{layer.name}.weight"]
            state |= {f"{layer.name}.{name}": values for name, values in _parts(stored.tensor).items()}
            layers.add(layer.name)
        others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in layers]
        model.save_pretrained(export.to, state_dict=state)
        loaded.tokenizer.save_pretrained(export.to)
        _save_config(export.to / "config.json", settings_of(spec, others), loaded.storage_dtype)
        load = partial(_load, export.to, str(parameter.device), "float32" if wide else "storage")
        return Written(words=f"{spec.label}, pack-quantized", nbytes=bytes_in(export.to), load=load)


def settings_of(spec: QuantSpec, others: list[str]) -> dict[str, Any]:
    """Return quantization_config for a spec.

    Args:
        spec: that ``CompressedTensorsExporter.check`` passes.
        others: linear layers that are not quantized.
    """
    by_row = spec.blocksize == ROW
    weights = {
        **{"num_bits": spec.bits, "type": "int", "symmetric": not spec.zero_point, "dynamic": False},
        **{"strategy": "channel" if by_row else "group", "group_size": None if by_row else spec.blocksize},
    }
    if isinstance(spec, GptqSpec) and spec.act_order and not by_row:
        weights["actorder"] = "weight"  # the columns of a group lie side by side
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        **{"quant_method": FORMAT, "format": "pack-quantized", "quantization_status": "compressed"},
        **{"config_groups": {"group_0": group}, "ignore": others, "kv_cache_scheme": None},
    }


def _why_not(spec: QuantSpec) -> str | None:
    """Return why the format can't hold a cell of block-wise quantization; None where it can."""
    if spec.dtype != "int" or spec.codebook is not None:
        return f"the format has integers, and no codes of {spec.dtype}"
    if spec.scheme != "group" or spec.blocksize is None:
        return "its blocks are groups of a row"
    for name, neutral in (
        ("absmax_dtype", "float16"),
        ("center", False),
        ("outlier_fraction", 0.0),
        ("rotation", None),
    ):
        value = getattr(spec, name)
        if value != neutral:
            return f"it has no place for {name}={value!r}"
    if isinstance(spec, GptqSpec) and spec.act_order and not spec.static_groups and spec.blocksize != ROW:
        return "compressed-tensors has removed groups of permuted columns: static_groups=true leaves them in place"
    return None


def _check_layers(model: nn.Module, spec: QuantSpec) -> None:
    """Refuse a model of which the format can't hold a layer, before anything is quantized.

    Raises:
        SpecError: names the layer.
    """
    for layer in block_layers(model):
        if not isinstance(layer.module, nn.Linear):
            kind = type(layer.module).__name__
            raise SpecError("format", FORMAT, f"gguf for this model: {layer.name} is a {kind}, and no linear layer")
        inputs = layer.shape[1]
        size = _group_size(spec, inputs)
        if inputs % size:
            rows = f"rows of {inputs} values in {layer.name} do not hold groups of {size}"
            raise SpecError("format", FORMAT, f"gguf for this model: {rows}")


def _group_size(spec: QuantSpec, inputs: int) -> int:
    size = spec.of_row(inputs).blocksize
    assert isinstance(size, int)
    return size


def _parts(q: QuantizedTensor) -> dict[str, Tensor]:
    """Return a layer's tensors; scales are rounded to its storage dtype."""
    (out, inputs), bits = q.shape, q.spec.bits
    assert isinstance(q.absmax, Tensor)
    codes = unpack(q.codes, bits, q.numel).view(out, inputs)
    scale = q.absmax.float().view(out, -1)
    parts = {"weight_shape": torch.tensor([out, inputs])}
    if q.zero_points is None:
        # The code of -(2^(k-1) - 1) is 0 here, and 1 there, where -2^(k-1) has a code too.
        codes = codes + 1
        scale = scale / (2 ** (bits - 1) - 1)
    else:
        zero = unpack(q.zero_points, bits, scale.numel()).view(scale.shape)
        parts["weight_zero_point"] = pack_words(zero.t(), bits).t().contiguous()
    parts |= {"weight_packed": pack_words(codes, bits), "weight_scale": scale.to(q.storage_dtype)}
    return {role: values.cpu() for role, values in parts.items()}


def _state(model: nn.Module, storage: torch.dtype) -> dict[str, Tensor]:
    """Return a model's tensors in its storage dtype on the host, tied ones as one."""
    found: dict[tuple[object, ...], Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        narrow = tensor.detach().to("cpu", storage if isinstance(tensor, nn.Parameter) else tensor.dtype)
        state[name] = found.setdefault(key_of(tensor), narrow)
    return state


def _save_config(file: Path, settings: Mapping[str, Any], storage: torch.dtype) -> None:
    config = json.loads(file.read_text())
    config |= {"dtype": str(storage).removeprefix("torch."), KEY: settings}
    file.write_text(json.dumps(config, indent=2) + "\n")


def _load(directory: Path, device: str, compute_dtype: str) -> Any:
    return load_model(str(directory), device=device, compute_dtype=compute_dtype).model


EXPORTER: Final[Exporter] = CompressedTensorsExporter()
