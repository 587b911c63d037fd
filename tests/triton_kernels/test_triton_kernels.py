"""The Triton kernels in Triton's interpreter, against fp64 on the same rounded inputs. Tiles are 64 x 256 x 64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from triton_cases import DTYPES, IGNORE, OPTIONS, SHAPES, Case, case_of_unlikely_tokens, make_case

from powerflow_fast.kernels import tiles

pytest.importorskip("triton")
import triton
import triton.language as tl

from powerflow_fast.kernels import launch, linear_logprob_bwd, linear_logprob_exps, linear_logprob_fwd
from powerflow_fast.kernels.interface import ForwardOutput
from powerflow_fast.kernels.launch import Tile
from powerflow_fast.kernels.linear_logprob_reference import linear_logprobs_ref

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def case_of_logits(logits, labels, dtype=torch.float32) -> Case:
    """A case whose logits are the given numbers, exactly where the dtype holds them, and whose gradients are not 0."""
    n, v = logits.shape
    weight = torch.randn(v, n + 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[:, :n] = logits.t()
    return Case(torch.eye(n, n + 8).to(dtype), weight, labels, torch.ones(n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_matches_fp64(options, dtype, check_accuracy):
    make_case(dtype, **options).check(check_accuracy)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape, check_accuracy):
    make_case(**shape).check(check_accuracy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_can_forbid_columns(dtype, check_accuracy):
    """-inf in single columns and in all of a tile, as heads have it that are padded; the statistics stay numbers."""
    case = make_case(dtype, n=40, v=600, bias=True)
    forbidden = torch.zeros(600, dtype=torch.bool)
    forbidden[7:300:41] = True
    forbidden[256:] = True
    case.labels[case.labels != IGNORE] %= 7
    allowed = dataclasses.replace(case, weight=case.weight[~forbidden], bias=case.bias[~forbidden])
    case.bias[forbidden] = float("-inf")
    ours, torchs, exact = case.run(), allowed.reference(dtype), allowed.reference(torch.float64)
    for name, x in ours.items():
        if name.startswith(("d_weight", "d_bias")):
            assert (x[forbidden] == 0).all(), name
            x = x[~forbidden]
        if name.startswith("mean_logit"):
            assert (x[case.labels != IGNORE] == float("-inf")).all()
        else:
            check_accuracy(x, torchs[name], exact[name], dtype, name)


def test_tiles_that_hold_only_labels_or_an_edge(check_accuracy):
    """Every row's label is the one column of the last tile, and every other tile has none."""
    case = make_case(n=70, v=257, ignored=False)
    case.labels[:] = 256
    case.check(check_accuracy)
    case.labels[::2] = 255
    case.check(check_accuracy)


def test_column_of_every_tile_can_be_the_label(check_accuracy):
    case = make_case(n=8, v=520, ignored=False)
    case.labels = torch.tensor([0, 255, 256, 257, 511, 512, 518, 519])
    case.check(check_accuracy)


def test_pointers_and_copy_engine_give_equal_bits(monkeypatch):
    case = make_case(torch.bfloat16, bias=True)
    with_descriptors = case.run()
    monkeypatch.setattr(launch, "tile_for", lambda *_, **__: Tile(64, 256, 64, 4, 1, tma=False))
    assert not launch.choose_tile(case.hidden, heavy=False).tma
    for name, x in case.run().items():
        assert torch.equal(x, with_descriptors[name]), name


def test_ignored_rows_are_zero_and_change_nothing_else():
    case = make_case(torch.bfloat16, n=200, bias=True)
    case.labels[64:192] = IGNORE  # whole tiles in the order given, as the backward pass reads them
    keep = case.labels != IGNORE
    full = case.run()
    for name in ("logp", "lse", "entropy", "mean_logit", "unit", "logp of unit", "d_hidden"):
        assert (full[name][~keep] == 0).all(), name
    kept = dataclasses.replace(
        case, hidden=case.hidden[keep], labels=case.labels[keep], d_logp=case.d_logp[keep]
    ).run()  # fmt: skip
    for name in ("logp", "lse", "entropy", "mean_logit", "unit", "d_hidden"):
        torch.testing.assert_close(
            full[name][keep], kept[name], rtol=1e-6 if full[name].dtype == torch.float32 else 0.02, atol=1e-6
        )
    for name in ("d_weight", "d_bias"):
        torch.testing.assert_close(full[name], kept[name], rtol=0.02, atol=1e-2)


def test_all_rows_ignored(check_accuracy):
    case = make_case(torch.bfloat16, bias=True)
    case.labels[:] = IGNORE
    case.check(check_accuracy)
    assert all((x == 0).all() for x in case.run().values())


def test_ignored_rows_cost_no_tile(monkeypatch):
    case = make_case(n=256, v=512)
    case.labels[torch.arange(256) % 4 != 0] = IGNORE  # scattered: 64 rows or fewer remain, one tile of 64
    tiles = []
    for module in (linear_logprob_fwd, linear_logprob_exps, linear_logprob_bwd):
        tile = module.logit_tile
        monkeypatch.setattr(module, "logit_tile", lambda *a, tile=tile: (tiles.append(1), tile(*a))[1])
    linear_logprob_fwd.linear_logprob_fwd(case.call())
    assert len(tiles) == 2
    linear_logprob_exps.linear_logprob_fwd_d_hidden(case.call())
    assert len(tiles) == 4
    case.labels[:192] = IGNORE
    forward = ForwardOutput(*torch.ones(3, 256))
    linear_logprob_bwd.linear_logprob_bwd(
        case.call(), forward, case.d_logp, need_d_hidden=True, need_d_weight=False, need_d_bias=False
    )
    assert len(tiles) == 6


@pytest.mark.parametrize("softcap", [None, 300.0])
def test_only_row_tiles_with_a_row_to_write_anew_are_made_twice(monkeypatch, softcap, check_accuracy):
    """256 rows are 4 row tiles, 512 columns are 2; the second launch has more tiles than programs."""
    case = make_case(torch.bfloat16, n=256, v=512, ignored=False, logit_softcap=softcap)
    tiles, tile = [], linear_logprob_exps.logit_tile
    monkeypatch.setattr(linear_logprob_exps, "logit_tile", lambda *a: (tiles.append(a[3:5]), tile(*a))[1])
    linear_logprob_exps.linear_logprob_fwd_d_hidden(case.call())
    assert len(tiles) == 8
    case.hidden[[70, 200]] = 0
    case.hidden[:, 0] = 0
    case.hidden[[70, 200], 0] = 1
    case.labels[[70, 200]] = 5
    case.weight[5, 0] = -120.0
    tiles.clear()
    linear_logprob_exps.linear_logprob_fwd_d_hidden(case.call())
    made_twice = sorted(tuple(int(x.handle.data.item()) for x in place) for place in tiles[8:])
    assert made_twice == [(64, 0), (64, 256), (192, 0), (192, 256)]
    case.check(check_accuracy)


def test_a_zero_upstream_gradient_costs_no_tile(monkeypatch):
    case = make_case(n=128, ignored=False, bias=True)
    case.d_logp[:64] = 0.0
    grads = case.run()
    assert (grads["d_hidden"][:64] == 0).all()
    tiles = []
    tile = linear_logprob_bwd.logit_tile
    monkeypatch.setattr(linear_logprob_bwd, "logit_tile", lambda *a: (tiles.append(1), tile(*a))[1])
    again = case.run()
    assert len(tiles) == 2
    assert all(torch.equal(grads[name], again[name]) for name in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_tokens_keep_their_digits(dtype):
    """1 - p from 1e-4 down to 1e-30: logp and the gradients of hidden, label row and other rows, all relative."""
    gaps = torch.tensor([14.0, 25.0, 30.0, 40.0, 64.0, 72.0])
    if dtype == torch.float16:  # which can't hold 1e-10: the gradient of hidden is a number, not a ratio
        gaps = gaps[:1]
    logits = torch.zeros(len(gaps), 300)
    labels = torch.arange(len(gaps)) * 50
    logits[torch.arange(len(gaps)), labels] = gaps
    case = case_of_logits(logits, labels, dtype)
    ours, exact = case.run(), case.reference(torch.float64)
    for name in ("logp", "logp of unit"):
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=5e-6, atol=0)
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}[dtype]
    for name in ("unit", "d_hidden"):
        error = (ours[name].double() - exact[name]).abs().amax(1) / exact[name].abs().amax(1)
        assert (error < rtol).all(), (name, error)
    rows = exact["d_weight"][labels].abs().amax(1)
    assert ((ours["d_weight"][labels].double() - exact["d_weight"][labels]).abs().amax(1) < rtol * rows).all()
    logp, rest = exact["logp"], -torch.expm1(exact["logp"])  # the other 299 share the rest evenly
    entropy = -logp.exp() * logp - rest * (rest / 299).log()
    torch.testing.assert_close(ours["entropy"].double(), entropy, rtol=1e-5, atol=0)


@pytest.mark.parametrize("softcap", [None, 300.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unlikely_tokens_among_likely_ones(dtype, softcap, check_accuracy):
    """Some rows of a tile are written anew around their maximum, the others are not."""
    case = case_of_unlikely_tokens(dtype, logit_softcap=softcap)
    _, limit = linear_logprob_exps.ANCHOR_RANGE[dtype]
    sums = (-case.reference(torch.float64)["logp"]).exp()
    over = sums > limit
    assert 0 < over.sum() < 14 and not over[1::5].any()
    case.check(check_accuracy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits(dtype, check_accuracy):
    case = make_case(dtype, sharpness=150.0)
    assert (case.hidden.double() @ case.weight.double().t()).abs().max() > 400
    case.check(check_accuracy)


def test_a_label_outside_the_vocabulary_gives_nan_in_its_row_alone():
    case = make_case(n=70, ignored=False)
    good = case.run()
    wrong = torch.tensor([3, 40, 41, 69])
    case.labels[wrong] = torch.tensor([300, -1, 2**32 + 5, 2**40])
    bad = case.run()
    fine = torch.ones(70, dtype=torch.bool)
    fine[wrong] = False
    for name in ("logp", "logp without stats", "logp of unit", "unit", "d_hidden"):
        assert bad[name][wrong].isnan().all(), name
        assert torch.equal(bad[name][fine], good[name][fine]), name


def test_layouts(check_accuracy):
    """Any strides: transposed, sliced to an odd offset, expanded, every second element."""
    case = make_case(torch.bfloat16, n=40, v=90, bias=True)
    wanted = case.run()
    n, h = case.hidden.shape
    layouts = {
        "hidden": [case.hidden.t().contiguous().t(), torch.zeros(n, 2 * h, dtype=torch.bfloat16)[:, 3 : h + 3]],
        "weight": [case.weight.t().contiguous().t(), torch.zeros(90, h + 8, dtype=torch.bfloat16)[:, :h]],
        "labels": [torch.zeros(n, 2, dtype=torch.int64)[:, 0]],
        "bias": [torch.zeros(90, 2, dtype=torch.bfloat16)[:, 1]],
        "d_logp": [torch.zeros(n, 2)[:, 1]],
    }
    for name, views in layouts.items():
        for view in views:
            odd = dataclasses.replace(case, **{name: view.copy_(getattr(case, name))})
            for key, x in odd.run().items():
                assert torch.equal(x, wanted[key]), (name, key)
    dataclasses.replace(case, hidden=case.hidden[:1].expand(n, h), d_logp=torch.ones(()).expand(n)).check(
        check_accuracy
    )


def test_bias_has_a_dtype_of_its_own():
    case = make_case(torch.bfloat16, bias=True)
    half = case.run()
    full = dataclasses.replace(case, bias=case.bias.float()).run()
    assert full["d_bias"].dtype == torch.float32
    for name, x in full.items():
        assert torch.equal(x.to(half[name].dtype), half[name]), name


def test_chunks_change_nothing(monkeypatch, check_accuracy):
    case = make_case(torch.bfloat16, n=130, v=600, bias=True, logit_softcap=8.0, sharpness=3.0)
    whole = case.run()
    monkeypatch.setattr(linear_logprob_fwd, "SCRATCH_ROWS", 64)
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 2 * 64 * 608)
    assert launch.plan_rows(130, 2 * 608, launch.tile_for(torch.bfloat16, None, heavy=True)) == 64
    assert launch.plan_columns(600, 2 * 130, launch.tile_for(torch.bfloat16, None, heavy=True)) == 256
    parts = case.run()
    for name in ("logp", "lse", "entropy", "mean_logit", "logp of unit", "d_weight", "d_bias"):
        assert torch.equal(whole[name], parts[name]), name
    case.check(check_accuracy)


@pytest.mark.parametrize("options", [*OPTIONS.values(), *SHAPES.values()], ids=[*OPTIONS, *SHAPES])
def test_products_that_are_made_first(monkeypatch, options, check_accuracy):
    """As float32 runs on a GPU: chunks of products by torch.mm, which the tile kernels read."""
    monkeypatch.setattr(launch, "tile_for", lambda *_, **__: Tile(16, 256, 0, 4, 1, False))
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 4 * 32 * 700)  # several chunks of rows, and of columns
    make_case(torch.float32, **options).check(check_accuracy)


def test_equal_bits_every_time():
    case = make_case(torch.bfloat16, n=130, bias=True, sharpness=8.0)
    first, second = case.run(), case.run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_autocast_changes_no_bit():
    case = make_case(bias=True)
    outside = case.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = case.run()
    assert all(torch.equal(outside[name], inside[name]) for name in outside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_change_nothing_else(dtype):
    case = make_case(dtype, n=130, logit_softcap=6.0, sharpness=3.0)
    counted = case.call()._replace(labels=case.labels.clamp(min=0))
    calls = [
        (linear_logprob_fwd.linear_logprob_fwd, case.call()),
        (linear_logprob_exps.linear_logprob_fwd_d_hidden, case.call()),
        (linear_logprob_exps.linear_logprob_fwd_exps, counted),
    ]
    for function, call in calls:
        *without, nothing = function(call)
        *others, stats = function(call, stats=True)
        assert nothing is None and len(stats) == 3
        assert all(torch.equal(a, b) for a, b in zip(without, others, strict=True)), function


def test_only_what_is_needed(monkeypatch):
    case = make_case(torch.bfloat16, bias=True)
    forward = linear_logprob_fwd.linear_logprob_fwd(case.call())
    assert forward.stats is None
    full = case.run()
    products = []
    for name in ("matmul_fp32", "add_matmul_fp32_"):
        function = getattr(linear_logprob_bwd, name)
        monkeypatch.setattr(
            linear_logprob_bwd, name, lambda *a, f=function, name=name: (products.append(name), f(*a))[1]
        )
    for wanted in ("d_hidden", "d_weight", "d_bias"):
        needs = {f"need_{name}": name == wanted for name in ("d_hidden", "d_weight", "d_bias")}
        products.clear()
        grads = linear_logprob_bwd.linear_logprob_bwd(case.call(), forward, case.d_logp, **needs)
        for name, grad in zip(("d_hidden", "d_weight", "d_bias"), grads, strict=True):
            assert grad is None if name != wanted else torch.equal(grad, full[name])
        assert len(products) == (wanted != "d_weight")


def test_series_near_zero():
    """log1p and tanh, written without libdevice, against fp64 over their ranges."""

    @triton.jit
    def kernel(p_x, p_t, o_log1p, o_tanh, o_slope, N: tl.constexpr):
        i = tl.arange(0, N)
        x = tl.load(p_x + i)
        tl.store(o_log1p + i, tiles.log1p_unit(x))
        tanh, slope = tiles.softcapped(tl.load(p_t + i), 1.0, True)
        tl.store(o_tanh + i, tanh)
        tl.store(o_slope + i, slope)

    x = torch.cat([torch.linspace(0, 1, 2048), torch.logspace(-30, 0, 2048)])
    t = torch.cat([torch.linspace(-60, 60, 2048), torch.logspace(-20, 0, 1024), -torch.logspace(-20, 0, 1024)])
    out = [torch.empty(4096) for _ in range(3)]
    kernel[(1,)](x, t, *out, N=4096)
    xd, td = x.double(), t.double()
    for ours, wanted in zip(out, [torch.log1p(xd), torch.tanh(td)], strict=False):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-6, atol=1e-37)
    slope = 1 / torch.cosh(td) ** 2
    # e^-2|t| is as exact as its exponent in float32
    assert ((out[2].double() - slope).abs() <= (1e-6 + 2 * td.abs() * 2.0**-23) * slope + 1e-37).all()


def test_reference_is_what_the_kernels_are_held_to():
    """The oracle's softcap and scale are those of the logit definition, so the cases above test them."""
    case = make_case(torch.float64, bias=True, temperature=0.5, logit_scale=2.0, logit_softcap=3.0)
    u = case.hidden @ case.weight.t() + case.bias
    z = 3.0 * torch.tanh(2.0 * u / 3.0) / 0.5
    keep = case.labels != IGNORE
    wanted = torch.log_softmax(z, 1)[keep, case.labels[keep]]
    ours = linear_logprobs_ref(
        case.hidden, case.weight, case.labels, bias=case.bias, ignore_index=IGNORE, **case.transform._asdict()
    )
    torch.testing.assert_close(ours[keep], wanted)
