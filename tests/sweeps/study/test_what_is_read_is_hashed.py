"""Whatever file of a model's directory decides a number decides its key, is refused by name, or has no effect."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kbit.errors import SpecError
from kbit.evaluation.generation import generate
from kbit.evaluation.requests import RequestEncoder
from kbit.models.loadable import LoadedModel
from kbit.models.loading import load_model
from kbit.models.obeyed import obeyed_files
from sweeps.errors import HubError
from sweeps.study.hub import local_model

WORDS = ["<s>", "</s>", "<unk>", *(f"w{n}" for n in range(40)), "W1"]
TEXT = " ".join(f"w{n % 40}" for n in range(60)) + " W1 extra"


def write_tokenizer(file: Path, *, lower: bool = False) -> None:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(file.parent / "whole")
    shutil.move(file.parent / "whole" / "tokenizer.json", file)
    if not (file.parent / "tokenizer_config.json").exists():
        shutil.move(file.parent / "whole" / "tokenizer_config.json", file.parent)
    shutil.rmtree(file.parent / "whole")


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    small: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**small, vocab_size=64, num_attention_heads=4, max_position_embeddings=256)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "llama"
    llama(0).to(torch.float16).save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    write_tokenizer(directory / "tokenizer.json")
    return directory


def numbers(loaded: LoadedModel) -> tuple[Any, ...]:
    """What evaluations would measure: the text's tokens, their loss, tokens of requests, what is generated."""
    tokenizer, model = loaded.tokenizer, loaded.model
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    encoder = RequestEncoder(tokenizer, context=loaded.context)
    plan = encoder.plan([("", "w1 w2"), ("w1 w2", " w3")])
    written = generate(model, encoder, [("w1 w2 w3", {"max_gen_toks": 12})], batch_tokens=256).texts
    return ids.tolist(), loss, plan.inputs, written, loaded.storage_dtype, loaded.context


def measured(directory: Path, *, remote_code: bool = False) -> tuple[str, tuple[Any, ...]]:
    """The key's part of a model, and what would be measured on it."""
    loaded = load_model(str(directory), device="cpu", compute_dtype="float32", trust_remote_code=remote_code)
    return local_model(directory).content_hash, numbers(loaded)


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Write keys of a JSON file, which need not be there."""

    def change(directory: Path) -> None:
        file = directory / name
        values = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(values | changes))

    return change


def other_weights(name: str, dtype: torch.dtype = torch.bfloat16) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        values = {k: (v * 2).to(dtype) for k, v in load_file(directory / "model.safetensors").items()}
        if name.endswith(".bin"):
            torch.save(values, directory / name)
        else:
            # Twice as large as the model's own.
            more = {f"more.{k}": v.clone() for k, v in values.items()}
            save_file(values | more, directory / name, metadata={"format": "pt"})

    return change


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)

    return change


def by_version(name: str, listed_in: str, key: str) -> Callable[[Path], None]:
    """A file that transformers takes in place of another, by its own version."""

    def change(directory: Path) -> None:
        edit(listed_in, **{key: [name]})(directory)
        if name.startswith("tokenizer"):
            write_tokenizer(directory / name, lower=True)
        else:
            values = json.loads((directory / "config.json").read_text())
            (directory / name).write_text(json.dumps(values | {"rms_norm_eps": 0.5}))

    return change


DECIDES = {
    "generation_config.json": edit("generation_config.json", suppress_tokens=[*range(3, 30)]),
    "special_tokens_map.json": edit("special_tokens_map.json", bos_token="w7"),
    "added_tokens.json": edit("added_tokens.json", extra=44),
    "tokenizer_config.json": edit("tokenizer_config.json", bos_token="w9"),
    "tokenizer.json": lambda directory: write_tokenizer(directory / "tokenizer.json", lower=True),
    "config.json": edit("config.json", rms_norm_eps=0.5),
    "config.4.0.0.json": by_version("config.4.0.0.json", "config.json", "configuration_files"),
    "tokenizer.4.0.0.json": by_version("tokenizer.4.0.0.json", "tokenizer_config.json", "fast_tokenizer_files"),
    "model.safetensors": lambda directory: save_file(
        {k: v * 2 for k, v in load_file(directory / "model.safetensors").items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    ),
}
HAS_NO_EFFECT = {
    "pytorch_model.bin": other_weights("pytorch_model.bin"),
    "adapter_model.safetensors": other_weights("adapter_model.safetensors"),
    "consolidated.safetensors": other_weights("consolidated.safetensors", torch.float32),
    "model.fp16.safetensors": other_weights("model.fp16.safetensors"),
    "chat_template.jinja": write("chat_template.jinja", "{{ messages }}"),
    "additional_chat_templates/rag.jinja": write("additional_chat_templates/rag.jinja", "{{ messages }}"),
    "preprocessor_config.json": write("preprocessor_config.json", '{"image_size": 8}'),
    "custom_generate/generate.py": write("custom_generate/generate.py", "def generate(*_, **__): raise RuntimeError\n"),
    "README.md": write("README.md", "about"),
    "training_args.bin": write("training_args.bin", "?"),
}
REFUSED = {
    "adapter_config.json": (
        edit("adapter_config.json", peft_type="LORA", base_model_name_or_path="someone/base"),
        r"adapter_config\.json .*merge",
    ),
    "transformers_weights": (
        edit("config.json", transformers_weights="consolidated.safetensors"),
        r"transformers_weights='consolidated\.safetensors'",
    ),
}


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "llama"))


@pytest.mark.parametrize("name", DECIDES)
def test_a_file_that_decides_a_number_decides_the_key(directory: Path, name: str) -> None:
    if name in ("special_tokens_map.json", "added_tokens.json"):
        # Old checkpoints have these instead of entries in tokenizer_config.json.
        config = json.loads((directory / "tokenizer_config.json").read_text())
        config.pop("bos_token")
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    before = measured(directory)
    DECIDES[name](directory)
    after = measured(directory)
    assert after[1] != before[1], "the file should decide something here"
    assert after[0] != before[0]


@pytest.mark.parametrize("name", HAS_NO_EFFECT)
@pytest.mark.parametrize("remote_code", [False, True])
def test_a_file_that_is_not_in_the_key_has_no_effect(directory: Path, name: str, remote_code: bool) -> None:
    before = measured(directory, remote_code=remote_code)
    HAS_NO_EFFECT[name](directory)
    assert measured(directory, remote_code=remote_code) == before


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_would_make_another_model_is_refused_when_planned_and_when_loaded(
    directory: Path, name: str
) -> None:
    change, said = REFUSED[name]
    change(directory)
    with pytest.raises(HubError, match=said):
        local_model(directory)
    with pytest.raises(SpecError, match=said):
        load_model(str(directory), device="cpu", compute_dtype="float32")


def test_code_of_the_model_decides_number_and_key_and_other_repositories_code_is_refused(directory: Path) -> None:
    edit("config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})(directory)
    code = "from transformers import LlamaForCausalLM\nfrom .part import scale\n\n\nclass Own(LlamaForCausalLM):\n"
    code += "    def forward(self, *a, **k):\n        out = super().forward(*a, **k)\n"
    code += "        out.logits = out.logits * scale\n        return out\n"
    (directory / "modeling_own.py").write_text(code)
    found = []
    for scale in (1.0, 2.0):
        (directory / "part.py").write_text(f"scale = {scale}\n")
        model = load_model(str(directory), device="cpu", compute_dtype="float32", trust_remote_code=True).model
        logits = model(torch.tensor([[3, 4, 5]])).logits.detach()
        found.append((local_model(directory).content_hash, float(logits.abs().sum())))
    assert found[0][0] != found[1][0]
    assert found[1][1] == pytest.approx(2 * found[0][1])
    edit("config.json", auto_map={"AutoModelForCausalLM": "someone/else--modeling_own.Own"})(directory)
    with pytest.raises(SpecError, match=r"auto_map in config\.json .*someone/else"):
        load_model(str(directory), device="cpu", compute_dtype="float32", trust_remote_code=True)


def test_a_model_goes_by_its_own_directory_not_by_the_view_of_it(directory: Path) -> None:
    loaded = load_model(str(directory), device="cpu", compute_dtype="float32")
    assert {loaded.model.name_or_path, loaded.model.config.name_or_path, loaded.tokenizer.name_or_path} == {
        str(directory)
    }


def test_a_directory_without_newly_hashed_files_keeps_its_hash(original: Path, tmp_path: Path) -> None:
    """The rule that the first keys were made by: SHA-256 of names and hashes, sorted by name."""
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    lines = [f"{n}\0{hashlib.sha256((original / n).read_bytes()).hexdigest()}\n" for n in names]
    assert local_model(original).content_hash == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_every_vocabulary_that_transformers_tokenizers_read_is_obeyed() -> None:
    """A watch for drift: a name that a later version reads would be left out of the view, and its tokenizer fail."""
    root = Path(transformers.__file__).parent
    names: set[str] = set()
    for file in [*root.glob("models/*/tokenization*.py"), *root.glob("tokenization*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) else []
            if any(isinstance(t, ast.Name) and t.id == "VOCAB_FILES_NAMES" for t in targets):
                names |= {str(v.value) for v in node.value.values if isinstance(v, ast.Constant)}
    assert len(names) > 15
    assert sorted(names - set(obeyed_files(names))) == []
    assert obeyed_files(["tekken.json", "qwen.tiktoken", "tokenizer.model.v3", "notes.txt"]) == [
        "tekken.json",
        "qwen.tiktoken",
        "tokenizer.model.v3",
    ]
    assert obeyed_files(["adapter_config.json", "chat_template.jinja", "README.md"]) == []
