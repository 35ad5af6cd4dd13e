"""Prune-OPD: top-k distillation whose reward fades as the student's prefix drifts away from the teacher (arXiv:2605.07804).

    A_t(v) = L_t w_t(v) (log q(v) - log p(v)) for v in the student's top-k   (w, log p, log q as in `topk_opd`, detached)
    L_t = max(0, 1 - drop C_t) + base,   C_t = events up to and with t,   L = - mean_t sum_v A_t(v) log p(v)

An event is a position where fewer than `gamma` x k of the student's k most probable ids are among the teacher's k; with
event="accept", one where the sampled token is outside the teacher's fewest ids that hold `accept` (at most k of them).
The response limit of the next step follows the effective length, the tokens before 1 / drop events
(`opdkit.length.LengthControl`: start, least, most, step, margin, hits, patience; adapt=False: sampling.max_new_tokens).
Without an event the reward is (1 + base) times that of `topk_opd`, whose `low`, `high` and `dual` it has.
Beyond the paper: with `stop_every` = n the teacher reads along and a rollout that has had 1 / drop events ends at the next
n-th token; the later ones, which would have counted `base`, are never written (`opdkit.rollouts.early`).
Defaults: the released scripts'; most = None is sampling.max_new_tokens (12288 there), and the clip, which has no effect
at one update a rollout batch, is off. They suit long answers: scale drop, start, least, step and margin with the response.
Left out: cutting a rollout back to where it drifted, and the paper's cut at a fixed length (sampling.max_new_tokens).
"""

from typing import Literal

from opdkit.drift import events_until, low_overlap, reliability, reliable, unaccepted
from opdkit.length import LengthControl
from opdkit.losses import SupportPolicyGradient
from opdkit.method import Method, Term, View
from opdkit.pieces import times
from opdkit.signals import support_gap
from opdkit.sources import EarlyStop, OnPolicy
from opdkit.support import TopK


def prune_opd(
    *, teacher: str = "teacher", k: int = 16, event: Literal["overlap", "accept"] = "overlap", gamma: float = 0.7,
    accept: float = 0.95, drop: float = 0.01, base: float = 0.5, adapt: bool = True, start: int = 1024, least: int = 1024,
    most: int | None = None, step: int = 100, margin: int = 100, hits: float = 0.1, patience: int = 3,
    stop_every: int | None = None, low: float | None = None, high: float | None = None, dual: float | None = None,
) -> Method:  # fmt: skip
    if (gamma != 0.7 and event != "overlap") or (accept != 0.95 and event != "accept"):
        raise ValueError("gamma belongs to event overlap and accept to event accept; remove the other one")
    if not adapt and (start, least, most, step, margin, hits, patience) != (1024, 1024, None, 100, 100, 0.1, 3):
        raise ValueError(
            "start, least, most, step, margin, hits and patience have no effect with adapt false; remove them"
        )
    drifted = low_overlap(k=k, below=gamma) if event == "overlap" else unaccepted(k=k, mass=accept)
    kept, weight = reliable(event=drifted, drop=drop), reliability(event=drifted, drop=drop, base=base)
    limit = LengthControl(kept, start, least, most, step, margin, hits, patience)
    end = events_until(drop)
    if stop_every is not None and end is None:
        raise ValueError(f"stop_every = {stop_every} has no effect with drop = 0: no number of events ends a rollout")
    early = None if stop_every is None or end is None else EarlyStop(drifted, end, stop_every)
    loss = SupportPolicyGradient("teacher", low, high, dual, ratio=(low, high, dual) != (None, None, None))
    return Method(
        name="prune_opd",
        rollouts={"policy": OnPolicy(stop_early=early)},
        views={"teacher": View(teacher, TopK(k))},
        terms=(Term(loss=loss, signal=times(weight, support_gap())),),
        controllers=(limit,) if adapt else (),
        watch={"drift": drifted, "reliability": weight},
    )
