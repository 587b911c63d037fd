"""The benchmarks' providers: they compute the same thing, and what their rows claim about the work is so."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
if not (BENCHMARKS / "run.py").is_file():
    pytest.skip("benchmarks/ isn't part of this copy", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

import measure  # noqa: E402
from cases import head as head_case  # noqa: E402
from cases import la_tb as la_tb_case  # noqa: E402
from cases import loss as loss_case  # noqa: E402
from cases import update as update_case  # noqa: E402
from cases.head import MODES, HeadCase, head_inputs, head_reference  # noqa: E402
from peers import head as head_peers  # noqa: E402
from peers import la_tb as la_tb_peers  # noqa: E402
from peers import loss as loss_peers  # noqa: E402
from peers import update as update_peers  # noqa: E402

from powerflow_fast.ops.torch_products import compiled_products_run  # noqa: E402

CPU = torch.device("cpu")
# Triton's kernels have their own tests, and torch.compile would take most of the time
HEAD = [p for p in head_peers.HEAD_PROVIDERS if p.name not in ("powerflow_fast triton", "naive compiled")]


@pytest.mark.parametrize("provider", HEAD, ids=lambda p: p.name)
@pytest.mark.parametrize("mode", MODES)
def test_providers_keep_the_contract(provider, mode):
    """fp32 log-probs, a gradient per token and masked rows, against fp64; who can't run here has to say why."""
    case = HeadCase(33, 501, 128, "fp32", mode, mask_ratio=0.3)
    inputs = head_inputs(case, CPU)
    try:
        outputs = head_peers.head_step(provider, case, inputs)()
    except (ImportError, RuntimeError) as error:
        assert measure.describe(error) and provider.distribution not in ("torch", "powerflow_fast")
        pytest.skip(measure.describe(error))
    if provider.kind == "floor":
        assert outputs == ()
        return
    assert len(outputs) == 1 + MODES.index(mode)
    errors = head_case.head_errors(outputs, inputs, head_reference(inputs))
    assert errors["logp_max_err"] < 2e-5
    assert all(value < 1e-5 for name, value in errors.items() if name.endswith("rel_err"))
    assert not outputs[0][inputs.labels == head_case.IGNORE].any()
    if mode != "no_grad":
        assert not outputs[1][inputs.labels == head_case.IGNORE].any()


def test_the_reference_is_the_oracle():
    """The slab-wise fp64 reference of the suite against autograd through the materialised oracle."""
    from powerflow_fast.kernels.linear_logprob_reference import linear_logprobs_ref

    inputs = head_inputs(HeadCase(64, 9000, 256, "bf16", "full", mask_ratio=0.25), CPU)
    exact = head_reference(inputs)
    hidden, weight = (t.double().requires_grad_() for t in (inputs.hidden, inputs.weight))
    logp = linear_logprobs_ref(hidden, weight, inputs.labels)
    d_hidden, d_weight = torch.autograd.grad(logp, [hidden, weight], inputs.upstream.double())
    torch.testing.assert_close(exact.logp, logp.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exact.d_hidden, d_hidden[exact.rows], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(exact.d_weight, d_weight[exact.columns], rtol=1e-9, atol=1e-12)
    assert logp.min() < -6 and logp[logp != 0].max() > -1e-2  # unlikely and confident tokens


def flop_of_products(step) -> int:
    """2·rows·inner·columns of every matrix product that PyTorch's profiler sees in one step."""
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    flop = 0
    for event in profile.events():
        first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1, "powerflow_fast::head_product": 0}.get(event.name)
        if first is not None:
            a, b = event.input_shapes[first : first + 2]
            flop += 2 * a[0] * a[1] * b[1]
    return flop


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("provider", head_peers.HEAD_PROVIDERS[:1] + HEAD, ids=lambda p: p.name)
def test_passes_count_what_runs(provider, dtype):
    """The executed FLOP of a row, against the products that PyTorch's profiler sees."""
    if provider.passes is None:
        pytest.skip("gradient filtering: its FLOP depend on the data")
    if dtype == "bf16" and not (provider.kind == "ours" and compiled_products_run()):
        pytest.skip("a product may be more than one call")
    for i, mode in enumerate(MODES):
        case = HeadCase(24, 601, 128, dtype, mode)
        passes = provider.passes_of(case, CPU)[i]
        try:
            step = head_peers.head_step(provider, case, head_inputs(case, CPU))
            step()
        except (ImportError, RuntimeError) as error:
            pytest.skip(measure.describe(error))
        assert flop_of_products(step) == pytest.approx(passes * 2 * case.n * case.v * case.h, rel=0.02), mode


@pytest.mark.parametrize("provider", la_tb_peers.LA_TB_PROVIDERS[:3], ids=lambda p: p.name)
@pytest.mark.parametrize("off_policy", [False, True])
def test_la_tb_providers_agree(provider, off_policy):
    case = la_tb_case.LaTbCase(300, 7, off_policy)
    inputs = la_tb_case.la_tb_inputs(case, CPU)
    outputs = la_tb_peers.la_tb_step(provider, case, inputs)()
    errors = la_tb_case.la_tb_errors(outputs, inputs, la_tb_case.la_tb_reference(inputs))
    assert max(errors.values()) < 1e-4, errors


LOSS = [p for p in loss_peers.loss_providers(CPU, "fp32") if p.name != "naive compiled"]


@pytest.mark.parametrize("provider", LOSS, ids=lambda p: p.name)
def test_loss_providers_agree(provider):
    """Loss and three gradients of ragged sequences against fp64; a cut-down call keeps complete sequences."""
    case = loss_case.LossCase(61, 501, 128, b=5, dtype="fp32")
    inputs = loss_case.loss_inputs(case, CPU)
    try:
        outputs = loss_peers.loss_step(provider, case, inputs)()
    except (ImportError, RuntimeError) as error:
        assert measure.describe(error) and provider.distribution not in ("torch", "powerflow_fast")
        pytest.skip(measure.describe(error))
    if provider.kind == "floor":
        assert outputs == ()
        return
    errors = loss_case.loss_errors(outputs, inputs, loss_case.loss_reference(inputs))
    assert len(errors) == 4 and max(errors.values()) < 1e-5, errors
    first = inputs.first(8)
    outputs = loss_peers.loss_step(provider, case, first)()
    errors = loss_case.loss_errors(outputs, first, loss_case.loss_reference(first))
    assert max(errors.values()) < 1e-5, errors


def test_the_loss_reference_is_the_oracle():
    """Slab-wise fp64 against autograd through the materialised oracles."""
    from powerflow_fast.kernels.la_tb_reference import la_tb_loss_ref
    from powerflow_fast.kernels.linear_logprob_reference import linear_logprobs_ref

    inputs = loss_case.loss_inputs(loss_case.LossCase(64, 9000, 128, b=6, dtype="bf16"), CPU)
    exact, terms = loss_case.loss_reference(inputs), inputs.terms
    tensors = (inputs.head.hidden, inputs.head.weight, terms.log_z)
    hidden, weight, log_z = leaves = [t.double().requires_grad_() for t in tensors]
    logp = linear_logprobs_ref(hidden, weight, inputs.head.labels)
    base, psi = terms.base_logps.double(), terms.psi.double()
    loss = la_tb_loss_ref(logp, base, log_z, terms.cu_seqlens, alpha=terms.alpha, psi=psi)[0]
    d_hidden, d_weight, d_log_z = torch.autograd.grad(loss, leaves)
    outputs = (loss.detach(), d_hidden, d_weight, d_log_z)
    assert max(loss_case.loss_errors(outputs, inputs, exact).values()) < 1e-12
    lengths = terms.cu_seqlens.diff()
    assert int(lengths.min()) >= 1 and int(lengths.sum()) == 64 and len(lengths.unique()) > 2


@pytest.mark.parametrize("name", ["powerflow_fast composed", "powerflow_fast one pass"])
def test_passes_of_the_loss_count_what_runs(name):
    (provider,) = (p for p in loss_peers.OURS if p.name == name)
    case = loss_case.LossCase(24, 601, 128, b=3, dtype="fp32")
    step = loss_peers.loss_step(provider, case, loss_case.loss_inputs(case, CPU))
    step()
    executed = flop_of_products(step) / (2 * case.n * case.v * case.h)
    assert executed == pytest.approx(provider.passes_of(case, CPU)[-1], rel=0.02)


# Checks of arguments, imports, and what a row names itself (the backend): a change there changes no figure.
_NO_FIGURE = ("__init__", "errors", "ops/checks", "ops/extension", "ops/backends", "objectives/registry")
NO_FIGURE = {f"package/{name}.py" for name in _NO_FIGURE}


def definitions_executed(call) -> set[tuple[str, str]]:
    """(file as `measure.SOURCES` names it, definition) of every Python function of ours that runs during ``call``."""
    package = Path(measure.powerflow_fast.__file__).resolve().parent
    kernels = Path(measure.powerflow_fast.kernels.__path__[0]).resolve()
    lines = set()

    def note(frame, event, argument):
        if event == "call":
            lines.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    seen = set()
    for path, line in sorted(lines):
        path = Path(path).resolve()
        for name, folder in (("kernels", kernels), ("package", package)):
            if path.is_file() and path.is_relative_to(folder):
                file = f"{name}/{path.relative_to(folder).as_posix()}"
                seen |= {(file, definition) for definition in definitions_at(path, line)}
                break
    return seen


def definitions_at(path: Path, line: int) -> set[str]:
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        first = min(part.lineno for part in (statement, *getattr(statement, "decorator_list", ())))
        if first <= line <= statement.end_lineno:
            return measure.defined_names(statement)
    return set()


@pytest.mark.parametrize(
    ("op", "make"),
    [
        ("linear_logprobs", lambda: head_step_of(MODES[0])),
        ("linear_logprobs", lambda: head_step_of(MODES[1])),
        ("linear_logprobs", lambda: head_step_of(MODES[2])),
        ("linear_la_tb_loss", lambda: loss_step_of()),
        ("update", lambda: update_step_of()),
    ],
)
def test_the_digest_covers_what_runs(op, make):
    """A figure of ours is marked as out of date when any definition changes that it rests on."""
    step = make()
    step()
    ran = {(file, name) for file, name in definitions_executed(step) if file not in NO_FIGURE}
    listed = [entry.partition(":")[::2] for entry in measure.SOURCES[op, "torch"]]
    whole = {file for file, names in listed if not names}
    parts = {(file, name) for file, names in listed for name in names.split(",")}
    missing = {f"{file}:{name}" for file, name in ran if file not in whole and (file, name) not in parts}
    assert ran and not missing, f"add to measure.SOURCES: {missing}"


def head_step_of(mode):
    case = HeadCase(24, 601, 128, "fp32", mode, mask_ratio=0.25)
    return head_peers.head_step(head_peers.HEAD_PROVIDERS[0], case, head_inputs(case, CPU))


def loss_step_of():
    case = loss_case.LossCase(24, 601, 128, b=3, dtype="fp32")
    return loss_peers.loss_step(loss_peers.OURS[0], case, loss_case.loss_inputs(case, CPU))


def update_step_of():
    case = update_case.UpdateCase("tiny", "fp32", 16, 4, 9)
    return update_peers.update_step(update_peers.UPDATE_PROVIDERS[1], case, update_case.update_inputs(case, CPU))
