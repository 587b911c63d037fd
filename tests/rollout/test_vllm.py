"""The vLLM engine against stand-ins for vllm and TRL's client, which load what they are sent and sample from that."""

from __future__ import annotations

import copy
import random
import sys
import threading
import types
from contextlib import contextmanager

import numpy
import pytest
import torch
from accelerate import Accelerator
from rollouts import PROMPTS
from tiny import EOS, PAD, one_thread, tiny_model, tiny_tokenizer  # noqa: F401

from powerflow_fast import PowerFlowConfig
from powerflow_fast.errors import ConfigError, RolloutError
from powerflow_fast.models import CausalLMScorer, add_lora, pad_batch
from powerflow_fast.rollout import HFGenerateEngine, VLLMEngine
from powerflow_fast.rollout.vllm import _pack_tied_heads_again, named_weights


class Remote:
    """A model somewhere else: it starts from other weights, and has only what it was sent."""

    def __init__(self):
        self.model = tiny_model(seed=99)
        self.log = []

    def load_weights(self, weights_iterator):
        own = dict(self.model.named_parameters())
        for name, weight in weights_iterator:
            self.log.append(("weight", name))
            own[name].data.copy_(weight)  # a KeyError for a name that a plain checkpoint has not

    def sample(self, prompt, p):
        self.log.append(("sample", dict(p)))
        engine = HFGenerateEngine(
            self.model,
            tiny_tokenizer(),
            temperature=p["temperature"],
            max_completion_length=p["max_tokens"],
            batch_size=64,
            eos_ids=p["stop_token_ids"],
        )
        return engine.generate([prompt] * p["n"], seed=p["seed"], return_logps=True)

    @property
    def names(self):
        return [what for kind, what in self.log if kind == "weight"]

    @property
    def sampled(self):
        return [what for kind, what in self.log if kind == "sample"]


class FakeLLM(Remote):
    last = None

    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.disturb()
        FakeLLM.last = self

    def disturb(self):
        """The global state of this process, as vLLM 0.32 does."""
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        torch.set_num_threads(1)

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"  # the model's own load_weights fails in vLLM once its weights are packed
        self.load_weights(**kwargs)

    def apply_model(self, function):
        return [function(self.model)]

    def reset_prefix_cache(self):
        self.log.append(("reset", None))
        return self.resets

    resets = True

    def generate(self, inputs, sampling_params, use_tqdm):
        self.disturb()
        outputs = []
        for request, params in zip(inputs, sampling_params, strict=True):
            r = self.sample(request["prompt_token_ids"], vars(params))
            rows = []
            for index, (ids, logps) in enumerate(zip(r.completion_ids, r.logps, strict=True)):
                entries = [{t: types.SimpleNamespace(logprob=x, rank=1)} for t, x in zip(ids, logps, strict=True)]
                rows.append(types.SimpleNamespace(index=index, token_ids=tuple(ids), logprobs=entries))
            outputs.append(types.SimpleNamespace(outputs=rows[::-1]))  # as they finish
        return outputs


class FakeClient(Remote):
    last = None

    def __init__(self, base_url):
        super().__init__()
        self.base_url, self.updating, self.lock = base_url, False, threading.Lock()
        FakeClient.last = self

    def init_communicator(self, device):
        self.log.append(("device", device))

    @contextmanager
    def weight_update(self):
        self.updating = True
        yield
        self.updating = False

    def update_named_param(self, name, weights):
        assert self.updating
        self.load_weights([(name, weights)])

    def reset_prefix_cache(self):
        self.log.append(("reset", None))

    def generate(self, prompts, *, generation_kwargs, **sampling):
        (prompt,) = prompts
        with self.lock:  # requests come from several threads, and this stand-in draws from torch's global state
            r = self.sample(prompt, {**sampling, **generation_kwargs})
        return {
            "prompt_ids": prompts,
            "completion_ids": r.completion_ids,
            "logprobs": [[[x] for x in row] for row in r.logps],
            "logprob_token_ids": [[[t] for t in row] for row in r.completion_ids],
        }


@pytest.fixture
def stand_ins(monkeypatch):
    vllm = types.ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = FakeLLM, types.SimpleNamespace
    client = types.ModuleType("trl.generation.vllm_client")
    client.VLLMClient = FakeClient
    packages = {name: types.ModuleType(name) for name in ("trl", "trl.generation")}
    for name, module in {"vllm": vllm, "trl.generation.vllm_client": client, **packages}.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that what the engine adds is taken back
        monkeypatch.delenv(name)


MODES = ["colocate", "server"]


def engine(model, mode="colocate", **options):
    model.name_or_path = "some/model"
    url = {"vllm_server_base_url": "http://host:8000"} if mode == "server" else {}
    config = PowerFlowConfig(use_vllm=True, vllm_mode=mode, max_prompt_length=20, **url, **options)
    sampler = VLLMEngine(
        model,
        tiny_tokenizer(),
        config=config,
        accelerator=Accelerator(cpu=True),
        temperature=0.8,
        max_completion_length=6,
    )
    return sampler, (FakeClient if mode == "server" else FakeLLM).last


@pytest.mark.parametrize("mode", MODES)
def test_weights_arrive_by_name_and_sampling_is_from_them(mode, stand_ins):
    model = tiny_model()
    sampler, remote = engine(model, mode)
    with pytest.raises(RolloutError, match=r"call sync\(version\) first"):
        sampler.generate(PROMPTS, seed=0)
    for version in (0, 3):
        sampler.sync(version)
        assert remote.names == [name for name, _ in model.named_parameters()]
        assert remote.log[-1] == ("reset", None), "the prefix cache goes after the weights came"
        for name, p in remote.model.named_parameters():
            assert torch.equal(p, model.get_parameter(name))
        remote.log.clear()
        sampler.sync(version)
        assert not remote.log, "the same version is not sent twice"
        rollout = sampler.generate(PROMPTS, seed=version, return_logps=True)
        assert rollout.weight_version == version and rollout.prompt_ids == PROMPTS
        batch = pad_batch(rollout.prompt_ids, rollout.completion_ids, PAD)
        with torch.no_grad():
            scored = CausalLMScorer(model)(batch, temperature=0.8).logps
            drawn = torch.tensor([x for row in rollout.logps for x in row])
            torch.testing.assert_close(scored, drawn, atol=1e-4, rtol=0)
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        remote.log.clear()


@pytest.mark.parametrize("mode", MODES)
def test_sampling_parameters(mode, stand_ins):
    sampler, remote = engine(tiny_model(), mode)
    sampler.sync(0)
    a, b = PROMPTS[:2]
    rollout = sampler.generate([a, b, a, a], seed=4)
    sampled = sorted(remote.sampled, key=lambda p: -p["n"])
    assert [p["n"] for p in sampled] == [3, 1]
    for p in sampled:
        want = {"temperature": 0.8, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        want |= {"max_tokens": 6, "logprobs": 0, "stop_token_ids": [EOS], "ignore_eos": True}
        assert {name: p[name] for name in want} == want
    seeds = [p["seed"] for p in sampled]
    assert seeds[0] != seeds[1] and all(0 <= s < 2**31 for s in seeds)
    direct = remote.sample(a, sampled[0])
    assert [rollout.completion_ids[i] for i in (0, 2, 3)] == direct.completion_ids, "in their places, in order"
    assert rollout.finished == [ids[-1] == EOS for ids in rollout.completion_ids]
    again = sampler.generate([a, b, a, a], seed=4)
    assert again == rollout and rollout.logps is None
    assert sampler.generate([a, b, a, a], seed=5).completion_ids != rollout.completion_ids
    assert len(sampler.generate([], seed=0)) == 0


def test_colocated_engine_options(stand_ins):
    _, remote = engine(tiny_model(), max_completion_length=30, vllm_gpu_memory_utilization=0.4, rollout_batch_size=7)
    want = {
        "model": "some/model",
        "dtype": "float32",
        "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.4,
        "max_model_len": 50,
        "max_num_seqs": 7,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
    }
    assert {name: remote.options[name] for name in want} == want


def test_the_process_that_the_engine_shares_stays_as_it_was(stand_ins):
    def state():
        return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = state()
        sampler, _ = engine(tiny_model())
        sampler.sync(0)
        sampler.generate(PROMPTS, seed=0)
        assert state() == before and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_an_output_layer_that_is_tied_is_packed_again_on_a_cpu():
    class Packed(torch.nn.Module):  # as vLLM's layers: the weight, and what a CPU multiplies by
        def __init__(self, weight):
            super().__init__()
            self.weight, self.quant_method = weight, self

        def process_weights_after_loading(self, layer):
            layer.packed = layer.weight.detach().clone()

    weight = torch.nn.Parameter(torch.zeros(2))
    model = torch.nn.Sequential(Packed(weight), Packed(weight), Packed(torch.nn.Parameter(torch.zeros(2))))
    for layer in model:
        layer.process_weights_after_loading(layer)
    weight.data.fill_(1)
    _pack_tied_heads_again(model)
    assert [layer.packed.tolist() for layer in model] == [[1, 1], [1, 1], [0, 0]]


def test_a_prefix_cache_that_stays_is_an_error(stand_ins, monkeypatch):
    sampler, remote = engine(tiny_model())
    monkeypatch.setattr(remote, "resets", False)
    with pytest.raises(RolloutError, match="prefix cache of older weights"):
        sampler.sync(0)
    with pytest.raises(RolloutError, match="sending them failed"):
        sampler.generate(PROMPTS, seed=0)


@pytest.mark.parametrize("mode", MODES)
def test_lora_is_merged_on_the_way_and_the_policy_stays_as_it_is(mode, stand_ins):
    policy = add_lora(tiny_model(), r=2)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_()
    before = copy.deepcopy(policy.state_dict())
    policy.get_base_model().name_or_path = "some/model"
    sampler, remote = engine(policy, mode)
    sampler.sync(1)
    assert remote.names == [name for name, _ in tiny_model().named_parameters()]
    merged = copy.deepcopy(policy).merge_and_unload()
    changed = 0
    for name, p in remote.model.named_parameters():
        torch.testing.assert_close(p, merged.get_parameter(name))
        changed += not torch.equal(p, tiny_model().get_parameter(name))
    assert changed == 14  # seven linear layers in each of two blocks
    after = policy.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_tied_weight_is_sent_once():
    model = tiny_model("llama_tied")
    names = [name for name, _ in named_weights(model)]
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names


def test_an_adapter_that_is_no_plain_lora_is_refused():
    from peft import IA3Config, LoraConfig, get_peft_model

    dora = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    ia3 = get_peft_model(
        tiny_model(), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    saved = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    for policy, word in ((dora, "DoRA"), (ia3, "k_proj"), (saved, "ModulesToSaveWrapper")):
        with pytest.raises(ConfigError, match=word):
            list(named_weights(policy))


def test_failed_sending_leaves_no_version(stand_ins, monkeypatch):
    sampler, remote = engine(tiny_model())
    sampler.sync(0)

    def fail(weights_iterator):
        raise OSError("link down")

    monkeypatch.setattr(remote, "load_weights", fail)
    with pytest.raises(OSError, match="link down"):
        sampler.sync(1)
    with pytest.raises(RolloutError, match="sending them failed"):
        sampler.generate(PROMPTS, seed=0)


def test_missing_completions_are_an_error(stand_ins, monkeypatch):
    sampler, remote = engine(tiny_model())
    sampler.sync(0)
    whole = remote.generate

    def cut(*args, **kwargs):
        outputs = whole(*args, **kwargs)
        outputs[-1].outputs.pop()
        return outputs

    monkeypatch.setattr(remote, "generate", cut)
    with pytest.raises(RolloutError, match=r"asked for 1 completions .* got 0"):
        sampler.generate(PROMPTS[:2], seed=0)


def test_missing_packages_and_names_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RolloutError, match=r"run: pip install 'vllm>=0\.16'"):
        engine(tiny_model())
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "trl.generation.vllm_client", None)
    with pytest.raises(RolloutError, match=r"run: pip install 'trl\[vllm\]"):
        engine(tiny_model(), "server")


def test_a_server_that_does_not_answer_is_named(stand_ins, monkeypatch):
    def refuse(self, base_url):
        raise ConnectionError("refused")

    monkeypatch.setattr(FakeClient, "__init__", refuse)
    with pytest.raises(RolloutError, match="no vLLM server answers at vllm_server_base_url='http://host:8000'"):
        engine(tiny_model(), "server")
