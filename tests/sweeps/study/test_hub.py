"""Identity of models and data: commits, hashes, parameter counts. A small server speaks the hub's HTTP interface."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants, file_download
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from kbit.evaluation.documents import file_documents
from kbit.models import checkpoint
from kbit.sources import source_from_dict, source_to_dict
from sweeps.errors import HubError
from sweeps.study import hashes as filehash
from sweeps.study import hub
from sweeps.study.evals import _text_file
from tests import ROOT

DEMO = ROOT / "sweeps" / "demo" / "models"
COMMIT = "5c1f" * 10
OTHER = "0a2b" * 10


def write_model(directory: Path, tensors: dict[str, np.ndarray] | None = None, **config: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt_neox", **config}))
    (directory / "tokenizer.json").write_text("{}")
    save_file(tensors or {"w.weight": np.ones((3, 4), np.float16)}, directory / "model.safetensors")
    return directory


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No network and an empty hub cache; gives the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "_asked", {})
    hub._unreachable.cache_clear()
    yield tmp_path / "hub"
    hub._unreachable.cache_clear()


class HubServer:
    """Serves one repository ``owner/name`` of each type from a directory, at one commit."""

    def __init__(self, files: Path) -> None:
        self.requests: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                server.requests.append(self.path)
                path = self.path.split("?")[0].replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")
                if path == "/":
                    return self.answer(200, b"")
                if path == "/api/models/owner/name/revision/main":
                    return self.answer(200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode())
                if path.startswith("/api/models/owner/name/revision/"):
                    return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                if path == f"/api/models/owner/name/tree/{COMMIT}":
                    tree = [
                        {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                        for f in sorted(files.iterdir())
                    ]
                    return self.answer(200, json.dumps(tree).encode())
                file = files / path.rpartition("/")[2]
                if path.startswith(f"/owner/name/resolve/{COMMIT}/") and file.is_file():
                    return self.answer(200, file.read_bytes(), {"ETag": f'"{file.name}"', "X-Repo-Commit": COMMIT})
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

            def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Keep the test's output clean."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def online(tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    (tmp_path / "served").mkdir()
    server = HubServer(tmp_path / "served")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for module in (constants, file_download):
        monkeypatch.setattr(
            module,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
            raising=False,
        )
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    yield server
    server.http.shutdown()
    server.http.server_close()


def cache_repo(cache: Path, repo: str = "models--owner--name") -> Path:
    """The layout that a download leaves: refs/main and snapshots/COMMIT."""
    (cache / repo / "refs").mkdir(parents=True)
    (cache / repo / "refs" / "main").write_text(COMMIT)
    return cache / repo / "snapshots" / COMMIT


# Commits


def test_commit_offline_is_what_the_cache_last_saw(offline: Path) -> None:
    cache_repo(offline)
    cache_repo(offline, "datasets--owner--name")
    assert hub.resolve_commit("owner/name", "main") == COMMIT
    assert hub.resolve_commit("owner/name", "main", repo_type="dataset") == COMMIT


def test_commit_is_never_invented() -> None:
    with pytest.raises(HubError, match=r"(?s)owner/name@main.*HF_HUB_OFFLINE.*mode=fetch.*path=DIR"):
        hub.resolve_commit("owner/name", "main")
    with pytest.raises(HubError, match=r"eval\.data_dir=DIR"):
        hub.resolve_commit("owner/name", "main", repo_type="dataset")


def test_damaged_ref_is_no_commit(offline: Path) -> None:
    cache_repo(offline)
    (offline / "models--owner--name" / "refs" / "main").write_text("main")
    with pytest.raises(HubError):
        hub.resolve_commit("owner/name", "main")


def test_a_commit_is_its_own_answer() -> None:
    assert hub.resolve_commit("owner/name", OTHER) == OTHER


def test_commit_online_is_the_hubs_not_the_caches(online: HubServer, offline: Path) -> None:
    cache_repo(offline)
    (offline / "models--owner--name" / "refs" / "main").write_text(OTHER)
    assert hub.resolve_commit("owner/name", "main") == COMMIT
    assert hub.resolve_commit("owner/name", "main", repo_type="dataset") == COMMIT


def test_unknown_repository_and_revision_are_refused_even_if_cached(online: HubServer, offline: Path) -> None:
    cache_repo(offline, "models--owner--gone")
    with pytest.raises(HubError, match=r"owner/gone.*no such model"):
        hub.resolve_commit("owner/gone", "main")
    with pytest.raises(HubError, match=r"no-such-tag.*no such revision"):
        hub.resolve_commit("owner/name", "no-such-tag")
    with pytest.raises(HubError, match="a/b/c"):
        hub.resolve_commit("a/b/c", "main")


def test_unreachable_hub_falls_back_to_the_cache_and_is_asked_once(online: HubServer, offline: Path) -> None:
    online.http.shutdown()
    online.http.server_close()
    cache_repo(offline)
    assert hub.resolve_commit("owner/name", "main") == COMMIT
    with pytest.raises(HubError, match="can't be reached"):
        hub.resolve_commit("owner/other", "main")
    assert hub._unreachable.cache_info().misses == 1


# Snapshots and fetching


def test_snapshot_counts_only_when_all_weights_are_there(offline: Path) -> None:
    assert hub.cached_snapshot("owner/name", COMMIT) is None
    snapshot = write_model(cache_repo(offline))
    assert hub.cached_snapshot("owner/name", COMMIT) == snapshot
    assert hub.cached_snapshot("owner/name", OTHER) is None
    (snapshot / "model.safetensors").unlink()
    assert hub.cached_snapshot("owner/name", COMMIT) is None


def test_fetched_model_resolves_and_loads_without_a_network(
    online: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "served")
    (tmp_path / "served" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "served" / "flax_model.msgpack").write_bytes(b"flax")
    lines: list[str] = []
    hub.fetch([("owner/name", "main")], report=lines.append)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub._unreachable.cache_clear()
    snapshot = hub.cached_snapshot("owner/name", hub.resolve_commit("owner/name", "main"))
    assert snapshot is not None
    assert sorted(p.name for p in snapshot.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert hub.local_model(snapshot).params == 12
    assert "owner/name" in lines[0]


def test_branch_resolves_offline_after_a_fetch_of_its_commit(
    online: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "served")
    hub.fetch([("owner/name", hub.resolve_commit("owner/name", "main"))], report=lambda _: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub._unreachable.cache_clear()
    assert hub.resolve_commit("owner/name", "main") == COMMIT


def test_fetch_takes_bin_parts_where_there_is_no_safetensors(online: HubServer, tmp_path: Path) -> None:
    served = write_model(tmp_path / "served")
    (served / "model.safetensors").unlink()
    index = {"weight_map": {"a": "pytorch_model-1-of-2.bin", "b": "pytorch_model-2-of-2.bin"}}
    (served / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for part in index["weight_map"].values():
        (served / part).write_bytes(b"pickle")
    hub.fetch([("owner/name", "main")], report=lambda _: None)
    snapshot = hub.cached_snapshot("owner/name", COMMIT)
    assert snapshot is not None
    assert {p.name for p in snapshot.glob("*.bin")} == set(index["weight_map"].values())
    assert hub.local_model(snapshot).params is None


def test_fetch_goes_on_after_a_failure_and_names_it(online: HubServer, tmp_path: Path, offline: Path) -> None:
    write_model(tmp_path / "served")
    with pytest.raises(HubError, match=r"(?s)1 of 2 could not be fetched.*owner/gone"):
        hub.fetch([("owner/gone", "main"), ("owner/name", "main")], report=lambda _: None)
    assert hub.cached_snapshot("owner/name", COMMIT) is not None
    assert (offline / "models--owner--name" / "refs" / "main").read_text() == COMMIT


# Local models


@pytest.mark.parametrize(("name", "params"), [("neox-xs", 728_928), ("neox-s", 1_892_800), ("neox-m", 5_787_648)])
def test_demo_models_are_counted_and_named(name: str, params: int) -> None:
    model = hub.local_model(DEMO / name)
    assert (model.name, model.family, model.params) == (name, "neox", params)


@pytest.mark.assets
def test_parameter_counts_equal_those_of_training(assets: Path) -> None:
    training = json.loads((assets / "models" / "training.json").read_text())
    counted = {name: hub.local_model(assets / "models" / name).params for name in training}
    assert counted == {name: record["params"] for name, record in training.items()}


@pytest.mark.parametrize(
    ("directory", "family"),
    [
        ("opt-125m", "opt"),
        ("pythia-1.4b", "pythia"),
        ("bloom-7b1", "bloom"),
        ("gpt2-xl", "gpt2"),
        ("my_run", "gpt_neox"),
    ],
)
def test_family_is_of_the_name_or_else_the_architecture(tmp_path: Path, directory: str, family: str) -> None:
    model = hub.local_model(write_model(tmp_path / directory))
    assert (model.name, model.family) == (directory, family)


def test_a_snapshot_of_the_hubs_cache_is_called_as_its_model(tmp_path: Path) -> None:
    snapshot = write_model(tmp_path / "models--EleutherAI--pythia-70m" / "snapshots" / COMMIT)
    (tmp_path / "mine").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "mine"):
        model = hub.local_model(path)
        assert (model.name, model.family) == ("pythia-70m", "pythia")
    plain = write_model(tmp_path / "snapshots" / "run7")
    assert hub.local_model(plain).name == "run7"


def test_content_hash_is_of_contents_not_of_place(tmp_path: Path) -> None:
    first = hub.local_model(write_model(tmp_path / "a")).content_hash
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("not part of the model")
    assert hub.local_model(tmp_path / "b").content_hash == first


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_content_hash_changes_with_every_file_that_matters(tmp_path: Path, file: str) -> None:
    first = hub.local_model(write_model(tmp_path / "a")).content_hash
    write_model(tmp_path / "a", {"w.weight": np.zeros((3, 4), np.float16)} if file == "model.safetensors" else None)
    if file != "model.safetensors":
        content = json.loads((tmp_path / "a" / file).read_text())
        (tmp_path / "a" / file).write_text(json.dumps({**content, "extra": 1}))
    assert hub.local_model(tmp_path / "a").content_hash != first


def test_sharded_model_needs_all_its_parts(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    (model / "model.safetensors").rename(model / "part-1.safetensors")
    save_file({"v.weight": np.ones((2, 2), np.float16)}, model / "part-2.safetensors")
    index = {"weight_map": {"w.weight": "part-1.safetensors", "v.weight": "part-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert hub.local_model(model).params == 16
    (model / "part-2.safetensors").unlink()
    with pytest.raises(HubError, match=r"part-2\.safetensors"):
        hub.local_model(model)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: shutil.rmtree(m), "not a directory"),
        (lambda m: (m / "config.json").unlink(), r"no config\.json"),
        (lambda m: (m / "config.json").write_text("{"), "not valid JSON"),
        (lambda m: (m / "config.json").write_text("{}"), "no model_type"),
        (lambda m: (m / "model.safetensors").unlink(), "found none"),
        (lambda m: (m / "model.safetensors").rename(m / "model.gguf"), r"only model\.gguf, which can't be used"),
        (lambda m: (m / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 9), "LFS"),
        (
            lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-1]),
            "fetch it again",
        ),
    ],
)
def test_unusable_directory_is_named_with_its_reason(tmp_path: Path, spoil: object, message: str) -> None:
    model = write_model(tmp_path / "m")
    spoil(model)  # type: ignore[operator]
    with pytest.raises(HubError, match=message) as error:
        hub.local_model(model)
    assert str(model) in str(error.value)


# Counting parameters


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_parameters_are_the_sum_of_sizes(tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]]) -> None:
    file = tmp_path_factory.mktemp("m") / "model.safetensors"
    save_file({f"layers.{i}.weight": np.zeros(shape, np.float32) for i, shape in enumerate(shapes)}, file)
    assert checkpoint.count_parameters(checkpoint.safetensors_header(file)) == sum(
        int(np.prod(shape)) for shape in shapes
    )


def test_masks_and_frequencies_of_old_checkpoints_are_no_parameters(tmp_path: Path) -> None:
    tensors = {
        "h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32),
        "layers.0.attention.bias": np.ones((1, 1, 8, 8), np.bool_),
        "layers.0.attention.masked_bias": np.ones((), np.float16),
        "layers.0.attention.rotary_emb.inv_freq": np.ones(4, np.float32),
        "layers.0.attention.dense.bias": np.ones(5, np.float16),
        "layers.0.mlp.weight": np.ones((2, 3), np.float16),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    assert checkpoint.count_parameters(checkpoint.safetensors_header(tmp_path / "m.safetensors")) == 11


def test_tied_head_counts_once_and_an_untied_one_twice(tmp_path: Path) -> None:
    embedding = np.arange(12, dtype=np.float16).reshape(4, 3)
    save_file({"wte.weight": embedding, "lm_head.weight": embedding.copy()}, tmp_path / "tied.safetensors")
    save_file({"embed_in.weight": embedding, "embed_out.weight": embedding + 1}, tmp_path / "untied.safetensors")
    assert checkpoint.count_parameters(checkpoint.safetensors_header(tmp_path / "tied.safetensors")) == 12
    assert checkpoint.count_parameters(checkpoint.safetensors_header(tmp_path / "untied.safetensors")) == 24


# Hashes of files


def test_large_files_hash_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filehash, "REMEMBERED_BYTES", 4)
    monkeypatch.setattr(filehash, "_SETTLED_SECONDS", -1.0)
    file = tmp_path / "weights"
    file.write_bytes(b"abcdef")
    seen: list[tuple[int, int]] = []
    first = hub.file_hash(file, progress=lambda _, done, total: seen.append((done, total)))
    assert first == "bef57ec7f53a6d40beb640a780a639c83bc29ac8a9816f1fc6c5c6dcd93c4721"
    assert seen == [(6, 6)]
    assert hub.file_hash(file, progress=lambda *_: pytest.fail("hashed again")) == first
    replacement = tmp_path / "replacement"
    replacement.write_bytes(b"ABCDEF")
    shutil.copystat(file, replacement)
    replacement.replace(file)
    assert hub.file_hash(file) != first


def test_a_file_replaced_where_times_say_nothing_is_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of file systems are made with one time for all their files, and inodes are given out again."""
    monkeypatch.setattr(filehash, "REMEMBERED_BYTES", 4)
    monkeypatch.setattr(filehash, "_SETTLED_SECONDS", -1.0)
    file = tmp_path / "weights"
    file.write_bytes(bytes(1_000_000))
    first, before, real = hub.file_hash(file), file.stat(), Path.stat
    file.write_bytes(b"\1" * 1_000_000)
    monkeypatch.setattr(Path, "stat", lambda path, **more: before if path == file else real(path, **more))
    assert hub.file_hash(file) != first


def test_hashing_works_where_the_cache_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(filehash, "REMEMBERED_BYTES", 1)
    (tmp_path / "weights").write_bytes(b"abcdef")
    assert hub.file_hash(tmp_path / "weights").startswith("bef57ec7")


# JSONL


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"body": "b"}\n', "line 2: no field 'text'; it has: body"),
        ('{"text": "a"}\n{"text":\n', "line 2: not JSON"),
        ("[1]\n", "line 1: expected an object, not a list"),
        ("\n\n", "is empty"),
        ("", "is empty"),
        ('{"text": ""}\n', "is empty"),
        ('{"text": "a"}\n\n{"text": null}\n', "line 3: no text in field 'text' but null"),
        ('{"text": 5}\n', "line 1: no text in field 'text' but 5"),
        ('{"text": "a"}\n{"text": "b \\ud83d c"}\n', "line 2: half a surrogate pair in field 'text'"),
        ('{"text": "a", "other": ["\\uDE00"]}\n', "line 1: half a surrogate pair in field 'other'"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
        (b'{"text": "\xed\xa0\xbd"}\n', "line 1: not UTF-8"),
    ],
)
def test_jsonl_that_does_not_fit_names_line_and_field(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "set.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(HubError, match=message):
        hub.check_jsonl(file, ("text",))


def test_a_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    hub.check_jsonl(tmp_path / "set.jsonl", ("text",))
    assert list(file_documents(tmp_path / "set.jsonl", "text")) == ["\U0001f600"]


def test_plain_text_needs_no_fields(tmp_path: Path) -> None:
    (tmp_path / "set.txt").write_text("just words")
    hub.check_jsonl(tmp_path / "set.txt", ("text",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"one\r\ntwo \xff\n", r"set\.txt, line 2: not UTF-8"),
        (b"one\n\n\xed\xa0\xbd\n", r"set\.txt, line 3: not UTF-8"),
    ],
)
def test_plain_text_that_is_none_names_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "set.txt").write_bytes(content)
    with pytest.raises(HubError, match=message):
        hub.check_jsonl(tmp_path / "set.txt", ("text",))


@pytest.mark.parametrize("name", ["set.txt", "set.jsonl"])
def test_a_byte_order_mark_is_no_text_and_tells_the_file_apart(tmp_path: Path, name: str) -> None:
    """Once it was read as text, so a number of then must not go by today's key."""
    content, found = b"words\r\nmore" if name == "set.txt" else b'{"text": "words\\nmore"}\n', []
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / name).write_bytes(mark + content)
        hub.check_jsonl(tmp_path / name, ("text",))
        assert list(file_documents(tmp_path / name, "text")) == ["words\nmore"]
        found.append(_text_file(tmp_path / name, "eval.perplexity", "text"))
    plain, marked = found
    assert plain.identity == f"sha256:{plain.sha256}"
    assert marked.identity == f"sha256:{marked.sha256}/without=bom"
    assert source_from_dict(source_to_dict(marked)) == marked


def test_identifying_a_model_imports_no_torch() -> None:
    model = str(DEMO / "neox-xs")
    code = f"import sys; from sweeps.study import hub; hub.local_model({model!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_a_hub_model_that_cannot_be_measured_is_refused(offline: Path) -> None:
    commit = "1" * 40
    directory = offline / "models--owner--name" / "snapshots" / commit
    hub.check_model("owner/name", commit)  # nothing is known of it
    write_model(directory)
    hub.check_model("owner/name", commit)
    for config, expected in (
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ({"n_layer": 1}, "n_layer=1"),
    ):
        write_model(directory, {"transformer.h.3.w": np.ones((2, 2), np.float16)}, **config)
        with pytest.raises(HubError, match=rf"owner/name@1+ is not usable.*{expected}"):
            hub.check_model("owner/name", commit)
    (directory / "model.safetensors").unlink()
    (directory / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(HubError, match="encoder-decoder"):
        hub.check_model("owner/name", commit)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.w", "mtp.layers.0.w", "model.mtp_layers.0.w"])
def test_layers_that_predict_further_tokens_are_not_counted(name: str, tmp_path: Path) -> None:
    own = {"model.layers.0.w": np.ones((2, 3), np.float16), "model.layers.1.w": np.ones((2, 3), np.float16)}
    further = {"model.layers.2.eh_proj.weight": np.ones((4, 4), np.float16), name: np.ones((5, 5), np.float16)}
    model = write_model(tmp_path / "m", {**own, **further}, num_hidden_layers=2)
    assert hub.local_model(model).params == 12
