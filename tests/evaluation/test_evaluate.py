from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy
import peft
import pytest
import torch
from tiny import one_thread, tiny_model, tiny_tokenizer  # noqa: F401 - a fixture that works by itself

import powerflow_fast
from powerflow_fast.data import encode_prompt
from powerflow_fast.errors import ConfigError, DataError, JudgeError, OutputDirError, PowerFlowError, ScorerError
from powerflow_fast.evaluation import Evaluation, during_training, evaluate, mean_interval
from powerflow_fast.evaluation.alpha_fit import length_tilt
from powerflow_fast.evaluation.measures import MEASURES
from powerflow_fast.evaluation.scorers import NamedScorer
from powerflow_fast.models import CausalLMScorer
from powerflow_fast.sampling import Completion, TemperatureSampler

PROBLEMS = [{"prompt": "one plus one", "answer": "2"}, {"prompt": "two", "answer": "3"}, {"prompt": "3", "answer": "4"}]
ANSWERS = [["2", "2", "5", "2"], ["4", "3", "4", None], [None, "", "x", "y"]]  # in the completions of the problems


class Scripted:
    """A sampler whose completions are made of a table of answers; it records its calls."""

    def __init__(self, answers=ANSWERS, *, stop_at=None):
        self.answers, self.stop_at, self.calls = answers, stop_at, []
        self.name, self.settings = "scripted", {"table": len(answers)}

    def sample(self, rows, *, num_samples, seed):
        self.calls.append([row.prompt for row in rows])
        torch.rand(1), random.random(), numpy.random.rand()  # a careless sampler
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        return [[self._one(row.prompt, j) for j in range(num_samples)] for row in rows]

    def _one(self, prompt, j):
        problem = [p["prompt"] for p in PROBLEMS].index(prompt)
        answer = self.answers[problem][j]
        text = f"sample {j} of {problem}" if answer is None else rf"so \boxed{{{answer}}} is sample {j}"
        ids = [4 + k for k in range(2 + j)]
        return Completion(text, ids, finished=j > 0, generated_tokens=10 * len(ids))


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(), tiny_tokenizer()


def scripted(tiny, sampler=None, **options):
    model, tokenizer = tiny
    options = {"num_samples": 4, "scorer": "boxed", "batch_size": 4, **options}
    return evaluate(model, PROBLEMS, tokenizer=tokenizer, sampler=sampler or Scripted(), **options)


def lines(folder):
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def test_measures_equal_what_is_counted_by_hand(tiny):
    result = scripted(tiny)
    assert result.per_prompt["accuracy"] == [0.75, 0.25, 0.0]
    assert result.per_prompt["majority"] == [1.0, 0.0, 0.0]
    assert result.per_prompt["distinct_answers"] == [2.0, 2.0, 2.0]
    assert result.per_prompt["length"] == [3.5] * 3 and result.per_prompt["finished"] == [0.75] * 3
    # pass@2 with c of 4 right: 1 - C(4-c, 2) / 6
    assert result.pass_at_k[2].value == pytest.approx((1.0 + 0.5 + 0.0) / 3)
    assert result.pass_at_k[4].value == pytest.approx(2 / 3) and list(result.pass_at_k) == [1, 2, 4]
    assert result.pass_at_k[1] == result.measures["accuracy"] == mean_interval([0.75, 0.25, 0.0])
    # Four times "so \ boxed { 2 } is sample 0"; besides so \ boxed { } is sample there are 0 1 2 3 5.
    assert result.per_prompt["distinct_1"][0] == pytest.approx(12 / 36)
    assert result.per_prompt["repetition"][0] == 0.0 and 0 < result.per_prompt["self_bleu"][0] < 1
    assert result.tokens_generated == 3 * 10 * (2 + 3 + 4 + 5) and result.seconds > 0
    assert list(result.measures) == [name for name in MEASURES if name in result.measures]
    assert (result.name, result.problems) == ("LlamaForCausalLM, scripted", "a list")
    assert [c["answer"] for c in result.completions[4:8]] == ["4", "3", "4", None]
    table = result.table().splitlines()
    assert table[0].split() == ["measure", "mean", "95%", "interval", "prompts", "of"]
    assert any(line.split()[:5] == ["pass@2", "0.500", "0.000", "to", "1.000"] for line in table)


def test_without_answers_to_read_there_is_no_vote(tiny):
    result = scripted(tiny, scorer=lambda prompt, completion, answer: completion.endswith("0"))
    assert result.per_prompt["accuracy"] == [0.25, 0.25, 0.0] and "majority" not in result.measures
    reading = NamedScorer("mine", lambda p, c, answer: answer in c, read_answer=lambda c: c[-1])
    assert scripted(tiny, scorer=reading).per_prompt["distinct_answers"] == [4.0, 3.0, 3.0]


def test_a_problem_set_without_a_scorer_is_measured_but_for_accuracy(tiny, caplog):
    result = scripted(tiny, scorer=None)
    assert "accuracy" not in result.measures and not result.pass_at_k and "length" in result.measures
    assert not caplog.records
    model, tokenizer = tiny
    evaluate(model, ["two"], tokenizer=tokenizer, sampler=Scripted(), num_samples=2)
    assert "accuracy is not measured" in caplog.text


def test_files_and_loading(tiny, tmp_path):
    result = scripted(tiny, output_dir=tmp_path / "out", measures=["accuracy", "length"])
    for record in lines(tmp_path / "out"):
        assert set(record) >= {
            "problem", "sample", "prompt", "completion", "tokens", "generated_tokens", "finished", "score", "logp",
            "base_logp", "answer",
        }  # fmt: skip
    loaded = Evaluation.load(tmp_path / "out")
    assert loaded == result
    result.per_prompt["accuracy"][0] = math.nan
    copy = Evaluation.load(result.save(tmp_path / "copy"))
    assert math.isnan(copy.per_prompt["accuracy"][0]) and copy.completions == result.completions
    with pytest.raises(DataError, match=r"holds no evaluation, evaluation.json is missing"):
        Evaluation.load(tmp_path)
    (tmp_path / "copy" / "evaluation.json").write_text('{"complete": true, "name": "x"}')
    with pytest.raises(DataError, match=r"damaged evaluation \(KeyError: 'problems'\)"):
        Evaluation.load(tmp_path / "copy")


def test_a_completion_may_hold_any_character(tmp_path):
    made = [{"problem": 0, "completion": "a\u2028b\x85c\n\x0c\ud800 é \\"}]
    result = evaluate(None, ["q"], completions=made, measures=["lexical"], output_dir=tmp_path)
    assert Evaluation.load(tmp_path) == result and result.completions[0]["completion"] == made[0]["completion"]
    assert " é " in (tmp_path / "completions.jsonl").read_text(encoding="utf-8")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named(tiny, tmp_path):
    class Filling(Scripted):
        def sample(self, rows, **options):
            if len(self.calls) == 2:
                (tmp_path / "completions.jsonl").rename(tmp_path / "kept")
                (tmp_path / "completions.jsonl").symlink_to("/dev/full")
            return super().sample(rows, **options)

    with pytest.raises(OutputDirError, match="cannot be used: no space left on the disk that holds"):
        scripted(tiny, Filling(), output_dir=tmp_path)
    assert len((tmp_path / "kept").read_text().splitlines()) == 8


def test_what_is_stopped_goes_on_where_it_was(tiny, tmp_path):
    whole = scripted(tiny, measures=["accuracy", "length"])
    with pytest.raises(KeyboardInterrupt):
        scripted(tiny, Scripted(stop_at=3), output_dir=tmp_path)
    assert len(lines(tmp_path)) == 8  # two of three problems, and no byte of the third
    with pytest.raises(DataError, match="this evaluation was not finished"):
        Evaluation.load(tmp_path)
    with open(tmp_path / "completions.jsonl", "a") as file:
        file.write('{"problem": 2, "sample": 0, "comp')  # killed while it wrote
    sampler = Scripted()
    result = scripted(tiny, sampler, output_dir=tmp_path, measures=["accuracy", "length"])
    assert sampler.calls == [["3"]]
    assert result.measures == whole.measures and result.pass_at_k == whole.pass_at_k
    again = Scripted(stop_at=1)
    assert scripted(tiny, again, output_dir=tmp_path, measures=["length"]).measures == {
        name: whole.measures[name] for name in ("length", "finished")
    }
    assert again.calls == []


def test_a_chunk_of_which_a_part_is_there_is_sampled_as_a_whole(tiny, tmp_path):
    scripted(tiny, batch_size=8, output_dir=tmp_path)
    path = tmp_path / "completions.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:3] + kept[4:]))
    sampler = Scripted()
    scripted(tiny, sampler, batch_size=8, output_dir=tmp_path)
    assert sampler.calls == [["one plus one", "two"]]
    assert [(r["problem"], r["sample"]) for r in lines(tmp_path)] == [(i, j) for i in range(3) for j in range(4)]


def test_the_folder_of_other_settings_is_refused(tiny, tmp_path):
    scripted(tiny, output_dir=tmp_path / "a")
    other = Scripted()
    other.settings = {"table": 4}
    with pytest.raises(OutputDirError) as error:
        scripted((tiny_model(seed=1), tiny[1]), other, seed=5, num_samples=2, output_dir=tmp_path / "a")
    message = str(error.value)
    assert "weights was '" in message and "seed was 0, now 5" in message
    assert "sampler_settings.table was 3, now 4" in message and "num_samples was 4, now 2" in message
    assert "problems" not in message and not other.calls
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "completions.jsonl").write_text("mine")
    with pytest.raises(OutputDirError, match=r"holds a completions.jsonl without evaluation.json"):
        scripted(tiny, output_dir=tmp_path / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirError, match="cannot be used: "):
        scripted(tiny, output_dir=tmp_path / "file")
    path = tmp_path / "a" / "completions.jsonl"
    path.write_text("[]\n" + path.read_text())
    with pytest.raises(OutputDirError, match=r"completions.jsonl:1: not a line of an evaluation"):
        scripted(tiny, output_dir=tmp_path / "a")


def test_a_scorer_that_raises_loses_nothing(tiny, tmp_path):
    def broken(prompt, completion, answer):
        if completion == "sample 3 of 1":
            raise ZeroDivisionError("division by zero")
        return 1.0

    with pytest.raises(ScorerError) as error:
        scripted(tiny, scorer=broken, output_dir=tmp_path)
    message = str(error.value)
    assert message.startswith(
        "scorer 'broken' raised ZeroDivisionError: division by zero; at problem 1 (prompts[1]), sample 3. Nothing is "
        f"lost: the 12 completions are in {tmp_path / 'completions.jsonl'}: call again with this output_dir"
    )
    assert [r["score"] for r in lines(tmp_path)] == [1.0] * 7 + [None] * 5
    sampler = Scripted()
    assert scripted(tiny, sampler, output_dir=tmp_path).per_prompt["accuracy"] == [0.75, 0.25, 0.0]
    assert not sampler.calls
    with pytest.raises(ScorerError, match="the completions are in this error's `completions`") as error:
        scripted(tiny, scorer=broken)
    rescued = evaluate(None, PROBLEMS, completions=error.value.completions, scorer="boxed", measures=["accuracy"])
    assert rescued.per_prompt["accuracy"] == [0.75, 0.25, 0.0]


def test_columns_are_checked_before_anything_is_sampled(tiny, tmp_path):
    sampler = Scripted()
    model, tokenizer = tiny
    rows = [PROBLEMS[0], {"prompt": "two", "solution": "3"}]
    with pytest.raises(DataError, match=r"prompts\[1\]: scorer 'math' needs the column 'answer', which is missing"):
        evaluate(model, rows, tokenizer=tokenizer, sampler=sampler, scorer="math", output_dir=tmp_path / "out")
    assert not sampler.calls and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ks": [1, 8]}, "pass@8 needs at least 8 completions of each problem, num_samples is 4"),
        ({"ks": [0]}, "ks must be positive integers, got 0"),
        ({"num_samples": 0}, "num_samples must be a positive integer, got 0"),
        ({"measures": ["accuracy", "speed"]}, "measures must be among accuracy, length, lexical, semantic, judge,"),
        ({"measures": "accuracy"}, "measures must be a list of groups"),
        ({"measures": ["judge"]}, "measures 'judge' needs judge="),
        ({"confidence": 1.0}, "confidence must be a number between 0 and 1, got 1.0"),
        ({"score_temperature": 0}, "score_temperature must be a number above 0, got 0"),
        ({"scorer": "boxxed"}, "scorer must be one of math, boxed,"),
        ({"sampler": "temprature=1"}, "temprature"),
        ({"base": "adapter_off"}, "base='adapter_off' needs a PeftModel as the model, got a LlamaForCausalLM"),
    ],
)
def test_bad_arguments(tiny, tmp_path, options, message):
    model, tokenizer = tiny
    options = {"num_samples": 4, "output_dir": tmp_path / "out", **options}
    with pytest.raises(PowerFlowError) as error:
        evaluate(model, PROBLEMS, tokenizer=tokenizer, **options)
    assert message in str(error.value) and not (tmp_path / "out").exists()


def test_a_real_sampler_leaves_the_model_and_the_random_states_alone(tiny):
    model, tokenizer = tiny
    model.train()
    model.model.layers[0].eval()
    torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
    wanted = (torch.rand(1).item(), random.random(), numpy.random.rand())
    torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
    options = {"tokenizer": tokenizer, "num_samples": 2, "max_completion_length": 6, "scorer": "exact"}
    scripted(tiny)
    result = evaluate(model, PROBLEMS, **options, measures=["accuracy", "length"])
    assert (torch.rand(1).item(), random.random(), numpy.random.rand()) == wanted
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    model.eval()
    rows = powerflow_fast.evaluation.load_problems(PROBLEMS).rows
    drawn = TemperatureSampler(model, tokenizer, max_completion_length=6).sample(rows, num_samples=2, seed=0)
    assert [c["ids"] for c in result.completions] == [c.ids for group in drawn for c in group]
    assert result.settings["sampler"] == "temperature 1" and result.settings["weights"]
    assert evaluate(model, PROBLEMS, **options, seed=1, measures=["length"]).completions != result.completions


def test_a_resumed_run_draws_the_same_tokens(tiny, tmp_path):
    model, tokenizer = tiny

    class Stopping(TemperatureSampler):
        left = 1

        def sample(self, rows, **options):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().sample(rows, **options)

    options = {"tokenizer": tokenizer, "num_samples": 2, "scorer": None, "measures": ["length"], "batch_size": 4}
    whole = evaluate(model, PROBLEMS, max_completion_length=6, **options)
    stopping = Stopping(model, tokenizer, max_completion_length=6, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, PROBLEMS, sampler=stopping, output_dir=tmp_path, **options)
    assert len(lines(tmp_path)) == 4
    resumed = evaluate(model, PROBLEMS, max_completion_length=6, output_dir=tmp_path, **options)
    assert [r["ids"] for r in resumed.completions] == [r["ids"] for r in whole.completions]


def direct_log_probs(model, tokenizer, record, temperature):
    """Sums over the completion of log p and of the entropy, in fp64 from the model's own logits."""
    prompt = encode_prompt(powerflow_fast.data.PromptRow(record["prompt"]), tokenizer)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + record["ids"]])).logits[0, len(prompt) - 1 : -1].double()
    logp = (logits / temperature).log_softmax(-1)
    picked = logp.gather(-1, torch.tensor(record["ids"])[:, None]).sum()
    return float(picked), float(-(logp.exp() * logp).sum(-1).mean())


def test_log_probs_under_model_and_base(tiny, tmp_path):
    model, tokenizer = tiny
    base = tiny_model(seed=1)
    texts = ["ab", "one more", "3, 2, 1", "zyx"]  # of different lengths, so that they tell of a tilt
    made = [{"problem": i, "completions": texts[i : i + 2] + texts[3:]} for i in range(3)]
    options = {"tokenizer": tokenizer, "completions": made, "scorer": None, "measures": []}
    options |= {"score_temperature": 0.7, "output_dir": tmp_path / "out"}
    result = evaluate(model, PROBLEMS, base=base, **options)
    for record in result.completions:
        logp, entropy = direct_log_probs(model, tokenizer, record, 0.7)
        base_logp, _ = direct_log_probs(base, tokenizer, record, 0.7)
        assert record["logp"] == pytest.approx(logp, abs=1e-4)
        assert record["base_logp"] == pytest.approx(base_logp, abs=1e-4)
        assert record["entropy"] == pytest.approx(entropy, abs=1e-5)
    first = result.completions[:3]
    assert result.per_prompt["logp"][0] == pytest.approx(numpy.mean([r["logp"] / r["tokens"] for r in first]))
    found = length_tilt(
        [r["logp"] for r in result.completions],
        [r["base_logp"] for r in result.completions],
        [r["tokens"] for r in result.completions],
        [r["problem"] for r in result.completions],
    )
    assert result.measures["tilt"].value == pytest.approx(found.tilt.value, nan_ok=True)
    assert result.measures["alpha"].value == pytest.approx(found.alpha.value)
    assert "tilt" not in result.per_prompt and len(result.per_prompt["inversion_rate"]) == 3
    # Without the base: nothing is dropped. With itself as base: its own log-probs, and no inversion.
    assert "base_logp" in evaluate(model, PROBLEMS, **{**options, "measures": ["likelihood"]}).measures
    same = evaluate(model, PROBLEMS, base=model, alpha=1.0, **options)
    assert same.per_prompt["base_logp"] == pytest.approx(same.per_prompt["logp"])
    assert all(rate == 0 or math.isnan(rate) for rate in same.per_prompt["inversion_rate"])
    assert same.measures["alpha"].value == 1.0 and abs(same.measures["tilt"].value) < 1e-4
    # At another temperature all are made anew.
    other = evaluate(model, PROBLEMS, base=model, **{**options, "score_temperature": 1.0})
    assert other.completions[0]["logp"] == pytest.approx(direct_log_probs(model, tokenizer, first[0], 1.0)[0], abs=1e-4)


def test_base_as_folder_and_with_the_adapter_off(tiny, tmp_path):
    _, tokenizer = tiny
    base = tiny_model(seed=1)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(seed=1), config)
    options = {"tokenizer": tokenizer, "num_samples": 2, "max_completion_length": 5, "scorer": None, "measures": []}
    off, folder = (evaluate(model, PROBLEMS, base=b, **options) for b in ("adapter_off", tmp_path / "base"))
    assert off.per_prompt["base_logp"] == pytest.approx(folder.per_prompt["base_logp"], abs=1e-5)
    assert off.per_prompt["base_logp"] != pytest.approx(off.per_prompt["logp"], abs=1e-3)
    with model.disable_adapter():
        without = evaluate(model, PROBLEMS, **{**options, "measures": ["length"]})
    assert without.settings["weights"] == off.settings["weights"]  # the same adapter is there, only not in use
    torch.nn.init.zeros_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    assert (
        evaluate(model, PROBLEMS, **{**options, "measures": ["length"]}).settings["weights"] != off.settings["weights"]
    )


class FakeJudge:
    """Grades by length, and goes down after ``answers`` calls."""

    def __init__(self, answers=9):
        self.answers, self.seen = answers, []

    def _ask(self, groups):
        self.answers -= 1
        if self.answers < 0:
            raise JudgeError("http://here is down.", done=3, total=12)
        self.seen.append(groups)

    def quality_of_all(self, groups):
        self._ask(groups)
        return [[math.nan, *(float(j) for j in range(1, len(texts)))] for _, texts in groups]

    def strategies_of_all(self, groups):
        self._ask(groups)
        return [[0, 1, 1, 0], None, [0, 0, 0, 0]]


def test_a_judge_and_an_encoder(tiny, tmp_path):
    with pytest.raises(JudgeError) as error:
        scripted(tiny, judge=FakeJudge(1), output_dir=tmp_path)
    assert str(error.value) == (
        f"http://here is down. Nothing is lost: the 12 completions are in {tmp_path / 'completions.jsonl'}: call again "
        "with this output_dir, and they are scored without sampling again"
    )
    assert (error.value.done, error.value.total) == (3, 12)
    assert all(record["score"] is not None for record in lines(tmp_path))
    sampler, judge = Scripted(), FakeJudge()
    result = scripted(tiny, sampler, judge=judge, encoder=lambda texts: numpy.eye(4)[: len(texts)], output_dir=tmp_path)
    assert not sampler.calls
    assert result.per_prompt["quality"] == [2.0] * 3
    assert result.per_prompt["strategies"] == pytest.approx([2.0, math.nan, 1.0], nan_ok=True)
    assert result.measures["strategies"].prompts == 2
    assert result.per_prompt["semantic_diversity"] == pytest.approx([1.0] * 3)
    assert judge.seen[0][1] == ("two", [c["completion"] for c in result.completions[4:8]])


def test_completions_from_elsewhere(tiny, tmp_path):
    _, tokenizer = tiny
    file = tmp_path / "made.jsonl"
    rows = [
        {"problem": 1, "completions": [r"\boxed{3}", "none"]},
        {"prompt": "one plus one", "completion": r"\boxed{2}", "finished": False, "ids": [4, 5, 6]},
        {"prompt": "one plus one", "completion": r"\boxed{2}", "tokens": 7},
        {"problem": 2, "completion": "a"},
        {"problem": 2, "completion": "b"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"completions": file, "tokenizer": tokenizer, "output_dir": tmp_path / "out"}
    result = evaluate(None, PROBLEMS, scorer="boxed", **given)
    assert result.per_prompt["accuracy"] == [1.0, 0.5, 0.0] and list(result.pass_at_k) == [1, 2]
    assert result.per_prompt["length"] == [5.0, (9 + 4) / 2, 1.0] and result.per_prompt["finished"] == [0.5, 1, 1]
    assert result.settings["num_samples"] == 2 and result.name == "given completions"
    again = evaluate(None, PROBLEMS, scorer="exact", **given)
    assert again.measures["accuracy"].value == 0.0 and len(lines(tmp_path / "out")) == 6
    scored = evaluate(*(tiny[0], PROBLEMS), completions=file, tokenizer=tokenizer, measures=["likelihood"], scorer=None)
    assert scored.completions[2]["logp"] == pytest.approx(
        direct_log_probs(tiny[0], tokenizer, scored.completions[2], 1.0)[0], abs=1e-4
    )
    with pytest.raises(ConfigError, match="the length of given completions needs tokenizer="):
        evaluate(None, PROBLEMS, completions=file, scorer="boxed")
    with pytest.raises(ConfigError, match=r"pass@4 needs at least 4 completions of each problem, num_samples is 2"):
        evaluate(None, PROBLEMS, completions=file, scorer="boxed", ks=[4], measures=["accuracy"])
    with pytest.raises(ConfigError, match="model must be a name, a folder or a model, got None"):
        evaluate(None, PROBLEMS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": 3, "completion": "a"}], "completions[0]: 'problem' 3 is none of the 3 problems"),
        ([{"prompt": "four", "completion": "a"}], "completions[0]: 'prompt' 'four' is none of the 3 problems"),
        ([{"problem": 0}], "completions[0]: needs a text 'completion' or a list of texts 'completions'"),
        ([{"problem": 0, "completions": "a"}], "completions[0]: needs a text 'completion' or a list"),
        (["a"], "completions[0]: must be an object, got str"),
        ([{"problem": 0, "completion": "a"}], "problem 1 (prompts[1]) has 0, others have 1"),
        ("nowhere.jsonl", "completions nowhere.jsonl: does not exist"),
    ],
)
def test_bad_completions(rows, message):
    with pytest.raises(DataError) as error:
        evaluate(None, PROBLEMS, completions=rows, scorer="boxed", measures=["accuracy"])
    assert message in str(error.value)


def test_during_training(tiny, tmp_path):
    model, tokenizer = tiny
    eval_fn = during_training(
        PROBLEMS, num_samples=2, ks=[2], scorer="exact", max_completion_length=4, limit=2, output_dir=tmp_path
    )
    numbers = eval_fn(model, tokenizer, 7)
    assert set(numbers) == {"accuracy", "majority", "distinct_answers", "length", "finished", "pass@2"}
    assert all(isinstance(value, float) for value in numbers.values())
    assert eval_fn(model, tokenizer, 8) == numbers
    assert len(Evaluation.load(tmp_path / "step-7").completions) == 4


def test_a_training_run_records_it_by_steps(tiny, tmp_path):
    _, tokenizer = tiny
    eval_fn = during_training(PROBLEMS, num_samples=2, scorer="exact", max_completion_length=4)
    options = {"max_steps": 2, "eval_steps": 1, "num_generations": 2, "per_device_train_batch_size": 2}
    options |= {"max_completion_length": 4, "output_dir": str(tmp_path), "num_sample_prompts": 0, "log_z": "group"}
    prompts = [p["prompt"] for p in PROBLEMS]
    powerflow_fast.train(tiny_model(), prompts, alpha=2.0, tokenizer=tokenizer, eval_fn=eval_fn, **options)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    steps = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    assert list(steps) == [0, 1, 2] and all("eval/length" in row for row in rows if "eval/accuracy" in row)


def test_it_is_public_and_lazy():
    assert powerflow_fast.evaluate is evaluate and powerflow_fast.Evaluation is Evaluation
    with pytest.raises(AttributeError, match="has no attribute 'evaluator'"):
        powerflow_fast.evaluator  # noqa: B018


def test_a_base_that_comes_later_does_not_score_the_model_again(tiny, tmp_path, monkeypatch):
    scripted(tiny, measures=["likelihood"], output_dir=tmp_path)
    own, base, scored = [line["logp"] for line in lines(tmp_path)], tiny_model(seed=5), []
    forward = CausalLMScorer.forward
    monkeypatch.setattr(
        CausalLMScorer, "forward", lambda self, *a, **k: (scored.append(self.model), forward(self, *a, **k))[1]
    )
    result = scripted(tiny, measures=["likelihood"], output_dir=tmp_path, base=base)
    assert len(scored) == 3 and all(model is base for model in scored), "twelve completions, four at once"
    assert [line["logp"] for line in lines(tmp_path)] == own and "inversion_rate" in result.measures


def test_half_a_point_counts_for_the_accuracy_and_not_for_pass_at_k(tiny):
    def score(prompt, completion, **columns):
        return {"0": 1.0, "1": 0.5}.get(completion.split("sample ")[1][0], 0.0)

    result = scripted(tiny, scorer=score, ks=[1])
    assert result.per_prompt["accuracy"] == [1.5 / 4] * 3 and result.pass_at_k[1].value == 1 / 4
