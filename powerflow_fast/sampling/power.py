"""Power sampling: completions of p^alpha from p itself, without training, by a Metropolis-Hastings chain each.

Karan and Du, "Reasoning with Sampling" (arXiv 2510.14901). The chain is a function of anything that can draw a suffix
and tell its log-probs; :class:`PowerSampler` gives it a language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
from numpy.typing import NDArray
from torch import nn

from ..data import PromptRow
from ..errors import ConfigError
from ..tools.random_state import random_stream
from .base import Completion, ModelSampler, check_number

Floats = NDArray[numpy.float64]
Ints = NDArray[numpy.int64]


@dataclass
class Paths:
    """The sequences of C chains so far, in arrays of width W; beyond its length a row is 0."""

    ids: Ints
    """(C, W) tokens."""
    lengths: Ints
    """(C,)."""
    finished: NDArray[numpy.bool_]
    """(C,) the last token is an end of sequence."""
    log_p: Floats
    """(C, W) log-prob in nats of each token under the model that is raised to a power."""
    log_q: Floats
    """(C, W) log-prob in nats of each token under the proposal."""

    @classmethod
    def empty(cls, chains: int, width: int) -> Paths:
        shape = (chains, width)
        numbers = numpy.zeros(chains, numpy.int64), numpy.zeros(chains, bool), numpy.zeros(shape), numpy.zeros(shape)
        return cls(numpy.zeros(shape, numpy.int64), *numbers)

    def take(self, rows: Ints) -> Paths:
        """A copy of some rows."""
        return Paths(*(array[rows] for array in vars(self).values()))

    def put(self, rows: Ints, paths: Paths) -> None:
        """Write ``paths`` to ``rows``."""
        for own, other in zip(vars(self).values(), vars(paths).values(), strict=True):
            own[rows] = other


class Propose(Protocol):
    """Draws the rest of sequences from the proposal q."""

    def __call__(self, rows: Ints, paths: Paths, keep: Ints, limit: int, uniforms: Floats) -> Paths:
        """``paths``, which are those of chains ``rows``, with other tokens from place ``keep`` on.

        Row i keeps its first ``keep[i]`` tokens and their log-probs, and goes on with one token at least, to an end of
        sequence or to ``limit`` tokens in all. Token t is drawn by ``uniforms[i, t]`` in [0, 1) and nothing else.
        """
        ...


@dataclass
class PowerDraw:
    """What :func:`power_chains` leaves."""

    paths: Paths
    generated_tokens: Ints
    """(C,) tokens that were proposed, rejected ones too."""
    accepted: Ints
    """(C,) of the chain's moves."""
    moves: int
    """Of each chain."""


def log_acceptance(
    alpha: float, gain_p: Floats | float, gain_q: Floats | float, length: Ints | int, new_length: Ints | int
) -> Floats:
    """Log of the probability that a proposed suffix is taken, <= 0:

        min(0, alpha (log p(new) - log p(old)) - (log q(new) - log q(old)) + log(length / new_length))

    ``gain_p`` and ``gain_q`` are the differences new - old of the log-probs in nats. The last term is there because
    the cut is drawn among the tokens of a sequence: a given cut has probability 1 / length, and on the way back
    1 / new_length. Without it, where lengths differ, the chain would leave p^alpha · length invariant.
    """
    return numpy.minimum(0.0, alpha * gain_p - gain_q + numpy.log(length) - numpy.log(new_length))


def block_ends(max_length: int, blocks: int) -> list[int]:
    """Tokens that a sequence may have at the end of each block: ceil(b · max_length / blocks), b = 1, ..., blocks."""
    return [-(-b * max_length // blocks) for b in range(1, blocks + 1)]


def power_chains(
    propose: Propose,
    *,
    chains: int,
    alpha: float,
    ends: Sequence[int],
    steps: int,
    random: Callable[[int], Floats],
) -> PowerDraw:
    """Advance chains whose target is p(y)^alpha / Z over sequences that end, or have ``ends[-1]`` tokens.

    Block b goes on with every unfinished sequence up to ``ends[b]`` tokens, and then makes ``steps`` moves towards
    p^alpha over the sequences that end within ``ends[b]`` tokens or have so many. A move cuts a sequence before one of
    its tokens, each as likely, draws the rest anew from q, and takes it with :func:`log_acceptance`. A finished
    sequence takes part in the later blocks, where its new rest may become longer than it could before: every move
    leaves its block's target invariant exactly, so the last block's moves lead to p^alpha of complete sequences
    from wherever the earlier ones got.

    Args:
        propose: draws suffixes; see :class:`Propose`.
        chains: C, all advanced together.
        alpha: the power, > 0.
        ends: rising lengths, from 1 on.
        steps: moves of each block, >= 0.
        random: gives (C, n) fresh numbers in [0, 1) for n; row i is all the randomness of chain i, and the demand for
            it does not depend on what the chains do.

    Raises:
        ValueError: an argument out of range.

    Source: Karan and Du (arXiv 2510.14901), algorithm 1. Their code differs where sequences end: it has no term for
    the lengths, lets no new suffix be longer than the old one, and stops after the first block that leaves a finished
    sequence, so that p^alpha of complete sequences is not what its chains go to.
    """
    if not alpha > 0:
        raise ValueError(f"power_chains: alpha must be > 0, got {alpha}")
    if steps < 0 or chains < 0:
        raise ValueError(f"power_chains: steps and chains must be >= 0, got {steps} and {chains}")
    if not ends or any(b <= a for a, b in zip([0, *ends], ends, strict=False)):
        raise ValueError(f"power_chains: ends must be rising lengths from 1 on, got {list(ends)}")
    everyone = numpy.arange(chains)
    paths = Paths.empty(chains, ends[-1])
    generated, accepted = numpy.zeros(chains, numpy.int64), numpy.zeros(chains, numpy.int64)
    for limit in ends:
        rows, uniforms = numpy.flatnonzero(~paths.finished), random(limit)
        if len(rows):
            keep = paths.lengths[rows]
            paths.put(rows, propose(rows, paths.take(rows), keep, limit, uniforms[rows]))
            generated[rows] += paths.lengths[rows] - keep
        for _ in range(steps if chains else 0):
            uniforms = random(limit + 2)
            cut = (uniforms[:, 0] * paths.lengths).astype(numpy.int64)
            new = propose(everyone, paths.take(everyone), cut, limit, uniforms[:, 2:])
            generated += new.lengths - cut
            # Before the cut the two are equal, and their differences are exactly 0.
            gain_p, gain_q = (new.log_p - paths.log_p).sum(1), (new.log_q - paths.log_q).sum(1)
            taken = uniforms[:, 1] < numpy.exp(log_acceptance(alpha, gain_p, gain_q, paths.lengths, new.lengths))
            rows = numpy.flatnonzero(taken)
            paths.put(rows, new.take(rows))
            accepted += taken
    return PowerDraw(paths, generated, accepted, steps * len(ends))


class PowerSampler(ModelSampler):
    """Draws whole completions from p(y|q)^alpha / Z, approximately, by :func:`power_chains`: one chain for each.

    p is the model at temperature 1, the proposal the model at ``proposal_temperature``. Both log-probs come with the
    tokens from the same logits, so that a move costs the decoding of its suffix, a prefill of what stands before it,
    and no pass that scores. All chains of a call advance together, in batches of ``batch_size``; each has random
    numbers of its own, made of the seed, the prompt and the sample's number. What a row is drawn depends on the other
    rows by the rounding of the logits alone: a call for one row at a time gives the same bits whatever the other rows
    are.

    ``statistics`` counts over all calls: ``moves``, ``accepted``, ``generated_tokens``, ``prefilled_tokens`` and
    ``forwards``. A completion that never ends costs about L (1 + steps (blocks + 1) / 4) tokens at length L.

    Args:
        alpha: > 0.
        blocks: a completion may have ceil(b · max_completion_length / blocks) tokens in block b; 1 makes all moves on
            complete sequences.
        steps: moves of each block; with more, the result comes closer to the target.
        proposal_temperature: None is 1/alpha. Any temperature > 0 has the same target; it changes how fast it is
            reached.
        common: as for :class:`~powerflow_fast.sampling.TemperatureSampler`.

    Raises:
        ConfigError: an argument out of range.

    Source: Karan and Du (arXiv 2510.14901), whose values are the defaults.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        alpha: float = 4.0,
        blocks: int = 16,
        steps: int = 10,
        proposal_temperature: float | None = None,
        **common: Any,
    ):
        check_number("PowerSampler", "alpha", alpha, least=0, above=True)
        check_number("PowerSampler", "blocks", blocks, least=1, whole=True)
        check_number("PowerSampler", "steps", steps, least=0, whole=True)
        temperature = 1 / alpha if proposal_temperature is None else proposal_temperature
        check_number("PowerSampler", "proposal_temperature", temperature, least=0, above=True)
        super().__init__(model, tokenizer, temperature=temperature, **common)
        longest = self.decoder.max_completion_length
        if blocks > longest:
            raise ConfigError(
                f"PowerSampler: blocks must be at most max_completion_length={longest}, since a block adds a token at "
                f"least, got {blocks}"
            )
        self.alpha, self.steps, self.ends = float(alpha), steps, block_ends(longest, blocks)
        self.name = f"power sampling α={alpha:g}"
        self.settings["proposal_temperature"] = self.settings.pop("temperature")
        self.settings |= {"sampler": "power", "alpha": self.alpha, "blocks": blocks, "steps": steps}
        names = ("moves", "accepted", "generated_tokens", "prefilled_tokens", "forwards")
        self.statistics: dict[str, int] = dict.fromkeys(names, 0)

    def sample(self, rows: Sequence[PromptRow], *, num_samples: int, seed: int) -> list[list[Completion]]:
        """See :meth:`powerflow_fast.sampling.Sampler.sample`."""
        check_number("sample", "num_samples", num_samples, least=1, whole=True)
        prompts = [prompt for prompt in self.encode(rows) for _ in range(num_samples)]
        if not prompts:
            return []
        streams = [random_stream("power", seed, prompt, i % num_samples) for i, prompt in enumerate(prompts)]

        def propose(chains: Ints, paths: Paths, keep: Ints, limit: int, uniforms: Floats) -> Paths:
            starts = [prompts[c] + path[:k].tolist() for c, path, k in zip(chains, paths.ids, keep, strict=True)]
            draws = self.decoder.draw(starts, [u[k:limit] for u, k in zip(uniforms, keep, strict=True)])
            for i, (k, one) in enumerate(zip(keep, draws, strict=True)):
                paths.lengths[i], paths.finished[i] = k + len(one.ids), one.finished
                for array, values in (
                    (paths.ids, one.ids),
                    (paths.log_p, one.logps),
                    (paths.log_q, one.proposal_logps),
                ):
                    array[i, k:] = 0
                    array[i, k : k + len(values)] = values
            return paths

        drawn = power_chains(
            propose,
            chains=len(prompts),
            alpha=self.alpha,
            ends=self.ends,
            steps=self.steps,
            random=lambda n: numpy.stack([stream.random(n) for stream in streams]),
        )
        self.statistics["moves"] += drawn.moves * len(prompts)
        self.statistics["accepted"] += int(drawn.accepted.sum())
        self.statistics["generated_tokens"] += int(drawn.generated_tokens.sum())
        self.statistics["prefilled_tokens"] = self.decoder.prefilled_tokens
        self.statistics["forwards"] = self.decoder.forwards
        paths = drawn.paths
        completions = [
            self.completion(path[:length].tolist(), bool(finished), int(cost))
            for path, length, finished, cost in zip(
                paths.ids, paths.lengths, paths.finished, drawn.generated_tokens, strict=True
            )
        ]
        return [completions[i : i + num_samples] for i in range(0, len(completions), num_samples)]
