"""Command lines made by chance: from the schema, and from real studies of which something was changed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Final, get_type_hints

from sweeps.commands.keys import OBEYED
from sweeps.config import CONFIG_DIR, DEMO_DIR, schema
from sweeps.study.cell import axis_names
from sweeps.study.grid import block_axes

Value = Any
STUDIES: Final = sorted(p.stem for p in (CONFIG_DIR / "sweep").glob("*.yaml") if p.stem != "paper_all")
"""Of real studies all but the one whose plan takes seconds."""
NUMBERS: Final[Sequence[Value]] = (0, 1, 2, 3, 4, 5, 8, 16, 17, 64, 100, 2048, -1, 0.5, 1.0, 1e-9, 2**31, 2**63, 2**70)
ODD: Final[Sequence[Value]] = (
    *(
        None,
        True,
        False,
        "",
        " ",
        "x",
        "int",
        "null",
        "1e5",
        "0x10",
        "é",
        "🙂",
        "a" * 300,
        "a\nb",
        "a\tb",
        "..",
        "/",
        "~",
    ),
    *("${oc.env:HOME}", "${missing}", "[/]", "{", "%s", "a=b", "a,b", "a:b", "\\", "'", '"', "nan", "inf", "-inf"),
    *([], [None], [[]], [[1]], [1, "a"], {}, {"a": 1}, {"file": "x.json"}, {"bits": 3}, [{"bits": 3}], [True], [{}]),
)
WORDS: Final[Sequence[Value]] = (
    *("int", "float", "dynamic", "quantile", "normal", "lloyd", "float16", "bfloat16", "float32", "auto", "storage"),
    *(
        "block",
        "group",
        "row",
        "tensor",
        "paper",
        "heuristic",
        "nested",
        "gptq",
        "awq",
        "hqq",
        "mixed",
        "ggml",
        "llm_int8",
    ),
    *("cpu", "cuda", "jargon", "jargon_choice", "demo", "neox-xs", "cheapest", "grid", "all", "none", "failed", "done"),
    *("activation", "mxfp4", "nvfp4", "Q4_K_M", "q4_0", "ceil", "floor", "2+3+4", "each", "first", "baseline"),
)
PLAUSIBLE: Final[Mapping[str, Sequence[Value]]] = {
    "bits": (2, 3, 4, 5, 8, 16, [3, 4]),
    "dtype": ("int", "float", "quantile", "normal", "lloyd", ["int", "dynamic"]),
    "blocksize": (16, 64, 100, 4096, None, [32, None]),
    "scheme": ("block", "group"),
    "exponent_bits": ("paper", "heuristic", 1, 2),
    "outlier_fraction": (0, 0.01, 0.5, [0, 0.02]),
    "absmax_dtype": ("float16", "float32", "nested"),
    **dict.fromkeys(("center", "clip", "zero_point"), (True, False)),
    "rotation": (None, 0, 7),
    "eval.limit": (1, 50, None),
    "eval.tokens": (2048, None),
    "eval.compute_dtype": ("auto", "float32", "storage"),
    "eval.bos": ("each", "first", "none"),
    "order": ("cheapest", "grid", "longest"),
    "retry": ("all", "none", ["failed"]),
    "budget": (0.1, 5, None),
}
"""Values that may well be valid, by axis and by key."""
READING: Final = ("status", "table", "findings", "compare", "best", "logs", "audit", "export", "drop", "merge")
"""Modes that run nothing, beside plan."""


def keys_of(node: type, prefix: str = "") -> Iterator[str]:
    """Every key of the schema whose name is fixed, sections too."""
    hints = get_type_hints(node)
    for f in fields(node):
        yield prefix + f.name
        if is_dataclass(of := hints.get(f.name)) and isinstance(of, type):
            yield from keys_of(of, f"{prefix}{f.name}.")


def grammar(value: Value) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{grammar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(grammar, value)) + "]"
    if isinstance(value, str):
        return value if value.replace("_", "").isalnum() and value.isascii() else json.dumps(value, ensure_ascii=False)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class Fuzzer:
    """Makes command lines; the same of the same seed.

    Attributes:
        out: a results directory that holds a study, for modes that read.
    """

    def __init__(self, seed: int, out: Path) -> None:
        self.random = random.Random(seed)
        self.out = out
        top = [k for k in keys_of(schema()) if k.partition(".")[0] not in ("mode", "out", "models")]
        self.keys = [k for k in top if k not in ("sweep", "eval", "executor", "tracking", "calibration")]

    def arguments(self) -> list[str]:
        """Return one command line, which asks for no work."""
        if self.random.random() < 0.3:
            return self._reading()
        base = self._study() if self.random.random() < 0.6 else ["sweep=demo"]
        changes = [self._change(base) for _ in range(self.random.randint(1, 3))]
        return [*base, *changes, "mode=plan", f"out={self.out.parent / 'none'}"]

    def value(self) -> Value:
        """Return what may stand for anything."""
        kind = self.random.random()
        if kind < 0.15:
            return [self.random.choice((*NUMBERS, *WORDS)) for _ in range(self.random.randint(1, 3))]
        return self.random.choice(NUMBERS if kind < 0.4 else WORDS if kind < 0.65 else ODD)

    def _study(self) -> list[str]:
        model = DEMO_DIR / "models" / "neox-xs"
        kept = self.random.random() < 0.7
        return [f"sweep={self.random.choice(STUDIES)}", *([f"path={model}"] if kept else []), "eval=demo"][
            : 3 if kept else 1
        ]

    def _change(self, base: Sequence[str]) -> str:
        kind = self.random.random()
        if kind < 0.5:
            usual = [name for name in block_axes() if name in PLAUSIBLE]
            axis = self.random.choice([*block_axes(), "linked", "bitz", *usual * 3])
            sign = self.random.choice(("", "", "", "", "", "+", "++"))
            return f"{sign}sweep.quant.{self.random.choice((0, 1, 1, 1, 2, 9))}.{axis}={grammar(self._likely(axis))}"
        if kind < 0.6:
            return f"sweep.quant={grammar([self._block() for _ in range(self.random.randint(0, 3))])}"
        if kind < 0.65:
            rule = {"when": {self.random.choice(axis_names()): self.value()}, "reason": self.value()}
            return f"sweep.exclude={grammar([rule])}"
        key = self.random.choice([*self.keys, *[name for name in PLAUSIBLE if name in self.keys] * 3])
        return f"{key}={grammar(self._likely(key))}"

    def _likely(self, name: str) -> Value:
        """Return a value that an axis or a key may well have, or one that may stand for anything."""
        return self.random.choice(PLAUSIBLE[name]) if name in PLAUSIBLE and self.random.random() < 0.7 else self.value()

    def _block(self) -> Value:
        names = self.random.sample([*block_axes()], self.random.randint(1, 4))
        return {name: self._likely(name) for name in dict.fromkeys(["bits", *names])}

    def _reading(self) -> list[str]:
        mode = self.random.choice(READING)
        keys = [key for key, modes in OBEYED.items() if mode in modes and key not in NOT_READING]
        chosen = self.random.sample(keys, min(len(keys), self.random.randint(1, 3)))
        return [f"mode={mode}", f"out={self.out}", *(f"{key}={grammar(self._of_key(key))}" for key in chosen)]

    def _of_key(self, key: str) -> Value:
        if key in ("where", "a", "b") and self.random.random() < 0.7:
            return {self.random.choice(axis_names()): self.value()}
        if key in ("by", "columns", "sort", "metrics") and self.random.random() < 0.7:
            return [self.random.choice((*axis_names(), "jargon_loss", "acc", "nothing"))]
        return self.value()


NOT_READING: Final = (
    "mode",
    "out",
    "sweep",
    "model",
    "models",
    "path",
    "eval",
    "calibration",
    "executor",
    "tracking",
    "to",
    "watch",
    "yes",
    "undo",
)
