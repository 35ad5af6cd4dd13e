"""From last hidden states and a vocabulary head to scores and losses, in memory that does not grow with the tokens.

Axes: N rows (trained tokens), C rows of one chunk, V real vocabulary, D hidden, K support size.

Logits exist for one chunk of C rows at a time. The backward pass is written by hand: each chunk's logits are turned
into their own gradient in place and contracted with the head at once, so no logits survive the forward pass and no
matrix product is repeated. Elementwise work inside a chunk runs on small blocks of rows, so its temporaries stay in
cache. Peak extra memory: 4 bytes x C x V, plus 4 x C x V for each view with support Full, plus the blocks.

Left out: sharded (tensor-parallel) heads.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opdkit.losses import Loss, StudentRows
from opdkit.step import Step

CHUNK_ENTRIES = 2**23  # logits of one chunk when none is asked for: 32 MiB of float32
BLOCK_ENTRIES = 2**18  # elementwise block: 1 MiB of float32 stays in a core's cache


@dataclass(frozen=True)
class Head:
    """A vocabulary head: softmax(softcap(scale * (weight h + bias)) / temperature) over the real vocabulary.

    Rows of `weight` at and above `vocab` are padding: they are never formed, so both sides of a comparison are
    normalised over the tokenizer's real ids.
    """

    weight: Float[Tensor, "P D"]  # P >= V rows
    bias: Float[Tensor, " P"] | None = None
    vocab: int | None = None  # V; None = all rows are real
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def size(self) -> int:
        """V, the number of real token ids."""
        return self.vocab or self.weight.shape[0]

    def at(self, temperature: float) -> "Head":
        return replace(self, temperature=temperature)

    def logits(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """Logits over the real vocabulary after scale, soft-cap and temperature; float32, or float64 for float64 input."""
        bias = None if self.bias is None else self.bias[: self.size].to(hidden.dtype)
        z = F.linear(hidden, self.weight[: self.size].to(hidden.dtype), bias)
        z = z if z.dtype == torch.float64 else z.float()
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z = z.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            z /= self.temperature
        return z

    def raw_gradient(self, dz: Float[Tensor, "n V"], lp: Float[Tensor, "n V"] | None, lse: Float[Tensor, " n"] | None):
        """Turn the gradient of the final logits, in place, into that of `weight h + bias`."""
        factor = self.scale / self.temperature
        if self.softcap is not None:
            assert lp is not None and lse is not None
            capped = (lp + lse[:, None]) * (self.temperature / self.softcap)
            dz *= capped.square_().neg_().add_(1.0)
        return dz.mul_(factor) if factor != 1.0 else dz

    def chunk(self, rows: int | None = None) -> int:
        """Rows of one chunk: `rows`, or as many as CHUNK_ENTRIES logits allow, at least 16."""
        return rows or max(16, CHUNK_ENTRIES // self.size)


@dataclass(frozen=True)
class HeadRows:
    """A view's full-vocabulary log-probs, lazily: hidden states [N, D] and the head that reads them."""

    hidden: Float[Tensor, "N D"]
    head: Head

    def log_probs(self, rows: Int[Tensor, " n"] | slice) -> Float[Tensor, "n V"]:
        z = self.head.logits(self.hidden[rows])
        for block in blocks(*z.shape):
            z[block] = z[block].log_softmax(-1)
        return z

    def take(self, rows: Int[Tensor, " n"]) -> "HeadRows":
        return HeadRows(self.hidden[rows], self.head)


@dataclass(frozen=True)
class TableRows:
    """Full-vocabulary log-probs that are simply held: for small vocabularies and tests."""

    table: Float[Tensor, "N V"]

    def log_probs(self, rows: Int[Tensor, " n"] | slice) -> Float[Tensor, "n V"]:
        return self.table[rows].clone()

    def take(self, rows: Int[Tensor, " n"]) -> "TableRows":
        return TableRows(self.table[rows])


def chunks(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows that cover n rows."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def blocks(n: int, width: int) -> Iterator[slice]:
    """Consecutive slices of rows whose entries fit BLOCK_ENTRIES."""
    return chunks(n, max(1, BLOCK_ENTRIES // max(width, 1)))


# ---------------------------------------------------------------------------------------------------------------------
# Scores: no gradient


@dataclass(frozen=True)
class RowScores:
    """What `score_rows` read off N rows (nats); fields that were not asked for are None."""

    sampled: Float[Tensor, " N"]
    log_norm: Float[Tensor, " N"]  # log-sum-exp of the logits
    entropy: Float[Tensor, " N"] | None
    top_ids: Int[Tensor, "N Kt"] | None
    top: Float[Tensor, "N Kt"] | None
    ids: Int[Tensor, "N K"] | None  # the ids that `choose` gave
    valid: Bool[Tensor, "N K"] | None
    at_ids: Float[Tensor, "N K"] | None
    tail: Float[Tensor, " N"] | None  # log of the mass outside the valid ids


Choose = Callable[[slice, Tensor | None], tuple[Tensor, Tensor]]  # (rows, their top-k ids) -> ids, valid [n, K]


@torch.no_grad()
def score_rows(
    head: Head,
    hidden: Float[Tensor, "N D"],
    tokens: Int[Tensor, " N"],
    *,
    top_k: int = 0,
    entropy: bool = True,
    choose: Choose | None = None,
    chunk: int | None = None,
) -> RowScores:
    """Log-prob of each token, and on request entropy, the top-k, and log-probs at chosen ids with the tail outside.

    `choose` may read the chunk's own top-k ids, so candidate sets made of both models' lists need one pass only.
    Raises ValueError when `top_k` exceeds the vocabulary.
    """
    if top_k > head.size:
        raise ValueError(f"top_k = {top_k} exceeds the vocabulary of {head.size} ids; ask for at most that many")
    size = head.chunk(chunk)
    parts = [_score_chunk(head, hidden, tokens, rows, top_k, entropy, choose) for rows in chunks(hidden.shape[0], size)]
    if not parts:  # no rows: score an empty chunk for the shapes
        parts = [_score_chunk(head, hidden, tokens, slice(0, 0), top_k, entropy, choose)]
    columns = zip(*parts, strict=True)
    return RowScores(*(None if c[0] is None else torch.cat([t for t in c if t is not None]) for c in columns))  # type: ignore[arg-type]


def _score_chunk(
    head: Head, hidden: Tensor, tokens: Tensor, rows: slice, top_k: int, entropy: bool, choose: Choose | None
) -> list[Tensor | None]:
    z = head.logits(hidden[rows])
    log_norm, ent, tail = (z.new_empty(z.shape[0]) for _ in range(3))
    for block in blocks(*z.shape):
        log_norm[block] = z[block].logsumexp(-1)
        z[block] -= log_norm[block, None]
        if entropy:
            ent[block] = -torch.linalg.vecdot(z[block].exp(), z[block])
    top = torch.topk(z, top_k, dim=-1) if top_k else None
    ids = valid = at_ids = None
    if choose is not None:
        ids, valid = choose(rows, top.indices if top else None)
        at_ids = z.gather(1, ids)
        for block in blocks(*z.shape):
            tail[block] = tail_of(z[block].exp(), ids[block], valid[block])
    return [
        z.gather(1, tokens[rows, None]).squeeze(1),
        log_norm,
        ent if entropy else None,
        top.indices if top else None,
        top.values if top else None,
        ids,
        valid,
        at_ids,
        tail if choose is not None else None,
    ]


def tail_of(p: Float[Tensor, "n V"], ids: Int[Tensor, "n K"], valid: Bool[Tensor, "n K"]) -> Float[Tensor, " n"]:
    """Log of the mass outside the valid ids, summed over that complement; `p` is overwritten.

    A mass of 0 (the ids cover the vocabulary) gives the log of the smallest normal number, never -inf.
    """
    return _clear(p, ids, valid).sum(-1).clamp(min=torch.finfo(p.dtype).tiny).log()


def _clear(p: Float[Tensor, "n V"], ids: Int[Tensor, "n K"], valid: Bool[Tensor, "n K"]) -> Float[Tensor, "n V"]:
    """Set the entries at the valid ids to 0, in place. An id may also stand in an invalid column."""
    rows = torch.arange(p.shape[0], device=p.device)[:, None].expand_as(ids)[valid]
    p[rows, ids[valid]] = 0.0
    return p


# ---------------------------------------------------------------------------------------------------------------------
# Losses: forward and hand-written backward in one pass


@dataclass(frozen=True)
class RowTerm:
    """One term on N rows: a row-wise loss, the step restricted to these rows, its signal and a coefficient per row."""

    loss: Loss
    step: Step
    signal: Float[Tensor, " N"] | Float[Tensor, "N K"] | None
    coef: Float[Tensor, " N"]  # term coefficient x reduction x weight


def objective(
    hidden: Float[Tensor, "N D"], head: Head, terms: Sequence[RowTerm], chunk: int | None = None
) -> tuple[Float[Tensor, ""], list[Float[Tensor, " N"]]]:
    """Sum over terms and rows of coef x loss, and each term's row losses (nats, detached).

    The sum is differentiable with respect to `hidden` and, unless it is frozen, the head's weight and bias.
    """
    total, *rows = _Objective.apply(hidden, head.weight, head.bias, head, tuple(terms), chunk)
    return total, rows


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head, terms, chunk):  # type: ignore[no-untyped-def]
        head = replace(head, weight=weight.detach(), bias=None if bias is None else bias.detach())
        wants = ctx.needs_input_grad[:3]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=hidden.device)
        rows = [torch.empty(hidden.shape[0], dtype=wide, device=hidden.device) for _ in terms]
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if wants[2] else None
        for part in chunks(hidden.shape[0], head.chunk(chunk)):
            h = hidden[part].detach()
            local = [RowTerm(t.loss, _slice(t.step, part), _part(t.signal, part), t.coef[part].to(wide)) for t in terms]
            dz, values = _chunk_gradient(h, head, local, any(wants))
            for term, row, value in zip(local, rows, values, strict=True):
                row[part] = value
                total += torch.dot(term.coef, value)
            if not any(wants):
                continue
            dz_low = dz.to(h.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = dz_low @ head.weight[: head.size].to(h.dtype)
            if grad_weight is not None:
                grad_weight[: head.size].addmm_(dz_low.T.to(wide), h.to(wide))
            if grad_bias is not None:
                grad_bias[: head.size] += dz.sum(0)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(*rows)
        return total, *rows

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight, grad_bias = ctx.grads
        scaled = [
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.dtypes[0]),
            None if grad_bias is None else (grad_bias * grad).to(ctx.dtypes[1]),
        ]
        return *scaled, None, None, None


def _part(value: Tensor | None, part: slice) -> Any:
    return None if value is None else value[part]


def _slice(step: Step, part: slice) -> Step:
    return step.rows(torch.arange(part.start, part.stop, device=step.tokens.device))


def _chunk_gradient(
    h: Float[Tensor, "n D"], head: Head, terms: Sequence[RowTerm], backward: bool
) -> tuple[Float[Tensor, "n V"], list[Float[Tensor, " n"]]]:
    """Row losses of every term on one chunk, and the gradient of their weighted sum with respect to `weight h + bias`."""
    z = head.logits(h)
    lse = z.new_empty(z.shape[0])
    for block in blocks(*z.shape):
        lse[block] = z[block].logsumexp(-1)
        z[block] -= lse[block, None]
    teachers = {
        id(t): t.step.views[t.loss.teacher].full.log_probs(slice(None))  # type: ignore[attr-defined,union-attr]
        for t in terms
        if t.loss.over(t.step) == "full"
    }
    values = [z.new_empty(z.shape[0]) for _ in terms]
    sparse = [_sparse_term(z, term, values[i], backward) for i, term in enumerate(terms) if id(term) not in teachers]
    for block in blocks(*z.shape):
        lp = z[block]
        p = lp.exp()
        dz = torch.zeros_like(p)
        for i, term in enumerate(terms):
            if id(term) in teachers:
                values[i][block], gradient = term.loss.full(lp, teachers[id(term)][block])  # type: ignore[attr-defined]
                dz += gradient * term.coef[block, None]
        for part in sparse:
            dz.addcmul_(p, -part.total[block, None])
        for part in sparse:
            part.add(dz, p if part.tail_gradient is None else lp.exp(), block)
        if backward:
            z[block] = head.raw_gradient(dz, lp, lse[block])
    return z, values


@dataclass(frozen=True)
class _Sparse:
    """Gradient of a term that reads log-probs at K ids: per id, per tail, and their total [n] (the softmax part)."""

    ids: Int[Tensor, "n K"]
    valid: Bool[Tensor, "n K"] | None
    gradient: Float[Tensor, "n K"]
    tail_gradient: Float[Tensor, " n"] | None  # divided by the tail's mass
    total: Float[Tensor, " n"]

    def add(self, dz: Float[Tensor, "b V"], p: Float[Tensor, "b V"], block: slice) -> None:
        """d log p_k / dz_j = [j = k] - p_j and d log tail / dz_j = [j outside] p_j / tail - p_j; `p` is overwritten."""
        dz.scatter_add_(1, self.ids[block], self.gradient[block])
        if self.tail_gradient is not None:
            assert self.valid is not None
            dz.addcmul_(_clear(p, self.ids[block], self.valid[block]), self.tail_gradient[block, None])


def _sparse_term(lp: Float[Tensor, "n V"], term: RowTerm, value: Float[Tensor, " n"], backward: bool) -> _Sparse:
    """Evaluate a term on the few log-probs that it reads; autograd runs on [n, K] tensors only."""
    step = term.step
    candidates = None
    if term.loss.over(step) == "candidates":
        candidates = step.views[term.loss.teacher].candidates  # type: ignore[attr-defined]
        assert candidates is not None
    ids = step.tokens[:, None] if candidates is None else candidates.ids
    valid = None if candidates is None else candidates.valid
    leaf = lp.gather(1, ids).requires_grad_(backward)
    tail = None
    if valid is not None:
        tail = lp.new_empty(lp.shape[0])
        for block in blocks(*lp.shape):
            tail[block] = tail_of(lp[block].exp(), ids[block], valid[block])
        tail.requires_grad_(backward)
    with torch.enable_grad():
        student = StudentRows(leaf[:, 0], None, None) if valid is None else StudentRows(None, leaf, tail)
        rows = term.loss.rows(student, step, term.signal)
        value.copy_(rows.detach())
        if not backward:
            return _Sparse(ids, valid, torch.zeros_like(leaf), None, lp.new_zeros(lp.shape[0]))
        inputs = [leaf] if tail is None else [leaf, tail]
        found = torch.autograd.grad(torch.dot(term.coef, rows), inputs, allow_unused=True)
    gradient = torch.zeros_like(leaf) if found[0] is None else found[0]
    if tail is None or found[1] is None:
        return _Sparse(ids, valid, gradient, None, gradient.sum(-1))
    mass = tail.detach().exp()
    floored = mass <= 2 * torch.finfo(mass.dtype).tiny  # no id is outside: there is no mass to move
    tail_gradient = found[1].masked_fill(floored, 0.0)
    return _Sparse(ids, valid, gradient, tail_gradient / mass, gradient.sum(-1) + tail_gradient)
