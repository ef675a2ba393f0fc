"""format=gguf: a file that llama.cpp opens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from kbit.errors import SpecError
from kbit.exporting.base import Export, Exporter, Written, check_weights_alone
from kbit.gguf.architectures import architecture_of
from kbit.gguf.export import read_gguf, rows_of, write_gguf
from kbit.spec import Spec
from kbit.specs.ggml import GgmlSpec


class GgufExporter:
    """Cells of method ggml are written in their formats; other ones in 16 bits, with their dequantized values."""

    def check(self, spec: Spec, config: Mapping[str, Any], to: Path) -> None:
        if to.suffix != ".gguf":
            raise SpecError("to", str(to), "a file for format=gguf: NAME.gguf")
        check_weights_alone(spec, "gguf")
        if "model_type" in config:
            architecture_of(config["model_type"])

    def write(self, export: Export) -> Written:
        loaded, spec = export.loaded, export.spec
        parameter = next(loaded.model.parameters())
        write = partial(
            write_gguf, export.to, loaded.model, loaded.tokenizer, storage_dtype=loaded.storage_dtype, spec=spec
        )
        if isinstance(spec, GgmlSpec):
            nbytes = write(rows=rows_of(loaded.model, spec, loaded.storage_dtype))
            words = f"{spec.label} in llama.cpp's own formats"
        else:
            with export.quantize(False):
                nbytes = write()
            sixteen = "bfloat16" if loaded.storage_dtype == torch.bfloat16 else "float16"
            words = f"{spec.label} in {sixteen}" + ("" if spec.is_baseline else ", dequantized: GGUF has no such codes")
        load = partial(
            read_gguf,
            export.to,
            storage_dtype=loaded.storage_dtype,
            dtype=parameter.dtype,
            device=str(parameter.device),
        )
        return Written(words=words, nbytes=nbytes, load=load)


EXPORTER: Final[Exporter] = GgufExporter()
