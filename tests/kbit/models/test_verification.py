"""A loaded model is what its files hold, keeps their finite values finite, and sees no token before its time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, XLNetConfig

from kbit.errors import SpecError
from kbit.models import refusals
from kbit.models.loading import load_model
from kbit.models.verification import check_causal
from tests.kbit.models.test_loading import write_tokenizer
from tests.kbit.tiny_models import tiny

Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny model's directory, its tensors changed: write(name, dtype, change, torch_file=...)."""

    def write(
        name: str, dtype: torch.dtype, change: Change = lambda tensors: None, *, torch_file: bool = False
    ) -> Path:
        directory = tmp_path / name
        tiny(name, dtype).save_pretrained(directory)
        write_tokenizer(directory)
        file = directory / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        if torch_file:
            torch.save(tensors, directory / "pytorch_model.bin")
            file.unlink()
        else:
            save_file(tensors, file, metadata={"format": "pt"})
        return directory

    return write


def load(directory: Path) -> Any:
    return load_model(str(directory), device="cpu", compute_dtype="storage")


def configure(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("torch_file", [False, True])
def test_weights_that_the_configuration_has_no_place_for_are_refused_by_name(write, torch_file):
    directory = write("llama-gqa", torch.float16, torch_file=torch_file)
    load(directory)
    configure(directory, num_hidden_layers=1)
    with pytest.raises(SpecError, match=r"layers\.1\.\w+.*num.*layers"):
        load(directory)


@pytest.mark.parametrize("torch_file", [False, True])
def test_another_models_weights_beside_the_language_models_are_refused_by_name(write, torch_file):
    added = {"score.weight": torch.zeros(2, 32), "h.bias": torch.zeros(3)}
    directory = write("opt", torch.float16, lambda tensors: tensors.update(added), torch_file=torch_file)
    with pytest.raises(SpecError, match=r"OPTForCausalLM has none for h\.bias, score\.weight"):
        load(directory)


def test_float8_weights_beside_their_scales_are_refused_by_name(write):
    name = "model.layers.0.mlp.up_proj.weight"

    def to_float8(tensors):
        scale = tensors[name].abs().max().float() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale[None]

    with pytest.raises(SpecError, match=r"up_proj\.weight.* belongs to quantized weights.*float16, bfloat16"):
        load(write("llama-gqa", torch.bfloat16, to_float8))


def test_a_weight_that_transformers_lets_be_missing_is_seen_in_the_count(write, monkeypatch):
    name = "model.layers.1.mlp.up_proj.weight"
    directory = write("llama-gqa", torch.float16, lambda tensors: tensors.pop(name))
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"layers\.1\.mlp\.up_proj"])
    with pytest.raises(SpecError, match=rf"as many parameters as its model.*in the model alone: {name}"):
        load(directory)


def assert_read(directory, stored, but=()):
    """The model has every tensor of the files, but for some that it has no place for."""
    read = load(directory).model.state_dict()
    assert set(but).isdisjoint(read)
    for name in stored.keys() - set(but):
        assert torch.equal(read[name], stored[name].to(read[name].dtype)), name


def test_a_buffer_that_is_made_at_load_may_be_in_the_files_or_not(write, monkeypatch):
    before = LlamaForCausalLM.__init__

    def with_buffer(self, config):
        before(self, config)
        self.register_buffer("correction", torch.zeros(5))

    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", ["correction"])
    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_buffer)
    directory = write("llama-gqa", torch.float16)
    file = directory / "model.safetensors"
    stored = load_file(file)
    assert "correction" in stored
    assert_read(directory, stored)
    del stored["correction"]
    save_file(stored, file, metadata={"format": "pt"})
    assert_read(directory, stored)


def test_what_transformers_leaves_out_on_purpose_is_left_out(write, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    added = {"mtp.layers.0.eh_proj.weight": torch.ones(32, 64)}
    directory = write("llama-gqa", torch.float16, lambda tensors: tensors.update(added))
    assert_read(directory, load_file(directory / "model.safetensors"), but=added)


@pytest.mark.parametrize("torch_file", [False, True])
def test_tied_weights_masks_and_prefixes_make_no_difference(write, torch_file, tmp_path):
    def as_of_old(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    directory = write("gpt2", torch.float16, as_of_old, torch_file=torch_file)
    loaded = load(directory).model
    assert isinstance(loaded, GPT2LMHeadModel)
    assert torch.equal(loaded.transformer.wte.weight, tiny("gpt2", torch.float16).transformer.wte.weight)


@pytest.mark.parametrize(
    "name",
    [
        "model.decoder.version",
        "model.decoder.embed_positions._float_tensor",
        "model.decoder.embed_positions.weights",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.decoder.layers.0.attn.causal_mask",
    ],
)
def test_what_older_checkpoints_store_besides_is_left_out(write, name):
    directory = write("opt", torch.float16, lambda tensors: tensors.update({name: torch.ones(3)}))
    assert_read(directory, load_file(directory / "model.safetensors"), but=[name])


WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("torch_file", [False, True])
def test_a_value_beyond_float16_is_refused_with_tensor_value_and_way_out(write, torch_file):
    def enlarge(value):
        return lambda tensors: tensors[WEIGHT][2, 3].fill_(value)

    with pytest.raises(SpecError, match=rf"float16.*up to 65504\); {WEIGHT} has -100000\..*bfloat16.*save_pretrained"):
        load(write("llama-gqa", torch.float32, enlarge(-1e5), torch_file=torch_file))


def test_what_float16_can_hold_and_what_bfloat16_holds_is_read(write):
    directory = write("llama-gqa", torch.float32, lambda tensors: tensors[WEIGHT][2, 3].fill_(65519))
    assert load(directory).model.state_dict()[WEIGHT][2, 3] == 65504
    directory = write("llama-gqa", torch.bfloat16, lambda tensors: tensors[WEIGHT][2, 3].fill_(1e5))
    assert torch.isfinite(load(directory).model.state_dict()[WEIGHT]).all()


def test_an_infinity_of_the_checkpoint_itself_is_kept(write):
    directory = write("llama-gqa", torch.float32, lambda tensors: tensors[WEIGHT][2, 3].fill_(float("inf")))
    assert load(directory).model.state_dict()[WEIGHT][2, 3] == float("inf")


def test_a_wider_tensor_among_bfloat16_ones_is_looked_at(write):
    def widen(tensors):
        tensors[WEIGHT] = tensors[WEIGHT].float()
        tensors[WEIGHT][0, 0] = torch.finfo(torch.float32).max

    with pytest.raises(SpecError, match=rf"bfloat16.*{WEIGHT} has 3\.40282e\+38"):
        load(write("llama-gqa", torch.bfloat16, widen))


SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SEEING = {  # model types and what makes them small: all see the tokens after one
    **dict.fromkeys(("bert", "roberta", "electra", "megatron-bert", "rembert", "roformer"), SMALL),
    "xlm": {"vocab_size": 96, "emb_dim": 64, "n_layers": 2, "n_heads": 4},
    "xlnet": {"vocab_size": 96, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
    "cpmant": {**SMALL, "dim_head": 16, "dim_ff": 128, "prompt_length": 4},
}
DECODERS = {
    **{name: {**SMALL, "is_decoder": True} for name in ("bert", "roberta", "electra")},
    "xlm": {**SEEING["xlm"], "causal": True},
    "mixtral": {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4},
    "olmoe": {**SMALL, "num_key_value_heads": 2, "num_experts": 8},
    "mamba": {"vocab_size": 96, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2},
    "rwkv": {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2},
}


def random_model(model_type: str, settings: dict[str, Any], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model_type", SEEING)
def test_a_model_that_sees_later_tokens_is_refused(model_type, dtype):
    model = random_model(model_type, SEEING[model_type], dtype)
    with pytest.raises(
        SpecError, match=rf"path='it'.*{type(model).__name__} the last token changes .* by [\d.]+ stand"
    ):
        check_causal(model, name="it")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model_type", DECODERS)
def test_a_causal_model_passes_in_every_dtype(model_type, dtype):
    check_causal(random_model(model_type, DECODERS[model_type], dtype), name="it")


def test_models_with_several_end_tokens_are_looked_at_too():
    model = tiny("llama-gqa")
    model.config.eos_token_id = [0, 1, 2]
    check_causal(model, name="it")


def test_causality_is_looked_at_when_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(refusals, "NOT_CAUSAL", frozenset())  # as of an architecture that nobody has tried
    AutoModelForCausalLM.from_config(XLNetConfig(**SEEING["xlnet"])).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(SpecError, match="XLNetLMHeadModel the last token changes"):
        load_model(str(tmp_path), device="cpu", compute_dtype="float32")


def test_a_model_that_diverged_is_no_encoder():
    model = tiny("llama-gqa", torch.float16)
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    check_causal(model, name="it")


class Batched(nn.Module):
    """Gives each row logits of its tokens so far, and a little of the whole batch, as experts' products do."""

    def __init__(self, little: float, *, seen: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 96)
        self.config, self.little, self.seen = SimpleNamespace(pad_token_id=0), little, seen

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: Tensor, use_cache: bool) -> SimpleNamespace:
        states = self.embedding(ids)
        noise = torch.arange(len(ids)).view(-1, 1, 1) - len(ids)
        last = self.seen * states[:, -1:]
        return SimpleNamespace(logits=states.cumsum(1) + self.little * noise + last)


def test_what_batches_change_is_told_from_what_tokens_change():
    torch.manual_seed(0)
    check_causal(Batched(0.01), name="it")
    with pytest.raises(SpecError, match="Batched"):
        check_causal(Batched(0.01, seen=0.1), name="it")
