"""Which of accounting's limits counts for a job, where several do; a real SLURM's word is in tests/slurm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pytest

from sweeps.errors import UserError
from sweeps.executors.slurm.query import Request, job_limits
from sweeps.executors.slurm.query.accounting import Standing

ENFORCED = {"AccountingStorageEnforce": "associations,limits,qos", "SelectTypeParameters": "CR_CORE_MEMORY"}


def fields(**values: str) -> Mapping[str, str]:
    return defaultdict(str, values)


def standing(**changes: Any) -> Standing:
    values: dict[str, Any] = {
        "user": "me",
        "account": "lab",
        "association": fields(),
        "accounts": {"lab": fields(ParentName="faculty"), "faculty": fields(ParentName="root"), "root": fields()},
        "qos": "normal",
        "partitions": {"main": ""},
        "all_qos": {"normal": fields(Name="normal")},
    }
    return Standing(**{**values, **changes})


def request(**changes: Any) -> Request:
    values: dict[str, Any] = dict.fromkeys(("partition", "account", "qos", "gpu_type", "constraint", "exclude"))
    values |= {"gpus": 2, "cpus": 4, "mem_gb": 8.0, "minutes": 60, "extra": {}}
    return Request(**{**values, **changes})


def said(
    monkeypatch: pytest.MonkeyPatch, of: Standing, config: Mapping[str, str] = ENFORCED, **changes: Any
) -> str | None:
    monkeypatch.setattr(job_limits, "read_config", lambda: config)
    monkeypatch.setattr(job_limits, "read_standing", lambda config, **asked: of)
    try:
        job_limits.check_job_limits(request(**changes))
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("most", "refused"),
    [("mem=4G", "executor.mem_gb=8: MaxTRES of me in account lab is 4 GB"), ("mem=8192M", None), ("mem=1T", None)],
)
def test_memory_counts_where_the_cluster_hands_it_out(
    most: str, refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = standing(association=fields(MaxTRES=most))
    found = said(monkeypatch, of)
    assert found == (refused and f"{refused}. SLURM would queue such jobs and never start them")
    assert said(monkeypatch, of, {**ENFORCED, "SelectTypeParameters": "CR_CORE"}) is None


def test_limits_that_are_not_enforced_refuse_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    of = standing(association=fields(MaxWall="00:05:00"))
    assert said(monkeypatch, of, {"AccountingStorageEnforce": "associations"}) is None
    assert "MaxWall of me in account lab is 5 minutes" in str(said(monkeypatch, of))


def test_a_group_s_limit_counts_for_all_accounts_below(monkeypatch: pytest.MonkeyPatch) -> None:
    accounts = {"lab": fields(ParentName="faculty"), "faculty": fields(GrpTRES="gres/gpu=1")}
    assert "executor.gpus=2: GrpTRES of account faculty" in str(said(monkeypatch, standing(accounts=accounts)))
    assert said(monkeypatch, standing(accounts=accounts), gpus=1) is None


def test_a_partition_s_qos_counts_before_the_job_s_unless_that_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = fields(Name="wide", MaxWall="02:00:00"), fields(Name="narrow", MaxWall="00:30:00")
    of = {"qos": "narrow", "partitions": {"main": "wide"}}
    assert said(monkeypatch, standing(all_qos={"wide": wide, "narrow": narrow}, **of)) is None
    narrow = {**narrow, "Flags": "OverPartQOS"}
    found = said(monkeypatch, standing(all_qos={"wide": wide, "narrow": fields(**narrow)}, **of))
    assert "executor.time=60 minutes: MaxWall of QOS narrow is 30 minutes" in str(found)


def test_one_of_several_partitions_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    all_qos = {"normal": fields(Name="normal"), "short": fields(Name="short", MaxWall="00:30:00")}
    both = standing(partitions={"short": "short", "main": ""}, all_qos=all_qos)
    assert said(monkeypatch, both) is None
    assert said(monkeypatch, standing(partitions={"short": "short"}, all_qos=all_qos))


def test_gpus_of_a_type_count_where_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    of = standing(all_qos={"normal": fields(Name="normal", MaxTRES="gres/gpu:h100=1,gres/gpu:a100=8")})
    assert "executor.gpus=2: MaxTRES of QOS normal is 1 of gres/gpu:h100" in str(said(monkeypatch, of, gpu_type="h100"))
    assert said(monkeypatch, of, gpu_type="a100") is None
    assert said(monkeypatch, of) is None
