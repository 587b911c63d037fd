from __future__ import annotations

import json
import string

import pytest
import torch
import transformers as tf
from distances import chi_square
from tiny import CHAT_TEMPLATE, EOS, SPECIAL, one_thread, tiny_model, tiny_tokenizer  # noqa: F401

from powerflow_fast.data import PromptRow
from powerflow_fast.errors import ConfigError
from powerflow_fast.rollout.seeded import Draw
from powerflow_fast.sampling import VerbalizedSampler, resolve_sampler
from powerflow_fast.sampling.verbalized import read_answers

ROWS = [PromptRow("tell a joke"), PromptRow("name a colour"), PromptRow([{"role": "user", "content": "say {hi}"}])]
REPLY = 'Sure:\n<answer probability="0.6">one</answer>\n<answer probability="0.2">two</answer>\n'
REPLY += "<answer probability='20%'>three</answer> Done."


@pytest.mark.parametrize(
    ("reply", "answers"),
    [
        (REPLY, [("one", 0.6), ("two", 0.2), ("three", 0.2)]),
        ("<ANSWER Probability = .5>\n a\nb </ANSWER >", [("a\nb", 0.5)]),
        ("<answer prob: 1e-2>a</answer>", [("a", 0.01)]),
        ('<answer probability="a few">a</answer><answer>b</answer>', [("a", None), ("b", None)]),
        ('<answer probability="-0.5">a</answer><answer probability="1e999">b</answer>', [("a", None), ("b", None)]),
        ('<answer probability="0.5.5">a</answer>', [("a", None)]),
        ('<answer probability="0.3">a\n<answer probability="0.7">b', [("a", 0.3), ("b", 0.7)]),
        ('<answer probability="0.3"> </answer><answer probability="0.7">b</answer>', [("b", 0.7)]),
        ("<answers>a</answers> 1. one (0.5)", []),
        ("", []),
    ],
)
def test_answers_that_are_read(reply, answers):
    assert read_answers(reply) == answers


def test_an_answer_that_the_reply_breaks_off_in_does_not_count():
    assert read_answers(REPLY, finished=False) == read_answers(REPLY)
    broken = REPLY + '<answer probability="0.1">fo'
    assert read_answers(broken, finished=False) == read_answers(REPLY)
    assert read_answers(broken)[-1] == ("fo", 0.1)


def characters():
    """A tokenizer of all printable characters, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate((*SPECIAL, *string.printable))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def scripted(replies, *, model=None, finished=True, **options):
    """A sampler whose model writes ``replies(attempt, prompt)``; with a list of the prompts it was given."""
    options = {"max_completion_length": 40, **options}
    own = VerbalizedSampler(model or tiny_model(), characters(), **options)
    calls = []

    def draw(prompts, uniforms):
        calls.append([own.tokenizer.decode(p) for p in prompts])
        texts = [replies(len(calls), prompt) for prompt in calls[-1]]
        ids = [own.tokenizer(text)["input_ids"] + ([EOS] if finished else []) for text in texts]
        limits = [40 if len(calls) == 3 else own._reply_limit(len(prompt)) for prompt in prompts]
        assert [len(u) for u in uniforms] == limits
        return [Draw(i, finished, [0.0] * len(i), [0.0] * len(i)) for i in ids]

    own.decoder.draw = draw
    return own, calls


def long_model():
    model = tiny_model()
    model.config.max_position_embeddings = 4096
    return model


def test_answers_are_drawn_by_their_probabilities():
    own, calls = scripted(lambda attempt, prompt: REPLY, model=long_model())
    [group] = own.sample(ROWS[:1], num_samples=800, seed=0)
    counts = torch.tensor([sum(c.text == text for c in group) for text in ("one", "two", "three")]).double()
    assert chi_square(counts, torch.tensor([0.6, 0.2, 0.2]).double()) > 0.01
    assert chi_square(counts, torch.full((3,), 1 / 3).double()) < 1e-6
    cost = len(own.tokenizer(REPLY)["input_ids"]) + 1
    for c in group[:20]:
        assert c.ids == [*own.tokenizer(c.text)["input_ids"], EOS] and c.finished and c.note == ""
        assert c.generated_tokens == cost
    assert own.statistics == {
        "replies": 800,
        "answers": 2400,
        "unreadable_replies": 0,
        "uniform_draws": 0,
        "direct_answers": 0,
        "generated_tokens": 800 * cost,
    }
    assert len(calls) == 1 and "Write 5 different answers" in calls[0][0]
    assert calls[0][0].endswith("tell a joke<eos>assistant\n")


def test_answers_without_usable_probabilities_count_alike():
    for reply in ("<answer probability=0.98>one</answer><answer>two</answer>", REPLY.replace("0.6", "x")):
        own, _ = scripted(lambda attempt, prompt, reply=reply: reply, model=long_model())
        [group] = own.sample(ROWS[:1], num_samples=600, seed=0)
        texts = sorted({c.text for c in group})
        counts = torch.tensor([sum(c.text == text for c in group) for text in texts]).double()
        assert chi_square(counts, torch.full((len(texts),), 1 / len(texts)).double()) > 0.01
        assert own.statistics["uniform_draws"] == 600
    own, _ = scripted(
        lambda attempt, prompt: "<answer probability=0>one</answer><answer probability=0%>two</answer>",
        model=long_model(),
    )
    assert {c.text for c in own.sample(ROWS[:1], num_samples=50, seed=0)[0]} == {"one", "two"}


def test_unreadable_replies_are_asked_for_again_and_then_marked():
    def replies(attempt, prompt):
        if "colour" in prompt and attempt == 2:
            return REPLY
        return "as a model, I" if attempt < 3 else "a plain answer"

    own, calls = scripted(replies, model=long_model())
    joke, colour, hi = own.sample(ROWS, num_samples=1, seed=1)
    assert [len(prompts) for prompts in calls] == [3, 3, 2]
    assert "say {hi}" in calls[0][2] and calls[2][1] == "user\nsay {hi}<eos>assistant\n"
    assert colour[0].text in ("one", "two", "three") and colour[0].note == ""
    for [c] in (joke, hi):
        assert c.text == "a plain answer" and "no answer could be read" in c.note
        assert c.generated_tokens == 2 * len("as a model, I") + len("a plain answer") + 3
    assert own.statistics["unreadable_replies"] == 5 and own.statistics["direct_answers"] == 2
    assert own.statistics["replies"] == 6


def test_a_long_answer_is_cut_and_a_broken_reply_gets_an_end():
    own, _ = scripted(
        lambda attempt, prompt: REPLY.replace("one", "1" * 60).replace("0.6", "1").replace("0.2", "0"),
        model=long_model(),
    )
    own.tokenizer.padding_side = "left"
    drawn = [c for c in own.sample(ROWS[:1], num_samples=40, seed=0)[0] if c.text.startswith("1")]
    assert drawn and all(len(c.ids) == 40 and not c.finished and c.text == "1" * 40 for c in drawn)
    own, _ = scripted(lambda attempt, prompt: REPLY, model=long_model(), finished=False)
    assert own.sample(ROWS[:1], num_samples=1, seed=0)[0][0].ids[-1] == EOS


def test_a_language_model_is_drawn_alike_in_any_company():
    model = tiny_model(spread=0.3)
    model.config.max_position_embeddings = 1024

    def draw(rows):
        tokenizer = tiny_tokenizer(chat_template=True)
        own = VerbalizedSampler(model, tokenizer, max_completion_length=4, reply_length=6)
        return own.sample(rows, num_samples=2, seed=2), own.statistics

    together, statistics = draw(ROWS)
    assert [draw([row])[0][0] for row in ROWS] == together
    assert statistics["direct_answers"] == 6 and statistics["replies"] == statistics["unreadable_replies"] == 12
    assert all(c.note and len(c.ids) <= 4 < c.generated_tokens <= 16 for group in together for c in group)
    assert statistics["generated_tokens"] == sum(c.generated_tokens for group in together for c in group)


def test_replies_may_take_what_the_model_has_room_for():
    own = VerbalizedSampler(tiny_model(), characters(), answers=3, max_completion_length=10)
    assert [own._reply_limit(n) for n in (4, 40, 64)] == [30, 24, 1]
    own = VerbalizedSampler(tiny_model(), characters(), reply_length=7)
    assert own._reply_limit(60) == 7


def test_names_settings_and_texts():
    own = resolve_sampler("verbalized:answers=3,temperature=0.7", tiny_model(), characters(), max_completion_length=9)
    assert own.name == "verbalized sampling, 3 answers" and own.decoder.temperature == 0.7
    assert json.loads(json.dumps(own.settings)) == own.settings
    assert own.settings != resolve_sampler("verbalized", tiny_model(), characters(), max_completion_length=9).settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answers": 1}, "answers must be an integer >= 2, got 1"),
        ({"reply_length": 0}, "reply_length must be an integer >= 1, got 0"),
        ({"use_chat_template": False}, "needs a chat template"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        VerbalizedSampler(tiny_model(), characters(), **options)
    with pytest.raises(ConfigError, match="needs a chat template"):
        VerbalizedSampler(tiny_model(), tiny_tokenizer())
