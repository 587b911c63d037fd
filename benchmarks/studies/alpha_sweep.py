"""α from 0.25 to 8, and the α that ``alpha="auto:..."`` finds for a requested entropy or log-prob.

On a small transformer whose completions can all be listed, so that what was to be reached is known exactly, and on the
model that does sums in steps (``arithmetic.py``). Everything is trained by ``powerflow_fast.train``.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common import BLACK, BLUE, GREY, ORANGE, VERMILION, Claim, Picture, Row, Study, main, mean, select, table, tidy
from enumerable import enumerable_lm, log_probs, tilted
from torch import Tensor, nn
from training import BASE_NOTE, GENERATIONS, Scale, run_training

from powerflow_fast import train
from powerflow_fast.config import PowerFlowConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALPHAS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
REQUESTS = ("entropy=0.7", "entropy=1", "entropy=1.3", "entropy=1.57", "logp=-1.2", "logp=-1.4", "logp=-1.7")
ARITHMETIC_ALPHAS = (0.5, 1.0, 2.0, 4.0)
ARITHMETIC_REQUESTS = ("entropy=0.37", "entropy=0.55")
ARITHMETIC_RATE = 5e-4
STEPS, SEQUENCES = 80, 64
ARITHMETIC = Scale("full", steps=50, prompts=8, every=50, tracked=60, tested=0)
ARITHMETIC_QUICK = Scale("quick", steps=1, prompts=1, every=1, tracked=1, tested=0)
TOLERANCE = 0.05
LETTERS, LONGEST = 5, 4
"""Of the enumerable LM."""


# The enumerable model


def entropy_of(chances: Tensor, words: Sequence[tuple[int, ...]]) -> float:
    """Mean over the tokens that are sampled of the entropy of the distribution there, nats.

    The entropies at a completion's prefixes add up, in expectation, to the entropy of whole completions.
    """
    lengths = torch.tensor([len(word) for word in words])
    return float(torch.special.entr(chances).sum() / (chances @ lengths.double()))


def logp_of(chances: Tensor, base: Tensor, words: Sequence[tuple[int, ...]]) -> float:
    """Mean over completions of log p_base(y) / |y|, nats per token."""
    return float(chances @ (base / torch.tensor([len(word) for word in words])))


def target_of(base: Tensor, words: Sequence[tuple[int, ...]], alpha: float) -> Tensor:
    """p_base^α exp(−λ|y|), with the λ that normalises it: what LA-TB trains to."""
    return tilted(alpha * base, torch.tensor([len(word) for word in words]).double())


def both(chances: Tensor, base: Tensor, words: Sequence[tuple[int, ...]]) -> dict[str, float]:
    return {"entropy": entropy_of(chances, words), "logp": logp_of(chances, base, words)}


def exact_alpha(base: Tensor, words: Sequence[tuple[int, ...]], quantity: str, wanted: float) -> float:
    """The α whose target has what is wanted, by bisection: the entropy falls with α, the log-prob rises."""
    low, high = math.log(1 / 64), math.log(64)
    for _ in range(40):
        middle = (low + high) / 2
        found = both(target_of(base, words, math.exp(middle)), base, words)[quantity]
        below = found > wanted if quantity == "entropy" else found < wanted
        low, high = (middle, high) if below else (low, middle)
    return math.exp(low)


# Cases and their runs


def cases(quick: bool, seeds: Sequence[int]) -> list[Row]:
    alphas, requests = ((2.0,), REQUESTS[1:2]) if quick else (ALPHAS, REQUESTS)
    small = {"model": "enumerable", "steps": 2 if quick else STEPS, "sequences": 8 if quick else SEQUENCES}
    found = [small | {"alpha": alpha, "seed": seeds[0]} for alpha in alphas]
    found += [small | {"alpha": f"auto:{request}", "seed": seed} for seed in seeds for request in requests]
    scale = ARITHMETIC_QUICK if quick else ARITHMETIC
    wanted = [*ARITHMETIC_ALPHAS[: 1 if quick else None], *(f"auto:{r}" for r in ARITHMETIC_REQUESTS if not quick)]
    sums = {"model": "arithmetic", "scale": list(scale), "steps": scale.steps, "learning_rate": ARITHMETIC_RATE}
    return found + [sums | {"alpha": alpha, "seed": seeds[0]} for alpha in wanted]


def run(case: Row) -> Iterator[Row]:
    yield (enumerable if case["model"] == "enumerable" else arithmetic)(case)


def enumerable(case: Row) -> Row:
    model, tokenizer, words = enumerable_lm(ends=True)
    base = log_probs(model, words)
    found: Row = {"base": both(base.exp(), base, words)}
    result = _train(model, tokenizer, case["alpha"], case)
    found |= {"reached": both(log_probs(result.model, words).exp(), base, words), "found_alpha": result.alpha}
    if not isinstance(case["alpha"], str):
        return found | {"target": both(target_of(base, words, case["alpha"]), base, words)}
    quantity, wanted = asked(case)
    every = max(1, case["steps"] // 20)
    rows = result.history[::every]
    found |= {"exact_alpha": exact_alpha(base, words, quantity, wanted)}
    found |= {"at": [row["step"] for row in rows], "alphas": [row["alpha"] for row in rows]}
    found |= {"policy_alphas": [row["policy_alpha"] for row in rows]}
    found |= {"values": [row["entropy" if quantity == "entropy" else "base_logp"] for row in rows]}
    if case["seed"] == 0:  # once more, with the number instead
        again = _train(enumerable_lm(ends=True)[0], tokenizer, result.alpha, case)
        found["again"] = both(log_probs(again.model, words).exp(), base, words)
    return found


def _train(model: nn.Module, tokenizer: Any, alpha: float | str, case: Row) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        config = PowerFlowConfig(
            output_dir=str(Path(folder) / "run"),
            num_generations=case["sequences"],
            per_device_train_batch_size=case["sequences"],
            rollout_batch_size=case["sequences"],
            max_completion_length=LONGEST,
            rollout_engine="hf",
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            adam_beta2=0.99,
            log_z="learned",
            log_z_learning_rate=1e-2,
            max_steps=case["steps"],
            seed=case["seed"],
            num_sample_prompts=0,
            self_check=False,
            bf16=False,
        )
        return train(model, ["a"], alpha=alpha, tokenizer=tokenizer, config=config)


def arithmetic(case: Row) -> Row:
    followed: list[dict[str, float]] = []
    trained = run_training(
        Scale(*case["scale"]),
        seed=case["seed"],
        alpha=case["alpha"],
        learning_rate=case["learning_rate"],
        lr_scheduler_type="cosine",
        log_z="group",
        callbacks=[lambda report: followed.append(report.metrics)],
    )
    curves = {name: values for name, values in trained.row.items() if isinstance(values, list)}
    found = {"before": {k: v[0] for k, v in curves.items()}, "reached": {k: v[-1] for k, v in curves.items()}}
    if isinstance(case["alpha"], str):
        late = [row["alpha"] for row in followed[len(followed) // 2 :]]
        found["found_alpha"] = math.exp(mean(map(math.log, late)))
    return found


def asked(row: Row) -> tuple[str, float]:
    quantity, value = row["alpha"].removeprefix("auto:").split("=")
    return quantity, float(value)


# What the rows say


def sweep(rows: list[Row], model: str) -> list[Row]:
    return sorted((r for r in select(rows, model=model) if not isinstance(r["alpha"], str)), key=lambda r: r["alpha"])


def searches(rows: list[Row], model: str = "enumerable") -> list[Row]:
    return [row for row in select(rows, model=model) if isinstance(row["alpha"], str)]


def off(row: Row, key: str = "reached") -> float:
    """Relative distance of what a search reached from what it was asked for."""
    quantity, wanted = asked(row)
    return row[key][quantity] / wanted - 1


def claims(rows: list[Row]) -> list[Claim]:
    fixed, found, sums = sweep(rows, "enumerable"), searches(rows), sweep(rows, "arithmetic")
    worst = max(found, key=lambda row: abs(off(row)))
    near = [row for row in found if abs(off(row)) <= TOLERANCE]
    made = [
        Claim(
            "A requested entropy or log-prob is reached within 5 %, below and above the base model's.",
            len(near) == len(found),
            f"{len(near)} of {len(found)} runs; the largest distance is {off(worst):+.1%}, for `{worst['alpha']}`; the "
            f"mean is {mean(abs(off(row)) for row in found):.1%}.",
        )
    ]
    ratios = [row["found_alpha"] / row["exact_alpha"] for row in found]
    made.append(
        Claim(
            "The α that is found is the one whose exact target has what was asked for, within 10 %.",
            all(abs(math.log(ratio)) <= math.log(1.1) for ratio in ratios),
            f"Found over exact α lies between {min(ratios):.2f} and {max(ratios):.2f}; "
            f"{sum(abs(math.log(r)) <= math.log(1.1) for r in ratios)} of {len(ratios)} are within 10 %.",
        )
    )
    if again := [row for row in found if "again" in row]:
        errors = [off(row, "again") for row in again]
        made.append(
            Claim(
                "A run with the found α as a number ends at what was asked for too, within 5 %.",
                all(abs(error) <= TOLERANCE for error in errors),
                f"Distances of {', '.join(f'{error:+.1%}' for error in errors)}.",
            )
        )
    errors = [row["reached"]["entropy"] / row["target"]["entropy"] - 1 for row in fixed]
    pairs = list(itertools.pairwise(fixed))
    made += [
        Claim(
            "Whatever α, the trained policy has the entropy of its exact target, within 5 %.",
            all(abs(error) <= TOLERANCE for error in errors),
            " ".join(f"α = {row['alpha']:g}: {error:+.1%}." for row, error in zip(fixed, errors, strict=True)),
        ),
        Claim(
            "The entropy falls and the log-prob under the base model rises with every larger α.",
            all(a["reached"]["entropy"] > b["reached"]["entropy"] for a, b in pairs)
            and all(a["reached"]["logp"] < b["reached"]["logp"] for a, b in pairs)
            if pairs
            else None,
            "Entropy " + " → ".join(f"{row['reached']['entropy']:.2f}" for row in fixed) + " nats.",
        ),
    ]
    values = {name: [row["reached"][name] for row in sums] for name in ("accuracy", "entropy", "answers")}
    alphas = " → ".join(f"{row['alpha']:g}" for row in sums)
    for text, name, rises in (
        ("On sums, the accuracy rises with every larger α.", "accuracy", True),
        ("On sums, the diversity of answers falls with every larger α.", "answers", False),
    ):
        steps = list(itertools.pairwise(values[name]))
        held = all((b > a) is rises for a, b in steps) if steps else None
        made.append(Claim(text, held, f"α = {alphas}: {' → '.join(f'{v:.2f}' for v in values[name])}."))
    if learned := searches(rows, "arithmetic"):
        made.append(
            Claim(
                "On sums, a requested entropy is reached on held-out problems, within 5 %.",
                all(abs(off(row)) <= TOLERANCE for row in learned),
                " ".join(
                    f"`{row['alpha']}`: {row['reached']['entropy']:.3f} nats ({off(row):+.1%}), "
                    f"α {row['found_alpha']:.2f}."
                    for row in learned
                ),
            )
        )
    return made


LABELS = {"entropy": "token entropy, nats", "logp": "log-prob per token under the base, nats"}


def draw_curves(figure: Figure, rows: list[Row]) -> None:
    fixed = sweep(rows, "enumerable")
    alphas = [row["alpha"] for row in fixed]
    for axes, quantity in zip(figure.subplots(1, 2), LABELS, strict=True):
        axes.plot(alphas, [row["target"][quantity] for row in fixed], color=GREY, label="exact target of LA-TB")
        axes.plot(
            alphas, [row["reached"][quantity] for row in fixed], "o", color=BLACK, label="trained with that α", ms=6
        )
        of = [row for row in searches(rows) if asked(row)[0] == quantity]
        for wanted in sorted({asked(row)[1] for row in of}):
            axes.axhline(wanted, color=ORANGE, linewidth=0.8, linestyle=":", label="requested")
        axes.plot(
            [row["found_alpha"] for row in of],
            [row["reached"][quantity] for row in of],
            linestyle="",
            marker="x",
            markersize=6,
            color=VERMILION,
            label="found α, and what its run reached",
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        axes.set_xlabel("α")
        axes.set_ylabel(LABELS[quantity])
        tidy(axes)
    handles, labels = axes.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def draw_search(figure: Figure, rows: list[Row]) -> None:
    from matplotlib import colormaps

    found = searches(rows)
    found = [row for row in found if row["seed"] == found[0]["seed"]]
    grid = figure.subplots(2, 2, sharex=True, squeeze=False)
    for column, quantity in zip(grid.T, LABELS, strict=True):
        of = [row for row in found if asked(row)[0] == quantity]
        for place, row in enumerate(of):
            color = colormaps["viridis"](0.15 + 0.65 * place / max(len(of) - 1, 1))
            wanted = asked(row)[1]
            column[0].plot(row["at"], row["values"], color=color, label=f"{wanted:g} requested")
            column[0].axhline(wanted, color=color, linewidth=0.8, linestyle=":")
            column[1].plot(row["at"], row["alphas"], color=color)
            column[1].axhline(row["exact_alpha"], color=color, linewidth=0.8, linestyle=":")
        column[0].set_ylabel(LABELS[quantity], fontsize=7.5)
        column[1].set_ylabel("α (dotted: exact)")
        column[1].set_yscale("log", base=2)
        column[1].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        column[1].set_xlabel("step")
        for axes in column:
            tidy(axes)
        if of:
            column[0].legend(fontsize=7, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))


def draw_sums(figure: Figure, rows: list[Row]) -> None:
    fixed, found = sweep(rows, "arithmetic"), searches(rows, "arithmetic")
    alphas = [row["alpha"] for row in fixed]
    names = {
        "accuracy": "right answers, share",
        "entropy": "token entropy, nats",
        "answers": f"distinct answers of {GENERATIONS}",
        "length": "length, tokens",
    }
    for axes, (name, label) in zip(figure.subplots(1, len(names)), names.items(), strict=True):
        before = mean(row["before"][name] for row in fixed)
        axes.axhline(before, color=GREY, linestyle=":", label="base model")
        axes.plot(alphas, [row["reached"][name] for row in fixed], "o-", color=BLUE, ms=5, label="trained with that α")
        for row in found:
            axes.plot(row["found_alpha"], row["reached"][name], "x", color=VERMILION, ms=7, label="found α")
            if name == "entropy":
                axes.axhline(asked(row)[1], color=ORANGE, linewidth=0.8, linestyle=":", label="requested")
        axes.set_xscale("log", base=2)
        axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        axes.set_xlabel("α")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        tidy(axes)
        if name == "entropy":
            handles, labels = axes.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def body(rows: list[Row]) -> str:
    lines = []
    for row in searches(rows) + searches(rows, "arithmetic"):
        quantity, wanted = asked(row)
        exact = f"{row['exact_alpha']:.3f}" if "exact_alpha" in row else "–"
        base = row["base" if "base" in row else "before"][quantity]
        reached = row["reached"][quantity]
        numbers = [
            f"{base:.3f}",
            f"{wanted:g}",
            f"{reached:.3f}",
            f"{off(row):+.1%}",
            f"{row['found_alpha']:.3f}",
            exact,
        ]
        lines.append([f"{row['model']}, {quantity}", str(row["seed"]), *numbers])
    header = ["model, quantity", "seed", "base model", "requested", "reached", "distance", "α found", "α exact"]
    return f"## Every search\n\n{table(header, lines)}"


ABOUT = f"""
The first model is a transformer over {LETTERS} letters with completions of at most {LONGEST} letters. All of them can
be listed, so that entropy and log-prob of a trained policy and of the target `p_base^α exp(−λ|y|)` are known and not
estimated. Each run is {STEPS} steps of {SEQUENCES} completions, learned log Z', by `powerflow_fast.train`. Entropy is
the mean over the tokens that the policy samples; the log-prob is `log p_base(y) / |y|`, the mean over completions.

With `alpha="auto:entropy=…"` or `"auto:logp=…"` a run begins at α = 1 and is one run like any other: α is chosen anew
at each rollout from what that rollout measures. The second model does sums in visible steps: {ARITHMETIC.steps} steps
of {ARITHMETIC.prompts} problems with {GENERATIONS} completions each, measured on {ARITHMETIC.tracked} held-out ones.

{BASE_NOTE}
"""

STUDY = Study(
    name="alpha_sweep",
    title="What α does from 0.25 to 8, and finding it",
    about=ABOUT,
    cases=cases,
    run=run,
    claims=claims,
    figures={
        "curves": Picture(
            "Entropy and log-prob over α: exact, trained, and found by a search.", draw_curves, (9.4, 4.2)
        ),
        "search": Picture("Searches of one seed: what is measured, and α.", draw_search, (9.4, 5.4)),
        "sums": Picture("Sums on held-out problems over α.", draw_sums, (11.0, 3.6)),
    },
    body=body,
    seeds=(0, 1, 2),
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(STUDY))
