"""Layouts of quantized weights: values equal those that the tools' own packages read, to the bit; bits are the files'.

tests/data/prequantized has layers of [32, 64] as AutoGPTQ 0.7.1, AutoAWQ 0.2.9, hqq 0.2.8 and compressed-tensors 0.20.1
wrote them on a CPU, each with the values that its package makes of them. bitsandbytes is asked here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kbit.errors import CheckpointError
from kbit.models.checkpoint import safetensors_header
from kbit.models.prequantized.layouts import LAYOUTS, QuantizedWeight, as_16_bit, quantized_weights, stored_as
from kbit.models.prequantized.words import affine, groups_of, pack_words, unpack_words
from kbit.models.refusals import check_config
from tests import ROOT

WRITTEN = sorted((ROOT / "tests" / "data" / "prequantized").glob("*.safetensors"))


def read(file: Path, settings: dict[str, Any], dtype: torch.dtype = torch.float16) -> tuple[QuantizedWeight, Tensor]:
    """The one quantized weight of a file, and its values."""
    header = [tensor for tensor in safetensors_header(file) if tensor.name != "reference"]
    (weight,) = quantized_weights({"quantization_config": settings}, header).values()
    tensors = load_file(file)
    return weight, weight.layout.read(weight, {role: tensors[p.name] for role, p in weight.parts.items()}, dtype)


def written(tmp_path: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> tuple[QuantizedWeight, Tensor]:
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        tmp_path / "m.safetensors",
    )
    return read(tmp_path / "m.safetensors", settings)


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.stem)
def test_values_are_those_of_the_package_that_wrote_them(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        settings = json.loads(opened.metadata()["quantization_config"])
    weight, values = read(file, settings)
    tensors = load_file(file)
    reference = tensors.pop("reference")
    assert torch.equal(values, reference.half())
    assert (weight.name, weight.shape) == ("layer.weight", (32, 64))
    assert weight.nbits == 8 * sum(tensor.nbytes for tensor in tensors.values())
    _, bits = stored_as({"quantization_config": settings}) or (None, frozenset())
    assert bits == {int("".join(c for c in file.stem if c.isdigit()) or 4)}


def test_every_layout_was_written_by_a_package() -> None:
    assert {file.stem.split("-")[0] for file in WRITTEN} == {"gptq", "awq", "hqq", "ct"}
    assert set(LAYOUTS) == {"gptq", "awq", "hqq", "compressed-tensors", "bitsandbytes"}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_in_4_bits(kind: str, nested: bool, tmp_path: Path) -> None:
    torch.manual_seed(4)
    original = (0.02 * torch.randn(300, 128)).half()  # 600 blocks: more than the 256 of a nested one
    packed, state = bnb.quantize_4bit(original, blocksize=64, quant_type=kind, compress_statistics=nested)
    tensors = {"layer.weight": packed, **{f"layer.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    weight, values = written(tmp_path, tensors, settings)
    codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), 1).view(300, 128).long()
    absmax = state.absmax.float()
    if nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(values, (state.code[codes] * absmax.view(300, 2).repeat_interleave(64, 1)).half())
    # The package's kernel for AVX-512 rounds a few values once more, to the next one.
    theirs = bnb.dequantize_4bit(packed, state)
    assert (values != theirs).float().mean() < 1e-3
    torch.testing.assert_close(values, theirs, rtol=2**-10, atol=0)
    assert (values - original).norm() < 0.13 * original.norm()
    assert (weight.name, weight.shape) == ("layer.weight", (300, 128))
    assert weight.nbits == 8 * sum(tensor.nbytes for tensor in tensors.values())
    assert weight.nbits / original.numel() == pytest.approx(4.39 if nested else 4.53, abs=0.01)


def test_bitsandbytes_in_8_bits(tmp_path: Path) -> None:
    torch.manual_seed(8)
    codes, rows, _ = bnb.int8_vectorwise_quant((0.02 * torch.randn(40, 96)).half())
    tensors = {"layer.weight": codes, "layer.SCB": rows, "layer.weight_format": torch.zeros((), dtype=torch.uint8)}
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    weight, values = written(tmp_path, tensors, settings)
    assert torch.equal(values, bnb.int8_vectorwise_dequant(codes, rows).half())
    assert weight.nbits == 8 * (40 * 96 + 4 * 40 + 1)
    tensors["layer.weight_format"] += 1
    with pytest.raises(CheckpointError, match="order of a GPU's kernel"):
        written(tmp_path, tensors, settings)


def test_version_2_of_gptq_stores_zero_points_as_they_are_and_groups_may_be_left_out(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    codes, zeros = (torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8) for shape in ((8, 64), (8, 2)))
    scales = torch.rand(8, 2, generator=generator).half()
    expected = (codes.float() - zeros.repeat_interleave(32, 1)) * scales.float().repeat_interleave(32, 1)
    found = {}
    for form, stored in (("gptq_v2", zeros), ("gptq", (zeros + 15) % 16)):
        tensors = {"layer.qweight": pack_words(codes, 4).t(), "layer.scales": scales.t()}
        tensors["layer.qzeros"] = pack_words(stored.t().contiguous(), 4)
        _, found[form] = written(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "checkpoint_format": form})
    assert torch.equal(found["gptq_v2"], expected.half())
    assert torch.equal(found["gptq"], expected.half())


LAST_IS_SHORT = {
    "gptq": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2", "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "awq of old": {"quant_method": "awq", "w_bit": 4, "q_group_size": 128},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"all": {"weights": {"num_bits": 4, "group_size": 128}}},
    },
}


def of_size(size: int | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with another size of a group; None leaves it out."""
    if "config_groups" in settings:
        return {**settings, "config_groups": {"all": {"weights": {"num_bits": 4, "group_size": size}}}}
    key = "q_group_size" if "q_group_size" in settings else "group_size"
    return {**settings, key: size} if size is not None else {k: v for k, v in settings.items() if k != key}


def in_two_groups(method: str, inputs: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A layer of 8 rows in two groups, with its codes less their zero point of 8, and scales, [8, 2]."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (8, inputs), generator=generator, dtype=torch.uint8)
    scale = torch.tensor([[1.0, 4.0]]).half().repeat(8, 1)
    zeros = torch.full((2, 8), 8, dtype=torch.uint8)
    tensors = {"l.scales": scale.t(), "l.qzeros": pack_words(zeros, 4), "l.qweight": pack_words(codes, 4).t()}
    if method == "awq":
        tensors["l.qweight"] = pack_words(codes.t()[:, [0, 2, 4, 6, 1, 3, 5, 7]].contiguous(), 4)
    if method == "compressed-tensors":
        tensors = {"l.weight_packed": pack_words(codes, 4), "l.weight_scale": scale}
        tensors["l.weight_shape"] = torch.tensor([8, inputs])
    return tensors, codes.float() - 8, scale.float()


@pytest.mark.parametrize("case", LAST_IS_SHORT)
def test_groups_are_of_the_size_that_the_configuration_says(case: str, tmp_path: Path) -> None:
    settings = LAST_IS_SHORT[case]
    tensors, codes, scale = in_two_groups(settings["quant_method"], 192)
    _, values = written(tmp_path, tensors, settings)
    assert torch.equal(values, (codes * scale.repeat_interleave(128, 1)[:, :192]).half())
    for size in (-1, 0, 32, 192, 256):  # of one group, or of six
        with pytest.raises(CheckpointError, match="the tensors of l do not fit together: "):
            written(tmp_path, tensors, of_size(size, settings))


@pytest.mark.parametrize("case", ["gptq", "awq"])
def test_groups_of_a_size_that_nothing_says_are_equal_ones(case: str, tmp_path: Path) -> None:
    settings = of_size(None, LAST_IS_SHORT[case])
    tensors, codes, scale = in_two_groups(case, 192)
    _, values = written(tmp_path, tensors, settings)
    assert torch.equal(values, (codes * scale.repeat_interleave(96, 1)).half())
    three = tensors | {name: tensors[name][[0, 0, 1]] for name in ("l.scales", "l.qzeros")}
    three["l.qweight"] = tensors["l.qweight"][: 160 if case == "awq" else 20]  # 160 columns
    with pytest.raises(CheckpointError, match="the tensors of l do not fit together: "):
        written(tmp_path, three, settings)


def test_compressed_tensors_takes_bits_by_layer_and_the_order_of_columns(tmp_path: Path) -> None:
    torch.manual_seed(5)
    codes, order = torch.randint(0, 4, (8, 64), dtype=torch.uint8), torch.randperm(64) // 16
    scale = torch.rand(8, 4).half()
    tensors = {"a.down.weight_packed": pack_words(codes, 2), "a.down.weight_shape": torch.tensor([8, 64])}
    tensors |= {"a.down.weight_scale": scale, "a.down.weight_g_idx": order.int()}
    groups = {
        "rest": {"targets": ["Linear"], "weights": {"num_bits": 8}},
        "down": {"targets": ["re:.*down"], "weights": {"num_bits": 2, "group_size": 16}},
    }
    settings = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    _, values = written(tmp_path, tensors, settings)
    assert torch.equal(values, ((codes.float() - 2) * scale.float()[:, order]).half())
    assert (stored_as({"quantization_config": settings}) or (0, 0))[1] == {2, 8}
    groups["down"]["targets"] = ["b.down"]  # the layer is of the group of all others then, whose codes take more words
    with pytest.raises(CheckpointError, match=r"tensors of a\.down do not fit together: weight_packed I32 \[8, 4\]"):
        written(tmp_path, tensors, settings)


@pytest.mark.parametrize("count", [1, 31, 32, 45, 96])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_lie_in_words_one_after_another_from_the_lowest_bit_on(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, count), dtype=torch.uint8)
    stream = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    flat = np.pad(stream.reshape(3, -1), ((0, 0), (0, -count * bits % 32)))
    words = torch.from_numpy(np.packbits(flat, axis=1, bitorder="little").view("<i4").copy())
    assert torch.equal(pack_words(codes, bits), words)
    assert torch.equal(unpack_words(words, bits, count), codes)


def test_pieces_of_rows_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale, zero = torch.randint(0, 9, (7, 12)), torch.rand(7, 3), torch.rand(7, 3)
    group = groups_of(12, 4, codes.device)
    whole = affine(codes, scale, zero, group, torch.bfloat16)
    monkeypatch.setattr("kbit.models.prequantized.words.AT_ONCE", 25)
    assert torch.equal(affine(codes, scale, zero, group, torch.bfloat16), whole)


CT = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4}}}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another package's": ({"quant_method": "aqlm"}, "'aqlm' is not read here .gptq, awq, .*the package aqlm reads it"),
    "unknown": ({"quant_method": "mine"}, r"quant_method='mine' is not read here \(gptq"),
    "a kernel's": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        "checkpoint_format='marlin' is a kernel's own order, which the package gptqmodel reads; gptq and gptq_v2",
    ),
    "gptq without bits": ({"quant_method": "gptq"}, r"quantization_config\.bits=None is not read here: 2, 3, 4, 8 are"),
    "gemv": (
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        "version='gemv' is an order of its own, which the package autoawq reads; gemm is read here",
    ),
    "awq in 3 bits": ({"quant_method": "awq", "bits": 3}, "bits=3 is not read here: 4 are"),
    "neither": ({"quant_method": "bitsandbytes"}, "says neither load_in_8bit nor load_in_4bit"),
    "hqq of nothing": ({"quant_method": "hqq"}, "has no weight_quant_params"),
    "nvfp4": ({**CT, "format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized' is not read here"),
    "sparse": ({**CT, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is set, which the package"),
    "rotated": ({**CT, "transform_config": {"config_groups": {"u": {}}}}, "transform_config is set"),
    "no groups": ({"quant_method": "compressed-tensors"}, "config_groups has no group with weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name_with_the_package_that_reads_it(case: str) -> None:
    settings, says = REFUSED[case]
    with pytest.raises(CheckpointError, match=rf"weights are quantized already, and .*{says}.* 16-bit weights"):
        check_config({"model_type": "llama", "quantization_config": settings})


def test_layouts_that_are_read_pass() -> None:
    for settings in (
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "awq", "w_bit": 4, "version": "GEMM"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"quant_method": "hqq", "quant_config": {"self_attn.q_proj": {"weight_quant_params": {"nbits": 2}}}},
        {**CT, "format": "pack-quantized", "sparsity_config": {"format": "dense"}},
    ):
        check_config({"model_type": "llama", "quantization_config": settings})
    assert as_16_bit(None, []) == []
    assert as_16_bit({"model_type": "llama"}, []) == []


def test_tensors_that_lack_what_belongs_to_them_are_refused(tmp_path: Path) -> None:
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    words, halves = torch.zeros(8, 8, dtype=torch.int32), torch.zeros(2, 8).half()
    for settings, tensors in (
        ({"quant_method": "gptq", "bits": 4}, {"l.qweight": words, "l.scales": halves}),
        ({"quant_method": "gptq", "bits": 4}, {"l.qweight": words, "l.scales": halves, "l.qzeros": words}),
        ({"quant_method": "awq", "bits": 4}, {"l.qweight": words, "l.scales": halves, "l.qzeros": words}),
        ({"quant_method": "hqq", "weight_quant_params": {"nbits": 4}}, {"l.W_q": words, "l.scale": halves}),
        (four, {"l.weight": words, "l.weight.absmax": halves}),
        (CT, {"l.weight": halves, "l.weight_scale": halves}),
        (CT, {"l.weight_packed": words, "l.weight_scale": halves}),
    ):
        with pytest.raises(CheckpointError, match=r"the tensors of l(\.weight)? do not fit together: "):
            written(tmp_path, tensors, settings)
    with pytest.raises(CheckpointError, match="no tensor of the files belongs to such weights"):
        written(tmp_path, {"l.weight": halves}, CT)
