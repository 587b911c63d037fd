"""Inputs of the Triton launchers, and what they return for them."""

from __future__ import annotations

import dataclasses

import torch

from powerflow_fast.kernels import linear_logprob_bwd, linear_logprob_exps, linear_logprob_fwd
from powerflow_fast.kernels.interface import HeadCall, HeadSums, LogitTransform
from powerflow_fast.kernels.linear_logprob_reference import linear_logprob_stats_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORE = -100
PLAIN = LogitTransform()


@dataclasses.dataclass
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    d_logp: torch.Tensor
    bias: torch.Tensor | None = None
    transform: LogitTransform = PLAIN

    def call(self) -> HeadCall:
        return HeadCall(self.hidden, self.weight, self.labels, self.bias, self.transform, IGNORE)

    def run_launchers(self):
        """What the launchers return: the forward pass with statistics, without, the unit gradient, gradients."""
        with_stats = linear_logprob_fwd.linear_logprob_fwd(self.call(), stats=True)
        forward = linear_logprob_fwd.linear_logprob_fwd(self.call())
        unit = linear_logprob_exps.linear_logprob_fwd_d_hidden(self.call(), stats=True)
        needs = {"need_d_hidden": True, "need_d_weight": True, "need_d_bias": self.bias is not None}
        grads = linear_logprob_bwd.linear_logprob_bwd(self.call(), forward, self.d_logp, **needs)
        return with_stats, forward, unit, grads

    def run_kept(self) -> dict[str, torch.Tensor]:
        """Log-probs, statistics and gradients of a trainable head from kept exponentials, of the rows that count."""
        rows = (self.labels != IGNORE).nonzero()[:, 0]
        hidden = self.hidden[rows]
        kept = linear_logprob_exps.linear_logprob_fwd_exps(self.call().of_rows(rows), stats=True)
        sums = HeadSums.like(self.weight, self.bias)
        d_hidden = linear_logprob_bwd.linear_logprob_bwd_exps(
            hidden, self.weight, kept, self.d_logp[rows], need_d_hidden=True, add_to=sums
        )
        out = {"d_hidden": torch.zeros_like(self.hidden).index_copy(0, rows, d_hidden)}
        for name, x, like in zip(("d_weight", "d_bias"), sums.finished(), (self.weight, self.bias), strict=True):
            if x is not None:
                assert x.dtype == torch.float32
                out[name] = x.to(like.dtype)
        for name, x in {"logp": kept.logp, **kept.stats._asdict()}.items():
            out[name] = torch.zeros_like(self.d_logp).index_copy(0, rows, x)
        return {f"{name} kept": x for name, x in out.items()}

    def run(self) -> dict[str, torch.Tensor]:
        """The launchers' results by name."""
        with_stats, forward, unit, grads = self.run_launchers()
        out = {"logp": with_stats.logp, **with_stats.stats._asdict(), "logp without stats": forward.logp}
        out |= {"logp of unit": unit.logp, "unit": unit.unit}
        out |= {f"{name} of unit": x for name, x in unit.stats._asdict().items()}
        if self.hidden.dtype != torch.float16:
            out |= self.run_kept()
        names = ("d_hidden", "d_weight", "d_bias")
        return out | {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}

    def reference(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = {"d_hidden": self.hidden, "d_weight": self.weight}
        if self.bias is not None:
            leaves["d_bias"] = self.bias
        leaves = {name: x.to(dtype).detach().requires_grad_() for name, x in leaves.items()}
        options = {**self.transform._asdict(), "bias": leaves.get("d_bias"), "ignore_index": IGNORE}
        heads = leaves["d_hidden"], leaves["d_weight"], self.labels
        logp, lse, entropy, mean_logit = linear_logprob_stats_ref(*heads, **options)
        grads = torch.autograd.grad((logp * self.d_logp.to(dtype)).sum(), list(leaves.values()), retain_graph=True)
        (unit,) = torch.autograd.grad(logp.sum(), leaves["d_hidden"])
        scores = {"logp": logp, "lse": lse, "entropy": entropy, "mean_logit": mean_logit}
        grads = dict(zip(leaves, grads, strict=True))
        out = {**scores, "logp without stats": logp, "unit": unit, **grads}
        out |= {f"{name} of unit": x for name, x in scores.items()}
        if self.hidden.dtype != torch.float16:
            out |= {f"{name} kept": x for name, x in (scores | grads).items()}
        return {name: x.detach() for name, x in out.items()}

    def check(self, check_accuracy):
        ours, torchs, exact = self.run(), self.reference(self.hidden.dtype), self.reference(torch.float64)
        assert ours.keys() == exact.keys()
        for name, x in ours.items():
            inputs = {"unit": self.hidden, "d_hidden": self.hidden, "d_weight": self.weight, "d_bias": self.bias}
            source = inputs.get(name.removesuffix(" kept"))
            expected = torch.float32 if source is None else source.dtype
            if name == "unit" and expected == torch.float16:
                expected = torch.float32  # so that a loss scale can lift it back
            assert x.dtype == expected, name
            check_accuracy(x, torchs[name], exact[name], self.hidden.dtype, name)


def make_case(dtype=torch.float32, *, n=70, v=300, h=72, ignored=True, bias=False, sharpness=1.0, seed=0, **transform):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator).to(dtype)
    weight = (torch.randn(v, h, generator=generator) * sharpness / h**0.5).to(dtype)
    labels = torch.randint(0, v, (n,), generator=generator)
    if ignored:
        labels[1::3] = IGNORE
    d_logp = torch.randn(n, generator=generator)
    b = torch.randn(v, generator=generator).to(dtype) if bias else None
    return Case(hidden, weight, labels, d_logp, b, LogitTransform(**transform))


OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"logit_softcap": 4.0, "sharpness": 3.0},
    "all": {"bias": True, "temperature": 0.7, "logit_scale": 1.5, "logit_softcap": 6.0, "sharpness": 3.0},
    "hot": {"temperature": 1.7, "logit_scale": 0.25},
    "peaked": {"sharpness": 25.0},
}
SHAPES = {
    "no rows": {"n": 0},
    "one row": {"n": 1, "ignored": False},
    "one column": {"v": 1},
    "two columns": {"v": 2},
    "a last tile of one column": {"v": 257},
    "whole tiles": {"n": 128, "v": 512, "h": 64},
    "rows off 16 bytes": {"h": 37, "bias": True},
    "one feature": {"h": 1, "n": 5},
}


def case_of_unlikely_tokens(dtype, **options) -> Case:
    """Every fifth token of 70 lies 2 to 1000 nats below the maximum."""
    case = make_case(dtype, **options)
    case.hidden[:, 0] = 0
    case.hidden[::5] = 0
    case.hidden[::5, 0] = 1
    deep = torch.arange(0, 70, 5)
    depth = torch.tensor([2.0, 12.0, 40.0, 64.0, 90.0, 120.0, 1000.0]).repeat(2)
    case.labels[deep] = 20 + torch.arange(14)
    case.weight[20:34, 0] = -depth.to(dtype)
    return case
