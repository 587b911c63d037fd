"""YAML files and command-line text as values of the config."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .fields import matches
from .options import FIELD_TYPES, PowerFlowConfig, unknown_field


def read_yaml(path: str | Path, *, also: Iterable[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file whose keys are config fields (or in ``also``); errors name the file and the line."""
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot read the config file: {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of field: value, got a {type(values).__name__}")
    seen = set()
    for key, _ in node.value if node else ():
        where = f"{path}:{key.start_mark.line + 1}"
        if key.value in seen:
            raise ConfigError(f"{where}: {key.value} is given twice")
        seen.add(key.value)
        if key.value not in also and (message := unknown_field(key.value)):
            raise ConfigError(f"{where}: {message}")
    return {name: parse_value(name, value) if isinstance(value, str) else value for name, value in values.items()}


def load_config(path: str | Path) -> PowerFlowConfig:
    """The config in a YAML file of ``field: value`` lines; errors name the file and, where known, the line."""
    values = read_yaml(path)
    try:
        return PowerFlowConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_value(name: str, text: str) -> Any:
    """``text`` as the value of field ``name`` (``1e-6``, ``true``, ``none``, ``[0.8, 1.2]``), else ``text`` itself.

    YAML reads ``1e-6`` as a string, and the command line has only strings: both come through here.
    """
    hint = FIELD_TYPES.get(name, str)
    candidates: list[Any] = []
    if text.lower() in ("none", "null"):
        candidates.append(None)
    if text.lower() in ("true", "false"):
        candidates.append(text.lower() == "true")
    for convert in (int, float, json.loads):
        try:
            candidates.append(convert(text))
        except ValueError:
            continue
    # A string that spells no other value the field takes stays a string.
    return next((c for c in candidates if matches(c, hint)), text)
