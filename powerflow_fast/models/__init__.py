"""Hugging Face models and their log-probs."""

from .adapters import add_lora
from .batches import Batch, pack_batch, pad_batch
from .loading import load_model, save_model
from .logprob_model import BaseScorer, CausalLMScorer, make_base
from .modes import disable_dropout
from .patching import patch_causal_lm, unpatch_causal_lm

__all__ = [
    "BaseScorer",
    "Batch",
    "CausalLMScorer",
    "add_lora",
    "disable_dropout",
    "load_model",
    "make_base",
    "pack_batch",
    "pad_batch",
    "patch_causal_lm",
    "save_model",
    "unpatch_causal_lm",
]
