"""PEFT adapters: whether a model has one, what is inside, and a new LoRA."""

from __future__ import annotations

from torch import nn

from ..errors import ModelError


def is_peft(model: nn.Module) -> bool:
    """True for a ``peft.PeftModel`` (told by its methods: peft is an optional dependency)."""
    return hasattr(model, "disable_adapter") and hasattr(model, "get_base_model")


def unwrap_peft(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PeftModel (adapter layers still in place), or ``model`` itself."""
    return model.get_base_model() if is_peft(model) else model


def add_lora(
    model: nn.Module,
    *,
    r: int = 16,
    alpha: int = 32,
    target_modules: str | list[str] = "all-linear",
) -> nn.Module:
    """Wrap ``model`` in a trainable LoRA adapter (a ``peft.PeftModel``); the output head never gets one.

    ``target_modules`` is ``"all-linear"``, a list of module names, or a regular expression. A fresh adapter changes
    nothing until it is trained. Raises ModelError where peft is missing, the model already has an adapter, or no
    module matches.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ModelError("add_lora: LoRA needs peft; run: pip install 'powerflow-fast[lora]'") from error
    if is_peft(model):
        raise ModelError(
            "add_lora: the model already has an adapter; train it as it is, or call its merge_and_unload()"
        )
    head = model.get_output_embeddings()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        target_modules=target_modules,
        exclude_modules=[name for name, module in model.named_modules() if module is head],
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"add_lora: target_modules={target_modules!r} cannot be used ({error})") from error
