"""What `opd cliff` measures: how sure teacher and reference are of the teacher's modal token, position by position.

Axes: N positions of all responses. Probabilities are kept as logits, log p - log(1 - p) in nats with the rest summed over
its own tokens, because p itself rounds to 1 at most positions of a format.

Left out: telling format from content. "Structural" is the paper's stand-in, a teacher's top probability of at least tau.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, inf, isfinite, log
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opdkit.diagnostics.cliff import (
    check_cap,
    dagger_of_logits,
    flip_of_logits,
    log_modal,
    logit,
    sigmoid,
    star_of_logits,
)
from opdkit.errors import RecipeError
from opdkit.head import score_rows
from opdkit.models import LanguageModel
from opdkit.rollouts.flatten import flatten
from opdkit.rollouts.rollout import Rollout
from opdkit.rollouts.sources import Prompts, on_policy
from opdkit.step import Step
from opdkit.train.setup import Setup
from opdkit.views.local import hidden_rows

GRID = 0.05  # the paper's grid of lam; it deploys one step below the cliff
TOLERATED = 0.05  # share of responses with a flip that bounds lam: a choice, see docs/extrapolation.md
QUANTILES = (0.05, 0.2, 0.5)


@dataclass(frozen=True)
class Position:
    """One position of a response: the teacher's modal token, and the logit of its probability under both (nats)."""

    token: int
    teacher: float
    base: float


@dataclass(frozen=True)
class Bound:
    """One row of the table: the teacher's and the reference's mass as logits, and the thresholds that they give."""

    teacher: float
    base: float
    cap: float

    @property
    def star(self) -> float:
        return star_of_logits(self.teacher, self.base, self.cap)

    @property
    def dagger(self) -> float:
        return dagger_of_logits(self.teacher, self.base, self.cap)

    def to_dict(self) -> dict[str, float | None]:
        return {"p": sigmoid(self.teacher), "rest": sigmoid(-self.teacher), "b": sigmoid(self.base),
                "lambda_star": finite(self.star), "lambda_dagger": finite(self.dagger)}  # fmt: skip


@dataclass(frozen=True)
class Cliff:
    """The measurement summed up. `typ` and `safe` are the paper's p_typ and p_safe with b at the same positions.

    A response's flip is the smallest lambda_flip among its positions, those below tau included; infinite without one.
    """

    cap: float
    tau: float
    responses: int
    positions: int
    structural: int
    typ: Bound
    safe: Bound
    geometric_base: float  # exp of the mean of log b at the structural positions, as the paper seems to take it
    surer: int  # structural positions at which the reference is surer than the teacher
    surer_below: int  # positions below tau, but above 1/2, at which it is
    flips: tuple[float, ...]  # sorted, one for each response
    tokens: tuple[tuple[int, int], ...]  # modal tokens that flip first in a response, and in how many

    def flip(self, share: float) -> float:
        """The lam at which this share of the responses holds a position that has flipped."""
        return self.flips[max(0, -int(-share * len(self.flips) // 1) - 1)]

    def flipped(self, lam: float) -> float:
        """The share of responses with a position whose greedy choice has left the teacher's modal token at lam."""
        return sum(flip <= lam for flip in self.flips) / len(self.flips)

    @property
    def bound(self) -> tuple[str, float]:
        """What limits lam, and where: lambda* at p_safe, or the lambda_flip that a tolerated share of the responses have."""
        found = {
            "lambda* at p_safe": self.safe.star,
            f"lambda_flip of {TOLERATED:.0%} of the responses": self.flip(TOLERATED),
        }
        return min(found.items(), key=lambda item: item[1])

    @property
    def recommended(self) -> float:
        """One grid step below the bound, in hundredths; 1, plain distillation, where that is less or nothing bounds lam
        (a reference that is as sure as the teacher on average)."""
        bound = self.bound[1]
        return max(1.0, int((bound - GRID) * 100 + 1e-9) / 100) if isfinite(bound) else 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a threshold that does not exist is None."""
        what, where = self.bound
        return {
            "recommended": self.recommended, "bound": {"what": what, "lambda": finite(where)}, "cap": self.cap,
            "tau": self.tau, "responses": self.responses, "positions": self.positions, "structural": self.structural,
            "typ": self.typ.to_dict(), "safe": self.safe.to_dict(), "geometric_base": self.geometric_base,
            "reference_surer": {"structural": self.surer / self.structural, "below_tau": self.surer_below / self.positions,
                                "lambda_flip": {str(q): finite(self.flip(q)) for q in QUANTILES}},
        }  # fmt: skip


def finite(x: float) -> float | None:
    return x if isfinite(x) else None


def summarise(measured: Sequence[Sequence[Position]], *, cap: float, tau: float = 0.9) -> Cliff:
    """Sum up the positions of some responses.

    Raises RecipeError where no position is structural, and where the reference is at least as sure as the teacher at
    every structural position: lambda* does not exist there.
    """
    check_cap(cap)
    edge = _edge(tau)
    kept = [found for response in measured if (found := [x for x in response if x.teacher >= edge])]
    flat = [x for response in kept for x in response]
    if not flat:
        raise RecipeError(f"the teacher is never as sure as tau = {tau} at {sum(map(len, measured))} positions of "
                          f"{len(measured)} responses: none is structural; lower --tau or train the teacher")  # fmt: skip
    first = [min(((flip_of_logits(x.teacher, x.base), x.token) for x in response if x.teacher > 0), default=(inf, -1))
             for response in measured]  # fmt: skip
    flips = tuple(sorted(flip for flip, _ in first))
    if all(x.base >= x.teacher for x in flat):
        raise RecipeError(f"the reference is at least as sure as the teacher at all {len(flat)} structural positions, so "
                          "lambda* does not exist; extrapolation walks away from the teacher's tokens from lambda_flip "
                          f"{flips[0]:.3f} on (half of the responses: {flips[len(flips) // 2]:.3f}); use lam = 1, or a "
                          "reference that is less sure")  # fmt: skip
    rests = [_mean([sigmoid(-x.teacher) for x in response]) for response in kept]
    base = _odds(_mean([_mean([sigmoid(-x.base) for x in response]) for response in kept]))
    counted = Counter(token for flip, token in first if isfinite(flip))
    return Cliff(
        cap=cap, tau=tau, responses=len(measured), positions=sum(map(len, measured)), structural=len(flat),
        typ=Bound(_odds(_mean(rests)), base, cap), safe=Bound(_odds(min(rests)), base, cap),
        geometric_base=exp(_mean([log_modal(x.base) for x in flat])),
        surer=sum(x.base > x.teacher for x in flat),
        surer_below=sum(x.base > x.teacher > 0 for response in measured for x in response if x.teacher < edge),
        flips=flips, tokens=tuple(counted.most_common(5)),
    )  # fmt: skip


def _edge(tau: float) -> float:
    """logit tau. Raises RecipeError unless the teacher's token must then be its majority."""
    if not 0.5 < tau < 1:
        raise RecipeError(f"tau = {tau}: expected above 1/2 and below 1; the teacher's token must be its majority")
    return logit(tau)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _odds(rest: float) -> float:
    """logit p from 1 - p, which has the digits."""
    return log((1.0 - rest) / rest)


@torch.no_grad()
def measure(
    setup: Setup, *, teacher: str, reference: str, prompts: int, on: Literal["teacher", "student"] = "teacher"
) -> list[list[Position]]:
    """Greedy responses of the teacher or of the student to held-out prompts, and both models' odds at every position.

    `teacher` and `reference` are names in the recipe. One list for each response.
    """
    lm, base = setup.teachers[teacher], setup.teachers[reference]
    with setup.autocast():
        rollouts = greedy(setup, lm if on == "teacher" else setup.student, setup.eval[:prompts])
        step = flatten(rollouts, device=setup.student.device)
        modes, sure = odds(setup, lm, rollouts, step)
        _, base_sure = odds(setup, base, rollouts, step, modes)
    found = zip(step.layout.seq.tolist(), modes.tolist(), sure.tolist(), base_sure.tolist(), strict=True)
    measured: list[list[Position]] = [[] for _ in rollouts]
    for seq, token, p, b in found:
        measured[seq].append(Position(token, p, b))
    return measured


def greedy(setup: Setup, lm: LanguageModel, prompts: Prompts) -> list[Rollout]:
    """One greedy response for each prompt, as the model reads it; the rollouts carry the student's prompts."""
    empty = [Rollout(problem, ids, (), "", group, "") for group, (problem, ids) in enumerate(prompts)]
    seen = empty if lm is setup.student else setup.as_read_by(lm, empty)
    ends = tuple(sorted({*(setup.sampling.eos_ids or ()), *lm.eos_ids}))
    how = replace(setup.sampling, group=1, temperature=0.0, top_p=1.0, top_k=0, eos_ids=ends)
    found = on_policy(lm, [(r.problem, r.prompt_ids) for r in seen], how, seed=0)
    return [replace(r, prompt_ids=ids, capture=None) for r, (_, ids) in zip(found, prompts, strict=True)]


def odds(
    setup: Setup, lm: LanguageModel, rollouts: list[Rollout], step: Step, ids: Int[Tensor, " N"] | None = None
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """(tokens, their log p - log(1 - p) under a model) at every position: of `ids`, or of the model's own modal tokens."""
    tokens, found = torch.empty_like(step.tokens), torch.empty(step.tokens.shape, dtype=torch.float64)
    for index, hidden in hidden_rows(lm, setup.as_read_by(lm, rollouts), step, setup.recipe.train.score_tokens):
        given = None if ids is None else ids[index, None]

        def choose(part: slice, top: Tensor | None, given: Tensor | None = given) -> tuple[Tensor, Tensor]:
            chosen = top if given is None else given[part]
            assert chosen is not None
            return chosen, torch.ones_like(chosen, dtype=torch.bool)

        got = score_rows(lm.head(), hidden, step.tokens[index], top_k=int(ids is None), entropy=False, choose=choose)
        assert got.ids is not None and got.at_ids is not None and got.tail is not None
        tokens[index] = got.ids[:, 0]
        found[index.cpu()] = (got.at_ids[:, 0] - got.tail).double().cpu()
    return tokens, found
