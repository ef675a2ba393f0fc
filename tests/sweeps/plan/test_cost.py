"""What a study costs is known before anything like it was measured, within a factor of two."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kbit.calibration import Calibration
from kbit.evaluation.predicted import NOISE_PASSES
from kbit.evaluation.spec import EvalSpec
from kbit.spec import QuantSpec, spec_of
from kbit.specs.mixed import MixedSpec
from sweeps.options import Options
from sweeps.plan import accuracy
from sweeps.plan.accuracy import accuracy_of, compared
from sweeps.plan.cost import CostModel, load_seconds, tokens_of
from sweeps.plan.learned import LATEST
from sweeps.plan.pack import Pack
from sweeps.plan.packs import Known, Packing, make_plan
from sweeps.store.rows import cell_row
from sweeps.store.schema import arrow_schema
from sweeps.study.cell import Cell, ModelRef
from sweeps.study.resolve import build_study
from tests.conftest import Launch
from tests.sweeps.plan.known_costs import cost_of, row
from tests.sweeps.plan.test_order import MANIFEST
from tests.sweeps.studies import composed
from tests.sweeps.worker.test_worker import pack_of

A, B, C = (
    ModelRef(family="neox", name=f"neox-{s}", params=n, path=f"/{s}", weights_hash=s * 64)
    for s, n in (("a", 10**6), ("b", 10**7), ("c", 10**9))
)
TEXT = EvalSpec(kind="perplexity", name="x", dataset="sha256:x", compute_dtype="float32", limit=1000, window=512)
AGREEMENT = replace(TEXT, kind="agreement", name="x_agreement")
TIMED = EvalSpec(kind="latency", name="x_latency", dataset="sha256:x", compute_dtype="float32", device="cpu (x)")
INT3, INT4, NF4 = (QuantSpec(bits=b, dtype=d) for b, d in ((3, "int"), (4, "int"), (4, "normal")))
DEMO_SECONDS = 189.0
DEMO_GPU_SECONDS = 52.0
"""What README says of the demo on two cores of a server, and on one H100."""


def test_the_first_prediction_of_the_demo_is_right_within_a_factor_of_two(here: Launch) -> None:
    said = here("mode=plan", "executor.device=cpu", "executor.workers=2").stdout
    match = re.search(r"wall time +(\d+) min predicted with 2 cpu", said)
    assert match is not None, said
    assert DEMO_SECONDS / 2 < float(match[1]) * 60 < DEMO_SECONDS * 2


def test_the_first_prediction_of_the_demo_on_a_gpu_is_right_within_a_factor_of_two() -> None:
    arguments = ["mode=plan"]
    options = Options.from_config(composed(*arguments), arguments)
    study = build_study(options.study, device="cuda", device_name=str, strict=True, progress=lambda _: None)
    plan = make_plan(
        study.manifest, Known(), retry=(), cost=lambda: CostModel(device="cuda"), packing=Packing(workers=1)
    )
    assert DEMO_GPU_SECONDS / 2 < plan.seconds < DEMO_GPU_SECONDS * 2


def cost(*rows: dict[str, Any], device: str = "cpu") -> CostModel:
    return CostModel.from_rows(rows, device)


def known(**changes: Any) -> dict[str, Any]:
    return {**row(A, "x", 1000, 3.0, quantize_seconds=None), **changes}


def quantized(label: str, seconds: float, **changes: Any) -> dict[str, Any]:
    dtype = "int" if label.startswith("int") else "normal"
    return known(key=label, label=label, dtype=dtype, bits=4, quantize_seconds=seconds, **changes)


def test_what_is_stored_of_like_cells_is_what_is_predicted() -> None:
    of = cost(*(known(seconds=s) for s in (1.0, 2.0, 9.0)))
    assert of.cell_seconds(Cell(model=A, quant=QuantSpec(bits=16)), [TEXT]) == 2.0
    # A failure, and what another kind of device took, say nothing.
    guess = cost().cell_seconds(Cell(model=A, quant=QuantSpec(bits=16)), [TEXT])
    assert (
        cost(known(seconds=None), known(device="NVIDIA H100")).cell_seconds(
            Cell(model=A, quant=QuantSpec(bits=16)), [TEXT]
        )
        == guess
    )
    # Another limit, window or dtype is another measurement: its rate counts, not its seconds.
    assert of.cell_seconds(Cell(model=A, quant=QuantSpec(bits=16)), [replace(TEXT, limit=500)]) != 2.0


def test_the_latest_values_count() -> None:
    early = [known(seconds=50.0, finished="2026-01-01")] * LATEST
    late = [known(seconds=5.0, finished="2026-01-02")] * LATEST
    assert cost(*late, *early).cell_seconds(Cell(model=A, quant=QuantSpec(bits=16)), [TEXT]) == 5.0


def test_quantizing_is_learned_by_data_type_and_counted_once_for_a_cell() -> None:
    rows = [known(), quantized("int4 b64", 2.0), quantized("nf4 b64", 7.0)]
    rows += [quantized("int4 b64", 2.0, eval="y")]  # the same quantization, in the row of another evaluation
    of = cost(*rows)
    assert of.cell_seconds(Cell(model=A, quant=INT4), [TEXT]) == pytest.approx(3.0 + 2.0)
    assert of.cell_seconds(Cell(model=A, quant=NF4), [TEXT]) == pytest.approx(3.0 + 7.0)
    # Of other bits of a data type, what the data type takes.
    assert of.cell_seconds(Cell(model=A, quant=INT3), [TEXT]) == pytest.approx(3.0 + 2.0)
    other = replace(TEXT, name="y")
    both = of.cell_seconds(Cell(model=A, quant=INT4), [TEXT, other])
    assert both == pytest.approx(2.0 + 3.0 + 3.0)


def test_a_model_that_was_not_measured_goes_by_the_nearest_in_size() -> None:
    slow_a, fast_c = known(seconds=60.0), row(C, "x", 1000, 0.5, quantize_seconds=None)
    base = QuantSpec(bits=16)
    guess = cost().cell_seconds(Cell(model=B, quant=base), [TEXT])
    assert (
        cost(slow_a, fast_c).cell_seconds(Cell(model=B, quant=base), [TEXT])
        == cost(slow_a).cell_seconds(Cell(model=B, quant=base), [TEXT])
        > 10 * guess
    )
    near_c = replace(B, params=9 * 10**8)
    assert cost(slow_a, fast_c).cell_seconds(Cell(model=near_c, quant=base), [TEXT]) == pytest.approx(
        cost(fast_c).cell_seconds(Cell(model=near_c, quant=base), [TEXT])
    )


def test_another_evaluation_of_a_model_goes_by_the_rate_of_its_kind() -> None:
    base, longer = QuantSpec(bits=16), replace(TEXT, name="z", limit=50_000)
    guess = cost().cell_seconds(Cell(model=A, quant=base), [longer])
    twice_as_slow = cost(known(seconds=2 * cost().cell_seconds(Cell(model=A, quant=base), [TEXT])))
    assert twice_as_slow.cell_seconds(Cell(model=A, quant=base), [longer]) == pytest.approx(2 * guess)


def test_what_comes_with_another_costs_nothing_at_first_and_then_its_part() -> None:
    cell = Cell(model=A, quant=QuantSpec(bits=16))
    assert cost().cell_seconds(cell, [TEXT, AGREEMENT]) == cost().cell_seconds(cell, [AGREEMENT])
    parts = [known(seconds=1.5), known(seconds=1.5, eval="x_agreement", eval_kind="agreement")]
    assert cost(*parts).cell_seconds(cell, [TEXT, AGREEMENT]) == pytest.approx(3.0)


def test_what_is_timed_in_k_bits_goes_by_its_bits() -> None:
    timed = {"eval": "x_latency", "eval_kind": "latency", "window": None, "limit": None, "n_tokens": 56_576}
    rows = [known(**timed, bits=16, label="16-bit", method="baseline", seconds=10.0)]
    rows += [known(**timed, bits=4, label="int4 b64", seconds=100.0)]
    of = cost(*rows)
    assert of.cell_seconds(Cell(model=A, quant=QuantSpec(bits=16)), [TIMED]) == 10.0
    assert of.cell_seconds(Cell(model=A, quant=INT4), [TIMED]) > 99
    # On a CPU weights in k bits are dequantized at each step.
    assert cost().cell_seconds(Cell(model=B, quant=INT4), [TIMED]) > 3 * cost().cell_seconds(
        Cell(model=B, quant=QuantSpec(bits=16)), [TIMED]
    )


def test_what_a_process_does_first_is_predicted_apart_from_the_rest() -> None:
    def took(job: str, seconds: float, model: ModelRef, **changes: Any) -> dict[str, Any]:
        about = {"launch": "l", "pack": f"{job} {model.name}", "job": job}
        return {**row(model, "x", 1000, seconds, quantize_seconds=None), **about, **changes}

    cell = Cell(model=A, quant=QuantSpec(bits=16))
    of = cost(took("p", 9.0, A), took("p", 2.0, A, key="k"), took("p", 2.0, A, key="m"))
    assert (of.cell_seconds(cell, [TEXT], first=True), of.cell_seconds(cell, [TEXT])) == (9.0, 2.0)
    # A model of which there is nothing but a first one: as much slower as it is for others.
    of = cost(took("q", 4.5, A), took("p", 8.0, B), took("p", 2.0, B, key="k"))
    assert of.cell_seconds(cell, [TEXT]) == pytest.approx(4.5 * 2 / 8)
    # The process's next pack of the model has nothing first: it is not predicted, and its values are learned as such.
    of = cost(took("p", 9.0, A), took("p", 2.0, A, key="k"), took("p", 2.0, A, key="m", pack="another"))
    pack = Pack(id="p", sweep="s", model=A, items=((cell, (TEXT,)), (cell, (TEXT,))), seconds=0.0)
    assert [pack.predicted(of, warm=warm).item_seconds for warm in (False, True)] == [(9.0, 2.0), (2.0, 2.0)]


def test_loading_is_learned_by_model() -> None:
    of = cost(known(load_seconds=4.0), known(load_seconds=4.0, eval="y"), known(load_seconds=6.0, launch="m"))
    assert of.load(A) == 5.0
    assert of.load(B) == pytest.approx(5.0 * load_seconds(B) / load_seconds(A))
    assert cost().load(A) == load_seconds(A)


def test_a_pack_is_predicted_again_by_what_is_known_when_it_begins() -> None:
    pack, *_ = make_plan(
        MANIFEST, Known(), retry=(), cost=lambda: CostModel(device="cpu"), packing=Packing(cells=2)
    ).packs
    learned = cost_of({(pack.model.label, "x", None): 12.0}, [pack.model])
    again = pack.predicted(learned, warm=False)
    assert (again.id, again.items) == (pack.id, pack.items)
    assert again.item_seconds == pytest.approx((12.0, 12.0))
    assert again.seconds == pytest.approx(24.0)


def test_errors_are_of_what_packs_took_from_their_first_quantization_to_their_last_result() -> None:
    def stored(pack: str, start: int, end: int, predicted: float | None, model: str = "m") -> dict[str, Any]:
        at = partial(datetime, 2026, 1, 1, tzinfo=UTC)
        about = {"launch": "l", "pack": pack, "model": model, "quantize_seconds": 2.0, "predicted_seconds": predicted}
        return {**about, "started": at(second=start), "finished": at(second=end)}

    measured = [stored("b", 14, 22, 20.0), stored("a", 7, 12, 7.0), stored("a", 2, 6, 5.0), stored("c", 20, 30, None)]
    # One that began before the model's first had ended, and another model's, knew of none.
    measured += [stored("d", 13, 23, 24.0), stored("e", 40, 48, 9.0, model="other")]
    rows = pa.Table.from_pylist(measured, pa.schema([arrow_schema().field(name) for name in accuracy.COLUMNS]))
    first, later, d, other = compared(rows)
    assert (first.predicted, first.took, first.is_first) == (12.0, 12.0, True)
    assert (d.took, d.is_first, later.took, later.is_first, other.is_first) == (12.0, True, 10.0, False, True)
    assert accuracy_of(rows) == (
        "median error and 95th percentile of the time taken here: "
        "100% and 100% of 1 pack after a model's first; 10% and 91% of 3 packs before one of their model had ended"
    )
    assert accuracy_of(rows.slice(3, 1)) is None


def test_what_methods_need_first_is_predicted_apart_from_their_cells() -> None:
    data = Calibration(dataset="sha256:y", samples=16, length=512)
    cells = [Cell(model=A, quant=MixedSpec(budget=budget, dtype="int"), calibration=data) for budget in (3.25, 4.25)]
    first = cells[0].first
    assert first is not None
    assert first == cells[1].first
    plain, each = (cost().cell_seconds(cell, [TEXT]) for cell in (Cell(model=A, quant=INT3), cells[0]))
    assert plain < each < plain + 1
    table = cost().cell_seconds(first.cell, [first.eval])
    assert table == pytest.approx(NOISE_PASSES * 2 * 10**6 * 16 * 512 / 8e10, rel=0.01)


def test_calibration_is_counted_in_windows_cut_to_the_context() -> None:
    model = pack_of().model  # of 512 tokens
    data = Calibration(dataset="sha256:y", samples=16, length=2048)
    gptq, mixed = (
        spec_of({"dtype": "int", **m}) for m in ({"method": "gptq", "bits": 4}, {"method": "mixed", "budget": 4.25})
    )
    cells = {d.length: Cell(model=model, quant=gptq, calibration=d) for d in (data, replace(data, length=512))}
    assert cost().cell_seconds(cells[2048], [TEXT]) == cost().cell_seconds(cells[512], [TEXT])
    first = Cell(model=model, quant=mixed, calibration=data).first
    assert first is not None
    assert tokens_of(first) == NOISE_PASSES * 16 * 512 * 3 // 24  # it has 3 blocks, not 24
    unknown = Cell(model=A, quant=gptq, calibration=data)  # nobody knows its context
    assert cost().cell_seconds(unknown, [TEXT]) > cost().cell_seconds(
        replace(unknown, calibration=cells[512].calibration), [TEXT]
    )
    # What was stored of a cell tells a factor by the same count.
    row = {**quantized(cells[2048].quant_label, 8.0), **cell_row(cells[2048]), "device": "cpu", "finished": 1}
    learned = cost({name: row.get(name) for name in row})
    other = replace(cells[2048], quant=replace(gptq, bits=3))
    counted = cost()._quantize(other, packed=False)
    assert learned._quantize(other, packed=False) == pytest.approx(8.0)
    assert counted < 8.0


def test_noise_in_each_matrix_of_each_expert_is_counted(tmp_path: Path) -> None:
    config = {"model_type": "mixtral", "num_hidden_layers": 32, "num_local_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = Calibration(dataset="sha256:y", samples=16, length=512)
    mixture = replace(A, path=str(tmp_path), weights_hash="d" * 64)
    first = Cell(model=mixture, quant=MixedSpec(budget=4.25, dtype="int"), calibration=data).first
    assert first is not None
    assert tokens_of(first) == NOISE_PASSES * 16 * 512 * 32 * (4 + 2 * 8) // (24 * 4)


def test_stored_calibration_that_another_version_wrote_does_not_end_planning() -> None:
    data = {"dataset": "sha256:y", "samples": 16, "length": 512}

    def factor(calibration: str) -> float:
        learned = cost(quantized("int4", 8.0, method="gptq", calibration=calibration))
        (known, *_) = learned.quantizing.later.values.values()
        return 8.0 / known.factors[0]

    counted = factor(json.dumps(data))
    assert factor(json.dumps({**data, "drawn_by": "length"})) == counted
    none = factor("")
    assert none < counted
    for unread in ('{"samples": 16}', json.dumps({**data, "samples": "many"}), "[16]", "16", "{"):
        assert factor(unread) == none


def test_what_a_first_process_compiled_is_not_taken_for_what_quantizing_takes() -> None:
    """On a GPU the first pack compiled a kernel for each `int` cell: seconds, where a cell takes a hundredth of one."""

    def cells(model: ModelRef, pack: str, seconds: dict[str, float]) -> list[dict[str, Any]]:
        made = [f"{dtype}{bits} b64" for dtype in seconds for bits in (3, 4, 5)]
        return [
            {
                **row(model, "x", 1000, 0.02, device="NVIDIA H200", key=f"{pack} {label}", pack=pack, label=label),
                "quantize_seconds": seconds[label[:-5]],
                "dtype": label[:-5],
            }
            for label in made
        ]

    usual = {"float": 0.011, "dynamic": 0.013, "normal": 0.012, "quantile": 0.04}
    compiled = cells(A, "p", {"int": 2.5, **usual})
    of = cost(*compiled, device="cuda")
    int6, int4 = QuantSpec(bits=6, dtype="int"), QuantSpec(bits=4, dtype="int")
    for model, quant in ((A, int6), (B, int4)):
        assert of._quantize(Cell(model=model, quant=quant), packed=False) < 0.5
    # Where a second pack took as long, it takes that.
    of = cost(*compiled, *cells(A, "q", {"int": 2.5}), device="cuda")
    assert of._quantize(Cell(model=A, quant=int6), packed=False) == pytest.approx(2.5)
    # So does what took much the same of many cells of the model, as fitted data types do.
    slow = [c | {"label": f"lloyd4 b{n}", "key": str(n)} for n, c in enumerate(cells(A, "p", {"lloyd": 0.5}) * 2)]
    of = cost(*compiled, *slow, device="cuda")
    lloyd = Cell(model=A, quant=QuantSpec(bits=4, dtype="lloyd", blocksize=512))
    assert of._quantize(lloyd, packed=False) == pytest.approx(0.5)


def test_what_compiled_once_on_a_machine_is_no_part_of_what_cells_take() -> None:
    """Of several packs half the cells compiled a kernel: their mean would be 40 times what the next one takes."""
    rows = [quantized(f"int4 b{n}", 0.03 if n % 2 else 2.5, pack=str(n), device="NVIDIA H200") for n in range(40)]
    of = cost(*rows, device="cuda")
    for label in ("int4 b1000", "int4 b2"):  # a new one, and one that had compiled
        quant = QuantSpec(bits=4, dtype="int", blocksize=int(label.split("b")[1]))
        assert of._quantize(Cell(model=A, quant=quant), packed=False) == pytest.approx(0.03)
    # Measured again it tells of itself; by a single pack as far as others like it make that likely.
    again = cost(*rows, quantized("int4 b2", 0.2, pack="q", device="NVIDIA H200"), device="cuda")
    assert again._quantize(Cell(model=A, quant=quant), packed=False) == pytest.approx(4 * 0.03)


def test_a_label_that_no_pack_had_takes_what_others_first_took() -> None:
    """Each of a study's labels may compile something: of 80 packs most took an eighth more than was predicted."""
    first, again = (
        [quantized(f"int4 b{n}", seconds, pack=f"{seconds} {n % 2}", device="NVIDIA H200") for n in range(16, 32)]
        for seconds in (0.1, 0.02)
    )
    of = cost(*first, *again, device="cuda")
    seen, unseen = (Cell(model=A, quant=QuantSpec(bits=4, dtype="int", blocksize=size)) for size in (16, 512))
    assert of._quantize(seen, packed=False) == pytest.approx(0.02)
    assert of._quantize(unseen, packed=False) == pytest.approx(0.1)


def test_cells_that_calibrate_are_not_like_those_that_do_not() -> None:
    """They run the model on text, which is most of what a small one takes."""
    data = Calibration(dataset="sha256:y", samples=16, length=512)
    plain = QuantSpec(bits=4, dtype="int", outlier_fraction=0.01)
    spec, other = (replace(plain, outlier_fraction=part, outlier_criterion="activation") for part in (0.01, 0.02))
    cells = [Cell(model=A, quant=spec, calibration=data), Cell(model=A, quant=plain)]
    guess = [cost(device="cuda")._quantize(cell, packed=False) for cell in cells]
    assert guess[0] > guess[1] + 0.05
    rows = [
        {**quantized("", seconds), **cell_row(cell), "launch": pack, "pack": pack, "device": "NVIDIA H200"}
        for cell, seconds in zip(cells, (0.6, 0.02), strict=True)
        for pack in ("p", "q")
    ]
    of = cost(*rows, device="cuda")
    assert of._quantize(replace(cells[0], quant=other), packed=False) == pytest.approx(0.6)
    assert of._quantize(replace(cells[1], quant=replace(plain, bits=3)), packed=False) == pytest.approx(0.02)


def test_passes_with_noise_take_time_however_small_the_model() -> None:
    first = Cell(model=A, quant=MixedSpec(budget=4.25, dtype="int"), calibration=Calibration(dataset="sha256:y")).first
    assert first is not None
    alone = cost(device="cuda").cell_seconds(first.cell, [first.eval])
    # Measured on models of 3 to 8 blocks: 1.6 to 3 seconds for each.
    assert 24 * 1.3 < alone < 24 * 3


def test_a_method_that_was_not_measured_is_counted_not_scaled_by_another() -> None:
    gptq = Cell(model=A, quant=spec_of({"method": "gptq", "bits": 4, "dtype": "int"}))
    guess = cost()._quantize(gptq, packed=False)
    of = cost(*(quantized(f"int{n} b64", 1.0, pack=f"p{n}") for n in range(8)))
    assert guess < of._quantize(gptq, packed=False) <= 4 * guess


def test_a_prediction_is_the_same_whatever_was_predicted_before_it() -> None:
    cells = [
        Cell(model=model, quant=QuantSpec(bits=bits, dtype=dtype))
        for model in (A, B)
        for bits in (3, 4)
        for dtype in ("int", "float")
    ]
    of_another = [
        {**row(B, "x", 1000, 1.0, key=f"{label} of B", label=label, dtype=label[:-5]), "quantize_seconds": seconds}
        for label, seconds in (("int4 b64", 9.0), ("float4 b64", 1.0))
    ]
    for stored in ([], [quantized("int4 b64", 8.0)], of_another, [quantized("float3 b64", 5.0), *of_another]):
        shared = cost(*stored)
        found = [shared._quantize(cell, packed=False) for cell in cells]
        assert found == [cost(*stored)._quantize(cell, packed=False) for cell in cells]
        # Where nothing is stored, nothing but the model tells cells of a method apart.
        assert stored or len(shared._predicted) == 2


def test_what_passes_between_measurements_is_learned_by_cells() -> None:
    """Two evaluations share a pass: the second ends upon the first. Storing each takes a quarter of a second."""
    rows, at = [], datetime(2026, 1, 1, tzinfo=UTC)
    for number in range(6):
        at += timedelta(seconds=1.0)  # quantized
        for name, passes in (("x_agreement", 3.25), ("x", 0.25)):
            at += timedelta(seconds=passes)
            kind = "agreement" if name != "x" else "perplexity"
            stored = known(key=f"k{number}", eval=name, eval_kind=kind, seconds=1.5, pack="p", job="local/1")
            rows.append({**stored, "label": "int4 b64", "bits": 4, "quantize_seconds": 1.0, "finished": at})
    cell = Cell(model=A, quant=INT4)
    assert cost(*rows).cell_seconds(cell, [TEXT, AGREEMENT]) == pytest.approx(1.0 + 3.0 + 0.5)
    # A worker tells rows with their times as text.
    told = [{**r, "finished": str(r["finished"])} for r in rows]
    assert cost(*told).cell_seconds(cell, [TEXT, AGREEMENT]) == pytest.approx(4.5)
    # The wait of a job for its requeue is no part of it.
    later = [{**r, "job": "local/2", "finished": r["finished"] + timedelta(days=1)} for r in rows[6:]]
    assert cost(*rows[:6], *later).cell_seconds(cell, [TEXT, AGREEMENT]) == pytest.approx(4.5)


def test_what_is_quantized_within_a_cell_does_not_pass_between_its_measurements() -> None:
    """A latency is of the packed form, which is made when its turn comes."""
    rows, at = [], datetime(2026, 1, 1, tzinfo=UTC)
    for number in range(6):
        for spec, quantizing, seconds in ((TEXT, 1.0, 3.0), (TIMED, 20.0, 2.0)):
            at += timedelta(seconds=quantizing + seconds + 0.25)
            about = {"eval": spec.name, "eval_kind": spec.kind, "quantize_seconds": quantizing + number / 100}
            stored = known(key=f"k{number}", seconds=seconds, pack="p", job="local/1", label="int4 b64", bits=4)
            rows.append({**stored, **about, "finished": at})
    learned = cost(*rows)
    between = learned.cell_seconds(Cell(model=A, quant=INT4), [TEXT, TIMED])
    learned.between = type(learned.between)()
    learned._predicted.clear()
    assert between - learned.cell_seconds(Cell(model=A, quant=INT4), [TEXT, TIMED]) == pytest.approx(0.5, abs=0.1)
