"""Study (a): which distribution every objective trains to, on a language model whose completions can all be listed."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence

import exact_targets_view as view
from common import LOOKS, Claim, Picture, Row, Study, main, mean, select
from exact_targets_view import LOG_Z_NAMES, LOG_Z_RATE, SAMPLES, by_alpha, level

ALPHAS = (0.5, 1.0, 2.0, 4.0)
# rewards are uniform on [0, 1], one of each completion
OPTIONS = {"relative_tb": {"beta": 3.0}, "flowrl": {"beta": 1.0, "scale_rewards": "none"}}
LEARNS_LOG_Z = ("la_tb", "tb", "subtb", "token_tb", "relative_tb", "flowrl")
RATE, SAMPLED_RATE, LOG_Z_RATES = 0.1, 0.05, (0.01, LOG_Z_RATE, 1.0)
GROUP_SIZES = (4, 8, 16, 64)
REACHED = 0.01
"""A total variation distance that counts as having arrived, in training without noise."""
NEAR = 0.05
# Measuring


def variants() -> list[tuple[str, str | None]]:
    """(objective, where log Z is from) of every objective; those that have none of their own have None."""
    from powerflow_fast.objectives import OBJECTIVES

    found: list[tuple[str, str | None]] = []
    for name in OBJECTIVES:
        found += [(name, "group"), (name, "learned")] if name in LEARNS_LOG_Z else [(name, None)]
        found += [(name, "flows")] if name == "subtb" else []
    return found


def cases(quick: bool, seeds: Sequence[int]) -> Iterable[Row]:
    alphas = (0.5, 4.0) if quick else ALPHAS
    sizes = {"longest": 4 if quick else 6, "prompts": 2 if quick else 4}
    steps = {"exact": 16, "sampled": 16} if quick else {"exact": 400, "sampled": 200}
    made: dict[str, Row] = {}

    def add(
        objective: str, log_z: str | None, samples: int | None, world: str = "ending", rate: float = LOG_Z_RATE
    ) -> None:
        learned = log_z in ("learned", "one_for_all", "flows")
        settings = {"world": world, "objective": objective, "log_z": log_z, "log_z_rate": rate if learned else None}
        for alpha in alphas:
            for seed in seeds:
                case = settings | {"samples": samples, "alpha": alpha, "seed": seed} | sizes
                case["steps"] = steps["exact" if samples is None else "sampled"]
                if world == "fixed":
                    case["longest"] = 4
                made[str(case)] = case

    for objective, log_z in variants():
        if objective != "grpo":  # its ratio is of tokens: nothing to weigh whole completions with
            add(objective, log_z, None)
        add(objective, log_z, SAMPLES)
    for objective in ("la_tb", "tb", "token_tb", "rl_token"):
        add(objective, None if objective == "rl_token" else "group", None, world="fixed")
    for samples in (4, SAMPLES) if quick else GROUP_SIZES:
        for log_z in ("group", "table", "one_for_all"):
            add("la_tb", log_z, samples)
        for rate in LOG_Z_RATES[:2] if quick else LOG_Z_RATES:
            add("la_tb", "learned", samples, rate=rate)
    return made.values()


def checkpoints(steps: int) -> list[int]:
    return sorted({0, *(n for n in (5, 10, 25, 50, 100, 150, 200, 300) if n < steps), steps})


def run(case: Row) -> Iterable[Row]:
    import torch
    from enumerable import World

    from powerflow_fast.objectives import LogZTable, resolve_objective

    name, alpha, log_z = case["objective"], case["alpha"], case["log_z"]
    fixed = case["world"] == "fixed"
    world = World(
        ends=not fixed,
        letters=3,
        longest=case["longest"],
        prompts=case["prompts"],
        end_bias=0.0 if fixed else -1.0,  # towards the longer ones, as language models are
        seed=case["seed"],
    )
    beta = OPTIONS.get(name, {}).get("beta")
    targets = {"power": world.power(alpha), "tilted": world.tilted(alpha), "tokenwise": world.tokenwise(alpha)}
    if name in ("tb", "log_variance_tb", "rl_trajectory") or log_z == "flows":
        targets["own"] = targets["power"]
    elif name == "la_tb":
        targets["own"] = targets["tilted"]
    elif name == "relative_tb":
        targets["own"] = world.power(alpha, beta * world.rewards)
    elif name == "flowrl":
        targets["own"] = world.tilted(alpha, beta * world.rewards * world.lengths)
    elif name in ("token_tb", "rl_token") and fixed:
        targets["own"] = targets["tokenwise"]

    def zeros(number: int) -> torch.Tensor:
        return torch.zeros(number, dtype=torch.float64).requires_grad_()

    learned = {
        "log_z": {"learned": zeros(world.prompts), "one_for_all": zeros(1), "table": LogZTable(0.9)}.get(log_z),
        "log_flows": zeros(len(world.base)) if log_z == "flows" else None,
    }
    series: dict[str, list[float]] = {}
    steps = checkpoints(case["steps"])

    def watch(step: int, logits: torch.Tensor) -> None:
        if step not in steps:
            return
        logp = world.logp(logits)
        now = {"length": world.mean(logp.exp(), world.lengths), "entropy": world.mean(logp.exp(), -logp)}
        now["reward"] = world.mean(logp.exp(), world.rewards)
        for key, target in targets.items():
            now[f"tv_{key}"] = float((logp.exp() - target).abs().sum()) / 2 / world.prompts
            now[f"kl_{key}"] = world.mean(logp.exp(), logp - target.log())
        for key, value in now.items():
            series.setdefault(key, []).append(float(f"{value:.3g}"))

    objective = resolve_objective(name, OPTIONS.get(name))
    sampled = case["samples"] is not None
    world.train(
        objective,
        alpha,
        start=2 * world.base if alpha == 1 else None,
        steps=case["steps"],
        rate=SAMPLED_RATE if sampled else RATE,
        samples=case["samples"],
        seed=case["seed"],
        log_z_rate=case["log_z_rate"],
        warm_start=True,
        decay=not sampled,  # a rate that goes to zero would hide the noise
        watch=watch,
        **learned,
    )
    best = world.rewards.view(world.prompts, -1).amax(1).mean()
    base = world.logp(world.base)
    ends = {f"length_{key}": world.mean(p, world.lengths) for key, p in ({"base": base.exp()} | targets).items()}
    ends |= {"entropy_base": world.mean(base.exp(), -base)}
    yield {"at": steps, **series, **ends, "best_reward": float(best)}


# Reading the rows


def last(rows: Iterable[Row], key: str) -> list[float]:
    return [row[key][-1] for row in rows]


def span(values: Iterable[float], digits: int = 3) -> str:
    """The smallest and the largest."""
    low, high = min(values := list(values)), max(values)
    return (
        f"{low:.{digits}f}" if f"{low:.{digits}f}" == f"{high:.{digits}f}" else f"{low:.{digits}f} to {high:.{digits}f}"
    )


def sharpened(rows: Iterable[Row]) -> list[Row]:
    """Without α = 1, where all targets but those with a reward are the base model."""
    return [row for row in rows if row["alpha"] != 1]


def ends(rows: Iterable[Row], key: str) -> str:
    """Where a series ends for each α, mean over seeds and variants."""
    return ", ".join(f"{mean(last(of, key)):.2f} (α = {alpha:g})" for alpha, of in by_alpha(rows).items())


def noiseless(rows: Iterable[Row]) -> list[Row]:
    return select(rows, world="ending", samples=None)


def ratio(ours: list[Row], theirs: list[Row]) -> tuple[float, float, float]:
    """Geometric mean of ``level`` of one over the other, paired by α, K and seed, with its 95 % bootstrap interval."""
    from powerflow_fast.evaluation import mean_interval

    other = {(row["alpha"], row["samples"], row["seed"]): level(row) for row in theirs}
    logs = [math.log(level(row) / other[row["alpha"], row["samples"], row["seed"]]) for row in ours]
    found = mean_interval(logs)
    return math.exp(found.value), math.exp(found.low), math.exp(found.high)


def smaller(value: tuple[float, float, float]) -> bool | None:
    """Whether a ratio is below 1; None if its interval has 1 in it."""
    return True if value[2] < 1 else False if value[1] > 1 else None


def within(value: tuple[float, float, float], limit: float = 1.1) -> bool | None:
    """Whether a ratio is at most ``limit``; None where the interval leaves that open."""
    return True if value[2] <= limit else False if value[0] > limit and value[1] > 1 else None


def show(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})"


def log_z_rows(rows: list[Row], log_z: str, samples: int, rate: float | None = None) -> list[Row]:
    found = select(rows, world="ending", objective="la_tb", log_z=log_z, samples=samples)
    return found if rate is None else select(found, log_z_rate=rate)


def _with(row: Row) -> str:
    return f" with log Z {LOG_Z_NAMES[row['log_z']]}" if row["log_z"] else ""


# Claims


def arrivals(rows: list[Row]) -> list[Claim]:
    """What each objective says that it trains to, without noise and with lengths that vary."""
    exact = noiseless(rows)
    found = []
    for names, what in (
        (("la_tb",), "p_base^α · exp(−λ|y|)"),
        (("tb", "log_variance_tb", "rl_trajectory"), "p_base^α"),
        (("relative_tb",), "p_base^α · exp(β reward)"),
        (("flowrl",), "p_base^α · exp(|y| (β reward − λ))"),
    ):
        of = [row for row in exact if row["objective"] in names]
        worst = max(of, key=lambda row: row["tv_own"][-1])
        found.append(
            Claim(
                f"{' and '.join(LOOKS[n].label for n in names)} train{'s' * (len(names) == 1)} to {what} "
                f"(total variation ≤ {REACHED}).",
                worst["tv_own"][-1] <= REACHED,
                f"At most {worst['tv_own'][-1]:.4f}, at α = {worst['alpha']:g}{_with(worst)}"
                f"; {mean(last(of, 'tv_own')):.4f} on average, from {mean(row['tv_own'][0] for row in of):.2f} before "
                "training.",
            )
        )
    flows = select(exact, objective="subtb", log_z="flows")
    found.append(
        Claim(
            f"SubTB with learned flows trains to p_base^α (total variation ≤ {REACHED}).",
            max(last(flows, "tv_own")) <= REACHED,
            f"{span(last(flows, 'tv_own'))} after {flows[0]['steps']} steps, the largest at α = "
            f"{max(flows, key=lambda row: row['tv_own'][-1])['alpha']:g}.",
        )
    )
    fixed = select(rows, world="fixed", objective="la_tb")
    found.append(
        Claim(
            f"With one fixed length LA-TB trains to p_base^α itself (total variation ≤ {REACHED}).",
            max(last(fixed, "tv_power")) <= REACHED,
            f"At most {max(last(fixed, 'tv_power')):.4f}.",
        )
    )
    varied = sharpened(select(exact, objective="la_tb"))
    found.append(
        Claim(
            f"With lengths that vary LA-TB still trains to p_base^α itself (total variation ≤ {NEAR}).",
            max(last(varied, "tv_power")) <= NEAR,
            f"It ends {ends(varied, 'tv_power')} from it: the tilt by length is no small correction.",
        )
    )
    return found


def tokens_alone(rows: list[Row]) -> list[Claim]:
    found = []
    for name in ("token_tb", "rl_token"):
        varied = sharpened(select(noiseless(rows), objective=name))
        fixed = select(rows, world="fixed", objective=name)
        label = LOOKS[name].label
        found += [
            Claim(
                f"{label} ends elsewhere than p_base^α and its length-tilted form (total variation > {NEAR} at every "
                "α ≠ 1 and with every seed).",
                min(last(varied, "tv_tilted") + last(varied, "tv_power")) > NEAR,
                f"{ends(varied, 'tv_power')} from p_base^α; {ends(varied, 'tv_tilted')} from the length-tilted one.",
            ),
            Claim(
                f"With one fixed length {label} trains to p_base(token|state)^α at every token (total variation ≤ "
                f"{REACHED}).",
                max(last(fixed, "tv_own")) <= REACHED,
                f"At most {max(last(fixed, 'tv_own')):.4f}, and {span(last(sharpened(fixed), 'tv_power'), 2)} from "
                "p_base^α.",
            ),
        ]
    middle = sharpened(select(noiseless(rows), objective="subtb", log_z="group"))
    found.append(
        Claim(
            f"SubTB without learned flows trains to p_base^α (total variation ≤ {NEAR}).",
            max(last(middle, "tv_power")) <= NEAR,
            f"It ends {ends(middle, 'tv_power')} from p_base^α; {ends(middle, 'tv_tilted')} from the length-tilted "
            f"one; {ends(middle, 'tv_tokenwise')} from that of each token alone.",
        )
    )
    return found


def lengths(rows: list[Row]) -> list[Claim]:
    exact = sharpened(noiseless(rows))
    aware = by_alpha(select(exact, objective="la_tb", log_z="group"))
    total = by_alpha(select(exact, objective="tb", log_z="group"))

    def change(row: Row) -> float:
        return row["length"][-1] / row["length_base"] - 1

    def said(of: dict[float, list[Row]]) -> str:
        before = mean(row["length_base"] for part in of.values() for row in part)
        ends = ", ".join(
            f"{mean(last(part, 'length')):.2f} at α = {alpha:g} ({mean(map(change, part)):+.0%})"
            for alpha, part in of.items()
        )
        return f"From {before:.2f} tokens to {ends}."

    collapsed = total[4.0]
    pairs = [
        (abs(change(a)), abs(change(t))) for alpha in aware for a, t in zip(aware[alpha], total[alpha], strict=True)
    ]
    largest = max(abs(change(row)) for part in aware.values() for row in part)
    return [
        Claim(
            "TB's completions collapse in length at α = 4 (they lose a third or more, with every seed).",
            all(change(row) <= -1 / 3 for row in collapsed),
            said(total),
        ),
        Claim(
            "LA-TB keeps the mean length of the base model (within 10 %, at every α and with every seed).",
            largest <= 0.1,
            f"{said(aware)} The largest change of a seed is {largest:.0%}.",
        ),
        Claim(
            "LA-TB changes the mean length less than TB does, at every α ≠ 1 and with every seed.",
            all(ours < theirs for ours, theirs in pairs),
            f"In {sum(ours < theirs for ours, theirs in pairs)} of {len(pairs)} runs; on average by "
            f"{mean(ours for ours, _ in pairs):.0%} against {mean(theirs for _, theirs in pairs):.0%}.",
        ),
    ]


def partitions(rows: list[Row]) -> list[Claim]:
    """log Z' of the group against a learned one and a table, from samples, after the same steps."""
    found = []
    sizes = sorted({row["samples"] for row in rows if row["samples"] is not None})
    for samples in sizes:
        value = ratio(log_z_rows(rows, "group", samples), log_z_rows(rows, "learned", samples, LOG_Z_RATE))
        found.append(
            Claim(
                f"From K = {samples} samples of a prompt, log Z' of the group is as good as a learned one (after the "
                "same steps at most 10 % further from the target).",
                within(value),
                f"Its distance is {show(value)} times that with a learned one.",
            )
        )
    for samples in sizes[:1]:
        value = ratio(log_z_rows(rows, "table", samples), log_z_rows(rows, "group", samples))
        found.append(
            Claim(
                f"With few samples (K = {samples}) a running table gets closer than the group's own log Z'.",
                smaller(value),
                f"Its distance is {show(value)} times the group's.",
            )
        )
    samples = sizes[-1]
    by_rate = {}
    for rate in sorted(
        {row["log_z_rate"] for row in rows if row["log_z"] == "learned" and row["objective"] == "la_tb"}
    ):
        ours = [row for size in sizes for row in log_z_rows(rows, "learned", size, rate)]
        by_rate[rate] = ratio(ours, [row for size in sizes for row in log_z_rows(rows, "group", size)])
    worst = max(value[0] for value in by_rate.values())
    found.append(
        Claim(
            "A learned log Z' is as good at any learning rate (within 10 % of the group's distance).",
            worst <= 1.1,
            "Times the group's distance, over all K and α: "
            + ", ".join(f"{show(value)} at {rate:g}" for rate, value in by_rate.items())
            + f" (the policy's rate is {SAMPLED_RATE:g}).",
        )
    )
    value = ratio(log_z_rows(rows, "one_for_all", samples), log_z_rows(rows, "learned", samples, LOG_Z_RATE))
    found.append(
        Claim(
            "A learned log Z' that is the same for all prompts is as good as one for each (within 10 %, at K = "
            f"{samples}).",
            value[0] <= 1.1,
            f"Its distance is {show(value)} times as large: a head that can't tell the prompts apart bends lengths.",
        )
    )
    return found


def samples_and_rewards(rows: list[Row]) -> list[Claim]:
    sampled = select(rows, samples=SAMPLES, world="ending")
    aware, total = (select(sampled, objective=name, log_z="group") for name in ("la_tb", "tb"))
    value = ratio(aware, total)
    reward = select(sampled, objective="grpo")
    share = [row["reward"][-1] / row["best_reward"] for row in reward]
    kept = [row["entropy"][-1] / row["entropy_base"] for row in reward]
    return [
        Claim(
            f"From K = {SAMPLES} samples LA-TB gets closer to its target than TB to its own after the same steps.",
            smaller(value),
            f"Its distance is {show(value)} times TB's.",
        ),
        Claim(
            "GRPO goes to the largest reward (95 % of it) and gives up diversity (half of the entropy or more).",
            mean(share) >= 0.95 and mean(kept) <= 0.5,
            f"{mean(share):.0%} of the largest reward, {mean(kept):.0%} of the base model's entropy, on average.",
        ),
    ]


def claims(rows: list[Row]) -> list[Claim]:
    parts = (arrivals, tokens_alone, lengths, partitions, samples_and_rewards)
    return [claim for part in parts for claim in part(rows)]


ABOUT = """
An LM with three letters, one of which ends a completion, and at most six of them has 127 completions. The policy is a
table of next-token logits, and every probability is known exactly. Each seed has a base model with four prompts
(logits with a standard deviation of 1, the end 1 nat less likely) and, for objectives that take one, a uniform random
reward of each completion. Training begins at the base model, and at α = 1, where there would be nothing to learn, at
its logits doubled. Adam, without noise (all completions weighted by their probability, rate 0.1 and a cosine to
zero) and on-policy from K samples of each prompt in a step (rate 0.05, constant). A learned log Z' is one number for
each prompt that starts, as in the trainer, at the mean of the first batch, with a learning rate of 0.1 where no other
is named; the table has the trainer's momentum of 0.9. SubTB has λ = 0.9, relative TB β = 3, FlowRL β = 1 with rewards
that are not scaled. The world of one fixed length has four letters a completion.

Distances from samples are compared by the total variation to the target, mean over the second half of the training: the
geometric mean of the ratio over α and seeds, with the 95 % bootstrap interval over these pairs in brackets.

What is not in it: a network that shares weights between states, prompts that come back seldom, and completions of
thousands of tokens.
"""

STUDY = Study(
    name="exact_targets",
    title="Which distribution every objective trains to",
    about=ABOUT,
    cases=cases,
    run=run,
    claims=claims,
    figures={
        "exact": Picture(
            "Training without noise: total variation to each objective's own target, mean over seeds, smaller ones "
            f"drawn at {view.FLOOR:g}. Log-variance TB and RL-traj lie on TB.",
            view.draw_distances,
            (9.6, 4.0),
        ),
        "length": Picture("Training without noise: mean length of the completions.", view.draw_lengths, (9.6, 3.4)),
        "sampled": Picture(
            f"From {SAMPLES} samples of a prompt: total variation to each objective's own target. Log-variance TB and "
            "RL-traj lie on TB.",
            view.draw_sampled,
            (9.6, 4.0),
        ),
        "log_z": Picture(
            "LA-TB from K samples of a prompt: total variation to its target, by where log Z' is from.",
            view.draw_log_z,
            (9.6, 7.0),
        ),
    },
    body=lambda rows: "\n\n".join([view.log_z_table(rows), view.tables(rows, NEAR)]),
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
