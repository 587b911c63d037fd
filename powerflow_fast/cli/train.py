"""`powerflow-fast train`: an option for each field of the config."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from typing import Any

from ..config.files import parse_value, read_yaml
from ..config.options import PowerFlowConfig
from ..errors import ConfigError
from ..rewards.formats import FORMATS, resolve_format

# What a config file may set besides the fields of PowerFlowConfig.
_RUN_KEYS = ("model", "prompts", "format")


def add_command(commands: Any) -> None:
    """The subcommand ``train`` of argparse's ``commands``."""
    parser = commands.add_parser(
        "train",
        help="train a model",
        usage="powerflow-fast train --model MODEL --prompts FILE --alpha ALPHA [--config FILE] [--OPTION VALUE ...]",
        description="Train a Hugging Face causal language model. The command line wins over the config file, the "
        "config file over the defaults.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_train)
    run = parser.add_argument_group("the run")
    run.add_argument("--model", help="hub name or local folder")
    run.add_argument("--prompts", help=".jsonl, .json, .parquet or .txt file")
    run.add_argument("--format", help=f"completions must have this form: {', '.join(FORMATS)}")
    run.add_argument("--config", help="YAML file with any of these options, written with underscores")
    run.add_argument("--traceback", help="show where in the code an error came from", action="store_true")
    options = parser.add_argument_group("configuration")
    for field in dataclasses.fields(PowerFlowConfig):
        options.add_argument(f"--{field.name.replace('_', '-')}", **_settings(field))


def _settings(field: dataclasses.Field) -> dict[str, Any]:
    """argparse's keywords for one field. Values stay text here: PowerFlowConfig reads and checks them."""
    annotation = str(field.type)
    default = "none" if field.default is None else field.default
    default = str(default).lower() if isinstance(default, bool) else default
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    settings: dict[str, Any] = {"help": f"{field.metadata['help']} [{shown}]".replace("%", "%%")}
    names = re.findall(r"['\"](\w+)['\"]", annotation)  # the values of a Literal
    if "bool" in annotation:
        names = ["true", "false", *names, *(["FOLDER"] if "str" in annotation else [])]
        settings |= {"nargs": "?", "const": "true"}
    elif "tuple" in annotation or "list" in annotation:
        settings["nargs"] = "+"
    settings["metavar"] = "|".join(names) if names else field.name.rsplit("_", 1)[-1].upper()
    return settings


def _train(arguments: argparse.Namespace) -> int:
    given = {k: v for k, v in vars(arguments).items() if k not in ("run", "command")}
    path = given.pop("config", None)
    values = read_yaml(path, also=_RUN_KEYS) if path else {}
    for name, text in given.items():
        values[name] = text if name in _RUN_KEYS else _value(name, text)
    model, prompts, format_name = (values.pop(key, None) for key in _RUN_KEYS)
    for key, value in (("--model", model), ("--prompts", prompts)):
        if not isinstance(value, str):
            raise ConfigError(f"{key} is required: give it here or as '{key[2:]}:' in the config file")
    try:
        config = PowerFlowConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}, command line: {error}" if path else str(error)) from error
    alpha, format_fn = config.require_alpha(), resolve_format(format_name)

    from ..training.train import train  # loads transformers: the errors above come at once

    result = train(model, prompts, alpha=alpha, config=config, format_fn=format_fn)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"done: {result.output_dir}")
    return 0


def _value(name: str, text: str | list[str]) -> Any:
    """What was typed for a field: one word, or the words of an option that takes several."""
    if isinstance(text, str):
        return parse_value(name, text)
    if len(text) == 1:
        return parse_value(name, text[0])
    return [float(t) if _is_number(t) else t for t in text]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
