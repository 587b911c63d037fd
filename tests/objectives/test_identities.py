"""Identities between objectives, and the registry that names them."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from objective_oracle import RESIDUALS, change, leaves, make

from powerflow_fast.objectives import (
    OBJECTIVES,
    RESIDUAL_LOSSES,
    Objective,
    ObjectiveOutput,
    flowrl,
    grpo,
    la_tb,
    log_variance_tb,
    relative_tb,
    resolve_objective,
    rl_token,
    rl_trajectory,
    subtb,
    tb,
    token_tb,
)
from powerflow_fast.ops import group_log_z, la_tb_loss

EVEN = {"lengths": [5, 5, 5, 5], "groups": [1, 2, 1, 2]}


def same(a, b, factor=1.0, *, only_gradient=False):
    """The outputs a and b of two calls: a = factor · b in loss and in the gradient of each leaf."""
    (out_a, t_a), (out_b, t_b) = a, b
    if not only_gradient:
        torch.testing.assert_close(out_a.loss, factor * out_b.loss, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(out.loss, leaves(t), allow_unused=True) for out, t in ((out_a, t_a), (out_b, t_b)))
    for x, y in zip(*gradients, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, factor * y, rtol=1e-11, atol=1e-15)
            assert x.abs().max() > 1e-3


def both(f, g, **fields):
    t, u = make(**fields), make(**fields)
    return (f(t), t), (g(u), u)


@pytest.mark.parametrize("old", [False, True])
def test_la_tb_is_the_one_pass_op(old):
    t = make(old=old)
    base, old_logps = t.sums(t.base_logps), t.sums(t.old_logps) if old else None
    options = {"alpha": t.alpha, "psi": t.psi, "old_logps": old_logps}
    log_z = group_log_z(t.logps, base, t.group_ids, t.cu_seqlens, **options)
    expected = la_tb_loss(t.logps, base, log_z, t.cu_seqlens, **options)
    out = la_tb(t)
    for ours, theirs in zip(out, (expected.loss, expected.weight, expected.logp_mean, expected.delta), strict=False):
        assert torch.equal(ours, theirs)
    assert torch.equal(out.log_z, log_z) and log_z.abs().max() > 0.01


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("log_z", [False, True])
def test_la_tb_at_equal_lengths_is_tb_over_the_square_of_the_length(old, log_z):
    t, u = make(**EVEN, old=old, log_z=log_z), make(**EVEN, old=old, log_z=log_z)
    if log_z:  # log Z = T log Z'
        u = change(u, log_z=(5 * u.log_z.detach()).requires_grad_())
    out, total = la_tb(t), tb(u)
    torch.testing.assert_close(out.loss, total.loss / 25)
    torch.testing.assert_close(out.log_z, total.log_z / 5)
    a, b = (torch.autograd.grad(o.loss, leaves(x)) for o, x in ((out, t), (total, u)))
    torch.testing.assert_close(a[0], b[0] / 25)
    if log_z:
        torch.testing.assert_close(a[1], b[1] / 5)


def test_group_la_tb_is_twice_grpo_with_the_internal_reward():
    """Ragged lengths, w = 1, advantage not divided by its deviation, mean over completions of means over tokens."""
    t, u = make(), make()
    internal = (u.means(u.target_logps) - u.logp_mean).detach()
    u = change(u, rewards=internal)
    same((la_tb(t), t), (grpo(u, aggregation="sequence", scale_rewards="none"), u), 2.0, only_gradient=True)


@pytest.mark.parametrize("old", [False, True])
def test_log_variance_tb_is_twice_rl_trajectory(old):
    same(*both(log_variance_tb, rl_trajectory, old=old), 2.0, only_gradient=True)


@pytest.mark.parametrize("old", [False, True])
def test_group_token_tb_is_twice_rl_token(old):
    same(*both(token_tb, rl_token, old=old), 2.0, only_gradient=True)


def test_log_variance_is_the_variance():
    t = make([3, 1, 4], [0, 0, 0])
    x = t.sums(t.logps.detach() - t.target_logps)
    torch.testing.assert_close(log_variance_tb(t).loss, x.var(correction=0))
    same(*both(log_variance_tb, tb, old=True))


@pytest.mark.parametrize("log_z", [False, True])
@pytest.mark.parametrize("residual_loss", RESIDUALS)
def test_relative_tb_without_a_reward_is_tb(log_z, residual_loss):
    fields = {"log_z": log_z, "rewards": torch.zeros(8)}

    def relative(t):
        return relative_tb(t, residual_loss=residual_loss)

    same(*both(relative, lambda t: tb(t, residual_loss=residual_loss), **fields))


def test_relative_tb_is_zero_at_the_base_model():
    t = make(log_z=True, psi=False, alpha=1.0, rewards=torch.zeros(8))
    t = change(t, base_logps=t.logps.detach(), log_z=torch.zeros(8).double().requires_grad_())
    out = relative_tb(t)
    assert out.loss == 0 and all((g == 0).all() for g in torch.autograd.grad(out.loss, leaves(t)))


@pytest.mark.parametrize("log_z", [False, True])
def test_flowrl_without_a_reward_is_la_tb(log_z):
    same(*both(lambda t: flowrl(t, beta=0.0), la_tb, old=True, log_z=log_z))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("log_z", [False, True])
def test_limits_of_subtb(old, log_z):
    fields = {"old": old, "log_z": log_z}
    same(*both(lambda t: subtb(t, lam=0.0), token_tb, **fields))
    same(*both(lambda t: subtb(t, lam=1e-16), token_tb, **fields))
    same(*both(lambda t: subtb(t, lam=1e16), lambda t: subtb(t, lam=math.inf), **fields))
    same(*both(lambda t: subtb(t, lam=math.inf), la_tb, lengths=[5] * 4, groups=[1, 2, 1, 2], **fields), 25.0)


@pytest.mark.parametrize("residual_loss", RESIDUALS)
def test_infinite_lambda_is_tb_with_log_z_of_the_length(residual_loss):
    t, u = make(log_z=True), make(log_z=True)
    u = change(u, log_z=t.log_z.detach() * u.lengths)
    out, total = (
        f(x, residual_loss=residual_loss) for f, x in ((lambda x, **o: subtb(x, lam=math.inf, **o), t), (tb, u))
    )
    torch.testing.assert_close(out.loss, total.loss, rtol=1e-12, atol=0)
    a, b = (torch.autograd.grad(o.loss, x.logps)[0] for o, x in ((out, t), (total, u)))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if "residual_loss" in o.options])
def test_squared_is_the_default(name):
    same(*both(OBJECTIVES[name], resolve_objective(name, {"residual_loss": "squared"}), old=True))


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if not o.needs_rewards])
def test_a_policy_at_the_target_has_nothing_to_learn(name):
    """π = p_base at α = 1 is the target of all that take no reward."""
    t = make(alpha=1.0, psi=False)
    t = change(t, base_logps=t.logps.detach())
    assert torch.autograd.grad(OBJECTIVES[name](t).loss, t.logps)[0].abs().max() < 1e-14


@pytest.mark.parametrize("name", OBJECTIVES)
def test_autocast_changes_nothing(name):
    t, u = make(dtype=torch.float32, old=True), make(dtype=torch.float32, old=True)
    plain = OBJECTIVES[name](t).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = OBJECTIVES[name](u).loss
    assert torch.equal(plain, cast)
    assert torch.equal(*(torch.autograd.grad(x, y.logps)[0] for x, y in ((plain, t), (cast, u))))


# The registry


def test_what_the_registry_says_is_true():
    """needs_rewards, needs_groups, partition: an objective runs without what it says it does not need, and only so."""
    for objective in OBJECTIVES.values():
        full = make(log_z=objective.partition is not None)
        assert isinstance(objective(full), ObjectiveOutput)
        for fields, needed in (
            ({"rewards": None}, objective.needs_rewards),
            ({"group_ids": None}, objective.needs_groups),
        ):
            if needed:
                with pytest.raises(
                    ValueError, match=rf"^{objective.name}: .*needs {next(iter(fields))} \(B,\), got None"
                ):
                    objective(change(full, **fields))
            else:
                objective(change(full, **fields))
        assert not objective.needs_old_logps and objective.function.__name__ == objective.name
        d_log_z = full.log_z is not None and torch.autograd.grad(objective(full).loss, full.log_z)[0]
        assert objective.partition is None or d_log_z.abs().max() > 0


UNIT = {"logps": [-1.0, -2.0], "base_logps": [-0.5, -1.0]}


def test_the_unit_of_log_z():
    """Twice as many tokens of the same kind double what log Z must be when it is a total, and only then."""
    for objective in OBJECTIVES.values():
        if objective.partition is None:
            continue
        found = []
        for length in (3, 6):
            per_token = {k: torch.tensor(v).double().repeat_interleave(length) for k, v in UNIT.items()}
            t = change(make([length] * 2, [1, 1], psi=False, rewards=torch.zeros(2)), **per_token)
            found.append(objective(t).log_z[0])
        expected = 2.0 if objective.partition == "total" else 1.0
        assert found[1] / found[0] == pytest.approx(expected, rel=1e-12), objective.name


def test_resolving():
    t = make()
    assert resolve_objective("tb") == OBJECTIVES["tb"]
    bound = resolve_objective("grpo", {"scale_rewards": "none", "kl_coefficient": 0.1})
    assert torch.equal(bound(t).loss, grpo(t, scale_rewards="none", kl_coefficient=0.1).loss)
    again = resolve_objective(bound, {"kl_coefficient": 0.2})
    assert torch.equal(again(t).loss, grpo(t, scale_rewards="none", kl_coefficient=0.2).loss)
    assert bound.options == ("epsilon_low", "epsilon_high", "aggregation", "scale_rewards", "kl_coefficient")
    flows = resolve_objective("subtb", {"log_flows": torch.zeros(20, dtype=torch.float64)})
    assert flows(t).loss.isfinite()


@pytest.mark.parametrize(
    ("objective", "options", "error", "match"),
    [
        ("tbb", {}, ValueError, "one of 'la_tb', 'tb', .*'grpo', got 'tbb'; did you mean 'tb'?"),
        ("nothing", {}, ValueError, "one of 'la_tb', .* got 'nothing'$"),
        (
            "subtb",
            {"lambda": 1},
            ValueError,
            "subtb has the options 'lam', 'log_flows', 'residual_loss', got 'lambda'; d",
        ),
        ("tb", {"beta": 1}, ValueError, "tb has the options 'residual_loss', got 'beta'"),
        ("subtb", {"lam": -1}, ValueError, "^subtb: lam must be >= 0"),
        ("flowrl", {"residual_loss": "l1"}, ValueError, "^flowrl: residual_loss must be one of"),
        (3, {}, TypeError, "a name or a function of Trajectories, got int"),
        (None, {}, TypeError, "a name or a function of Trajectories, got NoneType"),
    ],
)
def test_bad_objectives(objective, options, error, match):
    with pytest.raises(error, match=match):
        resolve_objective(objective, options)


def mine(trajectories, *, power=2.0):
    return trajectories.sequence_mean(trajectories.means(trajectories.logps - trajectories.target_logps).abs() ** power)


def test_a_function_of_the_user():
    t = make()
    objective = resolve_objective(mine, {"power": 3.0})
    assert isinstance(objective, Objective) and objective.name == "mine" and objective.options == ("power",)
    assert (objective.needs_groups, objective.needs_rewards, objective.partition) == (True, False, None)
    out = objective(t)
    assert torch.equal(out.loss, mine(t, power=3.0)) and torch.equal(out.logp_mean, t.logp_mean)
    with pytest.raises(ValueError, match=r"mine has the options 'power', got 'pwoer'; did you mean 'power'?"):
        resolve_objective(mine, {"pwoer": 1})
    assert resolve_objective(lambda t, **any: t.logps.sum(), {"x": 1})(t).loss == t.logps.sum()


def test_what_a_users_function_says_of_itself():
    def theirs(t):
        return t.logps.sum()

    theirs.partition, theirs.needs_groups, theirs.needs_rewards = "total", False, True
    found = resolve_objective(theirs)
    assert (found.partition, found.needs_groups, found.needs_rewards) == ("total", False, True)
    theirs.partition = "both"
    with pytest.raises(ValueError, match="'per_token', 'total' or None, got 'both'"):
        resolve_objective(theirs)


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (lambda t: 3.0, TypeError, "must return an ObjectiveOutput or a scalar tensor, got float"),
        (lambda t: t.logps, ValueError, r"floating loss of shape \(\), got torch.float64 \(20,\)"),
        (lambda t: t.group_ids.sum(), ValueError, r"floating loss of shape \(\), got torch.int64 \(\)"),
    ],
)
def test_bad_results(function, error, match):
    with pytest.raises(error, match=match):
        resolve_objective(function)(make())


# docs/objectives.md

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"
README = Path(__file__).parents[2] / "README.md"


def rows(heading, page=PAGE):
    """The cells of the table under ``heading``."""
    lines = page.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    table = [line for line in lines if line.startswith("|")][2:]
    return [
        [cell.strip().strip("`").replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table
    ]


def test_the_page_matches_the_registry():
    for page in (PAGE, README):
        assert rows("Objectives", page) == [[o.name, o.formula, o.target, o.when] for o in OBJECTIVES.values()]
    assert rows("Residual losses") == [[g.name, g.formula, g.divergence, g.character] for g in RESIDUAL_LOSSES.values()]
    needs = [
        [o.name, o.partition or "–", "yes" if o.needs_groups else "–", "yes" if o.needs_rewards else "–"]
        for o in OBJECTIVES.values()
    ]
    assert [row[:4] for row in rows("What each needs")] == needs
    for row, objective in zip(rows("What each needs"), OBJECTIVES.values(), strict=True):
        assert re.findall(r"\w+", row[4]) == list(objective.options)


def test_the_example_of_the_page_runs():
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    own = next(block for block in code if "def " in block)
    assert len([line for line in own.splitlines() if line.strip()]) <= 15
    names = {}
    exec(own, names)
    objective = resolve_objective(names["huber_tb"], {"delta": 0.5})
    t = make()
    (gradient,) = torch.autograd.grad(objective(t).loss, t.logps)
    assert gradient.abs().max() > 1e-4 and objective.partition == "per_token"
