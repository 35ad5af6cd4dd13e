"""What is read off rows of logits without a gradient: log-probs, entropy, top-k lists, candidates and their tail.

Axes: n rows of a chunk or block, N rows of a view, V real vocabulary, H columns of the hidden states, K support size,
Kt length of the top-k list. Left out: losses and gradients (`head`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opdkit import scratch
from opdkit.errors import RecipeError
from opdkit.lm_head import Head, blocks, chunks, exact, precision


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
    hidden: Float[Tensor, "N H"],
    tokens: Int[Tensor, " N"],
    *,
    top_k: int = 0,
    entropy: bool = True,
    choose: Choose | None = None,
    chunk: int | None = None,
) -> RowScores:
    """Log-prob of each token, and on request entropy, the top-k, and log-probs at chosen ids with the tail outside.

    `choose` may read the chunk's own top-k ids, so candidate sets made of both models' lists need one pass only.
    RecipeError when `top_k` is below 0 or exceeds the vocabulary; 0 is no list.
    """
    if top_k > head.size:
        raise RecipeError(f"top_k = {top_k} exceeds the vocabulary of {head.size} ids; ask for at most that many")
    if top_k < 0:
        raise RecipeError(f"top_k = {top_k}; expected 1 to {head.size} ids, or 0 for no list")
    size = head.chunk(chunk)
    parts = [_score_chunk(head, hidden, tokens, rows, top_k, entropy, choose) for rows in chunks(hidden.shape[0], size)]
    if not parts:  # no rows: score an empty chunk for the shapes
        parts = [_score_chunk(head, hidden, tokens, slice(0, 0), top_k, entropy, choose)]
    columns = zip(*parts, strict=True)
    return RowScores(*(None if c[0] is None else torch.cat([t for t in c if t is not None]) for c in columns))  # type: ignore[arg-type]


def _score_chunk(
    head: Head, hidden: Tensor, tokens: Tensor, rows: slice, top_k: int, entropy: bool, choose: Choose | None
) -> list[Tensor | None]:
    h = hidden[rows]
    z = head.logits(h, scratch.room("chunk", h.shape[0], head.size, h, precision(h)[1]))
    top_ids = torch.topk(z, top_k, dim=-1).indices if top_k else None
    ids, valid = (None, None) if choose is None else choose(rows, top_ids)
    log_norm, ent, tail = (z.new_empty(z.shape[0]) for _ in range(3))
    with exact(z):
        for block in blocks(z.shape[0], z.shape[1], z.device):
            log_norm[block] = z[block].logsumexp(-1)
            lp = z[block].sub_(log_norm[block, None])
            if not entropy and ids is None:
                continue
            p = lp.exp()
            if entropy:
                ent[block] = -torch.linalg.vecdot(p, lp)
            if ids is not None and valid is not None:
                tail[block] = tail_of(p, ids[block], valid[block])
    at_top = None if top_ids is None else z.gather(1, top_ids)
    at_ids = None if ids is None else z.gather(1, ids)
    return [
        z.gather(1, tokens[rows, None]).squeeze(1), log_norm, ent if entropy else None, top_ids, at_top,
        ids, valid, at_ids, None if ids is None else tail,
    ]  # fmt: skip


def tail_of(p: Float[Tensor, "n V"], ids: Int[Tensor, "n K"], valid: Bool[Tensor, "n K"]) -> Float[Tensor, " n"]:
    """Log of the mass outside the valid ids, summed over that complement; `p` is overwritten.

    A mass of 0 (the ids cover the vocabulary) gives the log of the smallest normal number, never -inf.
    """
    return clear(p, ids, valid).sum(-1).clamp(min=torch.finfo(p.dtype).tiny).log()


def clear(p: Float[Tensor, "n V"], ids: Int[Tensor, "n K"], valid: Bool[Tensor, "n K"]) -> Float[Tensor, "n V"]:
    """Set the entries at the valid ids to 0, in place. An id may also stand in an invalid column: a product, because
    it does not depend on the order in which the columns are written."""
    return p.scatter_reduce_(1, ids, (~valid).to(p.dtype), "prod")
