"""Terms that read few log-probs of a row: the sampled token's or those of candidates, and their gradient in the logits.

Axes: n rows of a chunk, b of a block, V real vocabulary, K support size. `opdkit.head` reads what they need from a chunk's
logits, normalises these, and adds the gradients when it sweeps over the rows. Left out: losses over whole rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opdkit.lm_head import blocks, normalise
from opdkit.row_scores import clear, tail_of
from opdkit.rows import RowTerm, SparseLoss, StudentRows


@dataclass(frozen=True)
class Read:
    """The few log-probs that a term reads, and the log of the mass outside them (sampled token: `valid`, `tail` None)."""

    term: RowTerm
    ids: Int[Tensor, "n K"]
    valid: Bool[Tensor, "n K"] | None
    logp: Float[Tensor, "n K"]  # logits until `normalise_reads`
    tail: Float[Tensor, " n"] | None  # filled in by `normalise_reads`


def read(term: RowTerm, z: Float[Tensor, "n V"]) -> Read:
    if term.loss.over(term.step) == "sampled":
        ids = term.step.tokens[:, None]
        return Read(term, ids, None, z.gather(1, ids), None)
    assert term.loss.teacher is not None
    found = term.step.views[term.loss.teacher].candidates
    assert found is not None
    return Read(term, found.ids, found.valid, z.gather(1, found.ids), z.new_empty(z.shape[0]))


def normalise_reads(z: Float[Tensor, "n V"], reads: Sequence[Read], keep: bool) -> Float[Tensor, " n"]:
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
class Sparse:
    """Row losses of a term that reads log-probs at K ids, and their gradient: per id, per tail, and the total [n]
    that the softmax takes from every id."""

    value: Float[Tensor, " n"]
    ids: Int[Tensor, "n K"]
    valid: Bool[Tensor, "n K"] | None
    gradient: Float[Tensor, "n K"]
    tail_gradient: Float[Tensor, " n"] | None  # divided by the tail's mass
    total: Float[Tensor, " n"]


def differentiate(read: Read, backward: bool) -> Sparse:
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
            return Sparse(rows, read.ids, valid, leaf, None, rows)  # nobody reads the gradients
        inputs = [leaf] if tail is None else [leaf, tail]
        found = torch.autograd.grad(torch.dot(term.coef, rows), inputs, allow_unused=True)
    rows = rows.detach()
    gradient = torch.zeros_like(leaf) if found[0] is None else found[0]
    if tail is None or found[1] is None:
        return Sparse(rows, read.ids, valid, gradient, None, gradient.sum(-1))
    mass = tail.detach().exp()
    floored = mass <= 2 * torch.finfo(mass.dtype).tiny  # no id is outside: there is no mass to move
    tail_gradient = found[1].masked_fill(floored, 0.0)
    return Sparse(rows, read.ids, valid, gradient, tail_gradient / mass, gradient.sum(-1) + tail_gradient)


def add_sparse(
    dz: Float[Tensor, "b V"] | None, p: Float[Tensor, "b V"], sparse: Sequence[Sparse], block: slice
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
