"""docs/api.md is what the docstrings say, and every public name is documented and has type hints that resolve."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs/make_api.py")
make_api = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_api)


def public():
    """(module, name, function or class) of every public name, and of the public methods of classes."""
    for module_name in make_api.modules():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            assert not (error.name or "").startswith("powerflow_fast"), error
            continue
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield module_name, name, value
            elif inspect.isclass(value):
                yield module_name, name, value
                for method, function in vars(value).items():
                    if inspect.isfunction(function) and (method in ("__init__", "__call__") or method[0] != "_"):
                        yield module_name, f"{name}.{method}", function


def test_the_page_is_up_to_date():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs/make_api.py"), "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_check_tells_a_page_that_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_api, "PAGE", tmp_path / "api.md")
    monkeypatch.setattr(make_api, "page", lambda present: "new\n")
    assert make_api.main(["--check"]) == 1 and "run python docs/make_api.py" in capsys.readouterr().err
    assert make_api.main([]) == 0 and make_api.main(["--check"]) == 0
    (tmp_path / "api.md").write_text("old\n")
    assert make_api.main(["--check"]) == 1
    assert make_api.main(["--wrong"]) == 2


def test_every_public_name_is_documented_with_its_signature():
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for module, name, _ in public():
        if "." not in name:
            assert f"### `{name}`\n" in page or f"`{name}` is described" in page, f"{module}.{name}"
    assert "linear_logprobs(\n    hidden: Tensor,\n    weight: Tensor,\n    labels: Tensor,\n    *,\n" in page


def test_properties_and_fields_have_their_texts():
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert "#### `Trajectories.has_tokens`\n\n(B,) bool.\n" in page
    assert "- `loss`: () the mean of w δ² over the sequences of the step.\n" in page
    assert "- `alpha`: exponent of the target" in page, "help of a configuration field"


def test_markdown_of_a_docstring():
    doc = inspect.cleandoc(
        """Sum of :func:`x` and ``y``:

            z = x + y

        more.

        Args:
            x, y: first line
                and second.
            z: third.

        Returns:
            (N,) one
            paragraph.
        """
    )
    assert make_api.markdown(doc) == (
        "Sum of `x` and `y`:\n\n```\nz = x + y\n```\n\nmore.\n\n**Args**\n\n- `x, y`: first line\n  and second.\n"
        "- `z`: third.\n\n**Returns**\n\n(N,) one\nparagraph."
    )


def test_a_module_whose_requirement_is_missing_keeps_its_part(monkeypatch):
    def missing(name):
        if name == "powerflow_fast.gone":
            raise ModuleNotFoundError("No module named 'trl'", name="trl")
        module = types.ModuleType(name)
        module.__all__ = []
        return module

    monkeypatch.setattr(make_api, "modules", lambda: iter(["powerflow_fast", "powerflow_fast.gone"]))
    monkeypatch.setattr(make_api.importlib, "import_module", missing)
    part = "## `powerflow_fast.gone`\n\nwhat it said\n"
    assert make_api.page("## `powerflow_fast.x`\n\nother\n\n" + part).endswith("\n" + part)
    assert "gone" not in make_api.page("")


@pytest.mark.parametrize("module", list(make_api.modules()))
def test_type_hints_resolve(module):
    # a protocol has an __init__ of typing's
    checked = [(name, value) for where, name, value in public() if where == module and value.__module__ != "typing"]
    for name, value in checked:
        hints = typing.get_type_hints(value)
        if inspect.isfunction(value):
            bare = [
                p.name
                for p in inspect.signature(value).parameters.values()
                if p.annotation is p.empty and p.name not in ("self", "cls")
            ]
            assert not bare, f"{module}.{name}: no type hints for {bare}"
            assert "return" in hints or name.endswith("__init__"), f"{module}.{name}: no return type"


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "powerflow_fast/py.typed").is_file()
