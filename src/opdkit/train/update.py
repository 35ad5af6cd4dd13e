"""One optimiser update: signals and weights over the whole step, then micro-batched forward, loss and backward.

Axes: S sequences, N trained tokens, K support size, D hidden.

Every token's coefficient (term coefficient x reduction x weight) is computed from the whole step before it is cut into
micro-batches, so the token mean is exact whatever the micro-batches. Left out: several updates per rollout batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opdkit.errors import MethodError
from opdkit.head import RowTerm, objective
from opdkit.method import Method, Term
from opdkit.models import LanguageModel
from opdkit.reduction import Reduction, reduction
from opdkit.rollouts.rollout import Rollout
from opdkit.step import Step
from opdkit.views.local import flat_index, micro_batches, pad, trained_rows


@dataclass(frozen=True)
class Stream:
    """One term's numbers for every token of its step."""

    term: Term
    signal: Float[Tensor, " N"] | Float[Tensor, "N K"] | None
    coef: Float[Tensor, " N"]


@torch.no_grad()
def streams(method: Method, steps: Mapping[str, Step], override: Reduction | None = None) -> dict[str, list[Stream]]:
    """Evaluate every term's signal and weight on its step. Raises MethodError for wrong shapes or negative weights."""
    found: dict[str, list[Stream]] = {name: [] for name in steps}
    for term in method.terms:
        step = steps[term.on]
        n = step.tokens.shape[0]
        signal = None if term.signal is None else term.signal(step)
        if signal is not None and (signal.ndim != term.loss.signal_rank or signal.shape[0] != n):
            raise MethodError(f"signal {term.signal} has shape {tuple(signal.shape)}; {term.loss} needs "
                              f"{'[N]' if term.loss.signal_rank == 1 else '[N, K]'} with N = {n}")  # fmt: skip
        weight = term.weight(step)
        if weight.shape != (n,) or bool((weight < 0).any()):
            raise MethodError(f"weight {term.weight} must be [N] = [{n}] and never negative; got shape "
                              f"{tuple(weight.shape)}, smallest {weight.min().item() if weight.numel() else 0:g}")  # fmt: skip
        mean = reduction(override or term.reduction, step.layout, weight > 0, step.horizon)
        coef = weight * mean.to(weight) * term.coefficient(step.progress)
        found[term.on].append(Stream(term, signal, coef))
    return found


def row_terms(found: Sequence[Stream], step: Step, index: Tensor | None = None) -> list[RowTerm]:
    """The terms restricted to some flat positions (all, when no index is given), ready for the head."""
    if index is None:
        index = torch.arange(step.tokens.shape[0], device=step.tokens.device)
    rows = step.rows(index)
    signals = [None if s.signal is None else s.signal[index] for s in found]
    return [RowTerm(s.term.loss, rows, signal, s.coef[index]) for s, signal in zip(found, signals, strict=True)]


def micro_steps(
    student: LanguageModel,
    rollouts: Mapping[str, Sequence[Rollout]],
    steps: Mapping[str, Step],
    found: Mapping[str, Sequence[Stream]],
    budget: int,
    chunk: int | None,
) -> Iterator[Float[Tensor, ""]]:
    """Yield each micro-batch's share of the loss; the caller runs backward on it. The shares add up to the step's loss."""
    for source, step in steps.items():
        if not found[source]:
            continue
        lengths = [len(r.prompt_ids) + len(r.response_ids) for r in rollouts[source]]
        for batch in micro_batches(lengths, budget):
            chosen = [rollouts[source][i] for i in batch]
            terms = row_terms(found[source], step, flat_index(step, batch))
            if all(not bool(t.coef.any()) for t in terms):
                continue
            rows, positions = (index.to(student.device) for index in trained_rows(chosen))
            hidden = student.hidden(pad(chosen, student.device))[rows, positions]
            loss, _ = objective(hidden, student.head(), terms, chunk)
            yield loss
