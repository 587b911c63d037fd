"""``powerflow-fast train | eval | compare | demo | info``. The options of ``train`` are made from PowerFlowConfig."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..config.fields import RENAMED
from ..errors import ConfigError, PowerFlowError, suggest
from ..version import __version__
from . import evaluate, info, train


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

    train.add_command(commands)
    evaluate.add_commands(commands)
    commands.add_parser("demo", help="train a small model right here and show what changed", add_help=False)
    info.add_command(commands)

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


def _demo(argv: list[str]) -> int:
    from ..demo.run import main as demo

    return demo(argv)
