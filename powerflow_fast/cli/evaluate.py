"""``powerflow-fast eval`` and ``powerflow-fast compare``."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
from pathlib import Path
from typing import Any

from ..errors import ConfigError, OutputDirError

# Options of the command that are keywords of evaluate under another name, or none at all.
_RENAMED = {"samples": "num_samples"}
_NOT_PASSED = (
    "run",
    "command",
    "model",
    "problems",
    "scorer",
    "tokenizer",
    "judge_url",
    "judge_model",
    "judge_key_file",
)


def add_commands(commands: Any) -> None:
    """Add the two commands to ``commands``, what ``add_subparsers`` returned."""
    run = commands.add_parser(
        "eval",
        help="sample completions of problems and measure them",
        usage="powerflow-fast eval --model MODEL --problems PROBLEMS [--OPTION VALUE ...]",
        description="Sample completions, score and measure them, print a table with intervals. A second call with the "
        "same --output-dir goes on where the first was stopped.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    run.set_defaults(run=_eval)
    add = run.add_argument
    add("--model", help="hub name or local folder; not needed with --completions")
    add("--problems", help="benchmark, benchmark:FILE, reasoning_gym:TASK?option=value, or a .jsonl/.parquet/.txt file")
    add("--output-dir", metavar="DIR", help="where evaluation.json and completions.jsonl go [nowhere]")
    add("--samples", "--num-samples", type=int, metavar="N", help="completions of each problem [16]")
    add("--sampler", help="temperature=1, greedy, power:alpha=4, verbalized:answers=5 [temperature=1]")
    add("--max-completion-length", type=int, metavar="N", help="tokens [1024]")
    add("--batch-size", type=int, metavar="N", help="sequences at once [32]")
    add("--limit", type=int, metavar="N", help="at most so many problems, always the same ones [all]")
    add("--seed", type=int, help="of the sampling [0]")
    add("--scorer", help="math, boxed, number, exact, choice, reasoning_gym, none, or FILE.py:FUNCTION [auto]")
    add(
        "--measures", nargs="+", metavar="GROUP", help="accuracy length lexical semantic judge likelihood [first three]"
    )
    add("--ks", nargs="+", type=int, metavar="K", help="the k of pass@k [1 2 4 ... samples]")
    add("--confidence", type=float, metavar="P", help="of the intervals [0.95]")
    add("--base", help="base model to compare log-probs with: hub name or folder")
    add("--alpha", type=float, help="exponent that the length tilt is estimated for [it is estimated too]")
    add("--score-temperature", type=float, metavar="T", help="of the log-probs and the entropy [1]")
    add("--completions", metavar="FILE", help=".jsonl of completions made elsewhere; nothing is sampled")
    add("--tokenizer", metavar="NAME", help="hub name or folder, for --completions without --model")
    add("--judge-url", metavar="URL", help="OpenAI-compatible endpoint of a judge of quality and strategies")
    add("--judge-model", metavar="NAME", help="its model")
    add("--judge-key-file", metavar="FILE", help="file that holds its API key")
    add("--name", help="of the result [model, sampler]")
    add("--dtype", help="of the weights: float32, bfloat16, ... [as stored]")
    add("--system-prompt", metavar="TEXT", help="before every prompt; needs a chat template")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    add("--traceback", action="store_true", help="show where in the code an error came from")

    compare = commands.add_parser(
        "compare",
        help="compare evaluations in one HTML page",
        usage="powerflow-fast compare DIR DIR [DIR ...] --output-dir DIR [--OPTION VALUE ...]",
        description="Write comparison.html and comparison.md; changes are against the first evaluation.",
        allow_abbrev=False,
    )
    compare.set_defaults(run=_compare)
    add = compare.add_argument
    add(
        "evaluations",
        nargs="+",
        metavar="DIR",
        help="folders that `powerflow-fast eval` wrote; the first is the reference",
    )
    add("--output-dir", metavar="DIR", required=True, help="where the pages go")
    add("--title", default="Comparison", help="[Comparison]")
    add("--text", default="", help="a paragraph below the title")
    add(
        "--history", nargs="+", default=[], metavar="NAME=FILE", help="history.jsonl of training runs, for their curves"
    )
    add("--traceback", action="store_true", help="show where in the code an error came from")


def _eval(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    if "problems" not in given:
        raise ConfigError("--problems is required: a benchmark, a task or a file")
    if "model" not in given and "completions" not in given:
        raise ConfigError("--model is required, or --completions")
    options = {_RENAMED.get(k, k): v for k, v in given.items() if k not in _NOT_PASSED}
    options["scorer"] = _scorer(given.get("scorer", "auto"))
    judge = _judge(given)

    from ..evaluation.evaluate import evaluate  # loads transformers: the errors above come at once
    from ..evaluation.result import describe_statistics

    if "tokenizer" in given:
        options["tokenizer"] = _tokenizer(given["tokenizer"])
    result = evaluate(given.get("model"), given["problems"], judge=judge, progress=True, **options)
    print(f"{result.name} on {result.problems}, {result.settings['num_samples']} completions of each problem")
    print(f"{result.tokens_generated} tokens generated in {result.seconds:.1f} s")
    if result.statistics:
        print(f"sampler: {describe_statistics(result.statistics, len(result.completions))}")
    print()
    print(result.table())
    if judge is not None and judge.unreadable:
        print(f"\n{judge.unreadable} opinions of the judge could not be read")
    if "output_dir" in given:
        print(f"\ndone: {given['output_dir']}")
    return 0


def _judge(given: dict[str, Any]) -> Any:
    if "judge_url" not in given:
        if extra := [name for name in ("judge_model", "judge_key_file") if name in given]:
            raise ConfigError(f"--{extra[0].replace('_', '-')} needs --judge-url")
        return None
    if "judge_model" not in given:
        raise ConfigError("--judge-url needs --judge-model, the name of the model there")
    key = None
    if "judge_key_file" in given:
        try:
            key = Path(given["judge_key_file"]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--judge-key-file {given['judge_key_file']}: cannot be read ({error})") from error
    from ..evaluation.judge import Judge

    folder = given.get("output_dir")
    try:
        cache = None if folder is None else Path(folder, "judge.jsonl")
        return Judge(given["judge_url"], given["judge_model"], api_key=key, cache=cache)
    except OSError as error:
        raise OutputDirError(f"--output-dir {folder} cannot be used: {error.strerror or error}") from error


def _scorer(text: str) -> Any:
    """A name, None for "none", or the function that FILE.py:FUNCTION names."""
    if text == "none":
        return None
    path, colon, name = text.rpartition(":")
    if not colon or not path.endswith(".py"):
        return text
    if not Path(path).is_file():
        raise ConfigError(f"--scorer {text}: the file {path} does not exist")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever is wrong in the user's file
        raise ConfigError(f"--scorer {text}: {path} cannot be run ({type(error).__name__}: {error})") from error
    if not callable(getattr(module, name, None)):
        functions = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(f"--scorer {text}: {path} has no function {name!r}, it has {', '.join(functions) or 'none'}")
    return getattr(module, name)


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # every kind of broken file or download raises its own type
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        raise ConfigError(f"--tokenizer {name}: cannot be loaded ({reason})") from error


def _compare(arguments: argparse.Namespace) -> int:
    if len(arguments.evaluations) < 2:
        raise ConfigError("compare needs two or more folders of evaluations, got one")
    histories = {}
    for text in arguments.history:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--history must have the form NAME=FILE, got {text!r}")
        histories[name] = path

    from ..comparison.page import write_comparison

    written = write_comparison(
        arguments.evaluations,
        arguments.output_dir,
        title=arguments.title,
        text=arguments.text,
        histories=histories,
    )
    print(f"{written.headline}\ndone: {written.html}")
    return 0
