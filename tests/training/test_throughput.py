"""Time shares and MFU against counts made by hand."""

from __future__ import annotations

import pytest
import torch
from runs import run
from tiny import tiny_model

from powerflow_fast.models import CausalLMScorer, add_lora
from powerflow_fast.tools.progress import ProgressLine
from powerflow_fast.training import throughput
from powerflow_fast.training.throughput import Throughput, peak_flops, training_flops_per_token


def test_peaks_by_device_name():
    known = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12}
    known |= {"NVIDIA H200": 989e12, "NVIDIA B200": 2250e12, "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 4090": 165e12}
    assert {name: peak_flops(name) for name in known} == pytest.approx(known)
    assert [peak_flops(name) for name in ("cpu", "NVIDIA L40", "NVIDIA GB200", "Tesla V100")] == [None] * 4


@pytest.mark.parametrize("arch", ["llama", "llama_tied"])
def test_flops_of_a_full_update(arch):
    """Against torch's own counter, on one sequence, attention scores subtracted."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model(arch)
    model.set_attn_implementation("eager")
    ids = torch.arange(5, 15)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" in str(op))
    body, head = training_flops_per_token(CausalLMScorer(model))
    # eager attention is the only bmm here; the rotary table's outer product is a bmm as well
    assert counter.get_total_flops() - attention == pytest.approx(10 * (body + head), rel=1e-6)


def test_flops_of_lora_and_mixtures():
    model = tiny_model()
    body, head = training_flops_per_token(CausalLMScorer(model))
    lora = training_flops_per_token(CausalLMScorer(add_lora(model, r=2)))
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert lora == pytest.approx((body * 4 / 6 + 6 * adapters, head * 4 / 6))
    model = tiny_model()
    model.config.num_local_experts = 8
    assert training_flops_per_token(CausalLMScorer(model)) is None


def test_means_since_the_last_row(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    scorer = CausalLMScorer(tiny_model())
    body, head = training_flops_per_token(scorer)
    meter = Throughput(scorer, "NVIDIA H200", 2)
    now[0] = 10.0
    meter.add({"rollout": 4.0, "score": 1.0, "update": 2.0}, 30, 50)
    meter.add({"rollout": 0.0, "score": 0.0, "update": 2.0}, 10, 10)
    row = meter.metrics()
    assert row["tokens_per_second"] == 20.0
    assert [row[f"share/{name}"] for name in ("rollout", "score", "update")] == pytest.approx([0.4, 0.1, 0.4])
    assert row["mfu"] == pytest.approx((100 * body + 60 * head) / 4.0 / 989e12)
    now[0] = 11.0
    meter.add({"rollout": 0.0, "score": 0.0, "update": 0.5}, 5, 5)
    assert meter.metrics()["tokens_per_second"] == 20.0, "earlier steps are not counted again"


def test_a_run_records_shares(tmp_path, capsys):
    result = run(tmp_path, max_steps=2, num_sample_prompts=0, self_check=False, logging_steps=2)
    (row,) = result.history
    shares = [row[f"share/{name}"] for name in ("rollout", "score", "update")]
    assert all(share > 0 for share in shares) and 0.5 < sum(shares) <= 1.0 + 1e-6
    assert "mfu" not in row, "a CPU has no peak in the table"
    assert "roll/score/upd" in capsys.readouterr().err


def test_the_line_shows_mfu(capsys):
    shares = {"share/rollout": 0.61, "share/score": 0.12, "share/update": 0.27}
    ProgressLine(2).update({"step": 2, "tokens_per_second": 5.0, "mfu": 0.314, **shares})
    assert "tok/s 5 | MFU 31% | roll/score/upd 61/12/27%" in capsys.readouterr().err
