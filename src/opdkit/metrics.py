"""What is logged at every step, read from the views that a method has anyway.

Axes: N trained tokens, k top-k size. Nats per token unless a docstring says otherwise. Definitions: 2604.13016
Eqs. 6-10, averaged over positions (not pooled over candidates, as its released code does).
"""

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opdkit.divergences import NO_MASS
from opdkit.drift import ROWS
from opdkit.pieces import Piece
from opdkit.rollouts.rollout import Rollout
from opdkit.step import Scores, Step, take_rows
from opdkit.turns import turn_means, usable

LOGGED = frozenset([  # what every run may log, before any "/": names that a watched piece must not take
    "step", "loss", "grad_norm", "lr", "loss_scale", "tokens", "tokens_per_second", "peak_memory_mb", "seconds", "count",
    "reverse_kl", "overlap_ratio", "overlap_chance", "overlap_token_advantage", "overlap_mass_student",
    "overlap_mass_teacher", "entropy_student", "entropy_teacher", "entropy_gap", "sampler_gap", "informed", "tools",
    "response_length", "clipped_share", "reward", "prepared_reward", "accuracy", "groups_mixed", "groups_all_wrong",
])  # fmt: skip
TURNS = 8  # turns of a response that are logged each on its own; the last one stands for all later ones too


Means = dict[str, tuple[float, float]]  # name -> (sum, count): such pairs of several processes add up exactly


def averages(means: Means) -> dict[str, float]:
    """The mean of every pair; 0 where nothing was counted."""
    return {name: total / count if count else 0.0 for name, (total, count) in means.items()}


def summed(parts: Sequence[Means]) -> Means:
    """The pairs of several processes, or of several steps, added up."""
    found: Means = {}
    for part in parts:
        for name, (total, count) in part.items():
            before = found.get(name, (0.0, 0.0))
            found[name] = (before[0] + total, before[1] + count)
    return found


def agreement(student: Scores, teacher: Scores, k: int) -> Means:
    """How far student and teacher agree on the sampled positions.

    `reverse_kl` is the one-sample estimate mean(log p - log q); the overlap numbers need both views' top-k lists and
    use k' = min(k, what both have). `overlap_token_advantage` is E[-KL(p', q') / |I|] with both renormalised on the
    intersection I, over positions where it is not empty; 0 is best.
    """
    found = {"reverse_kl": mean_and_count(student.sampled - teacher.sampled)}
    if student.entropy is not None and teacher.entropy is not None:
        found["entropy_teacher"] = mean_and_count(teacher.entropy)
        found["entropy_gap"] = mean_and_count((teacher.entropy - student.entropy).abs())
    if student.top_ids is not None and teacher.top_ids is not None:
        k = min(k, student.top_ids.shape[1], teacher.top_ids.shape[1])
        n = max(1, student.sampled.shape[0])  # where every token is left out, one empty part
        rows = [_overlap(student, teacher, k, slice(i, i + ROWS)) for i in range(0, n, ROWS)]
        share, advantage, p_mass, q_mass = (torch.cat(column) for column in zip(*rows, strict=True))
        found["overlap_ratio"] = mean_and_count(share)
        found["overlap_token_advantage"] = mean_and_count(advantage[share > 0])
        found["overlap_mass_student"] = mean_and_count(p_mass)
        found["overlap_mass_teacher"] = mean_and_count(q_mass)
    return found


def _overlap(student: Scores, teacher: Scores, k: int, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per position: |I| / k, -KL on I over |I|, and the mass of I under both."""
    assert student.top_ids is not None and student.top is not None
    assert teacher.top_ids is not None and teacher.top is not None
    equal = student.top_ids[rows, :k, None] == teacher.top_ids[rows, None, :k]
    both = equal.any(-1)
    p = student.top[rows, :k]
    q = torch.where(both, (equal * teacher.top[rows, None, :k]).sum(-1), NO_MASS)
    p = p.masked_fill(~both, NO_MASS)
    size = both.sum(-1)
    lp, lq = p.log_softmax(-1), q.log_softmax(-1)
    advantage = -(lp.exp() * (lp - lq)).sum(-1) / size.clamp(min=1)
    return size / k, advantage, p.exp().sum(-1), q.exp().sum(-1)


def rollout_metrics(rollouts: Sequence[Rollout], domains: Sequence[str] = ()) -> Means:
    """Response length (tokens), share cut by the length limit, and mean reward and accuracy where a verifier judged.

    Of several `domains` each has its own accuracy, behind `/DOMAIN`.
    """
    n = float(len(rollouts))
    found = {
        "response_length": (float(sum(len(r.response_ids) for r in rollouts)), n),
        "clipped_share": (float(sum(r.finish == "length" for r in rollouts)), n),
    }
    found |= tool_metrics([r for r in rollouts if r.calls is not None])
    if rollouts and all(r.reward is not None for r in rollouts):
        found["reward"] = (sum(r.reward or 0.0 for r in rollouts), n)
        found["accuracy"] = (float(sum(bool(r.correct) for r in rollouts)), n)
        for domain in domains if len(domains) > 1 else ():
            verdicts = [bool(r.correct) for r in rollouts if r.problem.domain == domain]
            found[f"accuracy/{domain}"] = (float(sum(verdicts)), float(len(verdicts)))
        found |= _groups(rollouts)
    return found


def _groups(rollouts: Sequence[Rollout]) -> Means:
    """Shares of the prompts with several responses in which some are right, and in which none is."""
    verdicts: dict[int, list[bool]] = {}
    for r in rollouts:
        verdicts.setdefault(r.group, []).append(bool(r.correct))
    several = [v for v in verdicts.values() if len(v) > 1]
    if not several:
        return {}
    mixed, wrong = sum(any(v) and not all(v) for v in several), sum(not any(v) for v in several)
    return {
        "groups_mixed": (float(mixed), float(len(several))),
        "groups_all_wrong": (float(wrong), float(len(several))),
    }


def tool_metrics(rollouts: Sequence[Rollout]) -> Means:
    """Of responses with tools: turns, calls and timeouts of a response, the share of calls that failed, and the share of
    responses that were cut at the limit of turns. Nothing where there are none."""
    if not rollouts:
        return {}
    n, outcomes = float(len(rollouts)), [outcome for r in rollouts for outcome in r.calls or ()]
    errors = float(sum(outcome != "ok" for outcome in outcomes))
    return {
        "tools/turns": (float(sum(1 + max(r.turns or (0,)) for r in rollouts)), n),
        "tools/calls": (float(len(outcomes)), n),
        "tools/timeouts": (float(outcomes.count("timeout")), n),
        "tools/error_share": (errors, float(len(outcomes))),
        "tools/turn_limit_share": (float(sum(r.finish == "turns" for r in rollouts)), n),
    }


def step_metrics(
    step: Step, rollouts: Sequence[Rollout], k: int, vocab: int, domains: Sequence[str] = (),
    judged: Sequence[Rollout] | None = None,
) -> Means:  # fmt: skip
    """Everything about one source's step. Several views get `/NAME` behind each of their numbers, several `domains` their
    own accuracy and reverse KL behind `/DOMAIN`, and responses of several turns their mean |log p - log q| in each of them as
    `turn_gap/1`, ... `domains` are the names that `Step.domain` numbers; `judged` are the rollouts before prepare steps left
    some of them out."""
    found = rollout_metrics(rollouts if judged is None else judged, domains)
    student = step.views.get("student")
    if student is None:
        return found
    if student.entropy is not None:
        found["entropy_student"] = mean_and_count(student.entropy)
    if "behaviour" in step.views:
        found["sampler_gap"] = mean_and_count((student.sampled - step.views["behaviour"].sampled).abs())
    teachers = [name for name in step.views if name not in ("student", "behaviour")]
    for name in teachers:
        suffix = f"/{name}" if len(teachers) > 1 else ""
        ours, theirs, bad = student, step.views[name], step.views[name].bad
        if bad is not None:
            good = torch.nonzero(~bad).squeeze(1)
            ours, theirs = take_rows(replace(student, full=None), good), take_rows(replace(theirs, full=None), good)
        agreed = agreement(ours, theirs, min(k, vocab))
        found |= {key + suffix: value for key, value in agreed.items()}
        gap = student.sampled - step.views[name].sampled
        for number, domain in enumerate(domains) if len(domains) > 1 else ():
            assert step.domain is not None
            own = step.domain.eq(number)[step.layout.seq]
            found[f"reverse_kl{suffix}/{domain}"] = mean_and_count(gap[own if bad is None else own & ~bad])
        found |= by_turn(f"turn_gap{suffix}", gap.abs(), step, step.usable([name]))
        if "overlap_ratio" in agreed:
            found["overlap_chance"] = (min(k, vocab) / vocab, 1.0)
        informed = step.views[name].informed
        if informed is not None:  # one number for each rollout that has tokens
            found[f"informed{suffix}"] = mean_and_count(
                step.layout.seq_mean(informed.double())[step.layout.seq_len() > 0]
            )
    return found


def watched(name: str, piece: Piece, step: Step) -> Means:
    """A piece's mean over the tokens on which the views that it reads gave numbers, and where responses have several turns
    also by turn (`by_turn`)."""
    values, good = piece(step), usable(step, piece)
    return {name: mean_and_count(values if good is None else values[good])} | by_turn(name, values, step, good)


def by_turn(name: str, values: Float[Tensor, " N"], step: Step, counted: Bool[Tensor, " N"] | None) -> Means:
    """NAME/k: the mean over the step's k-th turns of their means; the last one holds all later turns too.

    Nothing where no response has a second turn.
    """
    means = turn_means(step, values, counted)
    if not bool((means.place > 0).any()):
        return {}
    place, last = means.place[means.known].clamp(max=TURNS - 1), int(means.place.max())
    found = means.of_each[means.known]
    return {f"{name}/{k + 1}": mean_and_count(found[place == k]) for k in range(min(last + 1, TURNS))}


def mean_and_count(x: Float[Tensor, " N"]) -> tuple[float, float]:
    """(sum, count) of some tokens' values, as `averages` reads them."""
    return float(x.double().sum()), float(x.numel())


def avg_at_k(correct: Mapping[str, Sequence[bool]]) -> tuple[float, float]:
    """avg@k over problems and its standard error: problems are the independent units, samples of one are not."""
    means = torch.tensor([sum(c) / len(c) for c in correct.values()], dtype=torch.float64)
    n = means.numel()
    return float(means.mean()), float(means.std(unbiased=True) / n**0.5) if n > 1 else 0.0


def sequence_totals(value: Float[Tensor, " N"], seq: Int[Tensor, " N"], sequences: int) -> list[tuple[float, float]]:
    """(sum, tokens) of every sequence."""
    total = value.new_zeros(sequences).index_add(0, seq, value).tolist()
    return list(zip(total, torch.bincount(seq, minlength=sequences).double().tolist(), strict=True))


def token_mean_with_error(totals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Token mean and its standard error with sequences as the independent units (ratio estimator)."""
    total, count = torch.tensor(totals, dtype=torch.float64).unbind(1)
    mean = total.sum() / count.sum()
    n = len(totals)
    spread = ((total - mean * count).square().sum() * n / max(1, n - 1)).sqrt() / count.sum()
    return float(mean), float(spread)


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in MB; on a GPU the largest allocation."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


class Clock:
    """Seconds per named phase of one step; what no phase covers is "other"."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        total = time.perf_counter() - self.start
        found = {f"seconds/{name}": value for name, value in self.phases.items()}
        return {**found, "seconds/other": total - sum(self.phases.values()), "seconds/step": total}
