"""What stands in for the numbers of a model that returned NaN or infinity, at the tokens that are then left out.

Axes: N trained tokens. Every term that reads the view gives these tokens weight 0, so nobody learns from the numbers here;
they keep sums over a sequence finite and unmoved. Left out: repairing a model.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from opdkit.lm_head import HeadRows
from opdkit.step import Scores


def neutral(scores: Scores, bad: Bool[Tensor, " N"], student: Scores | None) -> Scores:
    """The scores with `bad` marked and, there, the student's own log-probs (0 nats where it has none): log ratio 0.

    Lists become the student's where it has as many ids. Rows of the whole vocabulary are formed from a hidden state of 0.
    """
    column = bad[:, None]
    found = replace(scores, bad=bad, sampled=_put(scores.sampled, bad, None if student is None else student.sampled))
    if scores.entropy is not None:
        found = replace(found, entropy=_put(scores.entropy, bad, None if student is None else student.entropy))
    if scores.top is not None and scores.top_ids is not None:
        k, ours = scores.top.shape[1], student
        if ours is not None and ours.top is not None and ours.top_ids is not None and ours.top.shape[1] >= k:
            ids = torch.where(column, ours.top_ids[:, :k], scores.top_ids)
            found = replace(found, top_ids=ids, top=_put(scores.top, column, ours.top[:, :k]))
        else:
            found = replace(found, top=_put(scores.top, column, None))
    if scores.candidates is not None:
        c = scores.candidates
        tail = _put(c.teacher_tail, bad, c.student_tail)
        found = replace(found, candidates=replace(c, teacher=_put(c.teacher, column, c.student), teacher_tail=tail))
    if isinstance(scores.full, HeadRows):
        found = replace(found, full=HeadRows(scores.full.hidden.masked_fill(column, 0.0), scores.full.head))
    return found


def _put(values: Tensor, at: Tensor, instead: Tensor | None) -> Tensor:
    return values.masked_fill(at, 0.0) if instead is None else torch.where(at, instead.to(values.dtype), values)
