from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from distances import chi_square
from tiny import EOS, LETTERS, PAD, SPECIAL, VOCAB, one_thread, tiny_model, tiny_tokenizer  # noqa: F401

from powerflow_fast.data import PromptRow
from powerflow_fast.errors import ConfigError, RolloutError
from powerflow_fast.models import CausalLMScorer, pad_batch
from powerflow_fast.rollout import HFGenerateEngine
from powerflow_fast.rollout.seeded import SeededDecoder
from powerflow_fast.sampling import SAMPLERS, Completion, Sampler, TemperatureSampler, resolve_sampler
from powerflow_fast.tools.random_state import random_stream

ROWS = [PromptRow(text) for text in ("abc", "a", "hello there", "no", "abd")]


def encoded(text):
    return [(SPECIAL + tuple(LETTERS)).index(c) for c in text]


def sampler(model=None, **options):
    options = {"max_completion_length": 6, **options}
    return TemperatureSampler(model or tiny_model(spread=0.3), tiny_tokenizer(), **options)


def test_a_row_is_drawn_alike_in_any_company():
    model = tiny_model(spread=0.3)
    together = sampler(model).sample(ROWS, num_samples=4, seed=3)
    assert [len(group) for group in together] == [4] * len(ROWS)
    alone = [sampler(model, batch_size=3).sample([row], num_samples=4, seed=3)[0] for row in ROWS]
    assert alone == together
    assert sampler(model).sample(ROWS[::-1], num_samples=4, seed=3) == together[::-1]
    fewer = sampler(model).sample(ROWS, num_samples=2, seed=3)
    assert fewer == [group[:2] for group in together]
    assert sampler(model).sample(ROWS, num_samples=4, seed=4) != together
    assert len({c.text for c in together[0]}) > 1, "samples of a row have streams of their own"


def test_completions_hold_their_tokens_text_and_cost():
    model = tiny_model(spread=0.3)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 3  # some end early
    ends = set()
    for completion in sampler(model).sample([ROWS[2]], num_samples=60, seed=0)[0]:
        assert isinstance(completion, Completion) and completion.note == ""
        assert completion.finished == (completion.ids[-1] == EOS)
        assert EOS not in completion.ids[:-1]
        assert len(completion.ids) == completion.generated_tokens <= 6
        assert completion.finished or len(completion.ids) == 6
        assert completion.text == tiny_tokenizer().decode(completion.ids, skip_special_tokens=True)
        assert "<eos>" not in completion.text
        ends.add(completion.finished)
    assert ends == {True, False}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_the_first_token_follows_the_tempered_softmax(temperature):
    model = tiny_model("gemma2", spread=0.3)
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 2.0  # must not matter
    logits = model(input_ids=torch.tensor([encoded("abc")])).logits[0, -1].detach().double()
    groups = sampler(model, temperature=temperature, max_completion_length=1, batch_size=500).sample(
        [ROWS[0]], num_samples=3000, seed=1
    )
    counts = torch.bincount(torch.tensor([c.ids[0] for c in groups[0]]), minlength=VOCAB).double()
    assert chi_square(counts, (logits / temperature).softmax(-1)) > 0.01
    if temperature != 1:
        assert chi_square(counts, logits.softmax(-1)) < 1e-6


def test_temperature_zero_is_greedy_and_paid_for_once():
    model = tiny_model(spread=0.3)
    for row, group in zip(ROWS, sampler(model, temperature=0).sample(ROWS, num_samples=3, seed=0), strict=True):
        ids = encoded(row.prompt)
        for _ in group[0].ids:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert [c.ids for c in group] == [ids[len(row.prompt) :]] * 3
        assert [c.generated_tokens for c in group] == [len(group[0].ids), 0, 0]
    assert sampler(temperature=0).name == "greedy"


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_log_probs_are_the_scorers(arch):
    model = tiny_model(arch)
    decoder = SeededDecoder(model, tiny_tokenizer(), temperature=0.4, batch_size=3)
    prompts = [encoded(row.prompt) for row in ROWS]
    limits = [5, 0, 2, 7, 3]
    draws = decoder.draw(prompts, [random_stream(i).random(n) for i, n in enumerate(limits)])
    assert [len(d.ids) == n or d.finished for d, n in zip(draws, limits, strict=True)] == [True] * 5
    assert draws[1].ids == draws[1].logps == [] and not draws[1].finished
    batch = pad_batch(prompts, [d.ids for d in draws], PAD)
    for temperature, name in ((1.0, "logps"), (0.4, "proposal_logps")):
        drawn = torch.tensor([x for d in draws for x in getattr(d, name)])
        torch.testing.assert_close(
            CausalLMScorer(model)(batch, temperature=temperature).logps.detach(), drawn, atol=2e-4, rtol=0
        )
    assert decoder.prefilled_tokens == sum(len(p) for p, n in zip(prompts, limits, strict=True) if n)
    assert 7 <= decoder.forwards <= 12


def test_logits_that_are_not_numbers_are_an_error():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    for temperature in (0, 1):
        with pytest.raises(RolloutError, match="completion token 0 are not numbers"):
            sampler(model, temperature=temperature).sample(ROWS, num_samples=1, seed=0)


def test_an_engine_draws_each_row_with_a_seed_of_its_own():
    model, tokenizer = tiny_model(spread=0.3), tiny_tokenizer()
    engine = HFGenerateEngine(model, tokenizer, temperature=0.7, max_completion_length=99, batch_size=8)

    def draw(rows, **options):
        by_engine = sampler(model, engine=engine, temperature=0.7)
        return by_engine.sample(rows, num_samples=3, seed=5), by_engine

    together, by_engine = draw(ROWS)
    assert together == [draw([row])[0][0] for row in ROWS]
    assert all(len(c.ids) <= 6 and c.generated_tokens == len(c.ids) for group in together for c in group)
    assert by_engine.settings["engine"] == "hf" != sampler().settings["engine"]
    with pytest.raises(ConfigError, match=r"temperature is 1, but the engine's is 0\.7"):
        sampler(model, engine=engine)
    with pytest.raises(ConfigError, match="temperature=0 needs engine=None"):
        sampler(model, engine=engine, temperature=0)


def test_settings_are_json_and_tell_samplers_apart():
    one = sampler(temperature=0.5)
    assert json.loads(json.dumps(one.settings)) == one.settings
    assert isinstance(one, Sampler) and one.name == "temperature 0.5"
    others = [sampler(), sampler(temperature=0.5, max_completion_length=7), sampler(temperature=0.5, eos_ids=[5])]
    assert all(one.settings != other.settings for other in others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a number >= 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be a number >= 0, got nan"),
        ({"temperature": True}, "temperature must be a number >= 0, got True"),
        ({"max_completion_length": 0}, "max_completion_length must be an integer >= 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer >= 1, got 2.5"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        sampler(**options)


def test_more_tokens_than_the_model_has_positions():
    with pytest.raises(ConfigError, match="may be 67 tokens, but the model has positions for 64"):
        sampler(max_completion_length=64).sample([ROWS[0]], num_samples=1, seed=0)
    with pytest.raises(ConfigError, match="num_samples must be an integer >= 1, got 0"):
        sampler().sample([ROWS[0]], num_samples=0, seed=0)


@pytest.mark.parametrize(
    ("text", "name"), [("temperature=0.5", "temperature 0.5"), ("temperature", "temperature 1"), ("greedy", "greedy")]
)
def test_a_text_names_a_sampler(text, name):
    found = resolve_sampler(text, tiny_model(), tiny_tokenizer(), max_completion_length=3, batch_size=2)
    assert found.name == name and found.settings["max_completion_length"] == 3
    assert resolve_sampler(found, None, None) is found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("greedy:temperature=1", "greedy has no options, it is 'temperature=0'"),
        ("temprature=1", r"unknown name 'temprature'.*did you mean 'temperature'"),
        ("temperature=hot", "temperature must be a number, got 'hot'"),
        ("temperature=-1", "temperature must be a number >= 0, got -1.0"),
        ("temperature:top_p=0.9", r"unknown option 'top_p', temperature has \['temperature'\]"),
        ("temperature=1,temperature=2", "'temperature' must be given once"),
        (3, "sampler must be a text"),
    ],
)
def test_texts_that_name_none(text, message):
    with pytest.raises(ConfigError, match=message):
        resolve_sampler(text, tiny_model(), tiny_tokenizer())


def test_the_documentation_names_every_sampler_and_its_example_runs(capsys):
    text = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)", text, re.MULTILINE)
    assert set(named) == {*SAMPLERS, "greedy"}
    [example] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    model = tiny_model(spread=0.3)
    example = example.replace("blocks=16,steps=10", "blocks=2,steps=1").replace("=64", "=6")  # in less time
    exec(example, {"model": model, "tokenizer": tiny_tokenizer(), "rows": ROWS[:1]})
    assert capsys.readouterr().out.startswith("power sampling α=4 ")
