"""Prefix drift: where student and teacher stop meaning the same text, and how much each later token still counts.

Axes: N trained tokens of the step, k size of both top lists.

An event piece [N] is 1 where something is wrong and 0 elsewhere; `reliability` and `reliable` count the events of a
sequence up to and including each token, whatever the event is. Events never expire (arXiv:2605.07804: agreement that
returns may only mean that the teacher follows a bad prefix). Left out: a detector of one place where the prefix is lost;
this is a counter. The response limit that follows it is `opdkit.length`'s, stopping while sampling `rollouts.early`'s.
"""

from math import ceil

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opdkit.errors import MethodError
from opdkit.pieces import Piece, flat, piece
from opdkit.step import Scores, Step

ROWS = 16384  # positions whose k x k comparisons are held at once
SPENT = 1e-8  # a reliability up to this counts as 0 (the released code's)


def _check_k(teacher: str, k: int) -> None:
    if k < 1:
        raise MethodError(f"k = {k}: expected at least 1 id in the lists of student and teacher")


def _check_low_overlap(teacher: str, k: int, below: float) -> None:
    _check_k(teacher, k)
    if not 0 < below <= 1:
        raise MethodError(f"low_overlap(below={below}): expected a share of the {k} ids, above 0 and at most 1")


def _check_unaccepted(teacher: str, k: int, mass: float) -> None:
    _check_k(teacher, k)
    if not 0 < mass <= 1:
        raise MethodError(f"unaccepted(mass={mass}): expected a probability, above 0 and at most 1")


@piece("student.top:{k}", "{teacher}.top:{k}", check=_check_k)
def overlap(step: Step, *, teacher: str = "teacher", k: int = 16) -> Float[Tensor, " N"]:
    """O_t: the share of the student's k most probable ids that are among the teacher's k most probable ones."""
    return shared_ids(step, teacher, k).to(step.views[teacher].sampled.dtype) / k


@piece("student.top:{k}", "{teacher}.top:{k}", check=_check_low_overlap)
def low_overlap(step: Step, *, teacher: str = "teacher", k: int = 16, below: float = 0.7) -> Float[Tensor, " N"]:
    """Event: the lists share less than `below` x k ids (2605.07804 Eq. 6); exactly that many is no event.

    Counted in ids, so the share's rounding does not matter. At 0.7 of 16, 11 shared ids are an event and 12 are not.
    """
    return (shared_ids(step, teacher, k) < ceil(below * k - 1e-6)).to(step.views[teacher].sampled.dtype)


@piece("{teacher}.top:{k}", check=_check_unaccepted)
def unaccepted(step: Step, *, teacher: str = "teacher", k: int = 16, mass: float = 0.95) -> Float[Tensor, " N"]:
    """Event: the sampled token is outside the teacher's fewest ids that hold `mass` (2605.07804, "top-p accept").

    Only the teacher's k most probable ids are looked at: where they hold less than `mass` together, all k are accepted.
    """
    view = step.views[teacher]
    ids, logp = _list(view, teacher, k), view.top
    assert logp is not None
    p = logp[:, :k].exp()
    accepted = p.cumsum(-1) - p < mass  # the ids before this one do not reach it
    hit = ((ids == step.tokens[:, None]) & accepted).any(-1)
    return (~hit).to(view.sampled.dtype)


def _check_drop(event: Piece, drop: float) -> None:
    flat(event, "a count of events")
    if not 0 <= drop <= 1:
        raise MethodError(f"drop = {drop}: expected what one event takes from a reliability of 1, from 0 to 1")


def _check_reliability(event: Piece, drop: float, base: float) -> None:
    _check_drop(event, drop)
    if base < 0:
        raise MethodError(f"reliability(base={base}): expected at least 0; it is what a token counts after many events")


@piece(check=_check_reliability)
def reliability(step: Step, *, event: Piece, drop: float = 0.01, base: float = 0.5) -> Float[Tensor, " N"]:
    """L_t = max(0, 1 - drop C_t) + base, where C_t counts the events of the sequence up to and with t (2605.07804 Eqs. 7-9).

    From 1 + base before the first event down to base; it never rises. As a factor of the signal it leaves a term's
    count of tokens alone (the paper). As a weight, base 0 takes the tokens after 1 / drop events out of that count.
    """
    found = event(step)
    fallen = (1 - drop * counted(step, found)).clamp(min=0).masked_fill(~_left(step, found, drop), 0.0)
    return (fallen + base).to(found.dtype)


@piece(check=_check_drop)
def reliable(step: Step, *, event: Piece, drop: float = 0.01) -> Float[Tensor, " N"]:
    """1 while fewer than 1 / drop events have happened in the sequence (reliability above `base`), 0 from there on.

    Its sum over a sequence is the effective length E (2605.07804 Eq. 11).
    """
    found = event(step)
    return _left(step, found, drop).to(found.dtype)


def counted(step: Step, events: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """C_t: events up to and with each token of its sequence. In float64: half precision cannot count beyond 256."""
    wide = events.double()
    return step.layout.before(wide) + wide


def events_until(drop: float) -> int | None:
    """The number of events that leave no reliability, ceil(1 / drop); None where no number does."""
    return ceil((1 - SPENT) / drop) if drop > 0 else None


def _left(step: Step, events: Float[Tensor, " N"], drop: float) -> Bool[Tensor, " N"]:
    """Whether any reliability is left, by the number of events: 1 - drop C is not exactly 0 for most values of drop."""
    limit = events_until(drop)
    if limit is None:
        return torch.ones_like(events, dtype=torch.bool)
    return counted(step, events) < limit


def shared_ids(step: Step, teacher: str, k: int) -> Int[Tensor, " N"]:
    """How many of the student's k most probable ids are among the teacher's. Raises MethodError where a list is shorter."""
    ours, theirs = _list(step.views["student"], "student", k), _list(step.views[teacher], teacher, k)
    parts = [
        (a[:, :, None] == b[:, None, :]).any(-1).sum(-1)
        for a, b in zip(ours.split(ROWS), theirs.split(ROWS), strict=True)
    ]
    return torch.cat(parts)


def _list(view: Scores, name: str, k: int) -> Int[Tensor, "N k"]:
    if view.top_ids is None or view.top_ids.shape[1] < k:
        had = 0 if view.top_ids is None else view.top_ids.shape[1]
        raise MethodError(f"a drift piece compares the {k} most probable ids, but view '{name}' records {had}; lower k, or "
                          "have that view record more")  # fmt: skip
    return view.top_ids[:, :k]
