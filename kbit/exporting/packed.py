"""format=packed: a directory that ``kbit.load_packed`` reads, with the tokenizer beside it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from kbit.errors import SpecError
from kbit.exporting.base import Export, Exporter, Written, bytes_in, check_directory, check_weights_alone
from kbit.packed.files import load_packed, save_packed
from kbit.spec import Spec


class PackedExporter:
    """Cells whose layers can be held in k bits."""

    def check(self, spec: Spec, config: Mapping[str, Any], to: Path) -> None:
        check_directory(to, "packed")
        if spec.is_baseline:
            raise SpecError("format", "packed", "gguf for the 16-bit baseline: nothing of it is in k bits")
        if spec.why_not_packed is not None:
            raise SpecError("format", "packed", f"gguf for {spec.label!r}: {spec.why_not_packed}")
        check_weights_alone(spec, "packed")

    def write(self, export: Export) -> Written:
        loaded = export.loaded
        device = next(loaded.model.parameters()).device
        with export.quantize(True):
            save_packed(loaded.model, export.to)
        loaded.tokenizer.save_pretrained(export.to)
        load = partial(load_packed, export.to, device=device)
        return Written(words=f"{export.spec.label} in k bits", nbytes=bytes_in(export.to), load=load)


EXPORTER: Final[Exporter] = PackedExporter()
