"""Writes docs/api.md from the docstrings of the public functions and classes.

python docs/make_api.py            # writes it
python docs/make_api.py --check    # fails if it isn't what would be written
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import itertools
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

PAGE = Path(__file__).with_name("api.md")
PACKAGE = "powerflow_fast"
# Public is what the `__init__` of a room names. The integrations need a package each, so that theirs names nothing:
# there it is the `__all__` of a module.
ROOMS = (
    "config",
    "ops",
    "objectives",
    "models",
    "rewards",
    "rollout",
    "sampling",
    "training",
    "evaluation",
    "comparison",
    "demo",
    "cli",
    "integrations",
)
HEADER = f"""# API

Written by `python docs/make_api.py` from the docstrings of `{PACKAGE}`: change those, not this page.
"""
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")


def modules() -> Iterator[str]:
    yield PACKAGE
    for room in ROOMS:
        name = f"{PACKAGE}.{room}"
        if importlib.util.find_spec(name) is None:
            continue
        yield name
        if room == "integrations":
            yield from (f"{name}.{sub.name}" for sub in pkgutil.iter_modules(importlib.import_module(name).__path__))


def page(present: str) -> str:
    """The whole page. Where a module needs a package that is missing here, its part of ``present`` stays."""
    parts = {"": HEADER}
    kept = dict(re.findall(r"(?ms)^## `([\w.]+)`\n(.*?)(?=^## |\Z)", present))
    for name in modules():
        try:
            text = section(importlib.import_module(name))
        except ModuleNotFoundError as error:
            if (error.name or "").startswith(PACKAGE):
                raise
            print(f"{name} can't be imported here ({error}): its part stays as it is", file=sys.stderr)
            text = kept.get(name, "").strip()
        if text:
            parts[name] = f"## `{name}`\n\n{text}\n"
    return "\n".join(parts.values())


def section(module: ModuleType) -> str:
    names = getattr(module, "__all__", ())
    blocks = [markdown(inspect.getdoc(module) or "")] if module.__name__ != PACKAGE else []
    top = importlib.import_module(PACKAGE)
    for name in names:
        value = getattr(module, name)
        if module is not top and name in top.__all__ and getattr(top, name) is value:
            blocks.append(f"`{name}` is described [above](#{name.lower()}).")
        else:
            blocks += entry(name, value, module)
    return "\n\n".join(block for block in blocks if block)


def entry(name: str, value: Any, module: ModuleType) -> list[str]:
    if inspect.isclass(value):
        return [f"### `{name}`", code(name, value), *class_body(value)]
    if inspect.isroutine(value):
        return [f"### `{name}`", code(name, value), markdown(own_doc(value))]
    source = inspect.getsource(importlib.import_module(defined_in(name, module)))
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return [f"### `{name}`", f"```python\n{ast.get_source_segment(source, node)}\n```"]
    raise ValueError(f"{module.__name__}.{name}: don't know how to describe a {type(value).__name__}")


def defined_in(name: str, module: ModuleType) -> str:
    """The module from which ``module`` imports ``name``, or itself."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return importlib.util.resolve_name("." * node.level + (node.module or ""), module.__package__)
    return module.__name__


def class_body(cls: type) -> list[str]:
    blocks = [markdown(own_doc(cls))]
    if fields := "\n".join(f"- `{name}`: {text}" for name, text in field_docs(cls)):
        blocks.append(fields)
    for name, member in vars(cls).items():
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(function, (property, functools.cached_property)):
            blocks += [f"#### `{cls.__name__}.{name}`", markdown(own_doc(function))]
        elif inspect.isfunction(function) and own_doc(function):
            blocks += [f"#### `{cls.__name__}.{name}`", code(name, function), markdown(own_doc(function))]
    return blocks


def foreign_fields(cls: Any) -> tuple[type | None, set[str]]:
    """The base of a dataclass that another package brings, and the fields that it alone has: they change with its
    releases, and its own documentation has them."""
    if not (inspect.isclass(cls) and dataclasses.is_dataclass(cls)):
        return None, set()
    own = [c for c in cls.__mro__ if c.__module__.startswith(PACKAGE)]
    base = next((c for c in cls.__mro__ if dataclasses.is_dataclass(c) and c not in own), None)
    ours = {name for c in own for name in inspect.get_annotations(c)}
    return base, {field.name for field in dataclasses.fields(cls)} - ours if base else set()


def field_docs(cls: type) -> Iterator[tuple[str, str]]:
    """What a dataclass says of a field in its metadata, or what stands below a field."""
    _, foreign = foreign_fields(cls)
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if "help" in field.metadata and field.name not in foreign:
            yield field.name, field.metadata["help"]
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    for node, below in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield node.target.id, inline(" ".join(inspect.cleandoc(below.value.value).split()))


def own_doc(value: Any) -> str:
    """The docstring, unless it was inherited or made up by dataclass or NamedTuple."""
    doc = inspect.cleandoc(value.__doc__ or "")
    return "" if inspect.isclass(value) and doc.startswith(f"{value.__name__}(") else doc


def code(name: str, value: Any) -> str:
    """The signature, annotations as they are written; a protocol has none."""
    if getattr(value, "_is_protocol", False):
        return ""
    try:
        signature = inspect.signature(value)
    except ValueError:
        return ""
    base, foreign = foreign_fields(value)
    parameters, keyword_only = [], False
    for p in signature.parameters.values():
        if p.name == "self" or p.name in foreign:
            continue
        if p.kind is p.KEYWORD_ONLY and not keyword_only and "*" not in "".join(x[:1] for x in parameters):
            parameters.append("*")
        keyword_only = keyword_only or p.kind is p.KEYWORD_ONLY
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        annotated = "" if p.annotation is p.empty else f": {annotation(p.annotation)}"
        shown = p.default.__name__ if inspect.isfunction(p.default) else repr(p.default)  # a repr has an address
        default = "" if p.default is p.empty else f" = {shown}" if annotated else f"={shown}"
        parameters.append(stars + p.name + annotated + default)
    if foreign:
        parameters.append(f"**fields of {base.__name__}")
    empty = inspect.isclass(value) or signature.return_annotation is signature.empty
    end = ")" if empty else f") -> {annotation(signature.return_annotation)}"
    line = f"{name}({', '.join(parameters)}{end}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {p},\n" for p in parameters) + end
    return f"```python\n{line}\n```"


def annotation(value: Any) -> str:
    value = getattr(value, "__forward_arg__", value)
    return value if isinstance(value, str) else inspect.formatannotation(value)


def inline(text: str) -> str:
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"``(.+?)``", r"`\1`", text)


def markdown(doc: str) -> str:
    """A docstring as Markdown: its sections become lists, what is indented becomes code."""
    out: list[str] = []
    lines = doc.splitlines()
    while lines:
        line = lines.pop(0)
        if heading := _SECTION.fullmatch(line):
            out += ["", f"**{heading[1]}**", "", *section_list(heading[1], indented(lines)), ""]
        elif line.startswith("    "):
            block = [line, *indented(lines, dedent=False)]
            out += ["", "```", textwrap.dedent("\n".join(block)).strip("\n"), "```", ""]
        else:
            if line.startswith(("* ", "- ")) and out and out[-1] and not out[-1].startswith(("* ", "- ", "  ")):
                out.append("")
            out.append(inline(line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def indented(lines: list[str], *, dedent: bool = True) -> list[str]:
    """Takes the indented lines at the beginning of ``lines``, and blank ones between them, out of it."""
    block = []
    while lines and (lines[0].startswith("    ") or (not lines[0] and lines[1:] and lines[1].startswith("    "))):
        block.append(lines.pop(0))
    return textwrap.dedent("\n".join(block)).splitlines() if dedent else block


def section_list(heading: str, lines: list[str]) -> list[str]:
    if heading in ("Returns", "Yields"):
        return [inline(line) for line in lines]
    items: list[str] = []
    for line in lines:
        if line.startswith(" ") and items:
            items.append("  " + inline(line.strip()))
        elif line:
            names = re.match(r"([\w*., ]+):\s+", line)
            items.append(f"- `{names[1]}`: {inline(line[names.end() :])}" if names else f"- {inline(line)}")
    return items


def main(arguments: list[str]) -> int:
    present = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    wanted = page(present)
    if arguments == ["--check"]:
        if present != wanted:
            print("docs/api.md is not what the docstrings say: run python docs/make_api.py", file=sys.stderr)
        return int(present != wanted)
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
