"""The torch backend: log-probs of a linear head, tile by tile, for CPUs and as the GPU fall-back.

Every function walks over tiles of rows x vocabulary columns in one reused fp32 buffer, so that extra memory depends on
the tile and on H, never on N x V. Logits are formed, exponentiated and summed in fp32 whatever the input dtype.

Exponentials are taken relative to a row's *anchor* a, which is the label's own logit z_y, known beforehand from one dot
product. No maximum is looked for and nothing is rescaled between tiles: partial sums just add. The label's column is
kept out of every sum; with ``E_j = exp(z_j − a)``, ``S = Σ_{j≠y} E_j`` and ``t = exp(z_y − a)``, 1 for that anchor:

    log p_y = −log(1 + S/t)                 ∂ log p_y/∂h = (S W_y − Σ_{j≠y} E_j W_j) / (t + S)

Nothing here subtracts nearly equal numbers: a token with 1 − p < 1e-8 keeps its digits, in the value and in the
gradient. The gradient doesn't contain the upstream one, which is why a frozen head needs two matrix products in all:
the backward pass only scales rows. A token so unlikely that S would leave fp32's range (z_max − z_y > 60) is done again
with its row's maximum as the anchor, which holds for any logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.interface import (
    ForwardOutput,
    HeadCall,
    HeadSums,
    HiddenGradient,
    RowExponentials,
    RowStatistics,
    kept_width,
)
from .torch_products import HALF, Products, products_for

# e^60 leaves room for the products with the weight that follow; below, a float32 ends where 1 − p is 1e-38.
_LARGEST_SUM = math.exp(60.0)


class _Rows(NamedTuple):
    """Some rows of the problem, and the logits of their labels."""

    index: slice | Tensor
    """where they are in the problem"""
    hidden: Tensor
    labels: Tensor
    z_y: Tensor
    slope_y: Tensor | float
    """∂z_y/∂u_y"""
    anchor: Tensor

    def select(self, rows: Tensor) -> _Rows:
        index = self.index
        if isinstance(index, slice):
            index = torch.arange(index.start, index.stop, device=rows.device)
        picked = (x[rows] if isinstance(x, Tensor) else x for x in self[1:])
        return _Rows(index[rows], *picked)


class _Sums(NamedTuple):
    """Sums over the tiles of some rows; all but the first only where statistics are asked for."""

    others: Tensor
    """S: E over the columns other than the label's"""
    energy: Tensor | None = None
    """E (z − anchor) over the same columns"""
    logits: Tensor | None = None
    """z over all columns"""


class _Problem:
    """The inputs of one call, with ignored rows taken out, and the tile buffer."""

    def __init__(self, call: HeadCall):
        hidden, weight, labels, bias, transform, ignore_index = call
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.n, self.v = hidden.shape[0], weight.shape[0]
        temperature, scale, self.softcap = transform
        # Without a softcap both factors are one multiplication, applied to the small operand where that is fp32.
        self.pre = scale if self.softcap is not None else scale / temperature
        self.post = 1.0 / temperature
        self.products = products_for(hidden)
        self.dtype = self.products.dtype
        # Half-precision operands stay as they are, so the factor goes to their fp32 product instead.
        self.scaled_later = self.pre if self.products.operand_dtype in HALF else 1.0
        keep = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
        in_range = (labels >= 0) & (labels < self.v)
        self.labels = labels.where(keep & in_range, 0)
        self.unknown = keep & ~in_range
        self.rows = None if ignore_index is None or bool(keep.all()) else keep.nonzero()[:, 0]
        self.count = self.n if self.rows is None else self.rows.numel()
        self.chunk, self.columns = self.products.tile_shape(self.count, self.v)
        self.buffer = torch.empty(self.chunk * self.columns, dtype=self.dtype, device=hidden.device)
        self.slopes = torch.empty_like(self.buffer) if self.softcap is not None else None
        self.operands: Tensor | None = None  # for exponentials that a product takes in half precision

    def _transform(self, u: Tensor, slopes: Tensor | None) -> None:
        """u → z in place, given ``pre`` without a softcap; ∂z/∂u into ``slopes`` where there is one."""
        if self.softcap is None:
            return
        u.div_(self.softcap).tanh_()
        torch.mul(u, u, out=slopes).neg_().add_(1.0).mul_(self.pre * self.post)
        u.mul_(self.softcap * self.post)

    def chunks(self) -> Iterator[_Rows]:
        for start in range(0, self.count, self.chunk):
            index: slice | Tensor = slice(start, min(start + self.chunk, self.count))
            if self.rows is not None:
                index = self.rows[index]
            h, y = self.hidden[index], self.labels[index]
            u = (h.to(self.dtype) * self.pre * self.weight[y].to(self.dtype)).sum(1)
            if self.bias is not None:
                u += self.bias[y].to(self.dtype) * self.pre
            slope = self.pre if self.softcap is None else torch.empty_like(u)
            self._transform(u, slope)
            yield _Rows(index, h, y, u, slope, u)

    def weight_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, their weight rows as the products take them)."""
        for start in range(0, self.v, self.columns):
            columns = slice(start, min(start + self.columns, self.v))
            yield columns, self.weight[columns].to(self.products.operand_dtype)

    def operand(self, rows: _Rows) -> Tensor:
        """Hidden states as the products take them."""
        if self.products.operand_dtype in HALF:
            return rows.hidden
        return rows.hidden.to(self.dtype) * self.pre

    def tile(self, rows: _Rows, operand: Tensor, columns: slice, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and ∂z/∂u or None where it is ``pre``. They lie in buffers that the next tile overwrites."""
        z = self.buffer[: operand.shape[0] * w.shape[0]].view(operand.shape[0], -1)
        slopes = None if self.slopes is None else self.slopes[: z.numel()].view_as(z)
        self.products.logits(operand, w, z)
        if self.scaled_later != 1.0:
            z.mul_(self.scaled_later)
        if self.bias is not None:
            z.add_(self.bias[columns].to(self.dtype), alpha=self.pre)
        self._transform(z, slopes)
        return z, slopes

    def tiles(self, rows: _Rows) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """(columns, their weight rows, and `tile`) of each tile of some rows."""
        operand = self.operand(rows)
        for columns, w in self.weight_tiles():
            yield columns, w, *self.tile(rows, operand, columns, w)

    def exponential_tile(
        self,
        rows: _Rows,
        columns: slice,
        tile: tuple[Tensor, Tensor | None],
        *,
        at_label: Tensor | None = None,
        sums: _Sums | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """E ∂z/∂u, or E where ∂z/∂u is ``pre``, ready for the products.

        ``at_label`` stands for E at the label, 0 unless given. What the tile has of ``sums`` is added to them. The
        result lies in the columns of ``kept`` (rows, V), or where the next tile overwrites it.
        """
        z, slopes = tile
        out = self._operands_like(z) if kept is None else kept[:, columns]
        if slopes is None:
            return self.summed(rows, columns, z, sums, at_label=at_label, out=out)
        e = self.summed(rows, columns, z, sums, at_label=at_label).mul_(slopes)
        return e if out is None else out.copy_(e)

    def summed(
        self,
        rows: _Rows,
        columns: slice,
        z: Tensor,
        sums: _Sums | None,
        *,
        at_label: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """`Products.exponentials` of a tile of logits, which adds to ``sums``."""
        label = rows.labels - columns.start
        others, energy, logits = sums or (None, None, None)
        return self.products.exponentials(
            z, rows.anchor, label, at_label, sums=others, energy=energy, logits=logits, out=out
        )

    def exponentials(
        self, rows: _Rows, sums: _Sums, kept: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(columns, their weight rows, `exponential_tile`) of each tile of some rows."""
        for columns, w, *tile in self.tiles(rows):
            yield columns, w, self.exponential_tile(rows, columns, tile, sums=sums, kept=kept)

    def _operands_like(self, z: Tensor) -> Tensor | None:
        """Memory of z's shape in the dtype that the products take; None if that is z's own."""
        if self.products.operand_dtype == z.dtype:
            return None
        if self.operands is None:
            self.operands = torch.empty_like(self.buffer, dtype=self.products.operand_dtype)
        return self.operands[: z.numel()].view_as(z)

    def anchored(self, run: Callable[[_Rows], Tensor]) -> None:
        """``run`` writes the results of some rows and returns their S. Rows where it is out of range run once more."""
        for rows in self.chunks():
            # float16 operands of a second product would end at 65504: their exponentials must not exceed one
            if self.products.operand_dtype == torch.float16:
                rows = rows._replace(anchor=self.row_max(rows))
            outside = (~(run(rows) <= _LARGEST_SUM)).nonzero()[:, 0]
            if outside.numel():
                rows = rows.select(outside)
                run(rows._replace(anchor=self.row_max(rows)))

    def row_max(self, rows: _Rows) -> Tensor:
        return torch.stack([z.amax(1) for _, _, z, _ in self.tiles(rows)]).amax(0)

    def zeros(self, count: int) -> list[Tensor]:
        """So many results per row, each (N,)."""
        return [self.hidden.new_zeros(self.n, dtype=self.dtype) for _ in range(count)]

    def zero_sums(self, rows: _Rows, stats: RowStatistics | None) -> _Sums:
        return _Sums(*(torch.zeros_like(rows.anchor) for _ in range(1 if stats is None else 3)))

    def put_scores(self, rows: _Rows, sums: _Sums, logp_out: Tensor, stats: RowStatistics | None) -> None:
        """log p_y of the rows, and their statistics if there is memory for them.

        log(p_y / (1 − p_y)) is +inf with a single column, for which there are no others: p_y = 1.
        """
        log_odds = rows.z_y - rows.anchor - sums.others.log()
        logp = torch.nn.functional.logsigmoid(log_odds)
        logp_out[rows.index] = logp
        if stats is None:
            return
        # −Σ p (z − lse): the others share 1 − p_y, and z_j − lse = (z_j − a) − log S + log(1 − p_y)
        surprise = sums.others.log() - sums.energy / sums.others - torch.nn.functional.logsigmoid(-log_odds)
        p_others = torch.sigmoid(-log_odds)
        entropy = torch.where(p_others > 0, p_others * surprise, 0.0) - logp.exp() * logp
        results = RowStatistics(rows.z_y - logp, entropy, sums.logits / self.v)
        for out, result in zip(stats, results, strict=True):
            out[rows.index] = result

    def label_weight(self, rows: _Rows, others: Tensor) -> Tensor:
        """S, times ∂z_y/∂u_y where there is a softcap: what stands at the label where E_j (∂z/∂u)_j is elsewhere."""
        return others if self.softcap is None else others * rows.slope_y

    def scale(self, rows: _Rows, others: Tensor) -> Tensor:
        """1/(t + S), times ∂z/∂u where that is one number."""
        slope = 1.0 if self.softcap is not None else self.pre
        return slope / (others + torch.exp(rows.z_y - rows.anchor))

    def finish(self, logp: Tensor) -> Tensor:
        """A label outside the vocabulary, possible only unchecked on a GPU, gives NaN."""
        return logp.masked_fill_(self.unknown, float("nan"))


def linear_logprob_fwd(call: HeadCall, *, stats: bool = False) -> ForwardOutput:
    """Log-probs and what a gradient from recomputed logits needs: 2NVH FLOP."""
    problem = _Problem(call)
    logp_out, anchor_out, others_out = problem.zeros(3)
    stats_out = RowStatistics(*problem.zeros(3)) if stats else None

    def run(rows: _Rows) -> Tensor:
        sums = problem.zero_sums(rows, stats_out)
        for columns, _, z, _ in problem.tiles(rows):
            problem.summed(rows, columns, z, sums)
        problem.put_scores(rows, sums, logp_out, stats_out)
        anchor_out[rows.index], others_out[rows.index] = rows.anchor, sums.others
        return sums.others

    problem.anchored(run)
    return ForwardOutput(problem.finish(logp_out), anchor_out, others_out, stats_out)


def linear_logprob_fwd_d_hidden(call: HeadCall, *, stats: bool = False) -> HiddenGradient:
    """Log-probs and, but for the upstream factor, their gradient by ``hidden``, together: 4NVH FLOP."""
    hidden, weight = call.hidden, call.weight
    problem = _Problem(call)
    (logp_out,) = problem.zeros(1)
    # float16 ends at 6e-8, where a gradient that the upstream one would lift back (a loss scale) is lost.
    unit_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    unit_out = torch.zeros(hidden.shape, dtype=unit_dtype, device=hidden.device)
    stats_out = RowStatistics(*problem.zeros(3)) if stats else None

    def run(rows: _Rows) -> Tensor:
        sums = problem.zero_sums(rows, stats_out)
        product = torch.zeros(rows.hidden.shape, dtype=problem.dtype, device=hidden.device)
        for _, w, e in problem.exponentials(rows, sums):
            problem.products.add(e, w, product)
        problem.put_scores(rows, sums, logp_out, stats_out)
        others = sums.others
        at_label, scale = problem.label_weight(rows, others), problem.scale(rows, others)
        own = weight[rows.labels].to(problem.dtype).mul_(at_label[:, None])
        unit_out[rows.index] = own.sub_(product).mul_(scale[:, None]).to(unit_dtype)
        return others

    problem.anchored(run)
    return HiddenGradient(problem.finish(logp_out), unit_out, stats_out)


def linear_logprob_fwd_exps(call: HeadCall, *, memory: Tensor | None = None, stats: bool = False) -> RowExponentials:
    """Log-probs and all that a backward pass for a trainable head needs, kept instead of recomputed: 2NVH FLOP, and
    V elements per row of ``kept_dtype``, in ``memory`` where that is given (``N * kept_width(V)`` elements or more)."""
    hidden = call.hidden
    problem = _Problem(call._replace(ignore_index=None))
    width = kept_width(problem.v)
    if memory is None:
        memory = hidden.new_empty(problem.n * width, dtype=problem.products.operand_dtype)
    exps = memory[: problem.n * width].view(problem.n, width)[:, : problem.v]
    logp_out, scale_out = problem.zeros(2)
    stats_out = RowStatistics(*problem.zeros(3)) if stats else None

    def run(rows: _Rows) -> Tensor:
        sums = problem.zero_sums(rows, stats_out)
        in_place = isinstance(rows.index, slice)
        for columns, _, e in problem.exponentials(rows, sums, exps[rows.index] if in_place else None):
            if not in_place:
                exps[rows.index, columns] = e
        problem.put_scores(rows, sums, logp_out, stats_out)
        others = sums.others
        index = torch.arange(problem.n, device=hidden.device)[rows.index]
        exps[index, rows.labels] = -problem.label_weight(rows, others).to(exps.dtype)
        scale_out[rows.index] = problem.scale(rows, others)
        return others

    problem.anchored(run)
    return RowExponentials(problem.finish(logp_out), exps, scale_out, stats_out)


def linear_logprob_bwd(
    call: HeadCall,
    forward: ForwardOutput,
    d_logp: Tensor,
    *,
    need_d_hidden: bool,
    need_d_weight: bool,
    need_d_bias: bool,
    add_to: HeadSums | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients from recomputed logits: 2NVH FLOP plus 2NVH for each of ``d_hidden`` and ``d_weight``.

    With ``E_y = −S``, ∂ log p_y/∂z = −E (1 − p_y)/S: one factor per row, which goes with the upstream gradient to the
    N x H side. Shifting by an anchor rather than by the rounded log-sum-exp keeps rows whose logits are in the hundreds
    as accurate as a softmax that stored its result.

    ``d_weight`` and ``d_bias`` are summed in fp32: in ``add_to``, and then not returned, or tile by tile, each complete
    before the next.
    """
    hidden, weight, _, bias, *_ = call
    problem = _Problem(call)
    if (sums := add_to) is None:
        sums = HeadSums.like(weight if need_d_weight else None, bias if need_d_bias else None, own_dtype=True)
    parts = []
    for rows in problem.chunks():
        rows = rows._replace(anchor=forward.anchor[rows.index])
        others, logp = forward.others_sum[rows.index], forward.logp[rows.index]
        # expm1(logp) = −(1 − p_y), to full relative accuracy.
        factor = d_logp[rows.index] * torch.expm1(logp) / others.clamp_min(torch.finfo(problem.dtype).tiny)
        if problem.softcap is None:
            factor = factor * problem.pre
        product = torch.zeros(rows.hidden.shape, dtype=problem.dtype, device=hidden.device) if need_d_hidden else None
        scaled = (rows.hidden.to(problem.dtype) * factor[:, None]).to(problem.products.operand_dtype)
        parts.append((rows, problem.operand(rows), -others, factor, scaled, product))
    for columns, w in problem.weight_tiles() if parts else ():
        total = sums.columns(columns, problem.dtype)
        for rows, operand, at_label, factor, scaled, product in parts:
            tile = problem.tile(rows, operand, columns, w)
            e = problem.exponential_tile(rows, columns, tile, at_label=at_label)
            _add_products(problem.products, e, w, scaled, factor, product, total)
        sums.put(columns, total)
    sums.fresh = sums.fresh and not parts
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need_d_hidden else None
    if need_d_hidden:
        for rows, _, _, factor, _, product in parts:
            d_hidden[rows.index] = product.mul_(factor[:, None]).to(hidden.dtype)
    return d_hidden, *((None, None) if add_to is not None else sums.finished())


def linear_logprob_bwd_exps(
    hidden: Tensor,
    weight: Tensor,
    kept: RowExponentials,
    d_logp: Tensor,
    *,
    need_d_hidden: bool,
    add_to: HeadSums,
) -> Tensor | None:
    """As `linear_logprob_bwd`, from kept exponentials: 2NVH FLOP for each of ``d_hidden``, which is returned, and
    ``d_weight``. Sums of other dtypes than fp32 take a single call."""
    products = products_for(hidden)
    dtype = products.operand_dtype
    factor = -d_logp * kept.scale
    scaled = (hidden * factor[:, None]).to(dtype)
    rounded = all(x is None or x.dtype == dtype for x in (add_to.d_weight, add_to.d_bias))
    if products.rounds_whole and add_to.fresh and rounded:
        if add_to.d_weight is not None:
            torch.mm(kept.exps.t(), scaled, out=add_to.d_weight)
        if add_to.d_bias is not None:
            add_to.d_bias.copy_(torch.mv(kept.exps.t(), factor.to(dtype)))
        add_to.fresh = False
        return (torch.mm(kept.exps, weight) * factor[:, None]).to(hidden.dtype) if need_d_hidden else None
    product = torch.zeros(hidden.shape, dtype=products.dtype, device=hidden.device) if need_d_hidden else None
    n, v = kept.exps.shape
    width = products.tile_shape(n, v)[1]
    for start in range(0, v, width):
        columns = slice(start, min(start + width, v))
        w = weight[columns].to(dtype)
        total = add_to.columns(columns, products.dtype)
        _add_products(products, kept.exps[:, columns], w, scaled, factor, product, total)
        add_to.put(columns, total)
    add_to.fresh = False
    return product.mul_(factor[:, None]).to(hidden.dtype) if need_d_hidden else None


def _add_products(
    products: Products, e: Tensor, w: Tensor, scaled: Tensor, factor: Tensor, product: Tensor | None, total: HeadSums
) -> None:
    """What one tile of exponentials adds to the gradients; ``total`` has the tile's columns."""
    if product is not None:
        products.add(e, w, product)
    if total.d_weight is not None:
        products.add(e.t(), scaled, total.d_weight, fresh=total.fresh)
    if total.d_bias is not None:
        products.add(e.t(), factor.to(e.dtype)[:, None], total.d_bias[:, None], fresh=total.fresh)
    total.fresh = False


def kept_dtype(hidden: Tensor) -> torch.dtype:
    """Of the exponentials that `linear_logprob_fwd_exps` keeps."""
    return products_for(hidden).operand_dtype


def scaled(unit: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``(unit * factor).to(dtype)``, in place or in pieces: a whole product of a head's size would be the peak. The
    pieces take turns in one buffer, since a CPU spends more on new pages than on the product."""
    if unit.dtype == dtype:
        return unit.mul_(factor)
    out = torch.empty_like(unit, dtype=dtype)
    rows = max(1, (1 << 20) * unit.shape[0] // max(1, unit.numel()))
    buffer = torch.empty_like(unit[:rows])
    for part, source in zip(out.split(rows), unit.split(rows), strict=True):
        part.copy_(torch.mul(source, factor, out=buffer[: len(source)]))
    return out
