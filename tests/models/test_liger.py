"""Which parts of Liger are asked for, on which models, and that everything is put back; no kernel is run here."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from runs import run
from tiny import tiny_model
from transformers.models.llama import modeling_llama

from powerflow_fast.errors import BackendUnavailableError, OutputDirError
from powerflow_fast.models import add_lora
from powerflow_fast.models.liger import apply_liger

CUDA = torch.device("cuda")
NAME = "liger_kernel.transformers.monkey_patch"


@pytest.fixture
def stand_in(monkeypatch):
    """Records what is patched; its functions compute what they replace."""
    seen = []

    def apply_llama(
        rope=True, cross_entropy=True, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None
    ):
        seen.append((model, {k for k, v in locals().items() if v is True}))
        own = modeling_llama.apply_rotary_pos_emb
        modeling_llama.apply_rotary_pos_emb = lambda *args, **keywords: own(*args, **keywords)
        for layer in model.model.layers:
            layer.mlp.__dict__["forward"] = type(layer.mlp).forward.__get__(layer.mlp)
            layer.input_layernorm.variance_epsilon = 2e-6

    library = SimpleNamespace(
        MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": apply_llama},
        _apply_liger_kernel_to_instance=lambda model, **flags: apply_llama(model=model, **flags),
    )
    monkeypatch.setitem(sys.modules, NAME, library)
    return seen


def test_only_norm_rope_and_mlp_and_all_is_put_back(stand_in):
    policy, base, rope = tiny_model(), tiny_model(), modeling_llama.apply_rotary_pos_emb
    before = [dict(vars(module)) for model in (policy, base) for module in model.modules()]
    undo = apply_liger([policy, base], "on", CUDA)
    assert [model for model, _ in stand_in] == [policy, base]
    assert all(parts == {"rope", "rms_norm", "swiglu"} for _, parts in stand_in)
    assert "forward" in vars(base.model.layers[1].mlp) and modeling_llama.apply_rotary_pos_emb is not rope
    undo()
    assert before == [dict(vars(module)) for model in (policy, base) for module in model.modules()]
    assert modeling_llama.apply_rotary_pos_emb is rope


def test_an_adapter_model_that_is_its_own_base_is_patched_once(stand_in):
    model = add_lora(tiny_model(), r=2)
    apply_liger([model, model], "auto", CUDA)()
    assert [patched for patched, _ in stand_in] == [model.get_base_model()]


def test_causes_of_a_refusal(stand_in, monkeypatch, caplog):
    cases = [
        (tiny_model(), torch.device("cpu"), "need CUDA, the model is on cpu"),
        (tiny_model("gpt2"), CUDA, "no kernels for model type 'gpt2'"),
    ]
    for model, device, cause in cases:
        with pytest.raises(BackendUnavailableError, match=f"use_liger_kernel='on' cannot be: .*{cause}"):
            apply_liger([model], "on", device)
        with caplog.at_level("INFO"):
            apply_liger([model], "auto", device)()
        assert cause in caplog.text
        apply_liger([model], "off", device)()
    monkeypatch.setitem(sys.modules, NAME, None)
    with pytest.raises(BackendUnavailableError, match="pip install liger-kernel"):
        apply_liger([tiny_model()], "on", CUDA)
    assert not stand_in


def test_the_real_library_takes_our_flags():
    library = pytest.importorskip(NAME)
    assert "llama" in library.MODEL_TYPE_TO_APPLY_LIGER_FN
    model, rope = tiny_model(), modeling_llama.apply_rotary_pos_emb
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    kinds = dict(vars(modeling_llama))
    undo = apply_liger([model], "on", CUDA)
    assert modeling_llama.apply_rotary_pos_emb is not rope
    assert "forward" in vars(model.model.norm) and "forward" in vars(model.model.layers[0].mlp)
    assert "forward" not in vars(model), "the fused cross entropy would sit here"
    undo()
    assert dict(vars(modeling_llama)) == kinds and torch.equal(model(ids).logits, expected)


def test_a_run_is_patched_while_it_lasts(tmp_path, stand_in, monkeypatch):
    """Through train(), on a CPU that says it is a GPU to Liger alone; also when the set-up fails after the patch."""
    from powerflow_fast.training import run as training_run

    monkeypatch.setattr(training_run, "apply_liger", lambda models, mode, device: apply_liger(models, mode, CUDA))
    rope, seen = modeling_llama.apply_rotary_pos_emb, []
    watch = [lambda report: seen.append(modeling_llama.apply_rotary_pos_emb is not rope) and None]
    result = run(tmp_path, use_liger_kernel="auto", max_steps=1, callbacks=watch)
    assert seen == [True] and modeling_llama.apply_rotary_pos_emb is rope and len(stand_in) == 2
    assert "forward" not in vars(result.model.model.layers[0].mlp)
    with pytest.raises(OutputDirError):
        run(tmp_path, use_liger_kernel="on", max_steps=1)
    assert modeling_llama.apply_rotary_pos_emb is rope and len(stand_in) == 4


def test_train_refuses_on_a_cpu(tmp_path):
    with pytest.raises(BackendUnavailableError, match="need CUDA"):
        run(tmp_path, use_liger_kernel="on")
    assert not (tmp_path / "run").exists()
