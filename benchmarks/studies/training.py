"""Training runs on the arithmetic model, followed on held-out problems: what the studies of training share."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from arithmetic import (
    DIRECT_ERROR,
    MAX_COMPLETION,
    QUICK,
    STEP_ERROR,
    STRATEGIES,
    BaseSettings,
    arithmetic_base,
    problems,
    strategy_of,
)
from common import Row, mean
from torch import nn

from powerflow_fast import train
from powerflow_fast.evaluation.diversity import distinct_n
from powerflow_fast.evaluation.likelihoods import scored_batches
from powerflow_fast.evaluation.scorers import boxed_score
from powerflow_fast.models import CausalLMScorer
from powerflow_fast.rewards import extract_answer
from powerflow_fast.rollout import HFGenerateEngine
from powerflow_fast.tools.ngrams import repeated_ngrams

FOLDER = Path(__file__).resolve().parents[2] / "runs" / "studies"
"""Where the base model is kept; git ignores it."""
GENERATIONS = 8
MEASURES = {
    "accuracy": "right answers, share",
    "length": "length, tokens",
    "finished": "ended by itself, share",
    "repetition": "repeated 4-grams in a completion, share",
    "distinct_2": "distinct bigrams of a problem's completions, share",
    "answers": f"distinct answers among {GENERATIONS} completions",
    "strategies": f"distinct strategies among {GENERATIONS} completions, what is none of the five counted as one",
    "direct": "answers without a step, share",
    "entropy": "entropy of the next token, nats",
}
"""What :func:`measures` returns."""


class Scale(NamedTuple):
    """The size of a run; equal for all methods of a study."""

    base: str
    """A key of ``BASES``."""
    steps: int
    prompts: int
    """Prompts of a step, each with ``GENERATIONS`` completions."""
    every: int
    """Steps between measurements."""
    tracked: int
    """Held-out problems that are followed, each with ``GENERATIONS`` completions."""
    tested: int
    """Other held-out problems, for a comparison of what training leads to."""


BASES = {"full": BaseSettings(), "quick": QUICK}
FULL = Scale("full", steps=60, prompts=8, every=10, tracked=40, tested=100)
SHORT = Scale("quick", steps=2, prompts=2, every=1, tracked=2, tested=4)

_SHARES = ", ".join(f"{name} {share:.0%}" for name, share in STRATEGIES.items())
BASE_NOTE = textwrap.fill(
    rf"""
The base model is a transformer of {BASES["full"].layers} layers and width {BASES["full"].hidden_size}, trained from
scratch (`arithmetic.py`) on demonstrations such as `3*7=21; 5*6=30, so 21+30=51. So \boxed{{51}}` for the problem
`3*7+5*6=`. What a base LM has by nature is put into them: several strategies ({_SHARES}); a free choice of words and of
order, which makes long completions unlikely ones; errors in {STEP_ERROR:.0%} of the steps and {DIRECT_ERROR:.0%} of the
direct answers, which do not agree with each other. So it is by construction that the likeliest completion as a whole
is a short answer without a step, and that right steps are likelier than wrong ones; what each method makes of that is
the question. Completions have at most {MAX_COMPLETION} tokens; one without a box costs 0.5 nats per token (ψ).
""".strip(),
    width=120,
    break_on_hyphens=False,
)
"""For the pages."""


def base_folder(scale: Scale) -> Path:
    return arithmetic_base(FOLDER, BASES[scale.base])


class Trained(NamedTuple):
    model: nn.Module
    tokenizer: Any
    row: Row
    """Each of ``MEASURES`` at the steps in "steps"; "generated_tokens" were sampled to train on."""


def run_training(scale: Scale, *, seed: int, **options: Any) -> Trained:
    """Train, with ``options`` of :func:`powerflow_fast.train` in which methods differ."""
    tracked = problems(held_out=True)[: scale.tracked]
    curves: dict[str, list[float]] = {}
    steps: list[int] = []

    def follow(model: nn.Module, tokenizer: Any, step: int) -> dict[str, float]:
        found = measures(model, tokenizer, tracked, seed=seed)
        steps.append(step)
        for name, value in found.items():
            curves.setdefault(name, []).append(value)
        return found

    with tempfile.TemporaryDirectory() as folder:
        result = train(
            base_folder(scale),
            problems(held_out=False),
            num_generations=GENERATIONS,
            per_device_train_batch_size=scale.prompts * GENERATIONS,
            max_completion_length=MAX_COMPLETION,
            max_steps=scale.steps,
            eval_fn=follow,
            eval_steps=scale.every,
            seed=seed,
            rollout_engine="hf",
            rollout_batch_size=scale.prompts * GENERATIONS,
            format_fn="boxed",
            num_sample_prompts=0,
            bf16=False,
            output_dir=str(Path(folder) / "run"),
            **options,
        )
    lengths = [row["length"] for row in result.history if "length" in row]
    tokens = round(sum(lengths) * scale.prompts * GENERATIONS)
    return Trained(result.model, result.tokenizer, {"steps": steps, **curves, "generated_tokens": tokens})


def measures(model: nn.Module, tokenizer: Any, rows: Sequence[Row], *, seed: int) -> dict[str, float]:
    """Each of ``MEASURES`` on ``GENERATIONS`` completions of each problem, at temperature 1."""
    k = GENERATIONS
    engine = HFGenerateEngine(
        model, tokenizer, temperature=1.0, max_completion_length=MAX_COMPLETION, batch_size=len(rows) * k
    )
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows for _ in range(k)]
    drawn = engine.generate(prompts, seed=seed)
    bodies = [ids[:-1] if done else ids for ids, done in zip(drawn.completion_ids, drawn.finished, strict=True)]
    texts = tokenizer.batch_decode(bodies)
    problem = [row for row in rows for _ in range(k)]
    strategies = [strategy_of(row["prompt"], text) for row, text in zip(problem, texts, strict=True)]
    answers = [extract_answer(text) for text in texts]
    repeated, grams = repeated_ngrams(bodies)

    def of_groups(values: Sequence[Any]) -> list[Sequence[Any]]:
        return [values[i : i + k] for i in range(0, len(values), k)]

    return {
        "accuracy": mean(boxed_score(completion=text, **row) for row, text in zip(problem, texts, strict=True)),
        "length": mean(map(len, drawn.completion_ids)),
        "finished": mean(drawn.finished),
        "repetition": repeated / max(grams, 1),
        "distinct_2": mean(distinct_n(group, 2) for group in of_groups(bodies)),
        "answers": mean(len({a for a in group if a is not None}) for group in of_groups(answers)),
        "strategies": mean(len(set(group)) for group in of_groups(strategies)),
        "direct": mean(s == "direct" for s in strategies),
        "entropy": _entropy(model, prompts, drawn.completion_ids, engine.pad_id),
    }


def _entropy(model: nn.Module, prompts: list[list[int]], completions: list[list[int]], pad_id: int) -> float:
    """Mean over all tokens of the entropy of the model's distribution there."""
    options = {"temperature": 1.0, "pad_id": pad_id, "batch_size": 128}
    found = scored_batches(CausalLMScorer(model), prompts, completions, **options)
    return float(torch.cat([out.stats.entropy for _, _, out in found]).mean())
