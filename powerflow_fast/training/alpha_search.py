"""``alpha="auto:entropy=0.8"``, ``alpha="auto:logp=-0.5"``: the exponent is looked for while the policy is trained.

Both fall as alpha grows on a scale of their own: f = log(entropy / (log V − entropy)), for V tokens, or f = log(−logp).
Each fresh rollout gives f, and with it the exponent that the policy has come to by itself, the slope of its log-probs s
over those of the base model r among completions of a prompt: where training has settled on p_base^α, s = αr − log Z'.
The next exponent lies ahead of that one, by how far f is off:

    log α  moves towards  log slope + gain (f − wanted) + trim,    trim += gain (f − wanted) / 200

With f as wanted, α is where the policy already is and nothing moves any more; away from it, the policy is drawn along
at its own speed, whatever the learning rate. An integrator of f − wanted alone needs a gain made for that speed: too
large a one swings, too small a one does not arrive. The trim takes up what the slope lacks where the policy is not
quite a power of the base model. Steps of log α are limited: a policy that is pulled far at once can collapse.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from ..config.fields import AlphaRequest, alpha_request
from ..config.options import PowerFlowConfig
from ..errors import ConfigError
from ..objectives.registry import Objective
from ..ops.segments import segment_sum
from .samples import Samples

logger = logging.getLogger(__name__)

LOW, HIGH = 1 / 16, 16.0
"""Bounds of alpha."""
TOLERANCE = 0.05
"""A larger relative distance of what was reached from what was asked for is warned of."""
_GAIN = {"entropy": 1.0, "logp": 2.5}
_TRIM = 1 / 200
_STEP = 0.1
"""Most that log alpha moves at a rollout."""
_LEAD = math.log(4.0)
"""Most that log alpha is away from the policy's own: alpha = 4 is the paper's own choice for a base model."""
_MEMORY = {"control": 0.7, "report": 0.95}
"""Share of the past, per rollout, in the averages that the law reads and in those that are reported."""
_NAMES = {
    "entropy": "mean token entropy",
    "logp": "mean log-prob per token under the base model",
}


def make_alpha(config: PowerFlowConfig, objective: Objective, *, own_engine: bool, vocabulary: int) -> Alpha:
    """The exponent of a run; :class:`ConfigError` where ``alpha="auto:..."`` asks for what the run cannot come to."""
    request = alpha_request(alpha := config.require_alpha())
    if request is None:
        return Alpha(alpha)
    asked = f"PowerFlowConfig: alpha={config.alpha!r}"
    if not objective.uses_alpha:
        raise ConfigError(f"{asked}: the objective {objective.name!r} does not depend on alpha; give it a number")
    if own_engine or config.rollout_temperature:
        why = "engine is given" if own_engine else f"rollout_temperature={config.rollout_temperature} is set"
        raise ConfigError(f"{asked} is measured on what the policy samples at temperature, and {why}; give a number")
    most = math.log(vocabulary)
    if request.quantity == "entropy" and request.value >= most:
        raise ConfigError(
            f"{asked}: the entropy of a token out of {vocabulary} is below log {vocabulary} = {most:.3f} nats"
        )
    return Alpha(1.0, request, vocabulary=vocabulary)


class Alpha:
    """A fixed exponent, or with a ``request`` one that is chosen anew at every rollout.

    All it knows is in :meth:`state_dict`. Every process holds the same one: sums are taken over all.
    """

    def __init__(self, value: float, request: AlphaRequest | None = None, *, vocabulary: int = 2):
        self.request, self._most = request, math.log(vocabulary)
        self.value = self.policy_alpha = value
        self._trim = 0.0
        # Decaying sums; quotients of them need no normalisation.
        self._sums: dict[str, list[float]] = {}

    @property
    def auto(self) -> bool:
        return self.request is not None

    @property
    def needs_start(self) -> bool:
        """Nothing was observed yet that a first exponent could be chosen from."""
        return self.auto and not self._sums

    @property
    def needs_entropy(self) -> bool:
        """Whether :meth:`observe` reads entropies, a pass of their own over the vocabulary."""
        return self.auto and self.request.quantity == "entropy"

    def observe(self, samples: Samples, logps: Tensor, entropy: Tensor | None, accelerator: Any) -> float:
        """The next alpha, after a fresh rollout's ``logps`` and token entropies, (N,) each, under the policy.

        Entropies are read where they are asked for. What is not finite is passed over: the step that trains on such a
        rollout deals with it.
        """
        totals = accelerator.reduce(self._totals(samples, logps, entropy), reduction="sum").tolist()
        if not all(map(math.isfinite, totals)):
            return self.value
        for name in _MEMORY:
            self._remember(name, totals)
        value, count, covariance, variance = self._sums["control"]
        if variance > 1e-9 * count:  # else completions of a prompt are all alike, and say nothing about the slope
            self.policy_alpha = min(max(covariance / variance, LOW), HIGH)
        error = _GAIN[self.request.quantity] * (self._scaled(value / max(count, 1e-9)) - self._scaled(self._wanted))
        lead = min(max(error + self._trim, -_LEAD), _LEAD)
        way = math.log(self.policy_alpha) + lead - math.log(self.value)
        if abs(way) < _STEP and abs(lead) < _LEAD:  # what is cut off here is not to be made up for later
            self._trim += _TRIM * error
        alpha = self.value * math.exp(min(max(way, -_STEP), _STEP))
        self.value = min(max(alpha, LOW), HIGH)
        self._remember("alpha", [math.log(self.value), 1.0])
        return self.value

    def _totals(self, samples: Samples, logps: Tensor, entropy: Tensor | None) -> Tensor:
        """(4,) fp64 of this device: v summed, what it is summed over, covariance of s and r, variance of r."""
        lengths = torch.tensor(samples.lengths, device=logps.device)
        s, r = (
            (segment_sum(x.double(), samples.cu_seqlens) / lengths.clamp_min(1))[lengths > 0].cpu()
            for x in (logps, samples.base_logps)
        )
        if self.request.quantity == "entropy":
            value, count = float(entropy.double().sum()), sum(samples.lengths)
        else:
            value, count = -float(r.sum()), len(r)
        # Among completions of one prompt with the same penalty: what that moves is no exponent.
        keys = torch.stack([key[lengths > 0].double().cpu() for key in (samples.group_ids, samples.psi)], dim=1)
        _, cell, size = keys.unique(dim=0, return_inverse=True, return_counts=True)

        def centred(x: Tensor) -> Tensor:
            return x - (torch.zeros(len(size), dtype=x.dtype).index_add(0, cell, x) / size)[cell]

        s, r = centred(s), centred(r)
        totals = [value, float(count), float((s * r).sum()), float((r * r).sum())]
        return torch.tensor(totals, dtype=torch.float64, device=logps.device)

    def _remember(self, name: str, new: list[float]) -> None:
        memory = _MEMORY.get(name, _MEMORY["report"])
        past = self._sums.get(name, [0.0] * len(new))
        self._sums[name] = [memory * old + x for old, x in zip(past, new, strict=True)]

    @property
    def _wanted(self) -> float:
        return abs(self.request.value)

    def _scaled(self, nats: float) -> float:
        if self.request.quantity == "logp":
            return math.log(max(nats, 1e-6))
        share = min(max(nats / self._most, 1e-6), 1 - 1e-6)
        return math.log(share / (1 - share))

    # What people see

    @property
    def landed(self) -> float:
        """What the run has found: the geometric mean of the last rollouts' exponents, the last counting most."""
        total, count = self._sums.get("alpha", (math.log(self.value), 1.0))
        return math.exp(total / count) if self.auto else self.value

    @property
    def reached(self) -> float:
        """The quantity that was asked for, measured on the last rollouts in the same way; NaN before the first."""
        value, count, *_ = self._sums.get("report", (math.nan, 1.0))
        return math.copysign(value / max(count, 1e-9), self.request.value)

    def metrics(self) -> dict[str, float]:
        return {"alpha": self.value, "policy_alpha": self.policy_alpha} if self.auto else {}

    def summary(self) -> str | None:
        """One line: what was asked for and what came out."""
        if not self.auto:
            return None
        off = self.reached / self.request.value - 1
        return (
            f"auto:{self.request.quantity}={self.request.value:g}: {_NAMES[self.request.quantity]} "
            f"{self.reached:.4g} nats over the last rollouts ({off:+.1%}), alpha {self.landed:.4g}"
        )

    def check(self) -> None:
        """Warn where the run has not come to what was asked for, with the reason as far as it shows."""
        if not self.auto:
            return
        if abs(self.reached / self.request.value - 1) <= TOLERANCE:
            logger.info("%s", self.summary())
            return
        if self.value in (LOW, HIGH):
            reason = f"alpha is at its bound {self.value:g}: more steps may still help, another exponent would not"
        else:
            reason = (
                f"the policy's own exponent has come to {self.policy_alpha:.3g} and is still on its way: take more "
                "steps, or a larger learning_rate"
            )
        logger.warning("%s; %s", self.summary(), reason)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """JSON, from which :meth:`load_state_dict` restores every bit."""
        return {"value": self.value, "policy_alpha": self.policy_alpha, "trim": self._trim, "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.policy_alpha, self._trim = state["value"], state["policy_alpha"], state["trim"]
        self._sums = {name: list(values) for name, values in state["sums"].items()}
