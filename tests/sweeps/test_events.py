"""Events cross the pipe between a worker and its pool as JSON, and come out as they went in."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import get_args

import pytest

from sweeps.events import Event, Listener, Measured, Measuring, Teller, event_to_dict
from sweeps.launches import spending
from sweeps.plan import cost
from sweeps.store.rows import told_part
from sweeps.worker.settings import WorkerArguments, WorkerSettings

VALUES = {
    "str": "text",
    "int": 256,
    "float": 0.5,
    "Row": {"measurement": "m", "status": "done", "metrics": {"loss": 2.0}},
}


@pytest.mark.parametrize("kind", get_args(Event), ids=lambda kind: kind.name)
def test_each_kind_of_event_comes_back_from_json(kind: type[Event]) -> None:
    event = kind(**{field.name: VALUES[str(field.type)] for field in fields(kind)})
    assert Listener().events(Teller().line(event).encode()) == [event]
    assert event_to_dict(event)["event"] == kind.name


def test_rows_come_back_whole_from_what_differs_in_pieces_of_any_length() -> None:
    rows = [
        {"key": "a", "limit": 400, "metrics": {"loss": math.inf}, "clip": False, "label": "µ"},
        {"key": "a", "metrics": {"acc": 0.5}, "clip": False, "label": "µ"},
        {"key": "b", "limit": 400, "metrics": {"loss": 2.0}, "clip": True, "label": "µ"},
    ]
    told: list[Event] = [each for row in rows for each in (Measuring(pack="p", measurement="m"), Measured(row=row))]
    teller = Teller()
    lines = [teller.line(event) for event in told]
    assert "label" not in lines[3]
    data = "".join(lines).encode()
    for length in (1, 7, len(data)):
        listener = Listener()
        pieces = [data[at : at + length] for at in range(0, len(data), length)]
        assert [event for piece in pieces for event in listener.events(piece)] == told


def test_what_is_told_of_a_row_is_all_that_listeners_read() -> None:
    read = {*cost.COLUMNS, *spending.COLUMNS, "measurement", "error_type", "metrics", "stderr"}
    assert told_part(dict.fromkeys([*read, "samples", "error"], 1)) == dict.fromkeys(read, 1)
    assert told_part({"key": "k", "blocksize": None, "clip": False, "versions": "{}"}) == {"key": "k", "clip": False}


def test_kinds_have_names_of_their_own() -> None:
    assert len({kind.name for kind in get_args(Event)}) == len(get_args(Event))
    assert Measured.name == "measured"


def test_a_workers_arguments_come_back_from_its_command_line() -> None:
    settings = WorkerSettings(batch_tokens=7, trust_remote_code=True, provenance={"dirty": None}, load_again=True)
    arguments = WorkerArguments(out="/o", device="cpu", threads=2, settings=settings)
    assert WorkerArguments.from_json(arguments.to_json()) == arguments
