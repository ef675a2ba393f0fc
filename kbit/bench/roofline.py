"""The paper's roofline of k-bit products (Appendix E, Figure 16), measured: the ceilings, and what is reached below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kbit.bench.matmul import CUBLAS, Product, Shape, limit
from kbit.bench.report import Record, Table
from kbit.bench.timing import Ceilings

ROWS: Final = (1, 2, 4, 8, 16, 32, 64)
BITS: Final = (3, 4, 5, 6, 7, 8)
SHAPES: Final[tuple[Shape, ...]] = ((28672, 7168),)


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Ceilings and products of one weight's shape: k bits, and cuBLAS in float16 as 16 bits."""

    ceilings: Ceilings
    products: Sequence[Product]
    blocksize: int
    device: str

    @property
    def shape(self) -> Shape:
        return self.products[0].shape

    @property
    def rows(self) -> list[int]:
        return sorted({p.rows for p in self.products})

    @property
    def bits(self) -> list[int]:
        return sorted({p.bits for p in self.products})

    def product(self, bits: int, rows: int) -> Product:
        return next(p for p in self.products if (p.bits, p.rows) == (bits, rows))

    def roof(self, intensity: float) -> float:
        """FLOP a second that the measured ceilings allow at an intensity in FLOP a byte."""
        return min(self.ceilings.flops, intensity * self.ceilings.bandwidth)

    def speedup(self, product: Product) -> float:
        """Return how many times as fast as cuBLAS in float16 with as many rows of x."""
        return self.product(16, product.rows).seconds / product.seconds

    def table(self) -> Table:
        """Return one row per number of rows of x: TFLOP/s, the share of the roof, and the speedup."""
        body = []
        for rows in self.rows:
            found = [self.product(bits, rows) for bits in self.bits]
            body.append([str(rows), *(self._cell(p) for p in found)])
        body.append(["limit", *(f"{limit(bits, self.blocksize):.2f}x" for bits in self.bits)])
        n, k = self.shape
        c = self.ceilings
        return Table(
            name=f"roofline-{n}x{k}",
            title=f"x W^T, W {n} x {k}: TFLOP/s, share of the roof, and times as fast as cuBLAS float16; {self.device}",
            header=("rows of x", *("16 (cuBLAS)" if b == 16 else f"k={b}" for b in self.bits)),
            body=body,
            notes=[
                f"roof, measured: {c.flops / 1e12:,.0f} TFLOP/s (cuBLAS float16), {c.bandwidth / 1e9:,.0f} GB/s (the "
                f"faster of a read, {c.read / 1e9:,.0f}, and a copy read plus written, {c.copy / 1e9:,.0f})"
            ],
            records=[self._record(p) for p in self.products],
        )

    def _cell(self, p: Product) -> str:
        ratio = "" if p.kernel == CUBLAS else f"\n{self.speedup(p):.2f}x"
        return f"{p.flops / 1e12:,.3g}\n{p.flops / self.roof(p.intensity):.0%}{ratio}"

    def _record(self, p: Product) -> Record:
        c = self.ceilings
        return {
            **p.record(),
            **{"blocksize": None if p.kernel == CUBLAS else self.blocksize, "speedup": self.speedup(p)},
            **{"limit": limit(p.bits, self.blocksize), "of_roof": p.flops / self.roof(p.intensity)},
            **{"copy_bytes_per_second": c.copy, "read_bytes_per_second": c.read, "peak_flops": c.flops},
        }
