"""From last hidden states and a vocabulary head to scores and losses, in memory that does not grow with the tokens.

Axes: N rows (trained tokens), C rows of one chunk, n rows of a chunk or block, V real vocabulary, D columns of the
hidden states (with those that the head's low rank reads), K support size, P rows of the head's weight.

Logits exist for one chunk of C rows at a time. The backward pass is written by hand: each chunk's logits are turned
into their own gradient in place and contracted with the head at once, so no logits survive the forward pass and no
matrix product is repeated. Elementwise work inside a chunk runs on small blocks of rows, so its temporaries stay in
cache. Peak extra memory: 4 bytes x C x V, plus 1 to 2 x C x V for each teacher with support Full, plus the blocks.

Left out: sharded (tensor-parallel) heads, second derivatives.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opdkit import scratch
from opdkit.config import HeadKernel
from opdkit.errors import ModelError
from opdkit.kernels import fusable
from opdkit.lm_head import PARAMETERS, Head, HeadRows, TableRows, blocks, chunks, exact, normalise, precision
from opdkit.losses import Divergence
from opdkit.row_scores import RowScores, clear, score_rows, tail_of
from opdkit.rows import FullLoss, Loss, SparseLoss, StudentRows
from opdkit.step import Step

__all__ = [
    "Head", "HeadRows", "RowScores", "RowTerm", "TableRows", "blocks", "chunks", "objective", "score_rows", "tail_of",
]  # fmt: skip

TEACHER_ROWS = 40
Teachers = dict[tuple[int, str | None], Tensor]  # (step, view) -> full-vocabulary log-probs [n, V]
Rooms = dict[int, Tensor]  # memory for the log-probs of each teacher in turn


@dataclass(frozen=True)
class RowTerm:
    """One term on N rows: a row-wise loss, the step restricted to these rows, its signal and a coefficient per row."""

    loss: Loss
    step: Step
    signal: Float[Tensor, " N"] | Float[Tensor, "N K"] | None
    coef: Float[Tensor, " N"]  # term coefficient x reduction x weight


def objective(
    hidden: Float[Tensor, "N D"],
    head: Head,
    terms: Sequence[RowTerm],
    chunk: int | None = None,
    kernel: HeadKernel = "torch",
) -> tuple[Float[Tensor, ""], list[Float[Tensor, " N"]]]:
    """Sum over terms and rows of coef x loss, and each term's row losses (nats, detached).

    The sum is differentiable with respect to `hidden` and, unless they are frozen, the head's weight, bias and low rank.
    Any `chunk` gives the same numbers, one above N too; N = 0 gives 0. With `kernel` triton a fused kernel forms the
    gradient where it can (`opdkit.kernels`). RecipeError for a chunk below 1, ModelError for a teacher with another
    vocabulary.
    """
    inputs = (hidden, head.weight, head.bias, head.low_rank)
    wants = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs)
    total, *rows = _Objective.apply(*inputs, head, tuple(terms), chunk, kernel, wants)
    return total, rows


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, low_rank, head, terms, chunk, kernel, wants):  # type: ignore[no-untyped-def]
        inputs = (hidden, weight, bias, low_rank)
        head = replace(
            head, **{f: None if t is None else t.detach() for f, t in zip(PARAMETERS, inputs[1:], strict=True)}
        )
        wide = precision(hidden)[1]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        rows = [torch.empty(hidden.shape[0], dtype=wide, device=hidden.device) for _ in terms]
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        wanted = zip(inputs[1:], wants[1:], strict=True)
        sums = [torch.zeros_like(t, dtype=wide) if want else None for t, want in wanted]
        size = max(1, min(hidden.shape[0], head.chunk(chunk)))
        room, rooms = scratch.room("chunk", size, head.size, hidden, wide), Rooms()  # memory that every chunk uses anew
        for part in chunks(hidden.shape[0], size):
            h = hidden[part].detach()
            local = _slice(terms, part, hidden.shape[0], wide)
            dz = head.logits(h, room[: h.shape[0]])
            fused = fusable([t.loss for t in local], head.softcap, wide) if kernel == "triton" and any(wants) else None
            if fused is not None and _is_full(local[0]):
                values = [_fused_gradient(dz, head, local[0], fused, rooms)]
            else:
                values = _to_gradient(dz, head, local, any(wants), rooms)
            for term, row, value in zip(local, rows, values, strict=True):
                row[part] = value
                total += (term.coef * value).sum()
            if grad_hidden is not None:
                grad_hidden[part] = head.hidden_gradient(dz, h)
            head.add_gradients(*sums, dz, h)
        ctx.save_for_backward(grad_hidden, *sums)  # freed by backward, not when the loss goes
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        ctx.mark_non_differentiable(*rows)
        return total, *rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        # Reading the value is free on the CPU, where a pass over [V, D] is not; elsewhere it would wait for the device.
        one = grad.device.type == "cpu" and grad.item() == 1.0
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # retain_graph: these buffers are read again
        found = [
            None if saved is None else saved if one else saved * grad if again else saved.mul_(grad)
            for saved in ctx.saved_tensors
        ]
        gradients = [None if t is None else t.to(dtype) for t, dtype in zip(found, ctx.dtypes, strict=True)]
        return *gradients, None, None, None, None, None


def _slice(terms: Sequence[RowTerm], part: slice, n: int, dtype: torch.dtype) -> list[RowTerm]:
    """The terms on some rows; a step that several terms share is cut once."""
    steps = {id(t.step): t.step for t in terms}
    if part != slice(0, n):
        index = {key: torch.arange(part.start, part.stop, device=s.tokens.device) for key, s in steps.items()}
        steps = {key: s.rows(index[key]) for key, s in steps.items()}
    cut = [None if t.signal is None else t.signal[part] for t in terms]
    return [RowTerm(t.loss, steps[id(t.step)], s, t.coef[part].to(dtype)) for t, s in zip(terms, cut, strict=True)]


def _to_gradient(
    z: Float[Tensor, "n V"], head: Head, terms: Sequence[RowTerm], backward: bool, rooms: Rooms
) -> list[Float[Tensor, " n"]]:
    """Turn a chunk's logits into the gradient of the weighted sum with respect to `weight h + bias`, in place if
    `backward`; give every term's row losses."""
    full = [(i, t) for i, t in enumerate(terms) if _is_full(t)]
    keep = bool(full) or head.softcap is not None
    with exact(z):
        reads = [_read(t, z) for t in terms if not _is_full(t)]
        lse = _normalise(z, reads, keep)
        sparse = [_differentiate(read, backward) for read in reads]
    found = iter(sparse)
    values = [z.new_empty(z.shape[0]) if _is_full(t) else next(found).value for t in terms]
    for block, rows in _sweep(z, [t for _, t in full], head, rooms) if full or backward else ():
        with exact(z):
            row, dz = z[block], None
            for i, term in full:
                assert isinstance(term.loss, FullLoss)
                values[i][block], gradient = term.loss.full(row, rows.get(_view(term)))
                gradient *= term.coef[block, None]
                dz = gradient if dz is None else dz.add_(gradient)
            if sparse and backward:
                dz = _add_sparse(dz, row.exp() if keep else row, sparse, block)
            if backward:
                dz = row.zero_() if dz is None else head.through_tail(dz, row, lse[block])
                if dz is not row:
                    row.copy_(dz)
    return values


def _fused_gradient(
    z: Float[Tensor, "n V"], head: Head, term: RowTerm, loss: Divergence, rooms: Rooms
) -> Float[Tensor, " n"]:
    """`_to_gradient` of one KL over the whole vocabulary, by the fused kernel; the teacher's logits stay as they are."""
    from opdkit.kernels_triton import kl_rows

    values, coef = z.new_empty(z.shape[0]), term.coef * (head.scale / head.temperature)
    for part in chunks(z.shape[0], max(1, teacher_rows(z.shape[0]))):
        teacher = _teachers([term], head, part, rooms, logits=True)[_view(term)]
        values[part] = kl_rows(z[part], teacher, coef[part], reverse=loss.kind == "reverse_kl")
    return values


def _sweep(
    z: Float[Tensor, "n V"], full: Sequence[RowTerm], head: Head, rooms: Rooms
) -> Iterator[tuple[slice, Teachers]]:
    """Blocks of a chunk's rows with the teachers' log-probs on them, which exist for a part of the chunk at a time. Their
    products follow autocast, so the caller must not have switched it off."""
    n, width = z.shape
    step = teacher_rows(n) if any(t.loss.teacher is not None for t in full) else n
    for part in chunks(n, max(1, step)):
        teachers = _teachers(full, head, part, rooms)
        for block in blocks(part.stop - part.start, width, z.device):
            inside = {view: rows[block] for view, rows in teachers.items()}
            yield slice(part.start + block.start, part.start + block.stop), inside


def teacher_rows(n: int) -> int:
    """For how many of a chunk's n rows a teacher's log-probs exist at once: a quarter, but up to half where that is few,
    because products of few rows are slow."""
    return max((n + 3) // 4, min((n + 1) // 2, TEACHER_ROWS))


def _is_full(term: RowTerm) -> bool:
    return term.loss.over(term.step) == "full"


def _view(term: RowTerm) -> tuple[int, str | None]:
    """Whose log-probs a term compares with: terms on one step and one teacher share them."""
    return id(term.step), term.loss.teacher


def _teachers(full: Sequence[RowTerm], head: Head, rows: slice, rooms: Rooms, logits: bool = False) -> Teachers:
    """Log-probs of every view with support Full that the terms read, formed once; with `logits`, or any other logits of the
    same distribution. ModelError for another vocabulary."""
    found: Teachers = {}
    for term in full:
        view, teacher = _view(term), term.loss.teacher
        if teacher is None or view in found:
            continue
        given, index = term.step.views[teacher].full, len(found)
        assert given is not None
        if isinstance(given, HeadRows):
            n, dtype = rows.stop - rows.start, precision(given.hidden)[1]
            if index not in rooms:  # the first rows are the most that it is asked for
                rooms[index] = scratch.room(f"teacher {index}", n, given.head.size, given.hidden, dtype)
            form = given.logits if logits else given.log_probs
            found[view] = form(rows, rooms[index][:n])
        else:
            found[view] = given.log_probs(rows)
        if found[view].shape[1] != head.size:
            raise ModelError(
                f"view '{teacher}' scores {found[view].shape[1]} token ids and the student {head.size}; a loss over "
                "the full vocabulary compares them id by id: both need the same real vocabulary"
            )
    return found


@dataclass(frozen=True)
class _Read:
    """The few log-probs that a term reads, and the log of the mass outside them (sampled token: `valid`, `tail` None)."""

    term: RowTerm
    ids: Int[Tensor, "n K"]
    valid: Bool[Tensor, "n K"] | None
    logp: Float[Tensor, "n K"]  # logits until `_normalise`
    tail: Float[Tensor, " n"] | None  # filled in by `_normalise`


def _read(term: RowTerm, z: Float[Tensor, "n V"]) -> _Read:
    if term.loss.over(term.step) == "sampled":
        ids = term.step.tokens[:, None]
        return _Read(term, ids, None, z.gather(1, ids), None)
    assert term.loss.teacher is not None
    found = term.step.views[term.loss.teacher].candidates
    assert found is not None
    return _Read(term, found.ids, found.valid, z.gather(1, found.ids), z.new_empty(z.shape[0]))


def _normalise(z: Float[Tensor, "n V"], reads: Sequence[_Read], keep: bool) -> Float[Tensor, " n"]:
    """Turn logits, in place, into probabilities, or log-probs if `keep`; fill in what is read; give the log-normalisers.

    Probabilities cost the second sweep no exponential; a soft-cap and full-vocabulary losses need the logs.
    """
    lse = normalise(z) if keep else z.new_empty(z.shape[0])
    tails = [r for r in reads if r.tail is not None]
    for block in blocks(z.shape[0], z.shape[1], z.device) if tails or not keep else ():
        p = z[block].exp() if keep else _probabilities(z[block], lse[block])
        for r in tails:
            assert r.tail is not None and r.valid is not None
            inside = p.gather(1, r.ids[block])
            r.tail[block] = tail_of(p, r.ids[block], r.valid[block])
            p.scatter_(1, r.ids[block], inside)
    for r in reads:
        if keep:
            torch.gather(z, 1, r.ids, out=r.logp)
        else:
            r.logp.sub_(lse[:, None])
    return lse


def _probabilities(z: Float[Tensor, "b V"], lse: Float[Tensor, " b"]) -> Float[Tensor, "b V"]:
    """Turn logits into probabilities, in place; fill in the log-normalisers."""
    top = z.amax(-1, keepdim=True)
    p = z.sub_(top).exp_()
    norm = p.sum(-1, keepdim=True)
    lse.copy_((top + norm.log()).squeeze(1))
    return p.div_(norm)


@dataclass(frozen=True)
class _Sparse:
    """Row losses of a term that reads log-probs at K ids, and their gradient: per id, per tail, and the total [n]
    that the softmax takes from every id."""

    value: Float[Tensor, " n"]
    ids: Int[Tensor, "n K"]
    valid: Bool[Tensor, "n K"] | None
    gradient: Float[Tensor, "n K"]
    tail_gradient: Float[Tensor, " n"] | None  # divided by the tail's mass
    total: Float[Tensor, " n"]


def _differentiate(read: _Read, backward: bool) -> _Sparse:
    """Evaluate a term on the few log-probs that it reads; autograd runs on [n, K] tensors only."""
    term, valid, tail = read.term, read.valid, read.tail
    assert isinstance(term.loss, SparseLoss)
    leaf = read.logp.requires_grad_(backward)
    if tail is not None:
        tail.requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        student = StudentRows(leaf[:, 0], None, None) if valid is None else StudentRows(None, leaf, tail)
        rows = term.loss.rows(student, term.step, term.signal)
        if not backward:
            return _Sparse(rows, read.ids, valid, leaf, None, rows)  # nobody reads the gradients
        inputs = [leaf] if tail is None else [leaf, tail]
        found = torch.autograd.grad(torch.dot(term.coef, rows), inputs, allow_unused=True)
    rows = rows.detach()
    gradient = torch.zeros_like(leaf) if found[0] is None else found[0]
    if tail is None or found[1] is None:
        return _Sparse(rows, read.ids, valid, gradient, None, gradient.sum(-1))
    mass = tail.detach().exp()
    floored = mass <= 2 * torch.finfo(mass.dtype).tiny  # no id is outside: there is no mass to move
    tail_gradient = found[1].masked_fill(floored, 0.0)
    return _Sparse(rows, read.ids, valid, gradient, tail_gradient / mass, gradient.sum(-1) + tail_gradient)


def _add_sparse(
    dz: Float[Tensor, "b V"] | None, p: Float[Tensor, "b V"], sparse: Sequence[_Sparse], block: slice
) -> Float[Tensor, "b V"]:
    """Add d log p_k / dz_j = [j = k] - p_j and d log tail / dz_j = [j outside] p_j / tail - p_j; `p` is overwritten."""
    taken = -torch.stack([s.total[block] for s in sparse]).sum(0)[:, None]
    tails = [s for s in sparse if s.tail_gradient is not None]
    if dz is None:
        dz = p * taken if tails else p.mul_(taken)
    else:
        dz.addcmul_(p, taken)
    for s in tails:
        assert s.valid is not None and s.tail_gradient is not None
        inside = p.gather(1, s.ids[block])
        dz.addcmul_(clear(p, s.ids[block], s.valid[block]), s.tail_gradient[block, None])
        p.scatter_(1, s.ids[block], inside)
    for s in sparse:
        dz.scatter_add_(1, s.ids[block], s.gradient[block])
    return dz
