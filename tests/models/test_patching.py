"""patch_causal_lm: the method against log-softmax of the model's own logits, and what it must leave alone."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import transformers as tf
from tiny import ARCHITECTURES, PAD, VOCAB, one_thread, ragged_ids, tiny_model  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from powerflow_fast.errors import ModelError
from powerflow_fast.models import add_lora, disable_dropout, patch_causal_lm, patching, unpatch_causal_lm
from powerflow_fast.models.patching import TokenLogprobs
from powerflow_fast.ops import torch_products

ROWS = ragged_ids([6, 1, 4], seed=1)
LENGTHS = [len(row) for row in ROWS]


def padded(side="right", rows=ROWS):
    """input_ids and attention_mask (B, T)."""
    width = max(map(len, rows))
    ids, mask = torch.full((2, len(rows), width), PAD)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def plain(model, row, temperature=1.0):
    """(T − 1, V) log-softmax of the model's own logits for one row without padding."""
    ids = torch.tensor([row])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
    return (logits.float() / temperature).log_softmax(-1)


def plain_logps(model, rows=ROWS, temperature=1.0):
    """The rows' log-probs, right-padded with zeros to (B, T − 1)."""
    out = torch.zeros(len(rows), max(map(len, rows)) - 1)
    for i, row in enumerate(rows):
        picked = plain(model, row, temperature).gather(-1, torch.tensor(row)[1:, None])[:, 0]
        out = out.index_put((torch.tensor([i]), torch.arange(len(row) - 1)), picked)
    return out


class Sizes(TorchDispatchMode):
    """The numbers of elements of all results."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tensor.numel())
        return out

    def __enter__(self):
        self.seen = set()
        return super().__enter__()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_equals_log_softmax_of_the_logits_with_all_gradients(arch):
    model = disable_dropout(tiny_model(arch)).train()
    weights = torch.linspace(-1, 1, 15).view(3, 5)
    want = plain_logps(model, temperature=0.7)
    (want * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    got = patch_causal_lm(model).logprobs(**padded(), temperature=0.7)
    assert got.dtype == torch.float32 and got.shape == (3, 5)
    assert torch.allclose(got, want, atol=2e-5, rtol=1e-5)
    (got * weights).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (gradients[name] is None), name
        if p.grad is not None:
            tolerance = 1e-5 + 1e-4 * float(gradients[name].abs().max())
            assert torch.allclose(p.grad, gradients[name], atol=tolerance), name


def test_labels_are_aligned_with_input_ids():
    """A model whose next token is certain: token i is followed by i + 1, so a shift by one would show."""
    model = tiny_model("llama")
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p.zero_()
        embedding = torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(0))
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(100 * (embedding / embedding.norm(dim=1, keepdim=True)).roll(1, dims=0))
    patch_causal_lm(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert model.logprobs(ids).min() > -1e-2
    labels = torch.tensor([[-100, -100, 7, 9]])
    logps = model.logprobs(ids, labels)
    assert logps[0, 0] == 0 and logps[0, 1] > -1e-2 and logps[0, 2] < -10
    # a label at the first place has nothing that predicts it
    assert torch.equal(model.logprobs(ids, labels.clone().index_fill_(1, torch.tensor(0), 3)), logps)


def test_padding_never_counts():
    model = patch_causal_lm(tiny_model())
    want = plain_logps(model)
    right = model.logprobs(**padded())
    assert torch.equal(right == 0, want == 0)
    left = padded("left")
    position_ids = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    got = model.logprobs(**left, position_ids=position_ids)
    for i, n in enumerate(LENGTHS):
        assert torch.allclose(got[i, 6 - n :], want[i, : n - 1], atol=1e-5)
        assert not got[i, : 6 - n].any()
    explicit = model.logprobs(**left, labels=left["input_ids"], position_ids=position_ids)
    assert torch.equal(explicit, got)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_packed_rows_do_not_see_each_other(arch):
    model = disable_dropout(patch_causal_lm(tiny_model(arch))).train()
    ids = torch.tensor([[token for row in ROWS for token in row]])
    position_ids = torch.tensor([[t for n in LENGTHS for t in range(n)]])
    got = model.logprobs(ids, position_ids=position_ids)[0]
    want = plain_logps(model)
    assert torch.allclose(got[:5], want[0], atol=1e-5)
    assert got[5] == 0 and got[6] == 0, "the first tokens of the second and third sequence"
    assert torch.allclose(got[7:], want[2, :3], atol=1e-5)
    with pytest.raises(ValueError, match="must not restart under an attention_mask, got both in row 0"):
        model.logprobs(ids, position_ids=position_ids, attention_mask=torch.ones_like(ids))


def test_on_a_device_a_restart_under_a_mask_gives_nan(monkeypatch):
    model = patch_causal_lm(tiny_model())
    monkeypatch.setattr(patching, "values_are_readable", lambda tensor: False)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    position_ids = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]])
    logps = model.logprobs(ids, attention_mask=torch.ones_like(ids), position_ids=position_ids)
    assert torch.isfinite(logps[0]).all() and logps[1].isnan().all()


def test_reductions_and_entropy():
    model = patch_causal_lm(tiny_model("gemma2"))
    want = plain_logps(model, temperature=0.8)
    entropy = torch.zeros_like(want)
    for i, row in enumerate(ROWS):
        logits = plain(model, row, 0.8)
        entropy[i, : len(row) - 1] = -(logits.exp() * logits).sum(-1)
    counts = torch.tensor(LENGTHS) - 1
    reduce = {"none": lambda x: x, "sum": lambda x: x.sum(1), "mean": lambda x: x.sum(1) / counts.clamp(min=1)}
    for reduction, function in reduce.items():
        got = model.logprobs(**padded(), temperature=0.8, reduction=reduction, return_entropy=True)
        assert isinstance(got, TokenLogprobs) and got.logprobs.requires_grad and not got.entropy.requires_grad
        assert torch.allclose(got.logprobs, function(want), atol=1e-4)
        assert torch.allclose(got.entropy, function(entropy), atol=1e-4)
        with torch.no_grad():
            without = model.logprobs(**padded(), temperature=0.8, reduction=reduction, return_entropy=True)
        assert torch.allclose(without.logprobs, got.logprobs, atol=1e-6) and not without.logprobs.requires_grad
        assert torch.equal(model.logprobs(**padded(), temperature=0.8, reduction=reduction), got.logprobs)


@pytest.mark.parametrize("compiled", [False, True])
def test_no_logits_exist(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(torch_products, "compiled_products_run", lambda: False)
    elif not torch_products.compiled_products_run():
        pytest.skip("the compiled products need AVX-512")
    model = patch_causal_lm(tiny_model())
    batch = padded()
    with Sizes() as sizes:
        model.logprobs(**batch).sum().backward()
    rows = batch["input_ids"].numel()
    counted = sum(LENGTHS) - len(LENGTHS)
    assert rows * 16 in sizes.seen  # the recorder works: hidden states
    assert rows * VOCAB not in sizes.seen
    # the torch backend walks over tiles in a buffer of its own, which on a tiny vocabulary is the whole of it;
    # the compiled products pack an operand into a whole block
    assert max(sizes.seen) <= max(counted * VOCAB, VOCAB * 16, rows * 24, 64 * 64 * compiled)


def test_the_model_is_left_as_it_was(tmp_path):
    model = tiny_model("llama_tied")
    before, keys, forward = model(**padded()).logits, set(model.state_dict()), type(model).forward
    attributes = set(vars(model))
    assert patch_causal_lm(model) is model
    method = model.logprobs
    assert patch_causal_lm(model).logprobs is method, "idempotent"
    model.logprobs(**padded())
    assert torch.equal(model(**padded()).logits, before)
    assert set(model.state_dict()) == keys and type(model).forward is forward
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**padded()).logits, before) and not hasattr(loaded, "logprobs")
    assert unpatch_causal_lm(model) is model and set(vars(model)) == attributes
    assert unpatch_causal_lm(model) is model
    with pytest.raises(AttributeError):
        model.logprobs(**padded())


def test_an_error_inside_leaves_the_model_usable():
    model = patch_causal_lm(tiny_model())
    want = model.logprobs(**padded())
    with pytest.raises(ValueError, match="temperature must be finite and > 0"):
        model.logprobs(**padded(), temperature=0.0)
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)
    assert torch.equal(model.logprobs(**padded()), want)


def test_copies_and_pickles_have_the_method_of_their_own_weights():
    model = patch_causal_lm(tiny_model())
    want = model.logprobs(**padded())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.logprobs(**padded()), want)
        with torch.no_grad():
            other.lm_head.weight.zero_()
        assert torch.allclose(other.logprobs(**padded())[0, 0], -torch.tensor(float(VOCAB)).log())
        assert torch.equal(model.logprobs(**padded()), want)


def test_the_method_does_not_keep_the_model_alive():
    model = patch_causal_lm(tiny_model())
    model.logprobs(**padded())
    method, alive = model.logprobs, weakref.ref(model)
    del model
    assert alive() is None
    with pytest.raises(ReferenceError, match="keep a reference"):
        method(torch.tensor([[1, 2]]))


def test_a_replaced_head_is_found_again():
    model = patch_causal_lm(tiny_model())
    model.resize_token_embeddings(VOCAB + 9)
    rows = [[VOCAB + 3, 5, VOCAB + 8]]
    got = model.logprobs(**padded(rows=rows))
    assert torch.allclose(got, plain_logps(model, rows), atol=1e-5)


def test_autocast_checkpointing_and_half_precision():
    model = patch_causal_lm(tiny_model()).train()
    want = model.logprobs(**padded())
    want.sum().backward()
    grad = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.logprobs(**padded()).sum().backward()
    assert torch.allclose(model.model.layers[0].mlp.up_proj.weight.grad, grad, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.logprobs(**padded())
    assert rounded.dtype == torch.float32 and 0 < (rounded - want).abs().max() < 0.5
    half = copy.deepcopy(model).to(torch.bfloat16)
    rounded = half.logprobs(**padded())
    assert rounded.dtype == torch.float32 and 0 < (rounded - want).abs().max() < 0.5


@pytest.mark.parametrize("patch_first", [False, True])
def test_peft(patch_first):
    model = tiny_model()
    want = plain_logps(model)
    policy = patch_causal_lm(add_lora(patch_causal_lm(model) if patch_first else model, r=2))
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_()
    moved = policy.logprobs(**padded())
    assert torch.allclose(moved, plain_logps(policy), atol=1e-4) and (moved - want).abs().max() > 0.1
    with policy.disable_adapter(), torch.no_grad():
        assert torch.allclose(policy.logprobs(**padded()), want, atol=1e-5)
    moved.sum().backward()
    trained = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in policy.named_parameters() if "lora_" in name}


def test_hooks_see_a_call_of_the_model():
    """What wraps a forward pass (FSDP2, accelerate, profilers) is in effect, with the log-probs as the output."""
    model = patch_causal_lm(tiny_model())
    outputs = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    logps = model.logprobs(**padded())
    assert len(outputs) == 1 and outputs[0] is logps
    inner, calls = model.forward, []

    def wrapped(**inputs):  # as accelerate puts its autocast around forward
        calls.append(sorted(inputs))
        with torch.autocast("cpu", torch.bfloat16):
            return inner(**inputs)

    model.forward = wrapped
    assert not torch.equal(model.logprobs(**padded()), logps)
    assert calls == [["attention_mask", "input_ids", "use_cache"]] and model.forward is wrapped


def test_refuses_models_that_it_cannot_score():
    with pytest.raises(ModelError, match="encoder-decoder"):
        patch_causal_lm(tiny_model("t5"))
    with pytest.raises(ModelError, match=r"got Linear; patch the model before it is wrapped"):
        patch_causal_lm(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="before it is wrapped or compiled"):
        patch_causal_lm(torch.compile(tiny_model()))
    model = tiny_model()
    model.logprobs = "mine"
    with pytest.raises(ModelError, match="attribute 'logprobs' of its own"):
        patch_causal_lm(model)
    unpatch_causal_lm(model)
    assert model.logprobs == "mine"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": torch.tensor([5, 6])}, ValueError, r"logprobs: input_ids must be .*\(B, T\).*got \(2,\)"),
        ({"input_ids": [[5, 6]]}, ValueError, "got list"),
        ({"input_ids": torch.rand(3, 6)}, TypeError, "input_ids must be torch.int64 or"),
        ({"labels": torch.zeros(3, 5, dtype=torch.long)}, ValueError, r"labels must have shape \(B, T\)=\(3, 6\)"),
        ({"attention_mask": torch.ones(3, 1, 6, 6)}, ValueError, r"attention_mask must have shape \(B, T\)=\(3, 6\)"),
        ({"position_ids": torch.zeros(1, 6, dtype=torch.long)}, ValueError, r"position_ids must have shape \(B, T\)"),
        ({"reduction": "token"}, ValueError, "reduction must be 'none', 'sum' or 'mean', got 'token'"),
        ({"use_cache": True}, TypeError, "use_cache is always False"),
        ({"logits_to_keep": 2}, ModelError, r"must call its output head once.*\(3, 6\); it passed \[\(3, 2\)\]"),
        ({"labels": torch.full((3, 6), VOCAB)}, ValueError, "labels must lie in"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_errors(change, error, message):
    model = patch_causal_lm(tiny_model())
    with pytest.raises(error, match=message):
        model.logprobs(**(padded() | change))


_FSDP_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from powerflow_fast.models import patch_causal_lm
from tiny import ragged_ids, tiny_model

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
ids = torch.tensor(ragged_ids([5, 5], seed=3))


def gradients(model, rows, scale):
    logps = model.logprobs(rows, temperature=0.9, reduction="sum")
    (logps.square().sum() * scale).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


for arch, patch_first, head_alone in (("llama", True, False), ("llama_tied", False, False), ("llama", False, True)):
    want = gradients(patch_causal_lm(tiny_model(arch).train()), ids, 1)
    model = tiny_model(arch).train()
    if patch_first:
        patch_causal_lm(model)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    if head_alone:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    patch_causal_lm(model)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        got = gradients(model, ids[rank : rank + 1], 2)
        assert type(model.lm_head.weight).__name__ == "DTensor", "sharded again"
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5, msg=name)
    print("equal", arch)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_fsdp2_patched_before_or_after_sharding(tmp_path):
    (tmp_path / "script.py").write_text(_FSDP_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(tmp_path / "script.py"), str(Path(__file__).parents[1] / "helpers")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 6
