"""``python -m kbit.bench``: tables, files, errors; the decode step is OPT's; the roofline's numbers and figure."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from analysis.figures import style
from kbit import QuantSpec, quantize
from kbit.bench import figure, switch
from kbit.bench.__main__ import main
from kbit.bench.decode import PRESETS, Architecture, Compiler, Decoder, plain_linear, random_source
from kbit.bench.latency import Setting, Step, dequantized, kbit_linear, measure_step, sizes
from kbit.bench.latency import table as decode_table
from kbit.bench.matmul import CUBLAS, OURS, PEERS, ZEROS, Product, limit, measure, repeated
from kbit.bench.matmul import table as matmul_table
from kbit.bench.quantizers import Rates
from kbit.bench.quantizers import table as quantizers_table
from kbit.bench.roofline import Roofline
from kbit.bench.timing import Ceilings
from kbit.kernels.tiles import tile, untile
from tests import ROOT

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
TINY = Architecture(name="tiny", hidden=64, ffn=128, layers=5, heads=2, vocab=96, positions=32)
CEILINGS = Ceilings(copy=2.4e12, read=2.9e12, flops=700e12)


@pytest.fixture(scope="module")
def cpu_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run prints, and its directory."""
    out = tmp_path_factory.mktemp("bench") / "new"
    options = ["--values", "262144", "--repeats", "1", "--bits", "4", "--dtypes", "int", "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kbit.bench", *options, "--out", str(out)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout, out


def test_the_table_has_our_row_and_those_of_bitsandbytes_where_it_is_installed(cpu_run: tuple[str, Path]) -> None:
    printed, _ = cpu_run
    assert "262,144 float16 values, block 64" in printed
    figures = r"(\W+[\d.,]+\W+[\d.]+%\W+[\d,]+){2}"
    assert re.search("int4 b64" + figures, printed)
    for peer in ("8 bits", "nf4", "fp4"):
        assert bool(re.search(f"bitsandbytes, {peer}" + figures, printed)) == (find_spec("bitsandbytes") is not None)


def test_calls_that_wait_for_a_gpu_have_a_column_of_their_own() -> None:
    rate = partial(Rates, bits=4, values=2000, nbytes=6e3, quantize_seconds=2e-6, dequantize_seconds=3e-6)
    found = [rate(name="ours", waited_seconds=4e-6), rate(name="a peer", waited_seconds=None)]
    table = quantizers_table(found, limit=4e9, blocksize=64, device="cpu")
    assert table.header[-1] == "with wait\nGB/s"
    assert [row[1] for row in table.body] == ["3", "3"]
    assert [row[-1] for row in table.body] == ["1.5", "-"]
    assert [r["quantize_waited_bytes_per_second"] for r in table.records] == [pytest.approx(1.5e9), None]
    alone = quantizers_table(found[1:], limit=4e9, blocksize=64, device="cpu")
    assert len(alone.header) == len(alone.body[0]) == len(table.header) - 1


def test_the_files_hold_every_number_and_where_it_comes_from(cpu_run: tuple[str, Path]) -> None:
    _, out = cpu_run
    report = json.loads((out / "kernels.json").read_text())
    assert report["options"]["bits"] == [4]
    assert report["environment"]["torch"] == torch.__version__
    ours = report["quantizers"][0]
    assert ours["bytes"] == 262144 * (2 + 4.25 / 8)
    assert ours["quantize_bytes_per_second"] == pytest.approx(ours["bytes"] / ours["quantize_seconds"])
    rows = list(csv.DictReader((out / "quantizers.csv").open()))
    assert [float(r["dequantize_seconds"]) for r in rows] == [r["dequantize_seconds"] for r in report["quantizers"]]
    assert all(r["date"] == report["environment"]["date"] for r in rows)
    assert f"| int4 b64 | {ours['quantize_bytes_per_second'] / 1e9:.3g} |" in (out / "kernels.md").read_text()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--roofline --device cpu", "--roofline needs an NVIDIA GPU"),
        ("--model --device cpu", "--model opt-6.7b needs an NVIDIA GPU"),
        ("--only matmul --device cpu", "--only matmul needs an NVIDIA GPU"),
        ("--shapes 4096x4096 --device cpu", "--shapes needs an NVIDIA GPU"),
        ("--shapes 4096", "'4096' is no ROWSxCOLUMNS"),
        ("--model gpt-5", "choose from"),
        ("--model --roofline", "not allowed with"),
        ("--switch --model", "not allowed with"),
        ("--switch opt-9b", "choose from"),
        ("--tasks piqa=x.jsonl", "--tasks belongs to --evaluation"),
        ("--evaluation opt-1.3b", "--evaluation needs --tasks"),
        ("--evaluation opt-1.3b --tasks piqa=x.jsonl", "--tokenizer DIR names one"),
        ("--evaluation opt-9b --tasks piqa=x.jsonl", "'opt-9b' is no directory, and none of pythia-160m"),
        ("--evaluation sweeps --tasks pique=x.jsonl", "'pique' is none of lambada_openai, piqa"),
        ("--evaluation sweeps --tasks piqa=x.jsonl", "'x.jsonl' is no file"),
        ("--evaluation sweeps --documents 0 --tasks piqa=x.jsonl", "at least 1"),
        ("--bits 9", "2 to 8 are possible"),
        ("--bits 16", "16 bits are measured in any case"),
        ("--blocksize 0", "at least 1"),
        ("--rows 16 0", "at least 1"),
        ("--rows 16 --device cpu", "--rows needs an NVIDIA GPU"),
        ("--zero-points --device cpu", "--zero-points needs an NVIDIA GPU"),
        ("--block-floats --device cpu", "--block-floats needs an NVIDIA GPU"),
        ("--block-floats --bits 3 5", "--block-floats: these have 4, 6, 8 bits"),
        ("--zero-points --only quantizers", "--zero-points belongs to the products"),
        ("--block-floats --switch small", "--block-floats belongs to the products"),
        ("--batch 2", "--batch belongs to --model"),
        ("--out /dev/null/there --values 64", "name a directory that can be written"),
        ("--device cpu --impl cuda --values 64", "cuda"),
    ],
)
def test_bad_input_is_refused_with_the_reason(
    options: str, why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        main(options.split())
    assert end.value.code == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(("options", "why"), [("100x100", "a multiple of 64"), ("0x64", "W is ROWSxCOLUMNS")])
def test_a_shape_the_kernel_does_not_take_is_refused(
    options: str, why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # it is refused before any GPU is asked
    with pytest.raises(SystemExit):
        main(["--device", "cuda", "--shapes", options])
    assert why in capsys.readouterr().err


def test_help_names_the_three_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("--roofline", "--model", "--shapes", "--out DIR", *PRESETS))


def test_a_weight_repeated_is_the_layout_of_the_matrix_repeated() -> None:
    strip = torch.randn(128, 192, generator=torch.Generator().manual_seed(1)).half()
    spec = QuantSpec(bits=5, dtype="normal", blocksize=64)
    long = repeated(tile(quantize(strip, spec), torch.float16), 3)
    assert long.n == 384
    assert torch.equal(untile(long), untile(tile(quantize(strip.repeat(3, 1), spec), torch.float16)))


def test_tasks_are_timed_beside_hflm_with_equal_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = ROOT / "sweeps" / "demo"
    tasks = [f"{demo}/tasks/{name}.yaml={demo}/text/{name}.jsonl" for name in ("jargon_choice", "jargon_lastword")]
    model = str(demo / "models" / "neox-xs")
    main(["--evaluation", model, "--tasks", *tasks, "--documents", "12", "--out", str(tmp_path), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("HFLM s", "of ceiling", "jargon_choice", "jargon_lastword", "together"))
    written = json.loads((tmp_path / "evaluation.json").read_text())
    choice, last = written["evaluation"]
    assert (choice["sharing"], last["sharing"]) == ("shared", "nothing to share")
    assert choice["tokens"] < 0.8 * choice["tokens_apart"]
    assert last["tokens"] == last["tokens_apart"]
    for record in (choice, last):
        assert record["documents"] == 12
        assert record["rms"] < 1e-3
        assert record["moved"] == 0
        assert min(record[name] for name in ("peer", "ours", "first", "encoding", "flops", "ceiling_flops")) > 0
    alone, compared = written["agreement"]
    assert compared["tokens"] == alone["tokens"] == 2048
    assert min(compared["seconds"], alone["seconds"], alone["refer_seconds"]) > 0


# The decode step.


def test_a_decode_step_has_the_logits_of_transformers_opt() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(3)
    config = OPTConfig(
        vocab_size=TINY.vocab,
        hidden_size=TINY.hidden,
        ffn_dim=TINY.ffn,
        num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads,
        max_position_embeddings=TINY.positions,
        word_embed_proj_dim=TINY.hidden,
    )
    opt = OPTForCausalLM(config).eval()
    for parameter in opt.parameters():  # biases and norms too, so that one left out shows
        nn.init.normal_(parameter, std=0.2)
    tokens = torch.tensor([[5, 17, 2, 80, 33, 9], [1, 1, 60, 7, 95, 4]])
    with torch.no_grad():
        past = opt(tokens[:, :-1], use_cache=True).past_key_values
        weights = opt_weights(opt, [(layer.keys.clone(), layer.values.clone()) for layer in past.layers])
        expected = opt(tokens[:, -1:], past_key_values=past).logits[:, -1]
        ours = Decoder(TINY, lambda name, shape: weights[name].view(shape), plain_linear, batch=2, context=6)
        found = ours(tokens[:, -1], torch.tensor([5]))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    parameters = TINY.linear_weights + TINY.other_parameters
    assert parameters == sum(p.numel() for p in opt.parameters())
    assert sizes(ours)[1] == 4 * parameters


def opt_weights(opt: nn.Module, past: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """transformers' parameters by our names; a slot of the cache is free."""
    decoder = opt.model.decoder
    found = {"tokens": decoder.embed_tokens.weight, "positions": decoder.embed_positions.weight}
    norms = {"norm": decoder.final_layer_norm}
    for i, (layer, (keys, values)) in enumerate(zip(decoder.layers, past, strict=True)):
        name, attention = f"layers.{i}", layer.self_attn
        norms |= {f"{name}.attention_norm": layer.self_attn_layer_norm, f"{name}.ffn_norm": layer.final_layer_norm}
        norms |= {f"{name}.fc1": layer.fc1, f"{name}.fc2": layer.fc2, f"{name}.out": attention.out_proj}
        for kind in ("weight", "bias"):
            parts = [getattr(m, kind) for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
            found[f"{name}.qkv.{kind}"] = torch.cat(parts)
        free = torch.full_like(keys[:, :, :1], 7.0)
        found |= {f"{name}.keys": torch.cat([keys, free], 2), f"{name}.values": torch.cat([values, free], 2)}
    for name, module in norms.items():
        found |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    return {name: tensor.detach() for name, tensor in found.items()}


def decoder(bits: int, *, compiler: Compiler | None = None, device: str = "cpu") -> Decoder:
    make = partial(kbit_linear, spec=QuantSpec(bits=bits, dtype="normal", blocksize=64))
    dtype = torch.float32 if device == "cpu" else torch.float16
    source = random_source(device, dtype)
    return Decoder(TINY, source, plain_linear if bits == 16 else make, batch=2, context=8, compiler=compiler)


@pytest.mark.parametrize("bits", [16, 3])
@torch.no_grad()
def test_each_piece_compiles_as_one_graph_and_one_serves_all_layers(bits: int) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    tokens, position = torch.tensor([3, 50]), torch.tensor([7])
    model = decoder(bits, compiler=partial(torch.compile, fullgraph=True, dynamic=False, backend=count))
    compiled = model(tokens, position)
    assert len(graphs) == 3
    assert torch.equal(compiled, decoder(bits)(tokens, position))


@torch.no_grad()
def test_a_k_bit_step_is_that_of_its_weights_dequantized() -> None:
    tokens, position = torch.tensor([3, 50]), torch.tensor([7])
    model = decoder(4)
    found, expected = model(tokens, position), model.reference(tokens, position, dequantized)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    plain = decoder(16)(tokens, position)
    assert not torch.allclose(found, plain, rtol=1e-2)  # the weights really are quantized


def test_a_step_reads_all_but_the_position_embeddings_and_the_size_is_without_the_cache() -> None:
    model = decoder(16)
    read, size = sizes(model)
    cache = 4 * 2 * TINY.layers * 2 * 8 * TINY.hidden
    assert size == 4 * (TINY.linear_weights + TINY.other_parameters)
    assert read == size + cache - 4 * (TINY.positions + 2) * TINY.hidden


def test_a_context_beyond_the_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 32 tokens"):
        Decoder(TINY, random_source("cpu", torch.float32), plain_linear, context=33)


def test_the_table_of_decode_steps_has_ratios_to_16_bits_and_to_the_limit_of_bytes() -> None:
    sizes_ = {"read_bytes": 2900, "model_bytes": 10**9, "peak_bytes": 2 * 10**9, "error": 1e-4}
    steps = [Step(bits=16, seconds=4e-9, **sizes_), Step(bits=4, seconds=2e-9, **sizes_ | {"read_bytes": 1450})]
    setting = Setting(model=TINY, blocksize=64, batch=1, context=8)
    found = decode_table(steps, setting, CEILINGS, device="a GPU")
    assert found.body[1] == ["4", "0.000", "2.00x", "0.000", "2.00x", "25%", "1.00", "2.00", "1.0e-04"]
    assert found.records[1]["limit_seconds"] == pytest.approx(1450 / CEILINGS.read)
    alone = decode_table(steps[1:], setting, CEILINGS, device="a GPU")
    assert alone.records[0]["speedup"] is None


# Changing the cell.


def test_a_run_that_changes_cells_compares_their_bits_and_has_their_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--switch", "--device", "cpu", "--repeats", "1", "--bits", "3", "--dtypes", "int", "quantile"]
    main([*options, "--out", str(tmp_path)])
    assert "small" in capsys.readouterr().out
    report = json.loads((tmp_path / "switch.json").read_text())
    plain, fitted = report["switch"]
    assert (plain["dtype"], fitted["dtype"]) == ("int", "quantile")
    assert plain["equal"] == fitted["equal"] == 1
    moved = switch.SMALL.linear_weights * (2 * 4 + 2 * 3.25 / 8)  # float32 on a CPU
    assert plain["later_limit_seconds"] == pytest.approx(moved / plain["copy_bytes_per_second"])
    assert plain["first_limit_seconds"] == plain["later_limit_seconds"]
    assert fitted["first_limit_seconds"] > fitted["later_limit_seconds"]
    assert all(r["later_seconds"] > r["later_limit_seconds"] for r in report["switch"])


def test_the_table_of_switches_has_the_link_as_a_limit_and_says_where_bits_differ() -> None:
    rates = switch.Rates(copy=100e9, link=1e9)
    model = switch.random_model(TINY, "cpu")
    spec = QuantSpec(bits=4, dtype="int")
    values = TINY.linear_weights
    near, far = (switch.limit_seconds(model, spec, rates, linked=linked, first=True) for linked in (False, True))
    assert near == pytest.approx(values * (8 + 2 * 4.25 / 8) / 100e9)
    assert far == pytest.approx(values * 4 / 1e9)
    found = switch.Switch(
        spec=spec, place="x", first=2.0, later=1.0, first_limit=0.5, later_limit=0.25, old=8.0, equal=False
    )
    setting = switch.Setting(model=TINY, blocksize=64, device="cpu", repeats=1)
    made = switch.table([found], setting, rates, ["a note"])
    assert made.body[0][1:] == ["2.000", "0.500", "4.0x", "1.000", "0.250", "4.0x", "8.000", "8.0x", "NO"]
    assert made.records[0]["equal"] == 0
    assert "1.0 GB/s" in made.notes[1]


# The roofline.


def product(bits: int, rows: int, efficiency: float = 0.8) -> Product:
    """One that reads its weight at a share of the bandwidth."""
    n, k = 1024, 512
    nbytes = int(n * k * 16 / limit(bits, 64) / 8)
    seconds = nbytes / (efficiency * CEILINGS.read)
    return Product(
        kernel=CUBLAS if bits == 16 else OURS, bits=bits, shape=(n, k), rows=rows, seconds=seconds, nbytes=nbytes
    )


def roofline(efficiency: float = 0.8) -> Roofline:
    products = [
        product(bits, rows, 1.0 if bits == 16 else efficiency) for bits in (16, *range(3, 9)) for rows in (1, 8, 64)
    ]
    return Roofline(ceilings=CEILINGS, products=products, blocksize=64, device="a GPU")


def test_intensity_roof_and_speedup_are_those_of_the_bytes() -> None:
    found = roofline()
    four = found.product(4, 8)
    assert four.moved == 1024 * 512 * 4.25 / 8 + 2 * 8 * (1024 + 512)
    assert four.intensity == 2 * 8 * 1024 * 512 / four.moved
    assert found.roof(10.0) == 10 * CEILINGS.read
    assert found.roof(1e6) == CEILINGS.flops
    assert found.speedup(four) == pytest.approx(0.8 * 16 / 4.25, rel=1e-3)
    assert limit(4, 64) == 16 / 4.25
    assert limit(4, 64, 8) == 16 / 4.375
    assert limit(16, 64) == 1
    record = next(r for r in found.table().records if r["bits"] == 4 and r["rows"] == 8)
    assert record["of_roof"] == pytest.approx(four.flops / (four.intensity * CEILINGS.read))


def test_the_table_of_products_has_microseconds_and_ratios_and_leaves_out_what_is_missing() -> None:
    found = [product(16, 1), product(16, 8), product(4, 1), product(4, 8), product(3, 8)]
    rows = matmul_table(found, 64, "a GPU").body
    assert rows[0] == ["limit", "", "", "3.76x", "4.92x"]
    assert rows[1][-1] == "-"
    assert [cell.split("\n")[1] for cell in rows[2][3:]] == ["3.76x", "4.92x"]


def test_the_figure_is_written_as_png_and_svg(tmp_path: Path) -> None:
    paths = figure.write_figure(roofline(), tmp_path / "new")
    assert [p.name for p in paths] == ["roofline-1024x512.png", "roofline-1024x512.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert "8-bit" in paths[1].read_text()


@pytest.mark.parametrize("efficiency", [0.9, 0.3])
def test_no_two_texts_of_the_figure_overlap_and_none_leaves_it(efficiency: float) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    with rc_context(figure.RC):
        fig = figure.draw(roofline(efficiency))
        canvas = FigureCanvasAgg(fig)
        canvas.draw()
        ticks = [t for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for t in (*axis.majorTicks, *axis.minorTicks)]
        ticks = {label for tick in ticks for label in (tick.label1, tick.label2)}
        texts = [t for t in fig.findobj(Text) if t.get_text() and t not in ticks and t.get_rotation() == 0]
        # Text's own extent: an annotation's would take in its leader line.
        boxes = {t.get_text(): Text.get_window_extent(t, canvas.get_renderer()) for t in texts}
    assert {"3-bit", "16-bit (cuBLAS)"} <= boxes.keys()
    for (one, a), (other, b) in combinations(boxes.items(), 2):
        assert not a.overlaps(b), (one, other)
    width, height = fig.bbox.width, fig.bbox.height
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= width and b.y1 <= height for b in boxes.values())


@given(st.lists(st.floats(0, 5), min_size=1, max_size=8), st.floats(0.01, 1))
def test_labels_keep_their_order_and_distance(values: list[float], gap: float) -> None:
    heights = figure.spread(values, gap)
    placed = sorted(zip(values, heights, strict=True))
    assert all(b[1] - a[1] >= gap * 0.999 for a, b in pairwise(sorted(placed, key=lambda p: p[1])))
    assert all(a[1] <= b[1] for a, b in pairwise(placed) if a[0] < b[0])
    if all(b - a >= gap for a, b in pairwise(sorted(values))):
        assert heights == values


def test_the_look_is_that_of_the_studys_figures() -> None:
    assert {bits: (look.colour, look.marker) for bits, look in style.BITS_STYLE.items()} == figure.BITS_STYLE
    assert figure.INK == style.INK
    assert figure.RC.items() <= style.RC.items()


# On a GPU.


@needs_gpu
def test_products_and_ceilings_are_measured_on_a_gpu() -> None:
    said: list[str] = []
    found = measure([(4096, 4096)], [3, 4], [1, 100], 64, also=[*PEERS, *ZEROS], say=said.append)
    kernels = {p.label for p in found}
    assert {CUBLAS, "k=3", "k=4", "k=3, zero points", "k=4, HQQ"} <= kernels
    assert all(p.seconds > p.moved / 8e12 for p in found)  # no GPU of today is faster than 8 TB/s
    assert len(found) == 2 * len(kernels)


@needs_gpu
@pytest.mark.parametrize("bits", [16, 8, 3])
def test_a_captured_step_agrees_with_its_weights_dequantized(bits: int) -> None:
    torch.compiler.reset()
    compiler = partial(torch.compile, fullgraph=True, dynamic=False)
    step = measure_step(decoder(bits, compiler=compiler, device="cuda"), bits, batch=2, context=8)
    assert step.error < 0.01
    assert step.peak_bytes > step.model_bytes


def test_a_checkpoint_is_written_and_quantized_as_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--write", "small", "--to", str(tmp_path / "model"), "--device", "cpu"])
    main(["--load", str(tmp_path / "model"), "--device", "cpu", "--bits", "3", "--out", str(tmp_path / "out")])
    assert "normal3 b64, cold" in capsys.readouterr().out
    records = json.loads((tmp_path / "out" / "loading.json").read_text())["loading"]
    assert [record["cache"] for record in records] == ["cold", "warm"]
    assert records[1]["equal"] == 1
    for record in records:
        assert record["bytes"] > 2 * switch.SMALL.linear_weights
        assert record["disk_seconds"] > 0
        assert record["open_seconds"] < record["seconds"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float16)
    assert sum(p.numel() for p in model.parameters()) * 2 == pytest.approx(records[0]["bytes"], rel=0.01)
    assert model.model.decoder.layers[0].fc1.weight.float().std().item() == pytest.approx(0.02, rel=0.05)


def test_a_checkpoint_runs_layer_by_layer_and_whole_with_equal_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--write", "small", "--to", str(tmp_path / "model"), "--device", "cpu"])
    options = ["--tokens", "128", "--batch-tokens", "64", "--device", "cpu", "--out", str(tmp_path / "out")]
    main(["--layered", str(tmp_path / "model"), *options])
    said = capsys.readouterr().out
    assert "9 cells on 128 tokens in one pass" in said
    assert "Extrapolated to OPT-175B" in said
    records = json.loads((tmp_path / "out" / "layered.json").read_text())["layered"]
    assert [record["same_bits"] for record in records] == [1] * 9
    assert len({record["loss"] for record in records}) == 9
    states = 9 * 128 * switch.SMALL.hidden * 4
    assert all(record["states_host_memory_bytes"] == states for record in records)
    assert all(record["computing_seconds"] > 0 and record["ratio"] > 0 for record in records)


def test_gptq_is_timed_whole_and_layer_by_layer_with_the_same_codes(tmp_path: Path) -> None:
    options = ["--samples", "2", "--layers", "1", "--bits", "3", "--blocksize", "128", "--device", "cpu"]
    main(["--gptq", "small", *options, "--out", str(tmp_path)])
    records = json.loads((tmp_path / "gptq.json").read_text())["gptq"]
    assert [(r["way"], r["cells"]) for r in records] == [("whole", 1), ("layer by layer", 1), ("layer by layer", 3)]
    a = switch.SMALL
    layer = 4 * a.hidden**2 + 2 * a.hidden * a.ffn
    packed = layer * (3 + 19 / 128) / 8 + 4 * (a.vocab + a.positions) * a.hidden
    batch = 2 * a.positions * 4 * (4 * a.hidden + 3 * a.ffn)
    for record in records:
        assert record["codes_as_whole"] == "yes"
        assert record["limit_bytes"] == pytest.approx(packed + 2 * 4 * layer + 4 * 4 * a.ffn**2 + batch, abs=2)
        assert record["seconds_per_cell_of_all_layers"] == record["seconds"] * a.layers / record["cells"]
        assert record["peak_bytes"] is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gptq", "small", "--layers", "9"], "--layers 9: small has 4"),
        (["--gptq", "small", "--bits", "3", "4"], "--gptq quantizes to one width"),
        (["--samples", "3"], "--samples belongs to --gptq"),
        (["--gptq", "small", "--samples", "0"], "--samples 0: at least 1 is needed"),
        (["--layered", "/nowhere"], "--layered /nowhere"),
        (["--limit-gb", "6"], "--limit-gb belongs to --layered"),
        (["--load", "/nowhere"], "--load /nowhere"),
        (["--write", "small"], "belong together"),
        (["--readers", "3"], "--readers belongs to --load"),
    ],
)
def test_bad_input_of_loading_is_refused(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*options, "--device", "cpu"])
    assert left.value.code == 2
    assert says in capsys.readouterr().err


def test_a_directory_that_holds_something_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit):
        main(["--write", "small", "--to", str(tmp_path), "--device", "cpu"])
    assert "is there already" in capsys.readouterr().err
