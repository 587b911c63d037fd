"""The rule of arrows: a room imports rooms on lower floors only, and no two files import each other in a circle.

It reads the sources; nothing of the package runs. ``powerflow_fast/kernels`` of an installed package is ``kernels/`` of
a checkout.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (  # from the ground up; rooms on one floor do not know each other
    {"errors", "version"},
    {"config", "data", "tools"},
    {"kernels"},
    {"ops"},
    {"models", "objectives", "rewards"},
    {"rollout"},
    {"checkpoints", "report", "sampling"},
    {"evaluation", "training"},
    {"comparison", "demo", "integrations"},
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
UNSORTED = len(FLOORS)  # a module that is in no room yet: no room may import it
FILES = {"errors", "version", "data"}

Name = tuple[str, ...]


def sources(root: Path) -> dict[Name, ast.Module]:
    """Syntax trees of the package's files, by their names below the package."""
    package = root / "powerflow_fast"
    files = {file.relative_to(package).with_suffix("").parts: file for file in package.rglob("*.py")}
    files |= {file.relative_to(root).with_suffix("").parts: file for file in (root / "kernels").rglob("*.py")}
    files = {
        name: file for name, file in files.items() if len(name) > 1 or name[0] in FILES
    }  # the flat ones move later
    return {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()}


def imports(name: Name, tree: ast.Module) -> Iterator[tuple[int, Name]]:
    """(line, name below the package) of every import of our own, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                module = ["powerflow_fast", *name[: len(name) - node.level], *module]
            paths = [[*module, alias.name] for alias in node.names]
        else:
            continue
        yield from ((node.lineno, tuple(path[1:])) for path in paths if path[0] == "powerflow_fast")


def upward(files: dict[Name, ast.Module]) -> list[str]:
    """Imports that point upward or to the same floor's other rooms."""
    wrong = []
    for name, tree in files.items():
        room = name[0]
        if room == "__init__" or room not in FLOOR:  # the package's face names what every room makes public
            continue
        for line, target in imports(name, tree):
            if target[:1] == ("integrations",) or name[0] == "integrations":  # moves last
                continue
            if target and target[0] != room and FLOOR.get(target[0], UNSORTED) >= FLOOR[room]:
                wrong.append(f"{'/'.join(name)}.py:{line}: {room} may not import {'.'.join(target)}")
            elif not target or target[0].startswith("__"):
                wrong.append(f"{'/'.join(name)}.py:{line}: {room} may not import the package's own face")
    return sorted(wrong)


def check_circles(files: dict[Name, ast.Module]) -> None:
    """CycleError, which names the files, where some import each other in a circle."""
    graph: dict[Name, set[Name]] = {}
    for name, tree in files.items():
        found = (path if path in files else path[:-1] for _, path in imports(name, tree))
        graph[name] = {path for path in found if path in files and path != name}
    graphlib.TopologicalSorter(graph).prepare()


def test_imports_point_downward():
    assert upward(sources(ROOT)) == []


def test_no_circle_of_files():
    check_circles(sources(ROOT))


def test_planted_faults_are_found():
    planted = {
        ("ops", "logprobs"): "def f():\n    from ..training.run import Run\n",
        ("models", "head"): "from ..rewards import answers\n",
        ("errors",): "from . import __version__\n",
        ("training", "run"): "from ..ops.logprobs import x\nfrom ..nowhere import y\n",
    }
    files = {name: ast.parse(text) for name, text in planted.items()}
    assert [line.split(": ")[0] for line in upward(files)] == [
        "errors.py:1",
        "models/head.py:1",
        "ops/logprobs.py:2",
        "training/run.py:2",
    ]
    circle = {
        ("ops", "a"): "from . import b\n",
        ("ops", "b"): "def f():\n    from .c import x\n",
        ("ops", "c"): "from .a import y",
    }
    with pytest.raises(graphlib.CycleError, match="'c'"):
        check_circles({name: ast.parse(text) for name, text in circle.items()})
