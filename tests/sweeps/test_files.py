"""Writes that exclude others, and the clock of the file system."""

from __future__ import annotations

import errno
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sweeps import files
from sweeps.errors import LinkError, StoreError
from sweeps.files import create_exclusively, require_directory, store_time, write_atomically
from sweeps.launches.claims import Claims


def test_of_all_who_create_a_file_one_is_told_that_it_did(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: create_exclusively(path, b"%d" % i), range(32)))
    assert made.count(True) == 1
    assert int(path.read_bytes()) == made.index(True)
    assert list(path.parent.iterdir()) == [path]


def test_a_link_that_a_network_file_system_repeats_is_still_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert create_exclusively(tmp_path / "file", b"x")
    assert not create_exclusively(tmp_path / "file", b"y")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(LinkError):
        create_exclusively(tmp_path / "file", b"x")
    with pytest.raises(StoreError, match=r"can't make hard links \(Operation not permitted\)"):
        Claims(out=tmp_path).create(1, launch="a", sweep="s", packs={})
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_the_stores_time_is_that_of_its_files(tmp_path: Path) -> None:
    assert store_time(tmp_path) == pytest.approx(time.time(), abs=5)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        store_time(tmp_path / "missing")


def test_a_directory_that_another_took_the_place_of_is_not_taken_for_it(tmp_path: Path) -> None:
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "out"
    for directory in (first, second):
        directory.mkdir()
    (first / "mine").touch()
    out.symlink_to(first)
    require_directory(out, "mine")
    out.unlink()
    with pytest.raises(FileNotFoundError, match="it is gone"):
        require_directory(out, "mine")
    out.symlink_to(second)
    with pytest.raises(FileNotFoundError, match="it has no mine"):
        require_directory(out, "mine")
    require_directory(out)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed to disk, of which the first directory fails."""
    flushed: list[str] = []
    real = os.fsync

    def fsync(file: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(file).st_mode)
        flushed.append("directory" if is_directory else "file")
        if is_directory and flushed.count("directory") == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0, 0.0))
    return flushed


def test_what_could_not_be_flushed_is_written_again_and_not_flushed_alone(tmp_path: Path, failing: list[str]) -> None:
    # The system tells a failure once: the next flush of the same names would say yes.
    write_atomically(tmp_path / "a", b"x")
    assert failing == ["file", "directory", "file", "directory"]
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_claim_flushes_its_own_name_alone(tmp_path: Path, failing: list[str]) -> None:
    failing.append("directory")  # the one that fails was before
    assert create_exclusively(tmp_path / "claim", b"x")
    assert failing == ["directory", "file", "directory"]
