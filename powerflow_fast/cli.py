"""``powerflow-fast train | eval | compare | demo | info``. The options of ``train`` are made from PowerFlowConfig."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .config.fields import RENAMED
from .config.files import parse_value, read_yaml
from .config.options import PowerFlowConfig
from .errors import ConfigError, PowerFlowError, suggest
from .eval_cli import add_commands
from .rewards.formats import FORMATS, resolve_format
from .version import __version__

__all__ = ["main"]

# What a config file may set besides the fields of PowerFlowConfig.
_RUN_KEYS = ("model", "prompts", "format")
_FIELDS = {f.name: f for f in dataclasses.fields(PowerFlowConfig)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for an error the user can fix (one line on stderr), 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in argv
    argv = [a for a in argv if a != "--traceback"]
    try:
        if argv[:1] == ["demo"]:  # the demo parses its own options
            return _demo(argv[1:])
        arguments = _parse(argv)
        return arguments.run(arguments)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except PowerFlowError as error:
        if traceback:
            raise
        print(f"powerflow-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if traceback:
            raise
        print("powerflow-fast: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="powerflow-fast",
        description="Train a language model to sample from p_base(y|q)^alpha.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"powerflow-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="train a model",
        usage="powerflow-fast train --model MODEL --prompts FILE --alpha ALPHA [--config FILE] [--OPTION VALUE ...]",
        description="Train a Hugging Face causal language model. The command line wins over the config file, the "
        "config file over the defaults.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    train.set_defaults(run=_train)
    run = train.add_argument_group("the run")
    run.add_argument("--model", help="hub name or local folder")
    run.add_argument("--prompts", help=".jsonl, .json, .parquet or .txt file")
    run.add_argument("--format", help=f"completions must have this form: {', '.join(FORMATS)}")
    run.add_argument("--config", help="YAML file with any of these options, written with underscores")
    run.add_argument("--traceback", help="show where in the code an error came from", action="store_true")
    fields = train.add_argument_group("configuration")
    for field in _FIELDS.values():
        fields.add_argument(_flag(field.name), **_settings(field))

    add_commands(commands)
    commands.add_parser("demo", help="train a small model right here and show what changed", add_help=False)
    info = commands.add_parser("info", help="show versions, devices and what can run here")
    info.set_defaults(run=_info)

    # --max_steps is as good as --max-steps.
    words = [re.sub(r"^--[^=]+", lambda option: option[0].replace("_", "-"), word) for word in argv]
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        option = next((w for w in unknown if w.startswith("-")), unknown[0]).split("=")[0]
        name = option.lstrip("-").replace("-", "_")
        known = [flag for flag in commands.choices[arguments.command]._option_string_actions if flag.startswith("--")]
        renamed = name in RENAMED and arguments.command == "train"
        raise ConfigError(f"unknown option {option}{f': {RENAMED[name]}' if renamed else suggest(option, known)}")
    return arguments


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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

    from .training.train import train  # loads transformers: the errors above come at once

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


def _demo(argv: list[str]) -> int:
    from .demo import main as demo

    return demo(argv)


def _info(arguments: argparse.Namespace) -> int:
    import torch

    from .ops.extension import extension_status
    from .ops.torch_products import bf16_is_fast, compiled_products_run

    print(f"powerflow_fast  {__version__}")
    print(f"python          {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "triton", "transformers", "accelerate", "datasets", "peft"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{name:15} {version}")
    for k in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(k)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        print(f"cuda:{k:<10} {device.name}, {memory}, compute capability {device.major}.{device.minor}")
    if not torch.cuda.is_available():
        print("cuda            no device" + ("" if torch.version.cuda else " (torch is built without CUDA)"))
    fast = [d for d in ("cuda", "cpu") if bf16_is_fast(d)]
    print(f"fast bfloat16   {', '.join(fast) or 'no'}")
    status = extension_status()
    print(f"extension       {'loaded' if status.available else 'missing'}: {status.reason}")
    compiled = compiled_products_run()
    print(f"CPU products    {'compiled: oneDNN blocks, AVX-512' if compiled else 'of torch'}")
    if importlib.util.find_spec("triton") is None:
        triton = "no: triton is not installed"
    elif torch.cuda.is_available():
        triton = "yes"
    else:
        triton = "no: needs a CUDA device (TRITON_INTERPRET=1 runs them slowly, for tests)"
    print(f"triton kernels  {triton}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
