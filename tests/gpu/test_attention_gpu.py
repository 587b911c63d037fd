"""Packed rows through torch's variable-length attention on a CUDA device: the log-probs of separate sequences."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from powerflow_fast.models import CausalLMScorer
from powerflow_fast.models.packed_attention import VARLEN, attending, packed_attention, register_varlen
from powerflow_fast.training.self_check import check_packing

pytestmark = pytest.mark.gpu
PROMPTS = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [3, 4, 5, 6]]


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_packed_rows_are_scored_as_separate_ones(arch):
    model = tiny_model(arch).to("cuda", torch.bfloat16)
    assert packed_attention(model).startswith(("flash_attention", VARLEN))
    with attending([model], register_varlen()):
        check_packing(CausalLMScorer(model), temperature=1.0, sample_prompts_ids=PROMPTS)
