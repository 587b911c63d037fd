"""The house: a room imports rooms on lower floors only, no files import each other in a circle, and a name that begins
with an underscore stays in its file.

It reads the sources; nothing of the package runs. ``powerflow_fast/kernels`` of an installed package is ``kernels/`` of
a checkout.
"""

from __future__ import annotations

import ast
import graphlib
import re
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
UNSORTED = len(FLOORS)  # a module on no floor: nobody may import it

Name = tuple[str, ...]


def sources(root: Path) -> dict[Name, ast.Module]:
    """Syntax trees of the package's files, by their names below the package."""
    package = root / "powerflow_fast"
    files = {file.relative_to(package).with_suffix("").parts: file for file in package.rglob("*.py")}
    files |= {file.relative_to(root).with_suffix("").parts: file for file in (root / "kernels").rglob("*.py")}
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
        if room == "__init__":  # the package's face names what every room makes public
            continue
        for line, target in imports(name, tree):
            if target and target[0] != room and FLOOR.get(target[0], UNSORTED) >= FLOOR[room]:
                wrong.append(f"{'/'.join(name)}.py:{line}: {room} may not import {'.'.join(target)}")
            elif not target or target[0].startswith("__"):
                wrong.append(f"{'/'.join(name)}.py:{line}: {room} may not import the package's own face")
    return sorted(wrong)


def check_circles(files: dict[Name, ast.Module]) -> None:
    """CycleError, which names the files, where some import each other in a circle."""
    graph: dict[Name, set[Name]] = {}
    for name, tree in files.items():
        found = {path if path in files else path[:-1] for _, path in imports(name, tree)}
        found = {path if path in files else (*path, "__init__") for path in found}
        graph[name] = {path for path in found if path in files and path != name}
    graphlib.TopologicalSorter(graph).prepare()


def borrowed(files: dict[Name, ast.Module]) -> list[str]:
    """Imports of a name that begins with an underscore, which belongs to its file."""
    return [
        f"{'/'.join(name)}.py:{line}: {path[-1]} is private"
        for name, tree in files.items()
        for line, path in imports(name, tree)
        if path and path[-1].startswith("_") and not path[-1].startswith("__")
    ]


def test_imports_point_downward():
    assert upward(sources(ROOT)) == []


def test_no_circle_of_files():
    check_circles(sources(ROOT))


def test_private_names_stay_in_their_file():
    assert [line for line in borrowed(sources(ROOT)) if not line.endswith(" _C is private")] == []


def test_every_file_is_in_a_room_and_every_room_is_installed():
    names = sources(ROOT)
    assert {name[0] for name in names} - {"__init__"} == set(FLOOR)
    assert {name[0] for name in names if len(name) == 1} == {"__init__", "data", "errors", "version"}
    rooms = {f"powerflow_fast.{name[0]}" for name in names if len(name) > 1}
    listed = re.search(r"(?ms)^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    assert set(re.findall(r'"([\w.]+)"', listed)) == {"powerflow_fast", *rooms}


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)+\w+\.(?:py|h|cpp))`", text)
    assert len(named) > 20
    for name in named:
        assert (ROOT / "powerflow_fast" / name).is_file() or (ROOT / name).is_file(), name


def test_no_file_is_long():
    for file in [
        file
        for place in ("powerflow_fast/**/*.py", "kernels/*.py", "csrc/*", "tests/**/*.py", "benchmarks/**/*.py")
        for file in ROOT.glob(place)
    ]:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 500, file


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
    assert borrowed({("ops", "a"): ast.parse("from .b import _x\nfrom .b import y")}) == ["ops/a.py:1: _x is private"]
    face = {("ops", "__init__"): "from .a import x\n", ("ops", "a"): "from . import x\n"}
    with pytest.raises(graphlib.CycleError):
        check_circles({name: ast.parse(text) for name, text in face.items()})
    circle = {
        ("ops", "a"): "from . import b\n",
        ("ops", "b"): "def f():\n    from .c import x\n",
        ("ops", "c"): "from .a import y",
    }
    with pytest.raises(graphlib.CycleError, match="'c'"):
        check_circles({name: ast.parse(text) for name, text in circle.items()})
