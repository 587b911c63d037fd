"""Loading and saving a causal LM: its weights, tokenizer, padding id, positions, and the digest of its weights."""

from __future__ import annotations

import copy
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .adapters import is_peft, unwrap_peft

_REMOTE_CODE = "it brings its own Python code; read that code, then pass trust_remote_code=True if you want to run it"


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and the name or path it was asked for by."""

    model: Any
    tokenizer: Any
    name: str


def load_model(
    model: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
) -> LoadedModel:
    """Load a decoder-only causal LM and its tokenizer.

    Args:
        model: a hub name, a local folder, or a loaded ``PreTrainedModel`` or ``PeftModel`` (used as it is, not copied).
        tokenizer: used instead of the one that lies beside the model.
        dtype: of the loaded weights; ``"auto"`` keeps the stored one. A loaded model keeps its own.
        trust_remote_code: allow Python code that comes with the model to run.
        device: where to put the model; None leaves it where it is.

    Weights are read from safetensors only. Raises ModelError that says what was looked for and what to do.
    """
    if isinstance(model, nn.Module):
        if not hasattr(unwrap_peft(model), "config"):
            raise ModelError(
                "load_model: model must be a name, a folder, or a Hugging Face PreTrainedModel or PeftModel, got "
                f"{type(model).__name__}"
            )
        path = getattr(unwrap_peft(model), "name_or_path", "")
        name = path or type(model).__name__
        if tokenizer is None:
            remedy = "pass tokenizer=..., for the loaded model does not tell where its tokenizer lies"
            if not path:
                raise ModelError(f"load_model: {name} has no name_or_path; {remedy}")
            tokenizer = _load_tokenizer(path, trust_remote_code, remedy)
    else:
        name = _checked_name(model)
        model = _load_weights(name, dtype, trust_remote_code)
        if tokenizer is None:
            tokenizer = _load_tokenizer(
                name, trust_remote_code, "put tokenizer.json into that folder or pass tokenizer="
            )
    return LoadedModel(model if device is None else model.to(device), tokenizer, name)


def _checked_name(model: str | Path) -> str:
    """A hub name, or the path of a folder that holds a model in a form that we read."""
    name = str(model)
    folder = Path(name).expanduser()
    if not folder.exists():
        if isinstance(model, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
            raise ModelError(f"load_model: folder {name!r} does not exist; give a local folder or a hub name")
        return name
    if not (folder / "config.json").is_file():
        remedy = "give the folder that save_pretrained wrote"
        if (folder / "adapter_config.json").is_file():
            remedy = "it holds an adapter: load it with peft.AutoPeftModelForCausalLM and pass the loaded model"
        raise ModelError(f"load_model: {name!r} is not a model folder, it has no config.json; {remedy}")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        found = f"only {pickled[0]}, a pickle, which can run code when it is read" if pickled else "no weights"
        raise ModelError(
            f"load_model: {name!r} has no .safetensors file ({found}); load the model with transformers where you "
            "trust it, and write it again with model.save_pretrained(folder)"
        )
    return str(folder)


def _load_weights(name: str, dtype: str | torch.dtype, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"load_model: {name!r} is an encoder-decoder model ({config.model_type}); only decoder-only causal "
                "LMs are supported"
            )
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except ModelError:
        raise
    except Exception as error:  # every kind of broken file or download raises its own type
        raise ModelError(_load_failure(name, error)) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"load_model: {name!r} lacks {len(missing)} weights of a causal LM, such as {missing[0]!r}; they would be "
            "random. Was it saved without its head?"
        )
    return model


def _load_tokenizer(name: str, trust_remote_code: bool, remedy: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise ModelError(f"{_load_failure(name, error, 'tokenizer of ')}; {remedy}") from error


def _load_failure(name: str, error: Exception, what: str = "") -> str:
    if "trust_remote_code" in str(error):
        return f"load_model: cannot load the {what}model {name!r}: {_REMOTE_CODE}"
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if Path(name).exists():
        return f"load_model: cannot load the {what}model in folder {name!r} ({reason})"
    return (
        f"load_model: cannot load the {what}model {name!r}: there is no such local folder, and the hub did not give it "
        f"({reason}); check the spelling and the network, or give a local folder"
    )


def pad_token_id(tokenizer: Any, model: nn.Module | None = None) -> int:
    """A token id to fill padding with: the tokenizer's pad, else eos, else unk, else 0. Padding is always masked.

    Nothing is added to the tokenizer. With ``model``, ids without a row in its input embedding are passed over.
    """
    rows = None if model is None else unwrap_peft(model).get_input_embeddings().weight.shape[0]
    for name in ("pad_token_id", "eos_token_id", "unk_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None and (rows is None or token < rows):
            return int(token)
    return 0


def max_positions(model: nn.Module) -> int | None:
    """Most tokens, prompt and completion, that the model's config allows, or None where it states no limit."""
    config = unwrap_peft(model).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "max_position_embeddings", None)


def weights_fingerprint(model: nn.Module) -> str:
    """Tells one base model from another: a digest of the first numbers of each of its weights, adapters left out."""
    digest = hashlib.sha256()
    for name, parameter in unwrap_peft(model).named_parameters():
        if "lora_" in name:
            continue
        digest.update(f"{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_model(model: nn.Module, tokenizer: Any, output_dir: Path) -> None:
    """Write ``output_dir/model``, which plain transformers loads; of a PEFT model, merged, and ``adapter/`` beside it.

    ``model`` is complete or absent: it is written beside its place and renamed.
    """
    if is_peft(model):
        model.save_pretrained(output_dir / "adapter")
        # Merged in fp32: most of a small adapter would be lost to the rounding of half-precision weights.
        model = copy.deepcopy(model).cpu().float().merge_and_unload()
    temporary, final = output_dir / ".model.tmp", output_dir / "model"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
