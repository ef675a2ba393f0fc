"""What layers held in k bits have in common: buffers, states, moves and casts, and checks of what they are given."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from kbit.kernels.ops import matmul_tiled
from kbit.kernels.tiles import TILE, TiledWeight
from kbit.packed.layout import Shapes, check_stored
from kbit.quantizer.storage import STORAGE_DTYPES
from kbit.specs.base import Spec

LAYER_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
"""Of x, and of the weights that a layer stands for."""
FIRST_VERSION: Final = 1
ZERO_POINT_VERSION: Final = 2
BLOCK_FLOAT_VERSION: Final = 3
"""Of the format on disk: 2 is of models whose layers have zero points or permuted columns, 3 of those with block-scaled
floats; others are written as 1, which earlier versions of this package read."""


class PackedLinear(nn.Module, ABC):
    """y = x · W^T + bias for a quantized W, of which no copy in 16 bits is kept, on the CPU and on a GPU.

    W lies in the kernels' tiles where it has that layout, else in row-major order, the same on every device
    (``kbit.packed.layout``). Everything is a buffer: ``state_dict`` holds what defines the layer, exactly, and one of
    another spec is refused. ``to(dtype)`` changes the bias and the dtype of x to come, never what the weight is made
    of. Loading a state dict in place keeps every buffer's address, so that CUDA graphs stay valid.

    Products and bias are summed in float32 and rounded to x's dtype once. A GPU's fused kernel takes x of ``dtype``;
    float32 x, and layers without tiles, go by dequantizing some rows at a time, and so do more than 64 rows of x (up to
    384 where that is slower), up to about 1 GiB at a time. A layer is for one CUDA stream at a time, and for
    inference: call it under torch.no_grad(), without which torch.compile traces a backward, and that raises
    NotImplementedError. Autocast does not reach into it.

    Args:
        in_features, out_features: W is [out_features, in_features].
        spec: how it is quantized.
        storage_dtype: float16 or bfloat16, what dequantized values are rounded to.
        dtype: of the x to come and of the bias: float16, bfloat16 or float32. None is `storage_dtype`.
        blocksize: values that share an absmax or scale; None for rows.
        why_no_tiles: why it has none, in words; None where it has.

    Attributes:
        batch_invariant: whether a row of y depends on no other row of x, nor on how many there are; False at first.
        tiled: whether W lies in tiles.

    Raises:
        ValueError: a size or dtype that is not possible, or a spec of 16 bits.
    """

    codes: Tensor
    scales: Tensor
    codebook: Tensor
    table: Tensor
    unscale: Tensor
    arrived: Tensor
    bias: Tensor | None
    spec: Spec

    def __init__(  # noqa: PLR0913  # as torch's own layers take them, and what subclasses know
        self,
        in_features: int,
        out_features: int,
        spec: Spec,
        *,
        storage_dtype: torch.dtype,
        dtype: torch.dtype | None,
        blocksize: int | None,
        why_no_tiles: str | None,
    ) -> None:
        super().__init__()
        if spec.is_baseline or storage_dtype not in STORAGE_DTYPES:
            raise ValueError(
                f"bits={spec.bits}, storage_dtype={storage_dtype}: 2 to 8 bits of a 16-bit dtype are needed"
            )
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features={in_features}, out_features={out_features}: sizes of at least 1 are needed")
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.storage_dtype, self.dtype = storage_dtype, dtype or storage_dtype
        if self.dtype not in LAYER_DTYPES:
            raise ValueError(f"dtype={self.dtype} is not torch.float16, torch.bfloat16 or torch.float32")
        self.batch_invariant = False
        self.tiled, self._why_no_tiles, self._blocksize = why_no_tiles is None, why_no_tiles, blocksize
        self._stored: Shapes = {}

    @property
    @abstractmethod
    def format_version(self) -> int:
        """The first version of packed models that has such a layer (``kbit.packed.metadata``)."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Return what the stored buffers stand for, as JSON: spec, storage dtype."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Return the weight that the layer stands for: [out_features, in_features], its dtype the layer's."""

    @abstractmethod
    def _product(self, x: Tensor) -> Tensor:
        """Return y = x · W^T + bias, of an x [m, in_features]."""

    @abstractmethod
    def _following(self) -> dict[str, Tensor]:
        """Return the buffers that follow from the stored ones, but for those of tiles that hold no values."""

    def _make_buffers(
        self, stored: Shapes, following: Shapes, *, bias: bool, device: torch.device | str | None
    ) -> None:
        """Register the buffers, zeros until a state dict is loaded.

        Args:
            stored: of a state dict, by name.
            following: of ``_following``, beside table and unscale.
            bias: whether there is one.
            device: where they are made.
        """
        self._stored = stored
        table: Shapes = {"table": ((1 << self.spec.bits,), self._table_dtype), "unscale": ((1,), torch.float32)}
        counts: Shapes = {"arrived": ((-(-self.out_features // TILE),), torch.int32)} if self.tiled else {}
        following = {**table, **counts, **following}
        for name, (shape, kind) in {**stored, **following}.items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device), persistent=name not in following)
        self.register_buffer("bias", torch.zeros(self.out_features, dtype=self.dtype, device=device) if bias else None)

    def _put(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Have a weight's own tensors as buffers, and what follows from them."""
        for name, tensor in tensors.items():
            self._buffers[name] = None if tensor is None else tensor.detach()
        self.derive()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] of ``dtype`` or float32 to [..., out_features] of x's dtype.

        Raises:
            ValueError: x has another shape or dtype, or not all of the layer is on x's device.
        """
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        if x.shape[-1:] != (self.in_features,) or x.dtype not in (self.table.dtype, torch.float32):
            why = "; autocast made x so: leave it, or give it this dtype" if autocast else ""
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)}: this layer takes [..., {self.in_features}] of {self.table.dtype} or "
                f"float32; layer.to(dtype) changes that{why}"
            )
        device = x.device
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.device != device:
                raise ValueError(
                    f"x is on {device} and this layer's {name} on {buffer.device}: move one of them; what is on meta "
                    "has no values yet: load a state dict, or call layer.derive()"
                )
        flat = x.reshape(-1, self.in_features).contiguous()
        if autocast:
            with torch.autocast(x.device.type, enabled=False):
                y = self._product(flat)
        else:
            y = self._product(flat)
        return y.view(*x.shape[:-1], self.out_features)

    def _times_tiles(self, x: Tensor, bias: Tensor | None, addend: Tensor | None = None) -> Tensor:
        """Return x · W^T + bias + addend of a W in tiles."""
        of = self._buffers  # attributes of a module take half a microsecond each
        y: Tensor = matmul_tiled(
            x,
            codes=of["codes"],
            scales=self._scales(),
            codebook=of["codebook"],
            table=of["table"],
            unscale=of["unscale"],
            arrived=of["arrived"],
            bias=bias,
            addend=addend,
            tensor_scale=of.get("tensor_scale"),
            n=self.out_features,
            bits=self.spec.bits,
            blocksize=self._blocksize,
            storage=self.storage_dtype,
            batch_invariant=self.batch_invariant,
        )
        return y

    def _scales(self) -> Tensor:
        """Return what is stored as scales, in the dtype that operators take."""
        scales = self._buffers["scales"]
        assert scales is not None
        return scales

    def derive(self) -> None:
        """Make the buffers that follow from those of the state dict, once these are there; in place where possible.

        Raises:
            ValueError: a buffer of the state dict is not what this layer stores.
        """
        if any(self._buffers[name].is_meta for name in self._stored):  # type: ignore[union-attr]
            return
        for name, (shape, kind) in self._stored.items():
            check_stored(name, self.get_buffer(name), shape, kind)
        for name, value in self._following().items():
            self._keep(name, value)
        if self.tiled:
            counts = torch.zeros(-(-self.out_features // TILE), dtype=torch.int32, device=self.codes.device)
            self._keep("arrived", counts)

    def _keep(self, name: str, value: Tensor) -> None:
        old = self.get_buffer(name)
        if (old.shape, old.dtype, old.device) == (value.shape, value.dtype, value.device):
            old.copy_(value)  # where a captured CUDA graph reads it
        else:
            self._buffers[name] = value

    def get_extra_state(self) -> Tensor:
        """What the layer is of, as bytes of JSON: a tensor is what safetensors and weights_only loading take."""
        return torch.tensor(list(json.dumps(self.about()).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse that of another spec: the same codes would stand for other weights."""
        found, own = (bytes(s.tolist()).decode() for s in (state, self.get_extra_state()))
        if json.loads(found) != json.loads(own):
            raise ValueError(f"a state dict of {found} does not fit a layer of {own}")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Check before anything is copied, since copying would cast."""
        if f"{prefix}_extra_state" in state_dict:
            self.set_extra_state(state_dict[f"{prefix}_extra_state"])
        for name, (shape, kind) in self._stored.items():
            if f"{prefix}{name}" in state_dict:
                check_stored(f"{prefix}{name}", state_dict[f"{prefix}{name}"], shape, kind)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.derive()

    @property
    def _table_dtype(self) -> torch.dtype:
        return self.dtype if self.dtype in STORAGE_DTYPES else self.storage_dtype

    def tiled_weight(self) -> TiledWeight:
        """Return the layer's tiles, shared with it, as ``kbit.kernels.matmul`` takes them.

        Raises:
            ValueError: it has none.
        """
        if not self.tiled:
            raise ValueError(f"a layer without tiles: {self._why_no_tiles}")
        assert self._blocksize is not None
        return TiledWeight(
            codes=self.codes,
            scales=self._scales(),
            codebook=self.codebook,
            table=self.table,
            unscale=self.unscale,
            arrived=self.arrived,
            n=self.out_features,
            k=self.in_features,
            bits=self.spec.bits,
            blocksize=self._blocksize,
            tensor_scale=self._buffers.get("tensor_scale"),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        layout = "tiles" if self.tiled else "rows"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.spec.label}, {layout}, {self.dtype}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:  # noqa: ARG002  # torch's signature
        """Move everything; cast the bias alone."""
        before = self._table_dtype
        dtype = fn(torch.empty(1, dtype=self.dtype, device=self.codes.device)).dtype
        if dtype not in LAYER_DTYPES:
            raise TypeError(
                f"a {type(self).__name__} can't be cast to {dtype}: float16, bfloat16 and float32 are possible"
            )
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer) if name == "bias" else _uncast(fn, buffer)
        self.dtype = dtype
        if self._table_dtype != before:
            self.derive()
        return self


def matrix_shape(shape: tuple[int, ...], bias: Tensor | None) -> tuple[int, int]:
    """Return (out, in) of a quantized weight.

    Raises:
        ValueError: it is no matrix, or its bias has another shape than [out].
    """
    if len(shape) != 2 or (bias is not None and bias.shape != shape[:1]):
        of_bias = None if bias is None else list(bias.shape)
        raise ValueError(f"weight {list(shape)} and bias {of_bias}: [out, in] and [out] are needed")
    return shape[0], shape[1]


def _uncast(fn: Callable[[Tensor], Tensor], buffer: Tensor) -> Tensor:
    """fn, which may move or cast what is floating point, of a buffer that must not be cast."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[buffer.element_size()]
    moved = fn(buffer.view(whole))
    if moved.dtype != whole:
        raise TypeError(
            f"a k-bit layer's codes can't be cast to {moved.dtype}: use to(dtype), which casts floats alone"
        )
    return moved.view(buffer.dtype)
