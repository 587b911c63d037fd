"""What the examples share: their command line, and a model by name or a tiny random one that needs no download."""

from __future__ import annotations

import argparse
import string

import torch

from powerflow_fast.models import disable_dropout, load_model


def arguments(description: str, *, steps: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="hub name or folder; none: a tiny random model")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--learning-rate", type=float, help="default: 1e-6, or 3e-3 for the tiny model")
    args = parser.parse_args()
    args.learning_rate = args.learning_rate or (1e-6 if args.model else 3e-3)
    return args


def load(name: str | None):
    """(model, tokenizer), without dropout: what is sampled must be what is scored."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name is None:
        model, tokenizer = _tiny()
    else:
        loaded = load_model(name, dtype=torch.float32)
        model, tokenizer = loaded.model, loaded.tokenizer
    return disable_dropout(model).to(device), tokenizer


def _tiny():
    """A two-layer Llama with random weights, one token per printable character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.set_num_threads(1)  # on matrices this small, threads only wait for each other
    torch.manual_seed(0)
    vocabulary = {token: i for i, token in enumerate(["<eos>", *string.printable])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config), tokenizer
