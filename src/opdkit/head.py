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
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from opdkit import scratch
from opdkit.config import HeadKernel
from opdkit.divergences import LogProbs
from opdkit.errors import ModelError
from opdkit.kernels import fusable
from opdkit.lm_head import PARAMETERS, Head, HeadRows, TableRows, blocks, chunks, exact, normalise_block, precision
from opdkit.losses import Divergence
from opdkit.row_scores import RowScores, score_rows, tail_of
from opdkit.rows import FullLoss, RowTerm
from opdkit.sparse_rows import add_sparse, differentiate, normalise_reads, read

__all__ = [
    "Head", "HeadRows", "RowScores", "RowTerm", "TableRows", "blocks", "chunks", "objective", "score_rows", "tail_of",
]  # fmt: skip

TEACHER_ROWS = 40
View = tuple[int, str | None]  # step and teacher
Rooms = dict[int, Tensor]  # memory for the logits of each teacher in turn


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
        reads = [read(t, z) for t in terms if not _is_full(t)]
        lse = normalise_reads(z, reads, keep) if reads else z.new_empty(z.shape[0])  # whole rows: block by block below
        sparse = [differentiate(r, backward) for r in reads]
    found = iter(sparse)
    values = [z.new_empty(z.shape[0]) if _is_full(t) else next(found).value for t in terms]
    for block, rows in _sweep(z, [t for _, t in full], head, rooms) if full or backward else ():
        with exact(z):
            row, dz = z[block], None
            p = LogProbs(row)
            if not reads:
                p, lse[block] = normalise_block(row)
            for i, term in full:
                assert isinstance(term.loss, FullLoss)
                values[i][block], gradient = term.loss.full(p, rows.get(_view(term)))
                gradient *= term.coef[block, None]
                dz = gradient if dz is None else dz.add_(gradient)
            if sparse and backward:
                dz = add_sparse(dz, p.mass if keep else row, sparse, block)
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
        teacher = _teachers([term], head, part, rooms)[_view(term)][0]
        values[part] = kl_rows(z[part], teacher, coef[part], reverse=loss.kind == "reverse_kl")
    return values


def _sweep(
    z: Float[Tensor, "n V"], full: Sequence[RowTerm], head: Head, rooms: Rooms
) -> Iterator[tuple[slice, dict[View, LogProbs]]]:
    """Blocks of a chunk's rows with the teachers' log-probs on them, whose logits exist for a part of the chunk at a time.
    Their products follow autocast, so the caller must not have switched it off."""
    n, width = z.shape
    step = teacher_rows(n) if any(t.loss.teacher is not None for t in full) else n
    for part in chunks(n, max(1, step)):
        teachers = _teachers(full, head, part, rooms)
        for block in blocks(part.stop - part.start, width, z.device):
            inside = {}
            for view, (rows, normalised) in teachers.items():
                with exact(z):
                    inside[view] = LogProbs(rows[block]) if normalised else normalise_block(rows[block])[0]
            yield slice(part.start + block.start, part.start + block.stop), inside


def teacher_rows(n: int) -> int:
    """For how many of a chunk's n rows a teacher's logits exist at once: a quarter, but up to half where that is few,
    because products of few rows are slow."""
    return max((n + 3) // 4, min((n + 1) // 2, TEACHER_ROWS))


def _is_full(term: RowTerm) -> bool:
    return term.loss.over(term.step) == "full"


def _view(term: RowTerm) -> View:
    """Whose log-probs a term compares with: terms on one step and one teacher share them."""
    return id(term.step), term.loss.teacher


def _teachers(
    full: Sequence[RowTerm], head: Head, rows: slice, rooms: Rooms
) -> dict[View, tuple[Float[Tensor, "n V"], bool]]:
    """Logits of every view with support Full that the terms read, formed once, and whether they are log-probs already.
    ModelError for another vocabulary."""
    found: dict[View, tuple[Tensor, bool]] = {}
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
            found[view] = given.logits(rows, rooms[index][:n]), False
        else:
            found[view] = given.log_probs(rows), True
        if found[view][0].shape[1] != head.size:
            raise ModelError(
                f"view '{teacher}' scores {found[view][0].shape[1]} token ids and the student {head.size}; a loss over "
                "the full vocabulary compares them id by id: both need the same real vocabulary"
            )
    return found
