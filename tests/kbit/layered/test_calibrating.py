"""Cells that calibrate, in a pass layer by layer: the codes and losses of the whole model, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kbit import QuantSpec, quantize_model
from kbit.evaluation.spec import EvalResult
from kbit.layered.blocks import HostBlocks
from kbit.layered.cells import PassCell
from kbit.layered.hollow import Hollow
from kbit.layered.run import LayeredPass
from kbit.layered.snapshots import Snapshots
from kbit.models.quantize import Calibrated, QuantHandle
from kbit.spec import Spec, spec_of
from tests.kbit.architectures import VOCABULARY, build
from tests.kbit.layered.test_pass import BATCH_TOKENS, numbers, windows

SPECS: Mapping[str, Spec] = {
    "int4": QuantSpec(bits=4, dtype="int", blocksize=32),
    "gptq4": spec_of({"method": "gptq", "bits": 4, "dtype": "int", "blocksize": 32, "zero_point": True}),
    "16": QuantSpec(bits=16),
    "awq3": spec_of({"method": "awq", "bits": 3, "dtype": "int", "blocksize": 32}),
    "gptq3": spec_of({"method": "gptq", "bits": 3, "dtype": "quantile", "blocksize": "row", "act_order": True}),
}
MORE_SPECS: Mapping[str, Spec] = {
    "awq4": spec_of({"method": "awq", "bits": 4, "dtype": "normal", "blocksize": "row", "clip": False}),
    "lloyd3": spec_of({"bits": 3, "dtype": "lloyd", "weighting": "activation"}),
    "kept3": spec_of({"bits": 3, "dtype": "int", "outlier_fraction": 0.1, "outlier_criterion": "activation"}),
    **SPECS,
}
TOKENS = torch.from_numpy(np.random.default_rng(5).integers(0, VOCABULARY, (10, 24)))


def whole(model: Any, specs: Mapping[str, Spec] = SPECS) -> dict[str, tuple[EvalResult, QuantHandle]]:
    found = {}
    for name, spec in specs.items():
        calibrated = Calibrated(tokens=TOKENS) if spec.calibrates else None
        with quantize_model(model, spec, storage_dtype=torch.float16, calibration=calibrated) as handle:
            found[name] = windows().run(model, batch_tokens=BATCH_TOKENS), handle
    return found


class Layered:
    """Passes over one model, which may be cut after a block."""

    def __init__(self, model: Any, snapshots: Snapshots | None = None, specs: Mapping[str, Spec] = SPECS) -> None:
        self.model, self.specs = model, specs
        self.blocks = HostBlocks(model, "cpu")
        self.hollow = Hollow(self.blocks)
        self.snapshots = snapshots

    def run(self, stop_after: int | None = None) -> dict[str, tuple[EvalResult, QuantHandle]] | None:
        calls = self.hollow.record(lambda: windows().run(self.model, batch_tokens=BATCH_TOKENS))
        calibration = self.hollow.record_windows(TOKENS)
        assert len(calibration) == 2  # batches of 8 windows and of 2
        cells = {
            name: PassCell(key=name, spec=spec, calls=calls, calibration=calibration if spec.calibrates else ())
            for name, spec in self.specs.items()
        }
        one = LayeredPass(
            blocks=self.blocks,
            hollow=self.hollow,
            cells=list(cells.values()),
            storage_dtype=torch.float16,
            snapshots=self.snapshots,
        )
        if not one.run(lambda done, count: done == stop_after):
            return None
        assert all(cell.error is None for cell in cells.values())
        found = {}
        for name, cell in cells.items():
            with self.hollow.playing(one.leaving(cell)):
                found[name] = windows().run(self.model, batch_tokens=BATCH_TOKENS), cell.handle()
        return found


def check(
    found: dict[str, tuple[EvalResult, QuantHandle]] | None, expected: dict[str, tuple[EvalResult, QuantHandle]]
) -> None:
    assert found is not None
    for name, (result, handle) in expected.items():
        assert np.array_equal(found[name][0].samples["nats"], result.samples["nats"]), name
        assert numbers(found[name][1]) == numbers(handle), name
        assert found[name][1].codes_hash == handle.codes_hash, name
        assert found[name][1].calibration_tokens == handle.calibration_tokens, name
    assert expected["gptq4"][1].codes_hash is not None


@pytest.mark.parametrize("name", ["gpt_neox", "opt", "gpt2", "bloom", "llama"])
def test_codes_and_losses_are_those_of_the_whole_model(name: str) -> None:
    model = build(name).float()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = whole(model)
    check(Layered(model).run(), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_experts_see_the_tokens_that_they_see_in_the_whole_model() -> None:
    specs = {name: SPECS[name] for name in ("gptq4", "awq3")}
    model = build("qwen2_moe").float()
    expected = whole(model, specs)
    check(Layered(model, specs=specs).run(), expected)
    tokens = expected["gptq4"][1].calibration_tokens
    assert tokens["model.layers.1.mlp.shared_expert.up_proj"] == TOKENS.numel()
    assert sum(tokens[f"model.layers.1.mlp.experts.down_proj.{n}"] for n in range(4)) == 2 * TOKENS.numel()


def test_a_pass_that_was_cut_goes_on_with_the_same_codes(tmp_path: Path) -> None:
    model = build("opt").float()
    expected = whole(model, MORE_SPECS)
    snapshots = Snapshots(directory=tmp_path, of="a" * 64, pack="p")
    assert Layered(model, snapshots, MORE_SPECS).run(stop_after=1) is None
    assert list(tmp_path.rglob("*.states"))
    check(Layered(model, snapshots, MORE_SPECS).run(), expected)
    assert len({handle.codes_hash for _, handle in expected.values()}) == len(expected) - 1  # none of "int4" and "16"
