"""The shell completes what a launch takes, values too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps.commands.modes import MODES
from tests import ROOT


def completed(line: str) -> list[str]:
    environment = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    command = [sys.executable, str(ROOT / "launch.py"), "-sc", "query=bash"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return said.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("kbit-sweep mode=", [f"mode={m}" for m in MODES]),
        ("python launch.py sweep=fig3_data_types mode=st", ["mode=status"]),
        ("kbit-sweep mode=drop un", ["undo="]),
        ("kbit-sweep mode=drop undo=", ["undo=false", "undo=true"]),
        ("kbit-sweep status=no", ["status=node_fail"]),
        ("kbit-sweep executor.device=c", ["executor.device=cpu", "executor.device=cuda"]),
        ("kbit-sweep executor=", ["executor=local", "executor=slurm"]),
        ("kbit-sweep sweep=fig3", ["sweep=fig3_block_size", "sweep=fig3_data_types"]),
    ],
)
def test_keys_and_values_are_completed(line: str, offered: list[str]) -> None:
    assert sorted(completed(line)) == sorted(offered)


def test_the_line_of_the_readme_installs_it_in_bash() -> None:
    """Bash calls what the line defines, as it does when somebody presses Tab."""
    assert 'eval "$(python launch.py -sc install=bash)"' in (ROOT / "README.md").read_text()
    script = f"""
        cd {ROOT}
        PATH={Path(sys.executable).parent}:$PATH
        eval "$(python launch.py -sc install=bash)"
        complete -p python
        COMP_LINE="python launch.py mode=st" COMP_POINT=24 COMP_CWORD=2
        hydra_bash_completion
        echo "${{COMPREPLY[@]}}"
    """
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "hydra_bash_completion" in said[0]
    assert said[1] == "mode=status"
