"""The torch backend: log-probs of a linear head, tile by tile, for CPUs and as the GPU fall-back.

Every function walks over tiles of rows x vocabulary columns in one reused fp32 buffer, so that extra memory depends on
the tile and on H, never on N x V. Logits are formed, exponentiated and summed in fp32 whatever the input dtype.

The label's column is kept out of every sum. With ``m`` the running maximum and ``so`` the running sum of
``exp(z_j − m)`` over the *other* columns, and ``d = z_y − m``:

    log p_y = logsigmoid(d − log so)            1 − p_y = sigmoid(log so − d)
    ∂ log p_y/∂h = (1 − p_y) (W_y − Σ_{j≠y} exp(z_j − m) W_j / so)

Nothing here subtracts nearly equal numbers or leaves fp32's range: a token with 1 − p < 1e-8 keeps its digits, in the
value and in the gradient, and so does a token 1000 nats below the maximum. The gradient does not contain the upstream
one, which is why a frozen head needs two matrix products in all: the backward pass only scales rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.types import ForwardOutput, LogitTransform

# Finite, so that the first rescale is exp(-huge) = 0 and never inf − inf.
_EMPTY_MAX = -1e30


def _tile_shape(n: int, v: int, device: torch.device) -> tuple[int, int]:
    """(rows, columns) of one tile.

    CPU: 32 MiB of fp32 stays in a last-level cache through the passes over it, and is wide enough that the products run
    at the speed of large ones. GPU: tiles far larger than L2, because each row chunk streams the whole weight.
    """
    rows, elements = (1024, 1 << 23) if device.type == "cpu" else (4096, 1 << 26)
    rows = max(1, min(n, rows))
    return rows, min(v, max(256, elements // rows))


def _matmul_fp32(a: Tensor, b: Tensor, *, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """``a @ b`` in fp32 (``out += a @ b`` with accumulate). Half-precision operands stay so on CUDA's tensor cores."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        product = torch.mm(a, b, out_dtype=torch.float32)
        if out is None:
            return product
        return out.add_(product) if accumulate else out.copy_(product)
    # A CPU's half-precision product would round the logits to 8 bits; fp32 inputs keep them.
    a, b = a.to(_compute_dtype(a)), b.to(_compute_dtype(b))
    if out is None:
        return torch.mm(a, b)
    return out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _operand(e: Tensor, like: Tensor) -> Tensor:
    """A tile of weights for the second product: the inputs' dtype on CUDA, fp32 elsewhere."""
    return e.to(like.dtype) if like.is_cuda else e


class _Problem:
    """The inputs of one call, with ignored rows taken out, and the tile buffer."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        ignore_index: int,
    ):
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.n, self.v, self.h = hidden.shape[0], weight.shape[0], hidden.shape[1]
        temperature, scale, self.softcap = transform
        # Without a softcap both factors are one multiplication, applied to the small operand.
        self.pre = scale if self.softcap is not None else scale / temperature
        self.post = 1.0 / temperature
        self.dtype = _compute_dtype(hidden)
        keep = labels != ignore_index
        self.in_range = (labels >= 0) & (labels < self.v)
        self.keep = keep
        self.rows: Tensor | None = None
        # Finding the kept rows costs a wait for the device, so only a CPU drops them before the products.
        if hidden.device.type == "cpu" and not bool(keep.all()):
            self.rows = keep.nonzero()[:, 0]
        self.labels = labels.where(keep & self.in_range, 0)
        self.count = self.n if self.rows is None else self.rows.numel()
        self.chunk, self.columns = _tile_shape(self.count, self.v, hidden.device)
        self.buffer = torch.empty(self.chunk * self.columns, dtype=self.dtype, device=hidden.device)
        self.slopes = torch.empty_like(self.buffer) if self.softcap is not None else None

    def chunks(self):
        """(row index for outputs, hidden rows, labels) of each chunk."""
        for start in range(0, self.count, self.chunk):
            index = slice(start, min(start + self.chunk, self.count))
            if self.rows is not None:
                index = self.rows[index]
            yield index, self.hidden[index], self.labels[index]

    def tiles(self, hidden: Tensor, labels: Tensor):
        """(columns, weight rows, logits, slopes ∂z/∂u or None, label in tile, label column) of each tile."""
        r = hidden.shape[0]
        half_on_cuda = hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)
        operand = hidden if half_on_cuda else hidden.to(self.dtype) * self.pre
        for start in range(0, self.v, self.columns):
            columns = slice(start, min(start + self.columns, self.v))
            w = self.weight[columns]
            if not half_on_cuda:
                w = w.to(self.dtype)
            width = w.shape[0]
            z = self.buffer[: r * width].view(r, width)
            _matmul_fp32(operand, w.t(), out=z)
            if half_on_cuda and self.pre != 1.0:
                z.mul_(self.pre)
            if self.bias is not None:
                z.add_(self.bias[columns].to(self.dtype), alpha=self.pre)
            slopes = None
            if self.softcap is not None:
                z.div_(self.softcap).tanh_()
                slopes = self.slopes[: r * width].view(r, width)
                torch.mul(z, z, out=slopes).neg_().add_(1.0).mul_(self.pre * self.post)
                z.mul_(self.softcap * self.post)
            here = (labels >= start) & (labels < start + width)
            yield columns, w, z, slopes, here, (labels - start).clamp(0, width - 1)[:, None]

    @property
    def slope(self) -> float:
        """∂z/∂u where it is constant (no softcap)."""
        return self.pre

    def finish(self, logp: Tensor) -> Tensor:
        """Ignored rows give 0; a label outside the vocabulary (possible only unchecked, on a GPU) gives NaN."""
        return logp.where(self.in_range, float("nan")).where(self.keep, 0.0)


class _Others:
    """Running maximum, sum and weighted sums over the columns that are not the label's."""

    def __init__(self, rows: int, like: Tensor):
        self.m = torch.full((rows,), _EMPTY_MAX, dtype=like.dtype, device=like.device)
        self.so = torch.zeros_like(self.m)
        self.z_y = torch.zeros_like(self.m)

    def exponentials(self, z: Tensor, here: Tensor, column: Tensor) -> Tensor:
        """Turn the logits in ``z`` into exp(z − m) in place, 0 at the label; return the old sums' rescale factor."""
        at_label = z.gather(1, column)[:, 0]
        self.z_y = torch.where(here, at_label, self.z_y)
        z.scatter_(1, column, torch.where(here, float("-inf"), at_label)[:, None])
        m = torch.maximum(self.m, z.amax(1))
        rescale = (self.m - m).exp_()
        self.m = m
        z.sub_(m[:, None]).exp_()
        self.so.mul_(rescale).add_(z.sum(1))
        return rescale

    def log_odds(self) -> Tensor:
        """log(p_y / (1 − p_y)). With a single column there are no others and it is +inf: p_y = 1."""
        return self.z_y - self.m - self.so.log()


def linear_logprob_fwd(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    ignore_index: int,
    *,
    stats: bool = False,
) -> ForwardOutput:
    """Log-probs and their log-sum-exp, with entropy and mean logit when asked for: 2NVH FLOP, no gradient."""
    problem = _Problem(hidden, weight, labels, bias, transform, ignore_index)
    names = ForwardOutput._fields if stats else ForwardOutput._fields[:3]
    out = {name: hidden.new_zeros(problem.n, dtype=problem.dtype) for name in names}
    for index, h, y in problem.chunks():
        others = _Others(h.shape[0], problem.buffer)
        energy, total = torch.zeros_like(others.m), torch.zeros_like(others.m)
        for _, _, z, _, here, column in problem.tiles(h, y):
            if stats:
                total += z.sum(1)
                old_m, old_so = others.m, others.so.clone()
                logits = z.clone()
                rescale = others.exponentials(z, here, column)
                # Σ E (z − m) moves with the maximum: each old term gains (m_old − m_new).
                energy = rescale * (energy + (old_m - others.m) * old_so)
                energy += logits.sub_(others.m[:, None]).mul_(z).sum(1)
            else:
                others.exponentials(z, here, column)
        odds = others.log_odds()
        logp = torch.nn.functional.logsigmoid(odds)
        out["logp"][index] = logp
        out["others_max"][index] = others.m
        out["others_sum"][index] = others.so
        if stats:
            out["lse"][index] = others.z_y - logp
            mean_energy = energy / others.so.clamp_min(torch.finfo(energy.dtype).tiny)
            # −Σ p (z − lse): the others share 1 − p_y and z_j − lse = (z_j − m) − log so + log(1 − p_y).
            surprise = others.so.log() - mean_energy - torch.nn.functional.logsigmoid(-odds)
            p_others = torch.sigmoid(-odds)
            out["entropy"][index] = torch.where(p_others > 0, p_others * surprise, 0.0) - logp.exp() * logp
            out["mean_logit"][index] = total / problem.v
    out["logp"] = problem.finish(out["logp"])
    for name in names[3:]:
        out[name] = out[name].where(problem.keep, 0.0)
    return ForwardOutput(**out)


def linear_logprob_fwd_d_hidden(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, transform: LogitTransform, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Log-probs (N,) and ``∂ logp_n/∂ hidden_n`` (N, H) in hidden's dtype (fp32 for fp16), together: 4NVH FLOP."""
    problem = _Problem(hidden, weight, labels, bias, transform, ignore_index)
    logp_out = hidden.new_zeros(problem.n, dtype=problem.dtype)
    # float16 ends at 6e-8, where a gradient that the upstream one would lift back (a loss scale) is lost.
    unit_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    unit_out = torch.zeros(hidden.shape, dtype=unit_dtype, device=hidden.device)
    for index, h, y in problem.chunks():
        others = _Others(h.shape[0], problem.buffer)
        acc = torch.zeros(h.shape, dtype=problem.dtype, device=h.device)
        label_slope = torch.zeros_like(others.m)
        for _, w, z, slopes, here, column in problem.tiles(h, y):
            rescale = others.exponentials(z, here, column)
            if slopes is not None:
                label_slope = torch.where(here, slopes.gather(1, column)[:, 0], label_slope)
                z.mul_(slopes)
            acc.mul_(rescale[:, None])
            _matmul_fp32(_operand(z, h), w, out=acc, accumulate=True)
        odds = others.log_odds()
        logp_out[index] = torch.nn.functional.logsigmoid(odds)
        acc.div_(others.so.clamp_min(torch.finfo(acc.dtype).tiny)[:, None])
        label_rows = weight[y].to(acc.dtype)
        if problem.softcap is not None:
            label_rows.mul_(label_slope[:, None])
        scale = torch.sigmoid(-odds) * (problem.slope if problem.softcap is None else 1.0)
        unit_out[index] = label_rows.sub_(acc).mul_(scale[:, None]).to(unit_out.dtype)
    if problem.rows is None:
        unit_out.mul_(problem.keep[:, None])
    return problem.finish(logp_out), unit_out


def linear_logprob_bwd(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    ignore_index: int,
    forward: ForwardOutput,
    d_logp: Tensor,
    *,
    need_d_hidden: bool,
    need_d_weight: bool,
    need_d_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients from recomputed logits: 2NVH FLOP plus 2NVH for each of ``d_hidden`` and ``d_weight``.

    With ``E_j = exp(z_j − m)`` and ``E_y = −so`` instead, ∂ log p_y/∂z = −E (1 − p_y)/so: one factor per row, which
    goes with the upstream gradient to the N x H side. Shifting by m rather than by the rounded log-sum-exp keeps rows
    whose logits are in the hundreds as accurate as a softmax that stored its result.

    ``d_weight`` is summed in fp32, which for half-precision weights takes a buffer of 4·V·H bytes.
    """
    problem = _Problem(hidden, weight, labels, bias, transform, ignore_index)
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need_d_hidden else None
    d_weight = torch.zeros(weight.shape, dtype=problem.dtype, device=weight.device) if need_d_weight else None
    d_bias = torch.zeros(problem.v, dtype=problem.dtype, device=weight.device) if need_d_bias else None
    d_logp = d_logp.to(problem.dtype).where(problem.keep, 0.0)
    for index, h, y in problem.chunks():
        m, so = forward.others_max[index], forward.others_sum[index]
        # expm1(logp) = −(1 − p_y), to full relative accuracy.
        row_factor = d_logp[index] * torch.expm1(forward.logp[index]) / so.clamp_min(torch.finfo(so.dtype).tiny)
        if problem.softcap is None:
            row_factor = row_factor * problem.slope
        acc = torch.zeros(h.shape, dtype=problem.dtype, device=h.device) if need_d_hidden else None
        scaled_hidden = _operand(h.to(problem.dtype) * row_factor[:, None], h) if need_d_weight else None
        for columns, w, z, slopes, here, column in problem.tiles(h, y):
            z.sub_(m[:, None])
            z.exp_()
            at_label = torch.where(here, -so, z.gather(1, column)[:, 0])
            z.scatter_(1, column, at_label[:, None])
            if slopes is not None:
                z.mul_(slopes)
            if need_d_bias:
                d_bias[columns].add_(torch.mv(z.t(), row_factor))
            e = _operand(z, h)
            if need_d_hidden:
                _matmul_fp32(e, w, out=acc, accumulate=True)
            if need_d_weight:
                _matmul_fp32(e.t(), scaled_hidden, out=d_weight[columns], accumulate=True)
        if need_d_hidden:
            d_hidden[index] = acc.mul_(row_factor[:, None]).to(d_hidden.dtype)
    return (
        d_hidden,
        None if d_weight is None else d_weight.to(weight.dtype),
        None if d_bias is None else d_bias.to(bias.dtype),
    )
