from __future__ import annotations

import importlib
import inspect
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from tiny import one_thread, tiny_model, tiny_tokenizer  # noqa: F401 - a fixture that works by itself

from powerflow_fast.cli import main
from powerflow_fast.evaluation import Judge, evaluate

STAGES = importlib.import_module("powerflow_fast.evaluation.evaluate")  # where the name is a function too


@pytest.fixture
def calls(monkeypatch):
    """Stands in for evaluate and records its calls."""
    seen = []

    def fake(model, problems, **options):
        seen.append((model, problems, options))
        return SimpleNamespace(
            name="m, t",
            problems="p",
            settings={"num_samples": 2},
            tokens_generated=9,
            seconds=1.0,
            completions=[{}] * 4,
            statistics={"moves": 8, "accepted": 2},
            table=lambda: "TABLE",
        )

    monkeypatch.setattr(STAGES, "evaluate", fake)
    return seen


def run(*words):
    return main(["eval", "--model", "m", "--problems", "math500", *words])


def test_eval_passes_on_what_is_given_and_nothing_else(calls, capsys):
    assert run() == 0
    assert calls == [("m", "math500", {"scorer": "auto", "judge": None, "progress": True})]
    out = capsys.readouterr().out
    assert "m, t on p, 2 completions of each problem" in out and "TABLE" in out


@pytest.mark.parametrize(
    ("words", "option", "value"),
    [
        (["--samples", "4"], "num_samples", 4),
        (["--num_samples=4"], "num_samples", 4),
        (["--sampler", "power:alpha=4"], "sampler", "power:alpha=4"),
        (["--ks", "1", "4"], "ks", [1, 4]),
        (["--measures", "accuracy", "likelihood"], "measures", ["accuracy", "likelihood"]),
        (["--scorer", "none"], "scorer", None),
        (["--scorer", "boxed"], "scorer", "boxed"),
        (["--output_dir", "out"], "output_dir", "out"),
        (["--alpha", "0.5"], "alpha", 0.5),
        (["--score-temperature", "0.7"], "score_temperature", 0.7),
        (["--trust-remote-code"], "trust_remote_code", True),
        (["--completions", "c.jsonl"], "completions", "c.jsonl"),
        (["--system-prompt", "be_brief"], "system_prompt", "be_brief"),
    ],
)
def test_options_of_eval(calls, words, option, value):
    assert run(*words) == 0
    assert calls[0][2][option] == value


def test_every_option_of_eval_is_one_of_evaluate(calls, monkeypatch):
    known = inspect.signature(evaluate).parameters
    monkeypatch.setattr(STAGES, "evaluate", lambda *a, **k: calls.append(k) or 1 / 0)
    numbers = "samples max-completion-length batch-size limit seed ks confidence alpha score-temperature"
    texts = "output-dir sampler scorer measures base completions name dtype system-prompt"
    words = [w for name in numbers.split() for w in (f"--{name}", "1")]
    words += [w for name in texts.split() for w in (f"--{name}", "x")]
    with pytest.raises(ZeroDivisionError):
        run(*words, "--trust-remote-code")
    assert set(calls[0]) <= set(known) and len(calls[0]) == len(words) // 2 + 3


def test_a_scorer_from_a_file(calls, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("def score(prompt, completion, answer):\n    return answer in completion\n")
    assert run("--scorer", f"{file}:score") == 0
    assert calls[0][2]["scorer"]("p", "it is 4", answer="4") is True
    assert run("--scorer", f"{file}:scores") == 2
    assert "mine.py has no function 'scores', it has score" in capsys.readouterr().err
    assert run("--scorer", f"{tmp_path}/none.py:score") == 2
    assert "none.py does not exist" in capsys.readouterr().err
    file.write_text("1 / 0")
    assert run("--scorer", f"{file}:score") == 2
    assert "mine.py cannot be run (ZeroDivisionError: division by zero)" in capsys.readouterr().err


def test_a_judge(calls, tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    words = ["--judge-url", "http://localhost:1/v1", "--judge-model", "big", "--judge-key-file", str(key)]
    assert run(*words, "--output-dir", str(tmp_path / "out")) == 0
    judge = calls[0][2]["judge"]
    assert isinstance(judge, Judge) and (judge.base_url, judge.model) == ("http://localhost:1/v1", "big")
    assert judge.cache == tmp_path / "out" / "judge.jsonl" and judge._client.api_key == "secret"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "--model", "m"], "--problems is required"),
        (["eval", "--problems", "math500"], "--model is required, or --completions"),
        (["eval", "--sample", "3"], "unknown option --sample; did you mean '--samples'?"),
        (
            ["eval", "--samples", "many"],
            "argument --samples/--num-samples: invalid int value: 'many' (see powerflow-fast",
        ),
        (["eval", "--model", "m", "--problems", "p", "--judge-url", "http://x"], "--judge-url needs --judge-model"),
        (["eval", "--model", "m", "--problems", "p", "--judge-model", "x"], "--judge-model needs --judge-url"),
        (["compare", "a", "--output-dir", "o"], "compare needs two or more folders of evaluations, got one"),
        (["compare", "a", "b"], "required: --output-dir"),
        (
            ["compare", "a", "b", "--output-dir", "o", "--history", "x"],
            "--history must have the form NAME=FILE, got 'x'",
        ),
        (["compare", "a", "b", "--output-dir", "o", "--titel", "x"], "unknown option --titel; did you mean '--title'?"),
    ],
)
def test_usage_errors_are_one_line(calls, capsys, words, message):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("powerflow-fast: error: ") and err.count("\n") == 1
    assert message in err and not calls


@pytest.fixture
def endpoint():
    """A server of chat completions that refuses all requests after ``state["left"]`` of them."""
    state, lock = {"left": 4, "served": 0}, threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            with lock:
                state["left"] -= 1
                down = state["left"] < 0
                state["served"] += not down
            text = "GROUPS: [[1], [2]]" if "GROUPS" in body else "SCORE: 7"
            reply = {"error": "closed"} if down else {"choices": [{"message": {"role": "assistant", "content": text}}]}
            self.send_response(403 if down else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", state
    server.shutdown()
    server.server_close()


def test_a_judge_that_goes_down_is_asked_for_the_rest_only(endpoint, tmp_path, capsys):
    url, state = endpoint
    (tmp_path / "problems.txt").write_text("Write a line.\nWrite a joke.\nWrite a poem.\n")
    made = [{"problem": k, "completions": [f"one {k}", f"two {k}"]} for k in range(3)]
    (tmp_path / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    words = ["eval", "--problems", str(tmp_path / "problems.txt"), "--completions", str(tmp_path / "made.jsonl")]
    words += ["--measures", "judge", "--judge-url", url, "--judge-model", "j", "--output-dir", str(tmp_path / "out")]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "Nothing is lost: the 6 completions are in" in err and "judge.jsonl" in err and err.count("\n") == 1
    assert len((tmp_path / "out" / "completions.jsonl").read_text().splitlines()) == 6
    state["left"] = 99
    assert main(words) == 0
    assert state["served"] == 6 + 3  # each completion's grade and each problem's strategies, once
    rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert (rows["quality"], rows["strategies"]) == ("7.000", "2.000")


def test_evaluating_and_comparing_for_real(tmp_path, capsys):
    tiny_model(spread=0.3).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"{k}+1=", "answer": k + 1}) + "\n" for k in range(3)))
    common = ["eval", "--model", str(tmp_path / "model"), "--problems", str(problems), "--samples", "2"]
    common += ["--max-completion-length", "6", "--scorer", "exact", "--ks", "1", "2"]
    folders = [str(tmp_path / name) for name in ("one", "two")]
    assert main([*common, "--output-dir", folders[0]]) == 0
    out = capsys.readouterr().out
    assert "model, temperature 1 on problems, 2 completions of each problem" in out and "pass@2" in out
    assert main([*common, "--output-dir", folders[1], "--sampler", "temperature=0.5"]) == 0
    assert main([*common, "--output-dir", folders[1]]) == 2
    assert "sampler was 'temperature 0.5', now 'temperature 1'" in capsys.readouterr().err
    assert main(["compare", *folders, "--output-dir", str(tmp_path / "page"), "--title", "Two"]) == 0
    assert f"done: {tmp_path / 'page' / 'comparison.html'}" in capsys.readouterr().out
    assert "Two" in (tmp_path / "page" / "comparison.html").read_text()
