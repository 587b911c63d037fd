"""Power sampling is held to the exact p^alpha of an LM whose completions can all be listed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy
import pytest
import torch
from distances import chi_square, total_variation
from enumerable import LM_END as END
from enumerable import enumerable_lm
from tiny import EOS, one_thread, tiny_model, tiny_tokenizer  # noqa: F401

from powerflow_fast.data import PromptRow
from powerflow_fast.errors import ConfigError
from powerflow_fast.sampling import PowerSampler, resolve_sampler
from powerflow_fast.sampling import power as power_sampling
from powerflow_fast.sampling.power import Paths, block_ends, log_acceptance, power_chains

V = 5
A = PromptRow("a")


class TableLM:
    """The enumerable LM as a table of its next-token log-probs, so that many chains take a moment."""

    def __init__(self, *, ends: bool):
        self.model, self.tokenizer, self.completions = enumerable_lm(ends=ends)
        self.ends, self.length = ends, max(map(len, self.completions))
        self.lengths = numpy.array([len(c) for c in self.completions])
        self.offsets = numpy.cumsum([0, *(V**n for n in range(self.length))])
        rows = []
        for n in range(self.length):
            prefixes = torch.tensor([[0, *p] for p in itertools.product(range(V), repeat=n)])
            with torch.no_grad():
                rows.append(self.model(prefixes).logits[:, -1].double().log_softmax(-1))
        self.log_p = torch.cat(rows).numpy()
        self.base = torch.tensor([sum(self.token_logs(self.log_p, c)) for c in self.completions])

    def log_q(self, alpha):
        return torch.from_numpy(alpha * self.log_p).log_softmax(-1).numpy()

    def target(self, alpha):
        return (alpha * self.base).softmax(0)

    def tempered(self, alpha):
        """Exact probability of each completion where every token is drawn at temperature 1/alpha."""
        log_q = self.log_q(alpha)
        return torch.tensor([sum(self.token_logs(log_q, c)) for c in self.completions]).exp()

    def token_logs(self, table, completion):
        code, logs = 0, []
        for t, token in enumerate(completion):
            logs.append(table[self.offsets[t] + code, token])
            code = code * V + token
        return logs

    def propose(self, alpha):
        log_q = self.log_q(alpha)
        below = numpy.exp(log_q).cumsum(1)

        def propose(rows, paths, keep, limit, uniforms):
            for array in (paths.ids, paths.log_p, paths.log_q):
                array[numpy.arange(array.shape[1]) >= keep[:, None]] = 0
            code = numpy.zeros(len(rows), int)
            paths.lengths, paths.finished = keep.copy(), numpy.zeros(len(rows), bool)
            for t in range(limit):
                new = numpy.flatnonzero((t >= keep) & ~paths.finished)
                place = self.offsets[t] + code[new]
                token = (below[place] <= uniforms[new, t, None] * below[place, -1:]).sum(1)
                paths.ids[new, t], paths.lengths[new] = token, t + 1
                paths.log_p[new, t], paths.log_q[new, t] = self.log_p[place, token], log_q[place, token]
                paths.finished[new] = self.ends and token == END
                code = code * V + paths.ids[:, t]
            return paths

        return propose

    def drawn(self, alpha, *, chains, blocks=2, steps=10, proposal=None):
        """Shares of the completions among the last states of the chains, and the draw."""
        rng = numpy.random.default_rng(0)
        draw = power_chains(
            self.propose(alpha if proposal is None else proposal),
            chains=chains,
            alpha=alpha,
            ends=block_ends(self.length, blocks),
            steps=steps,
            random=lambda n: rng.random((chains, n)),
        )
        pairs = zip(draw.paths.ids.tolist(), draw.paths.lengths, strict=True)
        return self.shares([tuple(path[:length]) for path, length in pairs]), draw

    def shares(self, completions):
        index = {c: i for i, c in enumerate(map(tuple, self.completions))}
        counts = numpy.bincount([index[c] for c in completions], minlength=len(index))
        return torch.from_numpy(counts / counts.sum())


LMS = {ends: TableLM(ends=ends) for ends in (False, True)}
FIXED, ENDING = LMS[False], LMS[True]
both = pytest.mark.parametrize("lm", LMS.values(), ids=["fixed-length", "variable-length"])


# Of the one with ends, p^4 is 99.7 % the completion "e", which a chain finds only by proposing all of it.
@pytest.mark.parametrize(
    ("lm", "alpha", "steps", "chains"),
    [(FIXED, 2.0, 8, 40_000), (FIXED, 4.0, 10, 20_000), (ENDING, 2.0, 120, 12_000), (ENDING, 4.0, 200, 4_000)],
    ids=["fixed-length-2", "fixed-length-4", "variable-length-2", "variable-length-4"],
)
def test_chains_reach_the_exact_power(lm, alpha, steps, chains):
    shares, draw = lm.drawn(alpha, steps=steps, chains=chains)
    target = lm.target(alpha)
    assert total_variation(lm.base.exp(), target) > 0.2
    assert total_variation(shares, target) <= 0.03
    assert 0.2 < draw.accepted.mean() / draw.moves <= 1
    if lm is FIXED:  # the mean cost of the docstring, before rounding
        cost = lm.length + steps * sum((end + 1) / 2 for end in block_ends(lm.length, 2))
        assert draw.generated_tokens.mean() == pytest.approx(cost, rel=0.01)


@pytest.mark.parametrize(("lm", "alpha"), [(FIXED, 4.0), (ENDING, 2.0), (ENDING, 4.0)])
def test_low_temperature_is_another_distribution(lm, alpha):
    assert abs(float(lm.tempered(alpha).sum()) - 1) < 1e-9
    assert total_variation(lm.tempered(alpha), lm.target(alpha)) > 0.05
    shares, draw = lm.drawn(alpha, steps=0, chains=40_000)  # without a move the chains only decode
    assert total_variation(shares, lm.tempered(alpha)) <= 0.03
    assert draw.moves == 0 and (draw.generated_tokens == draw.paths.lengths).all()


def test_another_proposal_has_the_same_target():
    shares, _ = FIXED.drawn(3.0, steps=60, blocks=1, chains=20_000, proposal=1.0)
    assert total_variation(shares, FIXED.target(3.0)) <= 0.03


def transition_matrix(lm, alpha, accept):
    """Of one move on complete sequences, by summing over every cut and every suffix: (states, states)."""
    log_p = [numpy.array(lm.token_logs(lm.log_p, c)) for c in lm.completions]
    log_q = [numpy.array(lm.token_logs(lm.log_q(alpha), c)) for c in lm.completions]
    n = len(lm.completions)
    matrix = numpy.zeros((n, n))
    for cut in range(lm.length):
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, c in enumerate(lm.completions):
            if len(c) > cut:
                groups.setdefault(tuple(c[:cut]), []).append(i)
        for group in map(numpy.array, groups.values()):
            p, q = (numpy.array([x[i][cut:].sum() for i in group]) for x in (log_p, log_q))
            lengths = lm.lengths[group]
            assert abs(numpy.exp(q).sum() - 1) < 1e-12, "every way to go on is there"
            taken = numpy.exp(accept(alpha, p - p[:, None], q - q[:, None], lengths[:, None], lengths))
            matrix[numpy.ix_(group, group)] += numpy.exp(q) * taken / lengths[:, None]
    numpy.fill_diagonal(matrix, 0)
    numpy.fill_diagonal(matrix, 1 - matrix.sum(1))
    return matrix


def uncorrected(alpha, gain_p, gain_q, length, new_length):
    return numpy.minimum(0.0, alpha * gain_p - gain_q)


@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
@both
def test_detailed_balance_is_exact(lm, alpha):
    target = lm.target(alpha).numpy()
    matrix = transition_matrix(lm, alpha, log_acceptance)
    assert matrix.min() >= 0
    flow = target[:, None] * matrix
    assert numpy.abs(flow - flow.T).max() < 1e-12
    assert numpy.abs(target @ matrix - target).max() < 1e-12
    start = torch.from_numpy(lm.tempered(alpha).numpy() @ numpy.linalg.matrix_power(matrix, 2**14))
    assert total_variation(start, lm.target(alpha)) < 1e-6, "every start leads there"


def test_without_the_term_for_lengths_the_target_is_another(monkeypatch):
    matrix = transition_matrix(ENDING, 2.0, uncorrected)
    target = ENDING.target(2.0).numpy()
    assert numpy.abs(target @ matrix - target).max() > 0.01
    wrong = target * ENDING.lengths / (target * ENDING.lengths).sum()
    assert numpy.abs(wrong @ matrix - wrong).max() < 1e-12
    monkeypatch.setattr(power_sampling, "log_acceptance", uncorrected)
    shares, _ = ENDING.drawn(2.0, steps=60, chains=4_000)
    assert total_variation(shares, ENDING.target(2.0)) > 0.2, "the test of the chains notices, too"


def test_the_numbers_of_the_documentation():
    text = " ".join((Path(__file__).parents[2] / "docs" / "sampling.md").read_text(encoding="utf-8").split())

    def left(lm, alpha, moves):
        matrix = numpy.linalg.matrix_power(transition_matrix(lm, alpha, log_acceptance), moves)
        return total_variation(torch.from_numpy(lm.tempered(alpha).numpy() @ matrix), lm.target(alpha))

    weighted = ENDING.target(2.0) * torch.from_numpy(ENDING.lengths)
    for number, sentence in [
        (left(FIXED, 4.0, 0), "the two are {:.2f} apart in total variation at α = 4"),
        (left(FIXED, 2.0, 0), "and {:.2f} at α = 2."),
        (left(FIXED, 4.0, 20), "20 moves at α = 4 leave a total variation of {:.4f}"),
        (100 * float(ENDING.target(4.0).max()), "p^4 is {:.1f} % the one that ends at once"),
        (left(ENDING, 4.0, 0), "({:.2f} away)"),
        (left(ENDING, 4.0, 160), "160 moves still leave {:.2f}."),
        (total_variation(weighted / weighted.sum(), ENDING.target(2.0)), "that is {:.2f} away at α = 2."),
    ]:
        assert sentence.format(number) in text
    prompt, length, steps, ends = 11, 64, 10, block_ends(64, 16)
    generated = length + steps * sum((end + 1) / 2 for end in ends)
    prefilled = sum(prompt + start for start in [0, *ends[:-1]]) + steps * sum(prompt + (e - 1) / 2 for e in ends)
    assert f"{generated:.0f} tokens generated and {prefilled:.0f} prefilled" in text
    scored = steps * sum(prompt + end for end in ends)
    assert f"Scoring its {steps * len(ends)} proposals would add {scored} tokens" in text


def test_a_completion_that_never_ends_costs_what_the_documentation_says():
    model = tiny_model(spread=0.3)
    own = sampler(model, tiny_tokenizer(), max_completion_length=8, blocks=4, steps=5, eos_ids=[])
    own.sample([PromptRow("abc")], num_samples=150, seed=0)
    ends, each = own.ends, own.decoder.prefilled_tokens / 150
    assert own.statistics["generated_tokens"] / 150 == pytest.approx(8 + 5 * sum((e + 1) / 2 for e in ends), rel=0.02)
    prefilled = sum(3 + start for start in [0, *ends[:-1]]) + 5 * sum(3 + (e - 1) / 2 for e in ends)
    assert each == pytest.approx(prefilled, rel=0.02)


def test_every_proposed_token_is_counted():
    seen = numpy.zeros(50, int)
    own = ENDING.propose(4.0)

    def propose(rows, paths, keep, limit, uniforms):
        assert uniforms.shape == (len(rows), limit) and (keep < limit).all()
        before = keep.copy()
        new = own(rows, paths, keep, limit, uniforms)
        seen[rows] += new.lengths - before
        return new

    rng = numpy.random.default_rng(0)
    draw = power_chains(propose, chains=50, alpha=4.0, ends=[1, 2, 4], steps=3, random=lambda n: rng.random((50, n)))
    assert (draw.generated_tokens == seen).all() and (seen > draw.paths.lengths).all()
    assert draw.moves == 9 and draw.accepted.max() <= 9


def sampler(model, tokenizer, **options):
    options = {"max_completion_length": 4, "blocks": 2, "steps": 5, "batch_size": 2000, **options}
    return PowerSampler(model, tokenizer, **options)


@pytest.mark.parametrize(("lm", "alpha"), [(FIXED, 4.0), (ENDING, 0.5)], ids=["fixed-length", "variable-length"])
def test_the_sampler_of_a_language_model_reaches_the_exact_power(lm, alpha):
    own = sampler(lm.model, lm.tokenizer, alpha=alpha, max_completion_length=lm.length, steps=6)
    [group] = own.sample([A], num_samples=1000, seed=0)
    counts = lm.shares([tuple(c.ids) for c in group]) * len(group)
    assert chi_square(counts, lm.target(alpha)) > 0.01
    assert chi_square(counts, lm.tempered(alpha)) < 1e-6
    assert all(c.finished == (lm.ends and c.ids[-1] == END) for c in group)


ROWS = [PromptRow(text) for text in ("abc", "a", "hello there", "no")]


def test_a_row_is_drawn_alike_in_any_company():
    model = tiny_model(spread=0.3)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 3
    together = sampler(model, tiny_tokenizer(), alpha=2.0).sample(ROWS, num_samples=5, seed=3)
    alone = [sampler(model, tiny_tokenizer(), alpha=2.0).sample([r], num_samples=5, seed=3)[0] for r in ROWS]
    assert alone == together
    assert [g[:2] for g in together] == sampler(model, tiny_tokenizer(), alpha=2.0).sample(ROWS, num_samples=2, seed=3)
    assert sampler(model, tiny_tokenizer(), alpha=2.0).sample(ROWS, num_samples=5, seed=4) != together


def test_costs_are_those_of_the_decoder(monkeypatch):
    model = tiny_model(spread=0.3)
    own = sampler(model, tiny_tokenizer(), batch_size=3)
    made, prefilled, draw = 0, 0, own.decoder.draw

    def counting(prompts, uniforms):
        nonlocal made, prefilled
        draws = draw(prompts, uniforms)
        made, prefilled = made + sum(len(d.ids) for d in draws), prefilled + sum(map(len, prompts))
        return draws

    monkeypatch.setattr(own.decoder, "draw", counting)
    groups = own.sample(ROWS, num_samples=2, seed=0)
    assert sum(c.generated_tokens for g in groups for c in g) == made == own.statistics["generated_tokens"]
    assert own.statistics["prefilled_tokens"] == prefilled
    assert own.statistics["moves"] == 2 * 5 * 8 >= own.statistics["accepted"] > 0
    assert made > sum(len(c.ids) for g in groups for c in g)
    assert own.sample([], num_samples=2, seed=0) == []


def test_names_settings_and_texts():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    own = resolve_sampler("power:alpha=3,blocks=4,steps=2", model, tokenizer, max_completion_length=16, engine=None)
    assert isinstance(own, PowerSampler) and own.name == "power sampling α=3"
    assert json.loads(json.dumps(own.settings)) == own.settings
    assert own.settings["proposal_temperature"] == pytest.approx(1 / 3) == own.decoder.temperature
    assert own.ends == [4, 8, 12, 16] and block_ends(10, 4) == [3, 5, 8, 10]
    other = resolve_sampler("power:alpha=3,proposal_temperature=0.5", model, tokenizer, max_completion_length=16)
    assert other.settings != own.settings
    with pytest.raises(ConfigError, match=r"unknown option 'step', power has .*did you mean 'steps'"):
        resolve_sampler("power:step=3", model, tokenizer)
    with pytest.raises(ConfigError, match=r"blocks must be an integer, got '1\.5'"):
        resolve_sampler("power:blocks=1.5", model, tokenizer)
    with pytest.raises(ConfigError, match="works without an engine"):
        resolve_sampler("power", model, tokenizer, engine=object())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "alpha must be a number > 0, got 0"),
        ({"alpha": float("inf")}, "alpha must be a number > 0, got inf"),
        ({"blocks": 0}, "blocks must be an integer >= 1, got 0"),
        ({"blocks": 5}, "blocks must be at most max_completion_length=4.*got 5"),
        ({"steps": -1}, "steps must be an integer >= 0, got -1"),
        ({"proposal_temperature": 0.0}, r"proposal_temperature must be a number > 0, got 0\.0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        sampler(tiny_model(), tiny_tokenizer(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ends": [2, 2]}, r"ends must be rising lengths from 1 on, got \[2, 2\]"),
        ({"ends": []}, "ends must be rising"),
        ({"alpha": -1.0}, r"alpha must be > 0, got -1\.0"),
        ({"steps": -1}, "steps and chains must be >= 0, got -1 and 1"),
    ],
)
def test_bad_chains_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        power_chains(
            **{
                **{"propose": None, "chains": 1, "alpha": 1.0, "ends": [2], "steps": 1, "random": None},
                **options,
            }
        )


def test_no_chain_is_no_work():
    draw = power_chains(None, chains=0, alpha=2.0, ends=[3], steps=2, random=lambda n: numpy.empty((0, n)))
    assert draw.paths.ids.shape == Paths.empty(0, 3).ids.shape and draw.generated_tokens.shape == (0,)
