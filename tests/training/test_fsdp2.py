"""FSDP2 (``fully_shard``) around the policy: two gloo processes give the gradients of one, tied and untied heads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from powerflow_fast import LogZHead, la_tb_loss
from powerflow_fast.models import CausalLMScorer
from powerflow_fast.models import pad_batch
from powerflow_fast.models.sharding import assembled, shard, whole
from powerflow_fast.training.policy import Policy
from tiny import ragged_ids, tiny_model

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()

prompts, completions = ragged_ids([3, 5, 2, 4]), ragged_ids([4, 0, 7, 2], seed=1)
base_logps = torch.tensor([-9.0, 0.0, -20.0, -5.0])


def policy():
    model = tiny_model(sys.argv[2]).train()
    torch.manual_seed(1)
    head = LogZHead(16, num_layers=2)
    torch.nn.init.normal_(head.layers[-1].weight)
    return Policy(CausalLMScorer(model), head)


def gradients(wrapped, rows, scale):
    batch = pad_batch(prompts[rows], completions[rows], 0)
    out = wrapped(batch, temperature=0.9)
    loss = la_tb_loss(out.logps, base_logps[rows], out.log_z, batch.cu_seqlens, alpha=2.0, num_sequences=3).loss
    (loss * scale).backward()
    total = loss.detach().clone()
    if scale > 1:
        dist.all_reduce(total)
    grads = {name: p.grad for name, p in wrapped.named_parameters()}
    return total, {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


loss, expected = gradients(policy(), slice(0, 4), 1)
sharded = policy()
shell = shard(sharded, sharded.scorer.model, torch.device("cpu"))
weight = sharded.scorer.head.weight
assert type(weight).__name__ == "DTensor" and weight.to_local().shape[0] < weight.shape[0], "the head is sharded"
for _ in range(2):  # the second time, the root's weights come back from their shards
    for p in sharded.parameters():
        p.grad = None
    got_loss, got = gradients(sharded, slice(0, 2) if rank == 0 else slice(2, 4), world)
    torch.testing.assert_close(got_loss, loss, rtol=1e-6, atol=0)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=5e-6, msg=name)
model = sharded.scorer.model
with torch.no_grad():
    model.lm_head.weight.mul_(2)
made, weights = assembled(shell, model, keep=rank == 0), whole(model.state_dict())
assert (made is None) == (rank == 1)
if made is not None:
    assert made.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in made.state_dict().items())
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == ("tied" in sys.argv[2])
print("equal", len(got))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("arch", ["llama", "llama_tied"])
def test_two_shards_give_the_gradients_of_one_process(tmp_path, arch):
    (tmp_path / "script.py").write_text(_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [tmp_path / "script.py", Path(__file__).parents[1] / "helpers", arch]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2
