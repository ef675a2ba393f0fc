"""A model that is quantized as it is read: of each tensor's 16-bit values nothing is kept.

Its layers are held in k bits. So a device holds, at most, these, what isn't quantized, the tensor that has come, and
the next one as it comes; with proxy outliers, which need the spread of a block's weights before the first is quantized,
those of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from kbit.errors import SpecError
from kbit.methods.protocol import method_of, write
from kbit.models.activations import Activations
from kbit.models.architectures import Layer, block_layers
from kbit.models.originals import Fitted
from kbit.models.outliers import block_spreads, largest_columns
from kbit.models.placement import device_map, spread
from kbit.models.quantize import BitCount, QuantHandle, check_quantizable, count_parameters
from kbit.models.streaming.streamed import Streamed
from kbit.models.verification import check_causal
from kbit.models.whole import WholeModel
from kbit.packed.int8 import outlier_share
from kbit.spec import Spec


class Packing:
    """The cells of one streamed model, each quantized as the model is read once more.

    What isn't quantized stays on its device between cells.

    Args:
        streamed: the model; nothing else changes it.
        device: 'cpu', 'cuda' or 'cuda:N'.
        gpus: with device 'cuda', how many GPUs to spread it over, from the first on.

    Attributes:
        fitted: codebooks of the tensors (``kbit.methods.protocol.ModelPass``).
    """

    def __init__(self, streamed: Streamed, *, device: str, gpus: int = 1) -> None:
        self.streamed = streamed
        self.fitted: Fitted = {}
        self._device, self._gpus = torch.device(device), gpus
        if device == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._found = block_layers(streamed.model)
        names = {id(p): name for name, p in streamed.model.named_parameters()}
        self._name_of = {layer.name: names[id(layer.parameter)] for layer in self._found}
        taken = {id(layer.module): layer.module for layer in self._found}
        children = ((p, n, m) for p in streamed.model.modules() for n, m in p._modules.items())
        self._places = [(parent, name, module) for parent, name, module in children if id(module) in taken]
        self._spreads: dict[str, Tensor | None] = {}
        self._leaving: dict[int, Tensor] = {}
        self._is_checked = False
        self._cell = 0

    @property
    def model(self) -> nn.Module:
        return self.streamed.model

    @torch.no_grad()
    def quantize(self, spec: Spec) -> QuantHandle:
        """Quantize the model as it is read, and hold its layers in k bits; an earlier cell's are dropped first.

        Codes, bits and hashes are those of ``quantize_model(..., packed=True)``.

        Returns:
            The handle, whose way back leaves a model without its quantized layers' weights.

        Raises:
            SpecError: the 16-bit baseline, a method that calibrates or that can't be packed; a weight beyond the 16-bit
                range; or the model is not causal.
            As ``quantize_model``, and ``Streamed.each``.
        """
        if spec.is_baseline:
            raise SpecError("bits", spec.bits, "2 to 8: the 16-bit baseline is not quantized as it is read")
        self.clear()
        self._cell += 1
        cell, model = self._cell, self.streamed.model
        devices = self._devices(spec)
        arriving = _Arriving(self, devices)
        model_pass = arriving.model_pass()
        check_quantizable(model_pass, spec, packed=True, calibrated=False)
        count = BitCount(parameters=count_parameters(model))
        try:
            arriving.begin()
            for layer, stored in method_of(spec)(model_pass, spec, None):
                count.add(layer, stored)
                write(stored, model, layer, packed=True)
                del stored
                self.streamed.empty([self._name_of[layer.name]])
            arriving.finish({layer.name for layer in self._found} - count.shapes.keys())
            if self._gpus > 1:
                spread(model, devices)
            if not self._is_checked:
                check_causal(self.streamed.model, name=self.streamed.checkpoint.name)
                self._is_checked = True
        except BaseException:
            self.clear()
            raise
        finally:
            arriving.end()
        handle = count.handle(spec, [lambda: self.clear() if self._cell == cell else None])
        if spec.replaces_layers:
            handle.outlier_share = partial(outlier_share, model)
        return handle

    def clear(self) -> None:
        """Drop a cell: the model has its own modules again, those of its layers without weights."""
        if self._gpus > 1:
            from accelerate.hooks import remove_hook_from_submodules

            remove_hook_from_submodules(self.model)
        for parent, name, module in self._places:
            if parent._modules[name] is not module:
                setattr(parent, name, module)
        self.streamed.empty(list(self._name_of.values()))

    def _devices(self, spec: Spec) -> dict[str, int]:
        """Return the GPU of each module by the bytes that it is held in; empty where there is one device."""
        if self._gpus == 1:
            return {}
        held = {id(layer.parameter) for layer in self._found}

        def nbytes(parameter: nn.Parameter) -> int:
            if id(parameter) in held:
                return round(parameter.numel() * spec.bits_per_param_nominal / 8)
            return self.streamed.nbytes_of(parameter)

        return device_map(self.model, self._gpus, nbytes=nbytes)

    def device_of(self, name: str, devices: Mapping[str, int]) -> torch.device:
        """Return where what has this name in the model goes."""
        path = name
        while path and path not in devices:
            path = path.rpartition(".")[0]
        return torch.device("cuda", devices[path]) if path else self._device

    def columns(self, layers: Sequence[Layer], block: int, fraction: float) -> Mapping[str, Tensor | None]:
        """Return the outlier columns of one block's layers; weights are read where no earlier cell needed them.

        Args:
            layers: all of the model's.
            block: the block's number.
            fraction: as in ``kbit.models.outliers.outlier_columns``.
        """
        entering: Tensor | None = None
        for number in sorted({layer.block for layer in layers if layer.block <= block}):
            if number not in self._leaving:
                of_block = [layer for layer in layers if layer.block == number]
                storage = self.streamed.loaded.storage_dtype
                spreads, self._leaving[number] = block_spreads(self.model, of_block, entering, storage_dtype=storage)
                self._spreads |= spreads
            entering = self._leaving[number]
        return largest_columns(self._spreads, [layer for layer in layers if layer.block == block], fraction)


class _Arriving:
    """The weights of one cell's layers, which come in order while they are asked for."""

    def __init__(self, packing: Packing, devices: Mapping[str, int]) -> None:
        self._packing, self._devices = packing, devices
        self._streamed = packing.streamed
        self.layers = [replace(layer, fetch=self._fetch) for layer in packing._found]
        order = [packing._name_of[layer.name] for layer in self.layers]
        self._device = {name: packing.device_of(name, devices) for name in order}
        self._coming: Iterator[object] = iter(())
        self._waiting = dict.fromkeys(order)

    def model_pass(self) -> _PackedPass:
        return _PackedPass(
            module=self._streamed.model,
            storage_dtype=self._streamed.loaded.storage_dtype,
            arriving=self.layers,
            known=self._packing.fitted,
            find_columns=self._packing.columns,
        )

    def begin(self) -> None:
        """Have everything but the layers' weights in the model, on its device, and begin to read these."""
        model, packing = self._streamed.model, self._packing
        rest = [name for name, _ in model.named_parameters() if name not in self._waiting]
        by_device: dict[torch.device, list[str]] = {}
        for name in rest:
            by_device.setdefault(packing.device_of(name, self._devices), []).append(name)
        groups = [(names, device) for device, names in by_device.items()]
        layers = [([name], self._device[name]) for name in self._waiting]
        # While one is quantized the next one comes, and a GPU's link has no pause.
        self._coming = self._streamed.each([*groups, *layers], ahead=max(map(self._streamed.read_bytes, self._waiting)))
        for _ in groups:
            next(self._coming)
        for path, module in model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(packing.device_of(f"{path}.{name}", self._devices))

    def finish(self, kept: set[str]) -> None:
        """Have the layers that the method left alone in the model, by name."""
        for layer in self.layers:
            if layer.name in kept:
                self._fetch(layer)

    def end(self) -> None:
        close = getattr(self._coming, "close", None)
        if close is not None:
            close()

    def _fetch(self, layer: Layer) -> None:
        """Have a layer's parameter hold its original. In the model's order it has been read ahead."""
        if not layer.parameter.is_meta:
            return
        name = self._packing._name_of[layer.name]
        while name in self._waiting:
            next(self._coming)
            del self._waiting[next(iter(self._waiting))]
        if layer.parameter.is_meta:
            self._streamed.fill([name], self._device[name])


@dataclass(frozen=True, kw_only=True, eq=False)
class _PackedPass(WholeModel):
    """A pass over a model whose layers come while a method asks for their weights."""

    arriving: list[Layer]
    known: Fitted
    find_columns: Callable[[Sequence[Layer], int, float], Mapping[str, Tensor | None]]

    @property
    def layers(self) -> list[Layer]:
        return self.arriving

    @property
    def fitted(self) -> Fitted:
        return self.known

    def start(self, tokens: Tensor) -> Activations:
        raise NotImplementedError("its blocks have no weights to calibrate on: they come one by one")

    def outlier_columns(self, fraction: float) -> Mapping[str, Tensor | None]:
        return _Columns(self.arriving, lambda block: self.find_columns(self.arriving, block, fraction))


class _Columns(Mapping[str, Tensor | None]):
    """Outlier columns by layer, found block by block when they are asked for."""

    def __init__(self, layers: Sequence[Layer], find: Callable[[int], Mapping[str, Tensor | None]]) -> None:
        self._block_of = {layer.name: layer.block for layer in layers}
        self._find = find
        self._known: dict[str, Tensor | None] = {}

    def __getitem__(self, name: str) -> Tensor | None:
        block = self._block_of[name]
        if name not in self._known:
            self._known |= self._find(block)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._block_of)

    def __len__(self) -> int:
        return len(self._block_of)
