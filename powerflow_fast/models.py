"""Loading a causal LM, LoRA, and the two scorers that training needs: of the policy and of the frozen base model."""

from __future__ import annotations

import copy
import hashlib
import logging
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ModelError
from .heads import Head, evaluating, find_head, head_inputs, is_peft, unwrap_peft
from .ops.backends import Backend
from .ops.logprobs import LogprobStats, linear_logprob_stats, linear_logprobs
from .packing import Batch

logger = logging.getLogger(__name__)

__all__ = [
    "BaseScorer",
    "CausalLMScorer",
    "Head",
    "LoadedModel",
    "ScorerOutput",
    "add_lora",
    "disable_dropout",
    "find_head",
    "is_peft",
    "load_model",
    "make_base",
    "max_positions",
    "pad_token_id",
    "save_model",
    "unwrap_peft",
    "weights_fingerprint",
]

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


def disable_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout, layer-drop and router-jitter rate in ``model`` to 0, in place, and return it.

    A policy must be scored with the distribution it was sampled from, which has none of these. Modules are changed,
    the saved config is not. Dropout of LoRA layers that are already there goes as well.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():  # rates held as plain numbers, such as attention_dropout
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)
    return model


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


class ScorerOutput(NamedTuple):
    """What :class:`CausalLMScorer` returns for B sequences with N completion tokens; all but ``logps`` detached."""

    logps: Tensor
    """(N,) fp32 log-prob in nats of each completion token, packed; differentiable."""
    cu_seqlens: Tensor
    """(B + 1,) int32 boundaries of the sequences in ``logps``."""
    stats: LogprobStats | None
    """(N,) fp32 each: entropy, log-sum-exp and mean logit of the distribution that each token was drawn from."""
    pooled_prompt: Tensor | None
    """(B, H) fp32 mean over all prompt tokens of the head's input."""


class CausalLMScorer(nn.Module):
    """Log-probs of completions under a Hugging Face causal LM, without the (tokens, vocabulary) logits.

    Equals, for the token y_t of a row, ``log_softmax(model(ids).logits[t - 1].float() / temperature)[y_t]``. Gradients
    reach every parameter of the model, the head included. Being the root module, it is what DDP and FSDP wrap.
    """

    def __init__(self, model: nn.Module, *, backend: Backend = "auto"):
        super().__init__()
        self.model = model
        self.head = find_head(model)
        self.backend = backend

    def forward(
        self, batch: Batch, *, temperature: float, need_stats: bool = False, pool_prompt: bool = False
    ) -> ScorerOutput:
        """Score ``batch`` at the sampling ``temperature``; see :class:`ScorerOutput`.

        Memory beyond the model's own: the last hidden states (B, T, H), their (N, H) rows, and ``linear_logprobs``.
        A packed batch is for models that :func:`check_packing` passes.
        """
        states = head_inputs(self.model, self.head, batch.model_inputs()).flatten(0, 1)
        hidden = states.index_select(0, batch.positions)
        weight, bias = self.head.weight, self.head.bias
        options = {
            "bias": bias,
            "temperature": temperature,
            "logit_scale": self.head.logit_scale,
            "logit_softcap": self.head.logit_softcap,
            "backend": self.backend,
        }
        stats = pooled = None
        if need_stats:
            scores = linear_logprob_stats(hidden, weight, batch.labels, **options)
            logps, stats = scores.logp, LogprobStats(scores.logp.detach(), *scores[1:])
        else:
            logps = linear_logprobs(hidden, weight, batch.labels, **options)
        if pool_prompt:
            prompts = states.detach().index_select(0, batch.prompt_positions).float()
            pooled = torch.segment_reduce(prompts, "mean", lengths=batch.prompt_lengths, unsafe=True)
        return ScorerOutput(logps=logps, cu_seqlens=batch.cu_seqlens, stats=stats, pooled_prompt=pooled)


class BaseScorer:
    """Log-probs of completions under the frozen p_base; made by :func:`make_base`."""

    def __init__(
        self,
        scorer: CausalLMScorer,
        *,
        mode: Literal["adapter_off", "copy", "cpu"],
        frozen: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.scorer = scorer
        self.root: nn.Module = scorer
        """What is called for scores: of a policy sharded over processes its root, which gathers the weights."""
        self.mode = mode
        self._frozen = frozen

    def alike(self, scorer: CausalLMScorer) -> list[nn.Module]:
        """The models of ``scorer``, the policy's, and of p_base where it runs on the same device."""
        return [scorer.model] if self.mode == "cpu" else [scorer.model, self.scorer.model]

    @torch.no_grad()
    def score(self, batch: Batch, *, temperature: float) -> Tensor:
        """(N,) fp32 log-probs of the completion tokens in nats, packed, on the device of ``batch``."""
        device = self.scorer.head.weight.device
        with self._frozen(), evaluating(self.scorer.model):
            out = self.root(batch.to(device), temperature=temperature)
        return out.logps.to(batch.input_ids.device)


def make_base(
    model: nn.Module, mode: Literal["auto", "adapter_off", "copy", "cpu"] = "auto", *, backend: Backend = "auto"
) -> BaseScorer:
    """A scorer of p_base, the model as it is now, that later training of ``model`` does not move.

    ``"adapter_off"``: a PEFT model with its adapter switched off; no extra memory, and the base is the model *without*
    the adapter, trained or not. ``"copy"``: a frozen copy on the same device. ``"cpu"``: a frozen copy in CPU memory,
    run there. ``"auto"``: adapter_off for a PEFT model, else copy. ``model`` may be a :class:`CausalLMScorer`.
    """
    model = model.model if isinstance(model, CausalLMScorer) else model
    if mode == "auto":
        mode = "adapter_off" if is_peft(model) else "copy"
    if mode == "adapter_off":
        if not is_peft(model):
            raise ModelError("make_base: base='adapter_off' needs a PEFT model; use base='copy' for full fine-tuning")
        if any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name):
            logger.warning(
                "the model comes with a trained adapter, and p_base is the model without it; base='copy' takes the "
                "model as it is"
            )
        return BaseScorer(CausalLMScorer(model, backend=backend), mode=mode, frozen=model.disable_adapter)
    frozen = _frozen_copy(model, torch.device("cpu") if mode == "cpu" else None)
    return BaseScorer(CausalLMScorer(frozen, backend=backend), mode=mode)


def _frozen_copy(model: nn.Module, device: torch.device | None) -> nn.Module:
    """A deep copy in eval mode whose weights take no gradient, on ``device`` (None: where each weight is).

    Weights are copied first and handed to ``deepcopy``, so that they go straight to ``device``; ties stay ties.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        data = parameter.detach().to(device or parameter.device, copy=True)
        memo[id(parameter)] = nn.Parameter(data, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to(device or buffer.device, copy=True)
    return copy.deepcopy(model, memo).eval()


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
