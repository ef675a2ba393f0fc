"""The weights of a loaded model, kept once for all of its cells.

A cell is quantized from what is kept into the weights that the model computes with. Their memory stays where it is.
Between two cells that overwrite the same weights nothing is given back: only what the second one leaves alone, and
everything where the 16-bit model itself is needed.

Originals on the weights' own device are read there. Others are copied into the working weights first, which serve as
the buffers: on a GPU by a stream of its own, so that the copies of later blocks run while earlier ones are quantized.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kbit.models.architectures import Layer, block_layers
from kbit.models.outliers import outlier_columns
from kbit.models.overwriting import is_same_memory
from kbit.models.places import Place, Room, gpu_room, host_like, host_room, lock_pages, place_for
from kbit.spec import Spec

Fitted = MutableMapping[tuple[str, Spec, torch.dtype | None], Tensor]
"""Codebooks that were fitted to a model's tensors, float32 on the host: by layer, by storage dtype, and by the spec, of
which the axes that the fit does not depend on have one value each."""


@dataclass(kw_only=True, eq=False)
class _Kept:
    """A parameter's values as they were loaded.

    Attributes:
        home: the device that the parameter belongs on.
        locked: the values lie in page-locked memory.
    """

    parameter: nn.Parameter
    values: Tensor
    home: torch.device
    locked: bool = False

    @property
    def is_beside(self) -> bool:
        return self.values.device == self.home


@dataclass(kw_only=True, eq=False)
class Originals:
    """What a loaded model's cells begin from; one object a model, which is in its 16-bit form when it is made.

    While it is in use, the model stays on its devices and in its dtype, and nothing else changes its weights. Kept are
    the matrices that cells overwrite, one copy each, from the first quantized cell on; and, by layer, what cells find
    out about them: fitted codebooks (at most 1 KB for each way of fitting them, on the host) and the columns that stay
    in 16 bits (4 bytes each, on the layer's device).

    Attributes:
        model: the model.
        place: where originals of weights on GPUs are kept; None until the first quantized cell decides (``place_for``).
        fitted: codebooks of the tensors (``kbit.methods.protocol.ModelPass``).
        lock_seconds: that page-locking took.
    """

    model: nn.Module
    place: Place | None = None
    fitted: Fitted = field(default_factory=dict)
    lock_seconds: float = 0.0
    _kept: dict[int, _Kept] = field(default_factory=dict)
    _found: list[Layer] | None = None
    _columns: dict[tuple[float, torch.dtype | None], dict[str, Tensor | None]] = field(default_factory=dict)
    # Layers whose working weights are a cell's; of these, what an earlier cell left and this one has not yet written.
    _changed: dict[str, Layer] = field(default_factory=dict)
    _left: dict[str, Layer] = field(default_factory=dict)
    _arriving: dict[str, torch.cuda.Event] = field(default_factory=dict)
    _streams: dict[torch.device, torch.cuda.Stream] = field(default_factory=dict)
    _places: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    _cell: int = 0
    _reads: bool = True

    @property
    def layers(self) -> list[Layer]:
        """The layers of all blocks, in order, with their originals once these are kept."""
        if self._found is None:
            self._found = block_layers(self.model)
            taken = {id(layer.module) for layer in self._found}
            children = ((p, name, m) for p in self.model.modules() for name, m in p._modules.items())
            self._places = [(p, name, m) for p, name, m in children if m is not None and id(m) in taken]
        return [self._with_original(layer) for layer in self._found]

    @property
    def gpu_bytes(self) -> int:
        """Bytes that originals take on GPUs, beside what the model computes with."""
        packed = any(parent._modules[name] is not module for parent, name, module in self._places)
        on_gpu = (k for k in self._kept.values() if k.values.is_cuda)
        return sum(k.values.nbytes for k in on_gpu if packed or not is_same_memory(k.parameter, k.values))

    def begin(self, spec: Spec, *, packed: bool) -> None:
        """Begin a cell: put the modules of a packed one back, and keep what isn't kept yet.

        The baseline gets the 16-bit model, and so does a method that runs blocks on calibration data, which have to be
        the original ones until they are quantized.

        Args:
            spec: the cell's.
            packed: layers are replaced. What is first kept now is then the parameter's own memory, without a copy.
        """
        self._put_modules_back()
        self._reads = not spec.calibrates
        if spec.is_baseline or spec.calibrates:
            self.restore()
        if spec.is_baseline:
            return
        self._keep([layer.parameter for layer in self.layers], copies=not packed)
        self._left = dict(self._changed)
        self._send_ahead()

    def way_back(self) -> Callable[[], None]:
        """Return what restores the model as long as no later cell was begun."""
        self._cell += 1
        cell = self._cell
        return lambda: self.restore() if self._cell == cell else None

    def put(self, layer: Layer, write: Callable[[], object], *, packed: bool) -> None:
        """Have a layer's working weight written, or a module put in its place where `packed`."""
        self._await(layer.name)
        # Before it is written: whatever happens meanwhile, it is known to be changed.
        self._changed[layer.name] = layer
        self._left.pop(layer.name, None)
        write()
        if packed:
            del self._changed[layer.name]  # what was replaced has a parameter with its original

    def finish(self) -> None:
        """End a cell's quantizing: what only an earlier cell changed gets its original back."""
        for name in list(self._left):
            self._refill(name)

    def arrive(self, layers: Iterable[Layer]) -> None:
        """Have the working weights of layers hold their originals, where ``Layer.weight`` reads them there."""
        for layer in layers:
            if layer.name in self._left and not layer.reads_original:
                self._refill(layer.name)

    def outside(self, layer: Layer) -> Layer:
        """Return a layer outside the blocks (embedding, head) with its original, kept from now on."""
        self._keep([layer.parameter], copies=True)
        known = self._with_original(layer)
        self.arrive([known])
        return known

    def outlier_columns(self, fraction: float, storage_dtype: torch.dtype | None) -> dict[str, Tensor | None]:
        """Return ``kbit.models.outliers.outlier_columns`` of the original weights, computed once."""
        key = (fraction, storage_dtype)
        if key not in self._columns:
            layers = self.layers
            self.arrive(layers)
            self._columns[key] = outlier_columns(self.model, fraction, storage_dtype=storage_dtype, layers=layers)
        return self._columns[key]

    @torch.no_grad()
    def restore(self) -> None:
        """Make sure that the model is in its 16-bit form: its own modules, and every weight as loaded, bit for bit."""
        self._put_modules_back()
        for name in list(self._changed):
            self._refill(name)

    @torch.no_grad()
    def make_room(self) -> bool:
        """Move originals from GPUs to the host, for good. Tell whether that frees memory."""
        freed, used = self.gpu_bytes, {id(p) for p in self.model.parameters()}
        on_gpu = [kept for kept in self._kept.values() if kept.values.is_cuda]
        if on_gpu:
            self.place = self._host_place(sum(kept.values.nbytes for kept in on_gpu))
        for kept in on_gpu:
            values = kept.values
            self._to_host(kept, values)
            # The parameter of a module that was replaced holds nothing but the original.
            if id(kept.parameter) not in used and is_same_memory(kept.parameter, values):
                kept.parameter.data = kept.values
        return freed > 0

    def _with_original(self, layer: Layer) -> Layer:
        kept = self._kept.get(id(layer.parameter))
        if kept is None:
            return layer
        return replace(layer, original=kept.values, reads_original=self._reads and kept.is_beside)

    def _keep(self, parameters: Iterable[nn.Parameter], *, copies: bool) -> None:
        """Keep parameters that aren't kept yet: they hold what was loaded."""
        new = list({id(p): p for p in parameters if id(p) not in self._kept}.values())
        if self.place is None and any(p.is_cuda for p in new):
            self.place = self._place_of(new)
        for parameter in new:
            kept = _Kept(parameter=parameter, values=parameter.detach(), home=parameter.device)
            if parameter.is_cuda and self.place is not Place.GPU:
                self._to_host(kept, kept.values)
            elif copies:
                self._copy_beside(kept)
            self._kept[id(parameter)] = kept

    def _copy_beside(self, kept: _Kept) -> None:
        try:
            kept.values = kept.values.clone()
        except torch.OutOfMemoryError:
            if not kept.parameter.is_cuda:
                raise
            self.make_room()
            self.place = self.place if self.place is not Place.GPU else self._host_place(kept.values.nbytes)
            self._to_host(kept, kept.values)

    def _place_of(self, parameters: Sequence[nn.Parameter]) -> Place:
        needed: dict[torch.device, int] = {}
        for parameter in parameters:
            if parameter.is_cuda:
                needed[parameter.device] = needed.get(parameter.device, 0) + parameter.nbytes
        gpus = [gpu_room(device, nbytes) for device, nbytes in needed.items()]
        return place_for(gpus, host_room(sum(needed.values())))

    def _host_place(self, nbytes: int) -> Place:
        return place_for([Room(needed=1, free=0, total=1)], host_room(nbytes))

    def _to_host(self, kept: _Kept, values: Tensor) -> None:
        host = host_like(values)
        if self.place is Place.LOCKED:
            began = time.perf_counter()
            kept.locked = lock_pages(host, owner=kept, gpu=kept.home)
            self.lock_seconds += time.perf_counter() - began
        host.copy_(values)
        kept.values = host

    def _send_ahead(self) -> None:
        """Begin to copy originals from page-locked memory to what an earlier cell changed, in its order."""
        first: set[torch.device] = set()
        for name, layer in self._left.items():
            kept = self._kept[id(layer.parameter)]
            if kept.is_beside or not kept.locked:
                continue
            if kept.home not in self._streams:
                self._streams[kept.home] = torch.cuda.Stream(kept.home)  # type: ignore[no-untyped-call]
            stream = self._streams[kept.home]
            if kept.home not in first:
                stream.wait_stream(torch.cuda.current_stream(kept.home))  # an evaluation may still read the weights
                first.add(kept.home)
            with torch.cuda.stream(stream):
                layer.working.copy_(layer.matrix(kept.values), non_blocking=True)
                self._arriving[name] = stream.record_event()

    def _await(self, name: str) -> bool:
        """Have the current stream wait for a layer's copy that was sent ahead; tell whether there was one."""
        event = self._arriving.pop(name, None)
        if event is not None:
            home = self._kept[id(self._changed[name].parameter)].home
            torch.cuda.current_stream(home).wait_event(event)
        return event is not None

    def _refill(self, name: str) -> None:
        """Give a changed layer its original back."""
        layer = self._changed[name]
        kept = self._kept[id(layer.parameter)]
        if not self._await(name) and not is_same_memory(kept.parameter, kept.values):
            layer.working.copy_(layer.matrix(kept.values), non_blocking=kept.locked)
        del self._changed[name]
        self._left.pop(name, None)

    def _put_modules_back(self) -> None:
        # By their places, not by the steps of a cell: it may have been interrupted between two of them.
        for parent, name, module in self._places:
            current = parent._modules[name]
            if current is not None and current is not module:
                module.train(current.training)
                setattr(parent, name, module)
        for kept in self._kept.values():
            if kept.parameter.device != kept.home:
                kept.parameter.data = kept.values.to(kept.home, non_blocking=kept.locked)
