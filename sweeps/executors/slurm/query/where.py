"""Whose jobs, and of which cluster: what can be told without asking SLURM."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Final

from sweeps.executors.slurm.query.command import user_name
from sweeps.launches.launch import Launch

_SLURM_CONFS: Final = ("/etc/slurm/slurm.conf", "/run/slurm/conf/slurm.conf")


@cache
def here() -> tuple[str, str]:
    """Return (user, cluster) as SLURM has them on this machine, without asking it; '' for what can't be told.

    The cluster is ClusterName of the file that SLURM_CONF names, else of the first usual one that can be read.
    """
    try:
        user = user_name()
    except KeyError:
        user = ""
    for path in [os.environ["SLURM_CONF"]] if os.environ.get("SLURM_CONF") else _SLURM_CONFS:
        try:
            text = Path(path).read_text(errors="replace")
        except OSError:
            continue
        named = re.search(r"^\s*ClusterName\s*=\s*([^\s#]+)", text, re.IGNORECASE | re.MULTILINE)
        # SLURM itself keeps clusters' names in lower case.
        return user, named[1].strip('"').lower() if named else ""
    return user, ""


def in_sight(launch: Launch) -> bool:
    """Tell whether asking from here must show a launch's jobs.

    Clusters may hide other users' jobs, and don't know other clusters'.
    """
    user, cluster = here()
    return launch.user in ("", user) and (launch.cluster in ("", cluster) or not cluster)
