"""What goes wrong in an evaluation, and what it leaves: bad arguments, samplers, judges, encoders, files."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from tiny import one_thread, tiny_model, tiny_tokenizer  # noqa: F401 - a fixture that works by itself

from powerflow_fast.cli import main
from powerflow_fast.comparison import write_comparison
from powerflow_fast.errors import (
    ConfigError,
    DataError,
    JudgeError,
    ModelError,
    OutputDirError,
    PowerFlowError,
    ScorerError,
)
from powerflow_fast.evaluation import Evaluation, during_training, evaluate
from powerflow_fast.evaluation.result import describe_statistics
from powerflow_fast.sampling import Completion

PROBLEMS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+1=", "answer": "3"}, {"prompt": "what?", "answer": "a"}]
SHORT = {"num_samples": 2, "scorer": "exact", "max_completion_length": 4, "measures": ["accuracy", "length"]}


class Counting:
    """Completions "a"; counts a move for each, and accepts every second."""

    name, settings = "counting", {"kind": "counting"}

    def __init__(self, stop_at=None):
        self.statistics, self.calls, self.stop_at = {"moves": 0, "accepted": 0}, 0, stop_at

    def sample(self, rows, *, num_samples, seed):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.statistics["moves"] += 2 * len(rows) * num_samples
        self.statistics["accepted"] += len(rows) * num_samples
        return [[Completion("a", [4, 2], True, 3)] * num_samples for _ in rows]


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(), tiny_tokenizer()


def run(tiny, problems=PROBLEMS, **options):
    return evaluate(tiny[0], problems, tokenizer=tiny[1], **{**SHORT, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ks": 2}, "ks must be a list of integers, such as [2], got 2"),
        ({"measures": 3}, "measures must be a list of groups, such as ['accuracy'], got 3"),
        ({"measures": None}, "measures must be a list of groups"),
        ({"seed": "x"}, "seed must be an integer, got 'x'"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"alpha": "x"}, "alpha must be a number that is finite, got 'x'"),
        ({"alpha": float("nan")}, "alpha must be a number that is finite, got nan"),
        ({"name": 3}, "name must be a text, got 3"),
        ({"base": 3}, "base must be a model, a name, a folder or 'adapter_off', got 3"),
        ({"judge": 3}, "judge must be a powerflow_fast.evaluation.Judge, got 3"),
        ({"encoder": 3}, "encoder must be a function of a list of texts, got 3"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_sampled(tiny, options, message):
    sampler = Counting()
    with pytest.raises(ConfigError) as error:
        run(tiny, sampler=sampler, **options)
    assert message in str(error.value) and not sampler.calls


def test_a_prompt_too_long_is_named_before_anything_is_sampled(tiny, tmp_path):
    problems = [*PROBLEMS, {"prompt": "b" * 61, "answer": "a"}]
    message = re.escape("prompts[3] has 61 tokens, with 4 more of a completion 65, but the model has positions for 64")
    with pytest.raises(ConfigError, match=message):
        run(tiny, problems, batch_size=2, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    chat = (tiny[0], tiny_tokenizer(chat_template=True))
    with pytest.raises(ConfigError, match=r"reply_length: prompts\[0\] has \d+ tokens"):
        run(chat, sampler="verbalized:answers=2", output_dir=tmp_path / "out")


def test_models_and_samplers_that_do_not_fit(tiny):
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        run((tiny_model("t5"), tiny[1]))
    few = Counting()
    few.sample = lambda rows, **options: [[Completion("a", [4], True, 1)] for _ in rows]
    with pytest.raises(ConfigError, match=r"sampler 'counting' must give 2 completions for each of 3 problems"):
        run(tiny, sampler=few)
    odd = Counting()
    odd.settings = {"x": object()}
    with pytest.raises(ConfigError, match="settings of the sampler 'counting' must be JSON-able"):
        run(tiny, sampler=odd)


def test_some_answers_are_not_enough(tiny):
    with pytest.raises(DataError, match=r"prompts\[1\]: scorer 'math' needs the column 'answer', which is missing"):
        run(tiny, [PROBLEMS[0], {"prompt": "b"}], scorer="auto")


@pytest.mark.parametrize(
    ("scorer", "answer", "message"),
    [
        ("number", "ten", "scorer 'number' needs a number as 'answer', got 'ten'"),
        ("choice", 2, "scorer 'choice' needs a letter from A to J as 'answer', got 2"),
        ("math", ["1", "2"], "scorer 'math' needs a text or a number as 'answer', got ['1', '2']"),
        ("exact", float("nan"), "scorer 'exact' needs the column 'answer', which is empty"),
    ],
)
def test_answers_that_no_completion_could_give(tiny, scorer, answer, message):
    sampler = Counting()
    with pytest.raises(DataError) as error:
        run(
            tiny,
            [PROBLEMS[0] | {"answer": "A" if scorer == "choice" else "3"}, {"prompt": "a", "answer": answer}],
            scorer=scorer,
            sampler=sampler,
        )
    assert str(error.value).startswith(f"prompts[1]: {message}") and not sampler.calls


def test_a_base_with_other_tokens_is_refused(tiny, tmp_path):
    base, tokenizer = tiny_model(seed=1), tiny_tokenizer()
    base.save_pretrained(tmp_path)
    text = tokenizer.backend_tokenizer.to_str()
    swapped = text.replace('"1":', '"%%":', 1).replace('"2":', '"1":', 1).replace('"%%":', '"2":', 1)
    assert text != swapped
    type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(swapped)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="must share the model's vocabulary; token 31 is '1' to the model and '2'"):
        run(tiny, base=tmp_path, sampler=(sampler := Counting()))
    assert not sampler.calls


def test_a_broken_base_is_named(tiny):
    base = tiny_model(seed=1)
    base.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(
        ModelError, match=r"base_logp of the completion . of problem . is nan under base 'LlamaForCausalLM'"
    ):
        run(tiny, base=base)


def test_evaluations_of_an_earlier_training_run(tiny, tmp_path):
    eval_fn = during_training(PROBLEMS, num_samples=1, scorer="exact", max_completion_length=2, output_dir=tmp_path)
    for step in (0, 2):
        eval_fn(*tiny, step)
    eval_fn(*tiny, 2)  # of a run that goes on
    with pytest.raises(OutputDirError, match="holds evaluations of an earlier run, such as step-2; remove them"):
        eval_fn(*tiny, 0)


def test_a_judge_in_a_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["eval", "--model", "m", "--problems", "creative", "--output-dir", str(tmp_path / "file" / "out")]
    assert main([*words, "--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "j"]) == 2
    assert "out cannot be used: Not a directory" in capsys.readouterr().err


def test_what_a_sampler_counts_is_kept(tiny, tmp_path):
    whole = run(tiny, sampler=Counting())
    assert whole.statistics == {"moves": 12, "accepted": 6}
    with pytest.raises(KeyboardInterrupt):
        run(tiny, sampler=Counting(stop_at=3), batch_size=2, output_dir=tmp_path)
    result = run(tiny, sampler=Counting(), batch_size=2, output_dir=tmp_path)
    assert result.statistics == whole.statistics  # four completions of one object, two of another
    # A chunk of which a line is lost is sampled again; its counts are there already.
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert run(tiny, sampler=Counting(), batch_size=2, output_dir=tmp_path).statistics == whole.statistics
    assert Evaluation.load(tmp_path).statistics == whole.statistics
    assert json.loads((tmp_path / "evaluation.json").read_text())["statistics"] == whole.statistics
    reference = run(tiny, sampler="greedy", output_dir=tmp_path / "greedy")
    page = write_comparison([reference, tmp_path], tmp_path / "page")
    for file in (page.html, page.markdown):
        text = file.read_text().replace("\\", "")
        assert f"Sampler of {result.name}: moves 12, accepted 6 (50 % of moves)." in text
        assert text.count("Sampler of") == 1
    assert (
        describe_statistics({"replies": 5, "direct_answers": 1}, 4)
        == "replies 5, direct answers 1 (25 % of completions)"
    )
    assert describe_statistics({"accepted": 1, "moves": 0}, 0) == "accepted 1, moves 0"


def test_real_samplers_count(tiny):
    power = run(tiny, sampler="power:alpha=2,blocks=2,steps=3")
    assert power.statistics["moves"] == 3 * 2 * 2 * 3  # problems, samples, blocks, steps
    assert power.statistics["generated_tokens"] == power.tokens_generated
    assert 0 < power.statistics["accepted"] <= power.statistics["moves"]


def test_a_judge_or_an_encoder_that_fails_loses_nothing(tiny, tmp_path):
    def down(groups):
        raise JudgeError("http://here is down", done=1, total=6)

    judge = SimpleNamespace(quality_of_all=down, strategies_of_all=down)
    with pytest.raises(JudgeError, match=r"down\. Nothing is lost: the completions are in this error's") as error:
        run(tiny, judge=judge)
    assert (error.value.done, error.value.total, len(error.value.completions)) == (1, 6, 6)
    again = run(tiny, completions=error.value.completions, measures=["accuracy"])
    assert [c["completion"] for c in again.completions] == [c["completion"] for c in error.value.completions]
    for encoder, message in ((lambda texts: 1 / 0, "ZeroDivisionError"), (lambda texts: [1], "shape")):
        with pytest.raises(ScorerError, match=rf"the encoder failed \(.*{message}.*Nothing is lost") as failed:
            run(tiny, encoder=encoder)
        assert len(failed.value.completions) == 6


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (3, "completions must be a .jsonl file or a list of rows, got 3"),
        ([], "completions: holds no completions"),
        ([{"problem": 0, "completion": "a", "ids": "abc"}], "completions[0]: 'ids' must be a list of token ids"),
        ([{"problem": 0, "completion": "a", "ids": [-1]}], "completions[0]: 'ids' must be a list of token ids"),
        ([{"problem": 0, "completion": "a", "tokens": "3"}], "'tokens' must be a number of tokens, got '3'"),
        ([{"problem": 0, "completion": "a", "generated_tokens": -3}], "'generated_tokens' must be a number of tokens"),
        ([{"problem": 0, "completion": "a", "ids": [4], "tokens": 3}], "'tokens' is 3, but there are 1 'ids'"),
        ([{"prompt": "1+1=", "completion": "a"}], "several problems have the prompt '1+1='; give their 'problem'"),
    ],
)
def test_bad_completions_are_named(rows, message):
    with pytest.raises(DataError) as error:
        evaluate(None, [*PROBLEMS, PROBLEMS[0]], completions=rows, scorer="exact", measures=["accuracy"])
    assert message in str(error.value)


def test_log_probs_are_per_token_that_was_scored(tiny):
    rows = [{"problem": i, "completion": "abc", "tokens": 7} for i in range(3)]  # of another tokenizer
    result = run(tiny, completions=rows, measures=["length", "likelihood"], base=tiny_model(seed=1))
    assert result.per_prompt["length"] == [7.0] * 3
    for name in ("logp", "base_logp"):
        assert result.per_prompt[name] == pytest.approx([c[name] / 3 for c in result.completions])
    for given, message in (({"ids": [5, 99]}, "hold the token 99, the model has 61"), ({}, "has 104 tokens with its")):
        rows = [{"problem": 0, "completion": "a" * 100, **given}]
        with pytest.raises(ConfigError, match=message):
            run(tiny, PROBLEMS[:1], completions=rows, measures=["likelihood"])


def test_a_folder_is_one_evaluations_at_a_time(tiny, tmp_path):
    class Nested(Counting):
        def sample(self, rows, **options):
            if not self.calls:
                with pytest.raises(OutputDirError, match="is in use by another evaluation; wait for it, or choose"):
                    run(tiny, sampler=Counting(), output_dir=tmp_path)
            return super().sample(rows, **options)

    sampler = Nested()
    run(tiny, sampler=sampler, output_dir=tmp_path)
    assert sampler.calls == 1
    run(tiny, sampler=Counting(), output_dir=tmp_path)  # it is free again


def test_damaged_files_are_data_errors(tiny, tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        run(tiny, sampler=Counting(), output_dir=folder)
    result = (bad / "evaluation.json").read_text()
    for text in ("{", "[]", "\udcff{}", result.replace('"settings": {', '"settings": 3, "x": {')):
        (bad / "evaluation.json").write_text(text, errors="surrogateescape")
        for call in (lambda: Evaluation.load(bad), lambda: write_comparison([good, bad], tmp_path / "page")):
            with pytest.raises(DataError, match=r"bad.*(damaged|not an evaluation)"):
                call()
        with pytest.raises(OutputDirError, match=r"damaged .*choose another output_dir"):
            run(tiny, sampler=Counting(), output_dir=bad)
    (bad / "evaluation.json").write_text(result)
    (bad / "completions.jsonl").write_text('{"problem": 0, "sample": 0}\n')
    with pytest.raises(DataError, match="is not an evaluation: KeyError: 'prompt'"):
        write_comparison([good, bad], tmp_path / "page")
    (tmp_path / "history").write_text("[]\n")
    with pytest.raises(DataError, match="history:1: not a row of a history, got list"):
        write_comparison([good, good], tmp_path / "page", histories={"x": tmp_path / "history"})
    (tmp_path / "history").write_text('{"step": 1, "length": "x"}\n')
    with pytest.raises(DataError, match="history 'x': 'step' and 'length' must be numbers, got 1 and 'x'"):
        write_comparison([good, good], tmp_path / "page", histories={"x": tmp_path / "history"})
    with pytest.raises(TypeError, match="evaluations must be folders or Evaluations, got 3"):
        write_comparison([good, 3], tmp_path / "page")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirError, match="file cannot be written: Not a directory"):
        write_comparison([good, good], tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sample": 3}, TypeError, "'sample'"),
        ({"ks": [4], "num_samples": 2}, PowerFlowError, "pass@4 needs at least 4"),
        ({"measures": ["speed"]}, PowerFlowError, "got 'speed'"),
    ],
)
def test_bad_options_are_named_before_training(options, error, message):
    with pytest.raises(error, match=message):
        during_training(PROBLEMS, scorer="exact", **options)
