"""One real SLURM cluster for all tests here; KBIT_SLURM_DIR names one that is already up (make slurm-up)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.faults import Outcomes, running_scenarios
from tests.slurm.studies import Counted, Studies, Study


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The test cluster, up; ended with the session unless it was up before."""
    running = os.environ.get("KBIT_SLURM_DIR")
    directory = Path(running) if running else Path(tempfile.gettempdir()) / f"kbit-slurm-test-{os.getpid()}"
    cluster = Cluster(directory=directory)
    missing = cluster.missing_packages()
    if missing:
        # Installing system packages is for the user to ask for.
        pytest.skip(f"{missing}; make slurm-up installs them")
    cluster.up()
    try:
        yield cluster
    finally:
        if not running:
            cluster.down()


@pytest.fixture(scope="module")
def studies(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studies]:
    """Makes studies that several tests of a module share; their jobs are cancelled at the end."""
    made: list[Study] = []

    def make(name: str) -> Study:
        made.append(Study(cluster=cluster, home=tmp_path_factory.mktemp(name)))
        return made[-1]

    try:
        yield make
    finally:
        for study in made:
            study.cancel_all()


@pytest.fixture
def study(cluster: Cluster, tmp_path: Path) -> Iterator[Study]:
    """A small study of its own on the cluster; its jobs are cancelled at the end."""
    study = Study(cluster=cluster, home=tmp_path)
    try:
        yield study
    finally:
        study.cancel_all()


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outcomes]:
    """What becomes of the scenarios that were selected, which run side by side (tests.slurm.faults)."""
    with running_scenarios(request.session.items, cluster, tmp_path_factory.mktemp("faults")) as outcomes:
        yield outcomes


@pytest.fixture
def counted(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    """Counts the calls of SLURM's commands."""
    return Counted(directory=tmp_path_factory.mktemp("commands"))
