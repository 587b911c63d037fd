"""Hopper's own tile kernels, as far as a machine without a GPU can tell: what ptxas makes of them, every order in which
their barriers can be passed, and their numbers, from their own source run on a CPU."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile

import pytest
import torch
from scripts import environment

from powerflow_fast.kernels import hopper_choice

pytest.importorskip("triton")
import gluon_emulator
from barrier_model import Fault, Model

from powerflow_fast.kernels import (
    hopper_tiles,
    interface,
    launch,
    linear_logprob_bwd,
    linear_logprob_exps,
    linear_logprob_fwd,
)
from powerflow_fast.kernels.active_tiles import active_tiles

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks/tile_times.py runs them on a GPU")
MARK = 7.0


# --- what ptxas makes of them ---
SHALLOW = hopper_tiles.Plan(depth=32, stages=8, stagger=4)
KERNELS = ("_rest_tile_sm90_kernel", "_exp_tile_sm90_kernel", "_gradient_tile_sm90_kernel")


def compile_all() -> list[dict]:
    """Records of test_compile_gate, with the machine code as (address, instruction), for heads of two dtypes and both
    plans that are tried; runs in a process of its own, where Triton is not interpreting."""
    import test_compile_gate
    import triton
    from triton.runtime.jit import JITFunction

    run, kernels = JITFunction.run, {}

    def collect(self, *args, **options):
        kernel = run(self, *args, **options)
        kernels.setdefault(kernel.hash, kernel)
        return kernel

    JITFunction.run = collect
    hopper_choice.HOPPER_TILES = True
    launch.capability_of = lambda device: (9, 0)
    linear_logprob_fwd.num_sms = linear_logprob_bwd.num_sms = linear_logprob_exps.num_sms = lambda device: 132

    def use(dtype, plan=hopper_tiles.PLAN, *, stats=False):
        hopper_tiles.PLAN = plan
        n, v, h = 8192, 151936, 3584
        hidden, weight = (torch.empty(rows, h, dtype=dtype, device="meta") for rows in (n, v))
        labels = torch.empty(n, dtype=torch.int64, device="meta")
        call = interface.HeadCall(hidden, weight, labels)
        forward = linear_logprob_fwd.linear_logprob_fwd(call, stats=stats)
        linear_logprob_exps.linear_logprob_fwd_d_hidden(call, stats=stats)
        needs = {"need_d_hidden": True, "need_d_weight": False, "need_d_bias": False}
        linear_logprob_bwd.linear_logprob_bwd(call, forward, torch.empty(n, device="meta"), **needs)

    launches = {"bf16": (use, torch.bfloat16), "fp16": (use, torch.float16), "shallow": (use, torch.bfloat16, SHALLOW)}
    launches["stats"] = (functools.partial(use, stats=True), torch.bfloat16)
    records = test_compile_gate.compile_launches(90, launches)
    for record, kernel in zip(records, kernels.values(), strict=True):
        if record["kernel"] in KERNELS:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(kernel.asm["cubin"])
                file.flush()
                dump = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
                sass = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
            code = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", sass, re.MULTILINE)
            record["code"] = [(int(address, 16), text) for address, text in code]
    return records


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    cache = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    done = subprocess.run([sys.executable, __file__], env=environment() | cache, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    records = [r for r in json.loads(done.stdout.splitlines()[-1]) if r["kernel"] in KERNELS]
    assert sorted(r["kernel"] for r in records) == sorted(KERNELS * 3 + KERNELS[:2])
    return records


def partitions(code: list) -> list[tuple[int, list]]:
    """(registers that its warps hold, code) of what runs between two changes of that number, in order of addresses:
    rare branches may lie behind other partitions."""
    index = {address: i for i, (address, _) in enumerate(code)}
    stretches = []
    for start, (_, text) in enumerate(code):
        change = re.match(r"USETMAXREG\.\S+ (?:UP\d, )?(0x[0-9a-f]+)", text)
        if not change:
            continue
        reached, ahead = {start}, [start]
        while ahead:
            i = ahead.pop()
            text = code[i][1]
            jump = re.search(r"\b(?:BRA|BSSY)\b.*?(0x[0-9a-f]+)", text)
            after = [index.get(int(jump[1], 16))] if jump else []
            if not re.match(r"(BRA (?!U?!?U?P\d)|EXIT|BRX)", text):
                after.append(i + 1)
            for k in after:
                if k is not None and k < len(code) and k not in reached and not code[k][1].startswith("USETMAXREG"):
                    reached.add(k)
                    ahead.append(k)
        stretches.append((int(change[1], 16), [code[i] for i in sorted(reached)]))
    return stretches


def consumers(record) -> list[list]:
    return [code for _, code in partitions(record["code"]) if any("HGMMA" in text for _, text in code)]


def epilogue(code: list) -> list[str]:
    """The instructions that a warp runs from the end of a tile's products to the next tile, where nothing is masked:
    the shortest way."""
    begin = next(i for i, (_, text) in enumerate(code) if "DEPBAR.LE gsb0, 0x0" in text)
    index = {address: i for i, (address, _) in enumerate(code)}
    ways, ends = {begin: [begin]}, []
    for i in range(begin, len(code)):
        if i not in ways:
            continue
        text = code[i][1]
        jump = re.search(r"\bBRA (?:!?U?P\d, )?(0x[0-9a-f]+)", text)
        target = index.get(int(jump[1], 16)) if jump else None
        if target is not None and target < begin:
            ends.append(ways[i])
        for after in (target, i + 1):
            if after is not None and after > i and (after not in ways or len(ways[after]) > len(ways[i]) + 1):
                ways[after] = [*ways[i], after]
    return [code[i][1] for i in min(ends, key=len)]


def test_registers_and_shared_memory_suffice(compiled):
    for record in compiled:
        assert record["stack"] + record["STL"] + record["LDL"] == 0, record["kernel"]
        assert record["shared"] <= 227 * 1024
        for registers, code in partitions(record["code"]):
            used = [int(r) for _, text in code for r in re.findall(r"\bR(\d+)\b", text)]
            assert max(used, default=0) < min(registers, 255)
        busy = re.compile("HGMMA|UTMALDG")
        roles = [registers for registers, code in partitions(record["code"]) if any(busy.match(x) for _, x in code)]
        assert sorted(roles) == [24, 240, 240], record["kernel"]


def test_products_are_never_serialised(compiled):
    """A step is a row of products 16 deep, the last of which closes the group; one group stays in flight but at the end
    of a tile."""
    for record in compiled:
        assert record["UTMALDG"] == 3 and all(x.startswith("HGMMA.64x256x16.F32") for x in record["products"])
        found, products = consumers(record), 2 if record["variant"] == "shallow" else 4
        counts = []
        for code in found:
            words = [re.search(r"HGMMA|WARPGROUP\.\w+", text) for _, text in code]
            sequence = [
                word[0] + (" gsb0" if "gsb0" in text and word[0] == "HGMMA" else "") + text[-4:] * ("DEPBAR" in text)
                for word, (_, text) in zip(words, code, strict=True)
                if word
            ]
            step = ["WARPGROUP.ARRIVE", *["HGMMA"] * (products - 1), "HGMMA gsb0", "WARPGROUP.DEPBAR 0x1"]
            counts.append(len(sequence) // len(step))
            assert sequence == step * counts[-1] + ["WARPGROUP.DEPBAR 0x0"], record["kernel"]
        assert sorted(counts) == [2, 3]  # the first consumer stops to pass the turn on


def test_an_epilogue_is_short(compiled):
    """128 x 256 exponentials are 128 a thread of two warpgroups, one instruction each; most tiles pass no mask."""
    for record in compiled:
        most = dict(zip(KERNELS, (620, 840, 620), strict=True))[record["kernel"]]
        if record["variant"] == "stats":  # the sum of logits, and that of e^x x
            most += 3 * 128
        for code in consumers(record):
            way = epilogue(code)
            print(record["kernel"], record["variant"], len(way))
            exponentials = sum("MUFU.EX2" in text for text in way)  # with statistics a few are taken again
            assert 128 <= exponentials <= (136 if record["variant"] == "stats" else 128)
            assert not any("MUFU" in text and "EX2" not in text for text in way)
            assert len(way) <= most, record["kernel"]


def test_boxes_are_stored_before_the_copy_engine_reads_them(compiled):
    """Half a tile at a time: the last copy has read the box, all threads know; they store, each makes that visible to
    the copy engine, all have done so; two warps send 64 columns each."""
    words = {"DEPBAR.LE SB0": "sent", "BAR.SYNC": "barrier", "STSM": "store", "FENCE.VIEW.ASYNC": "fence"}
    words |= {"UTMASTG": "send", "UTMACMDFLUSH": "commit"}
    for record in compiled:
        if record["kernel"] == "_rest_tile_sm90_kernel":
            continue
        for code in consumers(record):
            way = [next((name for word, name in words.items() if word in text), None) for text in epilogue(code)]
            way = [x for x in way if x]
            half = ["sent", "barrier", *["store"] * 8, "fence", "barrier", "send", "commit"]
            assert way == ["barrier", *half, *half], record["kernel"]  # the first one belongs to the release of a stage


# --- every order in which their barriers can be passed ---
def events(monkeypatch, stages: int, steps: int, tiles: int, stagger: int, *, plan_fits: bool = True):
    """(arrivals that each barrier expects, events of the producer and of both consumers) of one program."""
    kernels = gluon_emulator.install(monkeypatch)
    plan = hopper_tiles.Plan(stages=stages, stagger=stagger)
    if not plan_fits:
        monkeypatch.setattr(hopper_tiles.Plan, "fit", lambda self, hidden_size: self)
    n, v, h = 128, 256 * tiles, 64 * steps
    hidden, weight = torch.zeros(n, h).bfloat16(), torch.zeros(v, h).bfloat16()
    labels, row_tiles = torch.zeros(n, dtype=torch.int64), torch.tensor([1, 0], dtype=torch.int32)
    hopper_tiles.rest_tiles(hidden, weight, labels, row_tiles, torch.zeros(2, tiles, n), 1.0, sms=1, plan=plan)
    (machine,) = kernels["_rest_tile_sm90_kernel"].machines
    *inits, fence = machine.events["start"]
    assert fence == ("fence",)
    counts = {bar: count for _, bar, count in inits}
    return counts, [machine.events[name] for name in ("producer", "first", "second")]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_no_order_of_events_hangs_or_overwrites(monkeypatch, stages):
    for stagger in range(stages):
        for steps in (1, 2, 3, 4, 5, 6):
            for tiles in (1, 3, 6):
                if tiles * steps <= 15:
                    Model(*events(monkeypatch, stages, steps, tiles, stagger)).explore()


def test_no_order_of_events_hangs_or_overwrites_with_many_stages(monkeypatch):
    Model(*events(monkeypatch, SHALLOW.stages, SHALLOW.stages + 1, 2, SHALLOW.stagger)).explore()


def test_one_stage_does_not_suffice(monkeypatch):
    """A stage is released once the next one's product is issued."""
    Model(*events(monkeypatch, 1, 1, 3, 0)).explore()
    with pytest.raises(Fault, match="deadlock"):
        Model(*events(monkeypatch, 1, 2, 1, 0)).explore()


@pytest.mark.parametrize(("stages", "steps", "stagger"), [(4, 2, 1), (6, 3, 2), (4, 5, 4), (2, 5, 2)])
def test_the_model_finds_staggers_that_do_not_fit(monkeypatch, stages, steps, stagger):
    with pytest.raises(Fault, match="deadlock"):
        Model(*events(monkeypatch, stages, steps, 3, stagger, plan_fits=False)).explore()


def altered(kind: str, partition: int, bar: str, index: int, change):
    """A change of the events: ``change`` of one of them, dropped where it gives None."""

    def alter(counts, lists):
        chosen = [i for i, e in enumerate(lists[partition]) if e[0] == kind and e[1][0] == bar][index]
        changed = change(lists[partition][chosen])
        lists[partition][chosen : chosen + 1] = [] if changed is None else [changed]

    return alter


def flipped(event: tuple) -> tuple:
    return (*event[:2], event[2] ^ 1)


def released_early(counts, lists):
    """Each stage right after its product is issued."""
    for events in lists[1:]:
        for i, e in enumerate(events):
            if e[0] == "arrive" and e[1][0] == "empty":
                events[i] = ("arrive", ("empty", (e[1][1] + 1) % 4))
        last = max(i for i, e in enumerate(events) if e[0] == "arrive")
        del events[last]
        first = next(i for i, e in enumerate(events) if e[0] == "finish")
        events.insert(first + 1, ("arrive", ("empty", 0)))


def never_finished(counts, lists):
    lists[1][:] = [e for e in lists[1] if e[0] != "finish"]


MUTANTS = {
    "the producer's parity": altered("wait", 0, "empty", 5, flipped),
    "the producer does not wait": altered("wait", 0, "empty", 6, lambda e: None),
    "a consumer's parity": altered("wait", 1, "full", 6, flipped),
    "a consumer does not wait": altered("wait", 2, "full", 3, lambda e: None),
    "the turn's parity": altered("wait", 2, "turn", 1, flipped),
    "the turn is not passed on": altered("arrive", 1, "turn", 1, lambda e: None),
    "a stage is not released": altered("arrive", 2, "empty", -5, lambda e: None),
    "a stage is released twice": altered("arrive", 1, "empty", 2, lambda e: ("arrive", ("empty", 1))),
    "one consumer's release suffices": lambda counts, lists: counts.update({("empty", i): 1 for i in range(4)}),
    "bytes are missing": altered("expect", 0, "full", 2, lambda e: (*e[:2], e[2] - 64)),
    "stages are released early": released_early,
    "nobody waits for the products": never_finished,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_model_finds_mutants(monkeypatch, mutant):
    counts, lists = events(monkeypatch, 4, 6, 3, 2)
    Model(counts, lists).explore()
    MUTANTS[mutant](counts, lists)
    with pytest.raises(Fault):
        Model(counts, lists).explore()


# --- their numbers ---
@pytest.fixture
def emulated(monkeypatch):
    """The library's launchers with Hopper's kernels, emulated, wherever `supported` says so but for the device."""
    monkeypatch.setattr(hopper_choice, "HOPPER_TILES", True)
    supported = hopper_tiles.supported
    capability = launch.capability_of

    def on_hopper(*arguments, **options):
        monkeypatch.setattr(launch, "capability_of", lambda device: (9, 0))
        try:
            return supported(*arguments, **options)
        finally:
            monkeypatch.setattr(launch, "capability_of", capability)

    monkeypatch.setattr(hopper_tiles, "supported", on_hopper)
    for module in (linear_logprob_fwd, linear_logprob_exps, linear_logprob_bwd):
        monkeypatch.setattr(module, "num_sms", lambda device: 3)
    return gluon_emulator.install(monkeypatch)


def head(n: int, v: int, h: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(rows, h, generator=generator) for rows in (n, v))
    hidden[n // 2] *= 8  # far from its label: the row is anchored anew
    return hidden.to(dtype), (weight * 4 / h**0.5).to(dtype), torch.randint(v, (n,), generator=generator)


SHAPES = [(300, 700, 72), (1, 7, 264), (130, 513, 330)]


@on_cpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_the_library_computes_the_same_with_them(request, monkeypatch, shape, dtype, stats):
    hidden, weight, labels = head(*shape, dtype)
    labels[5:7] = -100
    labels[128:256] = -100  # one row tile is left out where rows are not sorted
    d_logp = torch.linspace(-2, 1, shape[0])
    transform = interface.LogitTransform(temperature=1.1)
    call = interface.HeadCall(hidden, weight, labels, None, transform)
    needs = {"need_d_hidden": True, "need_d_weight": True, "need_d_bias": False}

    def everything():
        forward = linear_logprob_fwd.linear_logprob_fwd(call, stats=stats)
        frozen = linear_logprob_exps.linear_logprob_fwd_d_hidden(call, stats=stats)
        both = linear_logprob_bwd.linear_logprob_bwd(call, forward, d_logp, **needs)[:2]
        kept = linear_logprob_exps.linear_logprob_fwd_exps(call._replace(labels=labels.clamp(min=0)), stats=stats)
        results = dict(zip(("logp", "anchor", "others"), forward[:3], strict=True))
        results |= {"frozen logp": frozen.logp, "frozen d_hidden": frozen.unit}
        results |= {"d_hidden": both[0], "d_weight": both[1]}
        results |= {"kept logp": kept.logp, "kept": kept.exps * kept.scale[:, None]}
        for name, out in (("forward", forward), ("frozen", frozen), ("kept", kept)):
            results |= {f"{name} {x}": value for x, value in (out.stats._asdict() if stats else {}).items()}
        return results

    expected = everything()
    kernels = request.getfixturevalue("emulated")
    got = everything()
    assert all(kernel.machines for kernel in kernels.values())
    rounding = torch.finfo(dtype).eps
    for name, a in expected.items():
        b = got[name]
        exact = a.dtype == torch.float32 and name != "kept" and "d_" not in name
        tolerance = 2e-6 if exact else rounding
        # an entropy is as exact as the sums' logarithm: relative to itself only where the anchor is the maximum
        atol = 1e-5 if "entropy" in name else tolerance * float(a.abs().max())
        torch.testing.assert_close(b.double(), a.double(), rtol=tolerance, atol=atol, msg=f"{name}: {{}}".format)


@on_cpu
@pytest.mark.parametrize("sms", [1, 3, 7])
@pytest.mark.parametrize("group", [1, 2, 16])
def test_each_tile_is_computed_once(monkeypatch, sms, group):
    """However many programs walk over the list, and at whatever width of a sweep, each active tile is written by one
    program, from its own rows and columns; the others are left alone."""
    kernels = gluon_emulator.install(monkeypatch)
    n, v, h = 700, 1100, 136
    hidden, weight, labels = head(n, v, h, torch.bfloat16)
    active = torch.ones(n, dtype=torch.int32)
    active[128:384] = 0
    active[500] = 0
    on = active.bool()
    anchor = torch.zeros(n)
    z = 0.5 * hidden.double() @ weight.double().t()
    rest = z.scatter(1, labels[:, None], float("-inf"))
    partial, exps = torch.full((2, 5, n), MARK), torch.full((n, 1104), MARK, dtype=torch.bfloat16)
    hopper_tiles.exp_tiles(
        hidden, weight, labels, active, active_tiles(active), anchor, exps, partial, 0.5,
        sms=sms, plan=hopper_tiles.Plan(group=group),
    )  # fmt: skip
    machines = kernels["_exp_tile_sm90_kernel"].machines
    assert len(machines) == sms
    tiles = [sum(e[0] == "finish" and e[1] == 0 for e in machine.events["first"]) for machine in machines]
    assert sum(tiles) == 4 * 5 and max(tiles) - min(tiles) <= 1
    for machine in machines:
        assert len(machine.events["producer"]) == 5 * 3 * tiles[machines.index(machine)]
    torch.testing.assert_close(exps[on, :v].double(), rest.exp()[on], rtol=1e-2, atol=1e-30)
    torch.testing.assert_close(partial[1].double().sum(0)[on], rest.exp().sum(1)[on], rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(partial[0].amax(0).double()[on], rest.amax(1)[on], rtol=1e-5, atol=1e-5)
    assert bool((exps[~on] == MARK).all()) and bool((exps[:, v:] == MARK).all())
    assert bool((partial[:, :, 128:384] == MARK).all())


@on_cpu
def test_a_box_is_sent_whole(monkeypatch):
    kernels = gluon_emulator.install(monkeypatch)
    hidden, weight, labels = head(200, 600, 64, torch.bfloat16)
    factor = torch.ones(200)
    grad = torch.empty(200, 600, dtype=torch.bfloat16)
    hopper_tiles.gradient_tiles(
        hidden, weight, labels, factor, active_tiles(factor.int()), factor, factor, grad, 0, 1.0, sms=2
    )
    for machine in kernels["_gradient_tile_sm90_kernel"].machines:
        for w, name in enumerate(("first", "second")):
            found = [e for e in machine.events[name] if e[0] in ("sent", "barrier", "box", "fence", "send")]
            one = [("sent", 0), ("barrier",), ("box", ("out", w)), ("fence",), ("barrier",), ("send", ("out", w))]
            assert found == one * (len(found) // 6) + [("sent", 0)]


@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0), (10, 0)])
def test_supported(monkeypatch, capability):
    monkeypatch.setattr(launch, "capability_of", lambda device: capability)
    monkeypatch.setattr(hopper_choice, "HOPPER_TILES", True)
    x = torch.empty(2, 8, dtype=torch.bfloat16)
    plain = interface.LogitTransform()

    def found(x=x, bias=None, transform=plain):
        return hopper_choice.hopper_tiles_for(interface.HeadCall(x, x, x, bias, transform)) is hopper_tiles

    assert found() == found(x.half()) == (capability == (9, 0))
    assert not found(x.float()) and not found(bias=x[0])
    assert not found(transform=plain._replace(logit_softcap=30.0))
    assert not found(transform=plain._replace(logit_scale=-1.0))
    monkeypatch.setattr(hopper_choice, "HOPPER_TILES", False)
    assert not found()


if __name__ == "__main__":
    print(json.dumps(compile_all()))
