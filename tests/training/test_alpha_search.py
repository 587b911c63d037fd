"""alpha="auto:...": the requested entropy or log-prob is reached, resumed runs agree, and what cannot be is refused."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from enumerable import enumerable_lm, log_probs
from runs import Killed, kill_after, run, same, weights
from tiny import one_thread  # noqa: F401

import powerflow_fast
from powerflow_fast import PowerFlowConfig, la_tb_loss
from powerflow_fast.config import load_config
from powerflow_fast.config.fields import AlphaRequest
from powerflow_fast.config.files import parse_value, read_yaml
from powerflow_fast.errors import ConfigError
from powerflow_fast.objectives import LogZHead, LogZTable
from powerflow_fast.ops import segment_sum
from powerflow_fast.rollout import HFGenerateEngine
from powerflow_fast.training import run as training_run
from powerflow_fast.training.alpha_search import HIGH, Alpha
from powerflow_fast.training.samples import Samples
from powerflow_fast.training.update import Updater

ALONE = SimpleNamespace(reduce=lambda values, reduction: values)


# The request


@pytest.mark.parametrize("text", ["auto:entropy=0.8", "auto:logp=-0.5"])
def test_requests_are_read_from_python_yaml_and_the_command_line(text, tmp_path):
    (tmp_path / "c.yaml").write_text(f"alpha: {text}\n")
    assert PowerFlowConfig(alpha=text).require_alpha() == text == parse_value("alpha", text)
    assert load_config(tmp_path / "c.yaml").alpha == text
    (tmp_path / "c.yaml").write_text("alpha: 4\n")
    assert read_yaml(tmp_path / "c.yaml") == {"alpha": 4} and parse_value("alpha", "2.5") == 2.5
    with pytest.raises(ConfigError, match=r"alpha must be a number here, got 'auto:"):
        PowerFlowConfig(alpha=text).require_alpha(auto=False)


@pytest.mark.parametrize(
    "text",
    (
        *("auto", "4.0.0", "entropy=1", "auto:entropy", "auto:entropy=", "auto:entropy=-1", "auto:entropy=0"),
        *(
            "auto:logp=0.5",
            "auto:entropy=nan",
            "auto:logp=-inf",
            "auto:length=3",
            "auto:entropy=0.8 nats",
            "x:entropy=1",
        ),
    ),
)
def test_other_texts_are_refused_with_the_forms_there_are(text):
    with pytest.raises(ConfigError) as error:
        PowerFlowConfig(alpha=text)
    for word in ("alpha must be a number", "'auto:entropy=NATS'", "> 0", "'auto:logp=NATS'", "< 0", repr(text)):
        assert word in str(error.value)


def test_what_a_run_cannot_come_to_is_refused_before_it_starts(tmp_path):
    engine = object.__new__(HFGenerateEngine)
    refused = [
        ({"alpha": "auto:entropy=4.2"}, r"entropy of a token out of 61 is below log 61 = 4\.111 nats"),
        ({"alpha": "auto:entropy=1", "rollout_temperature": 2.0}, r"what the policy samples .* rollout_temperature=2"),
        ({"alpha": "auto:entropy=1", "objective": "grpo", "reward": "rent"}, "'grpo' does not depend on alpha"),
        ({"alpha": "auto:logp=-1", "engine": engine}, "what the policy samples .* engine is given"),
    ]
    for options, message in refused:
        given = {"engine": options.pop("engine")} if "engine" in options else {}
        with pytest.raises(ConfigError, match=message):
            run(tmp_path, **options, **given)
    assert not (tmp_path / "run").exists()


# What is observed


def four_completions(slope, *, psi=(0.0, 0.0, 0.0, 0.0)):
    """Two prompts; the policy's mean log-probs are ``slope`` times the base's plus a constant of each prompt."""
    r = torch.tensor([-1.0, -0.5, -2.0, -0.8])
    lengths = [2, 3, 1, 2]
    groups = torch.tensor([0, 0, 1, 1])
    ids = [[5] * n for n in lengths]
    samples = Samples(ids, ids, [True] * 4, groups, torch.tensor(psi))
    samples.base_logps = r.repeat_interleave(torch.tensor(lengths))
    s = slope * r + torch.tensor([0.3, 0.3, -0.4, -0.4])
    return samples, s.repeat_interleave(torch.tensor(lengths)), torch.full((8,), 0.9)


def test_the_slope_is_the_exponent_of_a_policy_that_has_settled():
    for quantity, value in (("entropy", 1.2), ("logp", -1.2)):
        alpha = Alpha(1.0, AlphaRequest(quantity, value), vocabulary=61)
        assert alpha.needs_start and math.isnan(alpha.reached)
        alpha.observe(*four_completions(2.5), ALONE)
        assert alpha.policy_alpha == pytest.approx(2.5, rel=1e-6) and not alpha.needs_start
        assert alpha.reached == pytest.approx(0.9 if quantity == "entropy" else -4.3 / 4)
        assert alpha.value == pytest.approx(math.exp(0.1)), "towards the policy's own, by a limited step"
    apart = Alpha(1.0, AlphaRequest("logp", -3.0))
    apart.observe(*four_completions(2.5, psi=(0.0, -0.5, 0.0, -0.5)), ALONE)
    assert apart.policy_alpha == 1.0, "completions with other penalties are not compared"


def test_sums_of_the_processes_add_up():
    samples, logps, entropy = four_completions(1.7)
    alpha = Alpha(1.0, AlphaRequest("entropy", 1.0), vocabulary=61)
    halves = [
        alpha._totals(samples.take(at), logps[tokens], entropy[tokens])
        for at, tokens in (([0, 1], slice(0, 5)), ([2, 3], slice(5, 8)))
    ]
    torch.testing.assert_close(sum(halves), alpha._totals(samples, logps, entropy))


def test_what_is_not_finite_is_passed_over():
    samples, logps, entropy = four_completions(2.0)
    alpha = Alpha(1.0, AlphaRequest("logp", -1.0))
    samples.base_logps[0] = -math.inf
    assert alpha.observe(samples, logps, entropy, ALONE) == 1.0 and alpha.needs_start


def settled(quantity, alpha):
    """Entropy, or −logp, of one token out of five with p ∝ p_base^alpha."""
    base = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0], dtype=torch.float64).log_softmax(0)
    p = (alpha * base).softmax(0)
    return float(-(p * p.log()).sum() if quantity == "entropy" else -(p * base).sum())


@pytest.mark.parametrize("pace", [2, 10, 60])
@pytest.mark.parametrize(("quantity", "wanted"), [("entropy", 0.5), ("entropy", 1.5), ("logp", 0.65), ("logp", 1.9)])
def test_policies_of_any_pace_are_led_to_what_is_wanted(quantity, wanted, pace):
    """A policy whose exponent goes towards alpha by 1/pace of the way in a step, measured with 5 % of noise."""
    alpha = Alpha(1.0, AlphaRequest(quantity, wanted if quantity == "entropy" else -wanted), vocabulary=5)
    noise = torch.randn(20 * pace + 300, 2, generator=torch.Generator().manual_seed(0)).mul(0.05).exp().tolist()
    own, seen = 1.0, []
    for a, b in noise:
        value = settled(quantity, own)
        measured = min(value * a, 0.999 * math.log(5)) if quantity == "entropy" else value * a
        alpha._totals = lambda *_, m=measured, o=own * b: torch.tensor([m, 1.0, o, 1.0], dtype=torch.float64)
        own *= (alpha.observe(None, None, None, ALONE) / own) ** (1 / pace)
        seen.append(value)
    late = seen[-100:]
    assert sum(late) / 100 == pytest.approx(wanted, rel=0.03), "of the policy, not of what was measured of it"
    assert max(abs(v / wanted - 1) for v in late) < 0.2, "no swings"
    assert settled(quantity, alpha.landed) == pytest.approx(wanted, rel=0.05)


def test_log_z_follows_alpha(tmp_path):
    """Where log Z' is right for one alpha, it is right for the next: the mean residual stays 0."""
    samples, logps, _ = four_completions(1.0, psi=(0.0, -0.5, 0.0, 0.0))
    base_logps = segment_sum(samples.base_logps, samples.cu_seqlens)
    head, table = LogZHead(3), LogZTable()
    table.update([0, 1], torch.tensor([0.5, -0.5]))
    for log_z in (head, table):
        made = SimpleNamespace(
            accelerator=SimpleNamespace(
                reduce=ALONE.reduce, device=torch.device("cpu"), unwrap_model=lambda policy: policy
            ),
            policy=SimpleNamespace(log_z_head=log_z if log_z is head else None),
            log_z_table=log_z if log_z is table else None,
            objective=SimpleNamespace(partition="per_token"),
            alpha=1.0,
        )
        made._mean_log_z = lambda *arguments, made=made: training_run.Updater._mean_log_z(made, *arguments)
        residuals = []
        for alpha in (1.0, 3.0):
            training_run.Updater.change_alpha(made, alpha, samples)
            now = head(torch.zeros(4, 3)) if log_z is head else table.get([0, 0, 1, 1], torch.zeros(4))
            terms = {"alpha": alpha, "psi": samples.psi}
            out = la_tb_loss(logps, base_logps, now.detach(), samples.cu_seqlens, **terms)
            residuals.append(float(out.delta.mean()))
        assert made.alpha == 3.0 and residuals[1] == pytest.approx(residuals[0], abs=1e-6)


# Whole runs


def mean_entropy(model, completions):
    """Exact mean over the tokens of what the model samples, by plain transformers."""
    chances = log_probs(model, completions).exp().tolist()
    reached: dict[tuple[int, ...], float] = {}
    for completion, chance in zip(completions, chances, strict=True):
        for k in range(len(completion)):
            reached[completion[:k]] = reached.get(completion[:k], 0.0) + chance
    total = 0.0
    with torch.no_grad():
        for prefix, chance in reached.items():
            logp = model(torch.tensor([[0, *prefix]])).logits[0, -1].double().log_softmax(-1)
            total -= chance * float((logp.exp() * logp).sum())
    return total / sum(reached.values())


@pytest.mark.parametrize(("request_", "log_z"), [("auto:entropy=1.1", "learned"), ("auto:logp=-1.75", "group")])
def test_the_trained_policy_has_what_was_asked_for(request_, log_z, tmp_path, caplog):
    caplog.set_level("INFO", logger="powerflow_fast")
    model, tokenizer, completions = enumerable_lm(ends=True)
    base = log_probs(model, completions)
    result = powerflow_fast.train(
        model,
        ["a"],
        alpha=request_,
        tokenizer=tokenizer,
        output_dir=str(tmp_path / "run"),
        num_generations=48,
        per_device_train_batch_size=48,
        rollout_batch_size=48,
        max_completion_length=4,
        rollout_engine="hf",
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        log_z=log_z,
        log_z_learning_rate=1e-2,
        adam_beta2=0.99,
        max_steps=50,
        num_sample_prompts=0,
        self_check=False,
    )
    wanted = float(request_.split("=")[1])
    if "entropy" in request_:
        reached = mean_entropy(result.model, completions)
    else:
        lengths = torch.tensor([len(c) for c in completions])
        reached = float((log_probs(result.model, completions).exp() * base / lengths).sum())
    assert reached == pytest.approx(wanted, rel=0.05)
    steps = [row for row in result.history if "loss" in row]
    assert steps[0]["alpha"] == pytest.approx(math.exp(0.1 if wanted > 0 else -0.1)), "the first step knows the way"
    assert (result.alpha > 1) == (wanted > 0) and 0.5 < result.alpha / steps[-1]["alpha"] < 2
    text = f"{request_}: mean "
    assert text in caplog.text
    card = (result.model_dir / "README.md").read_text()
    assert f"- α: {result.alpha:g}, {text}" in card and f'"alpha": {result.alpha}' in card
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["config"]["alpha"] == request_ and record["alpha"]["value"] == result.alpha


def test_a_resumed_run_is_bit_equal_and_objectives_know_the_step(tmp_path, caplog):
    seen = []

    def watching(t):
        seen.append((t.step, t.alpha))
        log_z = t.group_mean(t.means(t.target_logps - t.logps.detach()))
        return t.sequence_mean((log_z + t.means(t.logps - t.target_logps)).square())

    options = {"alpha": "auto:entropy=2.5", "objective": watching, "max_steps": 6, "num_iterations": 2, "save_steps": 1}
    options |= {"prompts": ["one "], "learning_rate": 1e-4}
    whole = run(tmp_path, name="whole", **options)
    first, seen[:] = list(seen), []
    with pytest.raises(Killed):
        run(tmp_path, name="cut", callbacks=[kill_after(3)], **options)
    resumed = run(tmp_path, name="cut", resume_from_checkpoint=True, **options)
    assert same(weights(resumed.model), weights(whole.model)) and resumed.alpha == whole.alpha
    for name in ("alpha", "policy_alpha", "loss", "entropy"):
        assert [row[name] for row in resumed.history] == [row[name] for row in whole.history]
    assert seen == first[:3] + first[2:], "the killed run's third step, saved after its callbacks, is made again"
    assert [step for step, _ in first] == list(range(6))
    alphas = [alpha for _, alpha in first]
    assert alphas[0] != alphas[1] == alphas[2] != alphas[3] == alphas[4], "chosen by the first update on a rollout"
    assert [row["alpha"] for row in whole.history] == alphas
    assert "is still on its way: take more steps" in caplog.text, "six steps are too few, and the run says so"


def test_a_bound_is_named(caplog):
    alpha = Alpha(1.0, AlphaRequest("logp", -0.5))
    for _ in range(40):
        alpha._totals = lambda *_: torch.tensor([2.0, 1.0, alpha.value, 1.0], dtype=torch.float64)
        alpha.observe(None, None, None, ALONE)
    assert alpha.value == HIGH
    alpha.check()
    assert "auto:logp=-0.5: mean log-prob per token under the base model -2 nats" in caplog.text
    assert "(+300.0%)" in caplog.text and "at its bound 16" in caplog.text


def test_entropies_are_made_where_they_are_read_and_nowhere_else(tmp_path, monkeypatch):
    asked = []

    def watch(name, option):
        original = getattr(Updater, name)

        def watched(self, *arguments, **options):
            asked.append(options[option])
            return original(self, *arguments, **options)

        monkeypatch.setattr(Updater, name, watched)

    watch("gradient", "need_entropy")
    watch("score_policy", "need_stats")
    options = {"max_steps": 3, "logging_steps": 3, "num_sample_prompts": 0, "log_z": "group"}
    run(tmp_path, name="logp", alpha="auto:logp=-2.0", **options)
    assert asked == [False, False, False, True], "the first exponent, three steps, of which the last is logged"
    asked.clear()
    run(tmp_path, name="entropy", alpha="auto:entropy=2.0", **options)
    assert asked == [True] * 4


@pytest.mark.parametrize("share", [0.7, 1.4])
def test_what_the_slope_lacks_is_made_up_for(share):
    """A policy that is not quite a power of the base: its slope is a constant share of the exponent it has."""
    alpha, own, wanted = Alpha(1.0, AlphaRequest("entropy", 1.0), vocabulary=5), 1.0, 1.0
    for _ in range(2000):
        totals = torch.tensor([settled("entropy", own), 1.0, share * own, 1.0], dtype=torch.float64)
        alpha._totals = lambda *_, totals=totals: totals
        own *= (alpha.observe(None, None, None, ALONE) / own) ** 0.1
    assert settled("entropy", own) == pytest.approx(wanted, rel=0.01)
