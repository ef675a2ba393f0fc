"""Provenance of every row: the code's commit and the versions of the packages that compute."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
"""The directory that this installation is imported from: the checkout, a snapshot of it, or site-packages."""
PROJECT: Final = "kbit-sweep"
PACKAGES: Final = (PROJECT, "torch", "triton", "transformers", "tokenizers", "lm_eval", "datasets", "numpy", "pandas")


def import_environment() -> dict[str, str]:
    """Return the variables with which a Python child imports this installation, and nothing by the current directory.

    ``python -m`` would look there first, and an empty entry of PYTHONPATH means it too: a user's ``datasets.py`` would
    stand for the package. Children of the child inherit both variables.
    """
    entries = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {"PYTHONPATH": os.pathsep.join(e for e in entries if e), "PYTHONSAFEPATH": "1"}


def code_provenance() -> dict[str, str | bool | None]:
    """Return columns commit, dirty, versions. Outside a checkout, commit is the installed version and dirty null."""
    commit, dirty = _git_state(ROOT)
    installed = f"kbit-sweep {_version('kbit-sweep') or 'unknown'}"
    return {"commit": commit or installed, "dirty": dirty, "versions": package_versions()}


def version_text() -> str:
    """Return what ``--version`` says: 'kbit-sweep 0.1.0 (commit 0123456789ab, with local changes)'."""
    commit, dirty = _git_state(ROOT)
    text = f"{PROJECT} {_own_version() or 'unknown'}"
    return f"{text} (commit {commit[:12]}{', with local changes' if dirty else ''})" if commit else text


def package_versions() -> str:
    """Column versions: JSON of the packages' versions in this process's environment."""
    versions = {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}
    return json.dumps(versions, sort_keys=True)


def _git_state(directory: Path) -> tuple[str | None, bool | None]:
    # An installed package may lie inside somebody else's repository, so the checkout must be of this very directory.
    top = _git(directory, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != directory.resolve():
        return None, None
    status = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return _git(directory, "rev-parse", "HEAD"), None if status is None else bool(status)


def _git(directory: Path, *args: str) -> str | None:
    try:
        result = subprocess.run(["git", *args], cwd=directory, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _own_version() -> str | None:
    """Return the version of this code: a checkout's own, which need not be the one that is installed."""
    project = ROOT / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    return _version(PROJECT)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
