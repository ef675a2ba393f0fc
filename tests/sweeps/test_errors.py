"""One tree of exceptions: an exception stands in sweeps.errors or kbit.errors, in its drawing, with one line on it."""

from __future__ import annotations

import ast

from sweeps import errors
from tests import ROOT


def exceptions() -> dict[str, type[errors.SweepError]]:
    found = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    return {name: value for name, value in found.items() if issubclass(value, errors.SweepError)}


def test_the_drawing_has_every_exception_under_its_parent() -> None:
    drawn: dict[str, str] = {}
    parents: list[str] = []
    for line in str(errors.__doc__).splitlines():
        words = line.replace("├──", " ").replace("└──", " ").replace("│", " ").split()
        if words and words[0] in exceptions():
            depth = (len(line) - len(line.lstrip(" │├└─")) - 4) // 4
            parents[depth:] = [words[0]]
            drawn[words[0]] = parents[depth - 1] if depth else "Exception"
    assert drawn == {name: kind.__bases__[0].__name__ for name, kind in exceptions().items()}


def test_each_says_what_it_is_and_a_wrong_request_alone_is_bad_input() -> None:
    for kind in exceptions().values():
        assert kind.__doc__
        assert kind.exit_code == (errors.EXIT_BAD_INPUT if issubclass(kind, errors.UserError) else errors.EXIT_FAILED)


def test_no_other_file_defines_an_exception_or_an_exit_code() -> None:
    for path in [*(ROOT / "sweeps").rglob("*.py"), *(ROOT / "kbit").rglob("*.py"), ROOT / "launch.py"]:
        if path.name == "errors.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ClassDef) and node.name.endswith("Error")), path
            is_set = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            assert not (is_set and node.id.startswith("EXIT_")), path
