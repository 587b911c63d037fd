"""Batches for the tests of objectives, and every objective again as loops over completions, tokens and groups."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from powerflow_fast.objectives import Trajectories

LENGTHS = [4, 0, 7, 1, 3, 0, 5, 0]
GROUPS = [9, 9, -3, 9, -3, 5, 9, 5]  # interleaved, negative; group 5 has no token at all


def make(lengths=LENGTHS, groups=GROUPS, *, dtype=torch.float64, seed=0, log_z=False, psi=True, old=False, **fields):
    """Trajectories with rewards; residuals of about one nat, log-ratios on both sides of the clip."""
    g = torch.Generator().manual_seed(seed)

    def rand(n):
        return torch.rand(n, generator=g, dtype=torch.float64)

    n, b = sum(lengths), len(lengths)
    logps = -3 * rand(n)
    fields = {
        "alpha": 1.5,
        "logps": logps,
        "base_logps": logps / 1.5 - 0.6 + 0.4 * rand(n),
        "cu_seqlens": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        "group_ids": torch.tensor(groups[:b], dtype=torch.int64),
        "rewards": rand(b),
        "log_z": 2 * rand(b) - 1 if log_z else None,
        "psi": -0.2 * rand(b).round() if psi else None,
        "old_logps": logps + 0.2 * rand(n) - 0.1 + torch.linspace(-0.05, 0.15, n) if old else None,
    } | fields
    fields = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in fields.items()}
    for name in ("logps", "log_z"):
        if fields[name] is not None:
            fields[name].requires_grad_()
    return Trajectories(**fields)


def change(t, **fields):
    """The same trajectories but for these fields."""
    return Trajectories(**({k: getattr(t, k) for k in t.__dataclass_fields__} | fields))


def exact(t):
    """The same trajectories in fp64, with leaves of their own."""
    fields = {k: getattr(t, k) for k in t.__dataclass_fields__}
    for k, v in fields.items():
        if isinstance(v, torch.Tensor) and v.is_floating_point():
            fields[k] = v.detach().double().requires_grad_(v.requires_grad)
    return Trajectories(**fields)


def leaves(t):
    return [x for x in (t.logps, t.log_z) if x is not None]


RESIDUALS = {
    "squared": (lambda d: d**2, lambda d: 2 * d),
    "linex": (lambda d: 2 * (math.e**-d + d - 1), lambda d: 2 - 2 * math.e**-d),
    "half_linex": (lambda d: 8 * (math.e ** (-d / 2) + d / 2 - 1), lambda d: 4 - 4 * math.e ** (-d / 2)),
    "shifted_cosh": (lambda d: math.e**d + math.e**-d - 2, lambda d: math.e**d - math.e**-d),
}


class Sequence:
    """One completion with tokens: its fields as scalars and short vectors."""

    def __init__(self, t, i, a, b):
        self.i, self.length, self.group = i, b - a, int(t.group_ids[i])
        self.logps = t.logps[a:b]
        psi = 0 if t.psi is None else t.psi[i]
        self.target = t.alpha * (t.base_logps[a:b] + psi)
        self.gap = self.logps - self.target
        self.base = t.base_logps[a:b]
        self.reward = float(t.rewards[i])
        self.log_z = None if t.log_z is None else t.log_z[i]
        self.ratio = torch.ones_like(self.logps) if t.old_logps is None else (self.logps - t.old_logps[a:b]).exp()
        log_ratio = float(self.ratio.detach().log().sum())
        if t.importance_level == "length_normalized":
            log_ratio /= self.length
        self.weight = min(max(math.exp(log_ratio), t.clip[0]), t.clip[1])


def sequences(t):
    bounds = t.cu_seqlens.tolist()
    found = [Sequence(t, i, a, b) for i, (a, b) in enumerate(pairwise(bounds)) if a < b]
    for s in found:
        s.members = [other for other in found if other.group == s.group]
    return found


def zero_of(slope):
    """Where an increasing function crosses zero."""
    low, high = -60.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return low


def balance(t, terms, residual_loss="squared", learned=True):
    """(loss, log Z of each completion) of ``mean_i w_i Σ_k v_k g(c m_k + e_k)`` with ``terms(s)`` the (v, m, e)."""
    value, slope = RESIDUALS[residual_loss]
    loss, log_z = t.logps.sum() * 0, torch.zeros(len(t.lengths), dtype=torch.float64)
    found = sequences(t)
    for s in found:
        c = s.log_z if s.log_z is not None and learned else None
        if s.log_z is not None and not learned:
            c = s.log_z.detach()
        if c is None:
            fixed = [(m.weight * v, k, float(e.detach())) for m in s.members for v, k, e in terms(m)]
            c = zero_of(lambda c, fixed=fixed: sum(v * k * slope(c * k + e) for v, k, e in fixed))
        log_z[s.i] = float(c.detach() if isinstance(c, torch.Tensor) else c)
        loss = loss + s.weight * sum(v * value(c * m + e) for v, m, e in terms(s))
    return loss / (t.num_sequences or max(len(found), 1)), log_z


def advantages(found, scale_rewards):
    for s in found:
        rewards = [m.reward for m in s.members]
        mean = sum(rewards) / len(rewards)
        s.advantage = s.reward - mean
        if scale_rewards == "group":
            variance = sum((r - mean) ** 2 for r in rewards) / max(len(rewards) - 1, 1)
            s.advantage /= math.sqrt(variance) + 1e-4
    return {s.i: s.advantage for s in found}


def oracle(name, t, **options):
    """(loss, log Z or None) of the objective with that name."""
    g = options.pop("residual_loss", "squared")
    if name == "la_tb":
        return balance(t, lambda s: [(1, 1, s.gap.sum() / s.length)], g)
    if name in ("tb", "log_variance_tb"):
        return balance(t, lambda s: [(1, 1, s.gap.sum())], g, learned=name == "tb")
    if name == "relative_tb":
        beta = options.get("beta", 1.0)
        return balance(t, lambda s: [(1, 1, s.gap.sum() - beta * s.reward)], g)
    if name == "flowrl":
        a = advantages(sequences(t), options.get("scale_rewards", "group"))
        beta = options.get("beta", 15.0)
        return balance(t, lambda s: [(1, 1, s.gap.sum() / s.length - beta * a[s.i])], g)
    if name == "token_tb":
        return balance(t, lambda s: [(1 / s.length, 1, e) for e in s.gap], g)
    if name == "subtb":
        lam = options.get("lam", 0.9)

        def runs(s):
            pairs = [(i, j) for i in range(s.length) for j in range(i + 1, s.length + 1)]
            weights = [lam ** (j - i - 1) for i, j in pairs]
            total = sum(weights)
            return [(w / total, j - i, s.gap[i:j].sum()) for w, (i, j) in zip(weights, pairs, strict=True)]

        return balance(t, runs, g)
    found = sequences(t)
    n = t.num_sequences or max(len(found), 1)
    loss = t.logps.sum() * 0
    if name == "grpo":
        a = advantages(found, options.get("scale_rewards", "group"))
        low, high = 1 - options.get("epsilon_low", 0.2), 1 + options.get("epsilon_high", 0.2)
        for s in found:
            ratio = s.ratio if t.old_logps is not None else (s.logps - s.logps.detach()).exp()
            for k in range(s.length):
                clipped = min(max(float(ratio[k].detach()), low), high)
                plain = ratio[k] * a[s.i]
                term = -(plain if float(plain.detach()) <= clipped * a[s.i] else plain.new_tensor(clipped * a[s.i]))
                d = s.base[k] - s.logps[k]
                term = term + options.get("kl_coefficient", 0.0) * (d.exp() - d - 1)
                if options.get("aggregation", "dapo") == "dapo":
                    loss = loss + term / (t.num_tokens or len(t.logps))
                else:
                    loss = loss + term / s.length / n
        return loss, None
    for s in found:
        rewards = {m.i: -float((m.gap.sum() if name == "rl_trajectory" else m.gap.mean()).detach()) for m in s.members}
        among = [m for m in s.members if options.get("baseline", "group") == "group" or m.i != s.i]
        total = sum(m.weight for m in among)
        baseline = sum(m.weight * rewards[m.i] for m in among) / total if total else rewards[s.i]
        if name == "rl_trajectory":
            loss = loss - s.weight * (rewards[s.i] - baseline) * s.logps.sum() / n
        else:
            loss = loss - s.weight * ((-s.gap.detach() - baseline) * s.logps).mean() / n
    return loss, None
