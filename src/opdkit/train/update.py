"""One optimiser update: signals and weights over the whole step, then micro-batched forward and loss.

Axes: S sequences, N trained tokens, K support size, D hidden.

Signals are evaluated once a step. Every token's coefficient (term coefficient x reduction x weight) is computed from the
whole update, over all processes, before it is cut into micro-batches, so means are exact whatever the micro-batches.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opdkit.config import HeadKernel
from opdkit.errors import MethodError
from opdkit.head import RowTerm, objective
from opdkit.method import Method, Term
from opdkit.models import LanguageModel
from opdkit.reduction import Reduction, reduction, units
from opdkit.rollouts.rollout import Rollout
from opdkit.step import Step
from opdkit.train.processes import Processes
from opdkit.train.sharding import is_sharded
from opdkit.views.batches import Batch, batches, flat_index

Part = Mapping[str, Sequence[int]]  # source -> its sequences that take part in one update


@dataclass(frozen=True)
class Stream:
    """One term's numbers for every token of its step."""

    term: Term
    signal: Float[Tensor, " N"] | Float[Tensor, "N K"] | None
    weight: Float[Tensor, " N"]


@torch.no_grad()
def streams(method: Method, steps: Mapping[str, Step]) -> dict[str, list[Stream]]:
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
        usable = step.usable(method.reads(term))
        weight = weight if usable is None else weight * usable
        found[term.on].append(Stream(term, signal, weight))
    return found


def parts(rollouts: Mapping[str, Sequence[Rollout]], count: int, groups: int, seed: int) -> list[Part]:
    """Divide a step into `count` updates, whole prompt groups together, by a permutation of its `groups` prompts.

    It depends on the groups' numbers only, so processes that hold different prompts agree on it.
    """
    order = torch.randperm(groups, generator=torch.Generator().manual_seed(seed)).tolist()
    place = {group: position * count // groups for position, group in enumerate(order)}
    return [
        {
            name: [s for s, r in enumerate(found) if count == 1 or place[r.group] == part]
            for name, found in rollouts.items()
        }
        for part in range(count)
    ]


def coefficients(
    found: Mapping[str, Sequence[Stream]], steps: Mapping[str, Step], part: Part, processes: Processes,
    override: Reduction | None = None,
) -> dict[str, list[Float[Tensor, " N"]]]:  # fmt: skip
    """Every term's coefficient per token of one update; 0 outside its part. One sum over the processes."""
    listed = [(name, stream) for name, group in found.items() for stream in group]
    counted = [_counted(stream, steps[name], part[name]) for name, stream in listed]
    named = [override or stream.term.reduction for _, stream in listed]
    own = [units(n, steps[s].layout, c) for n, (s, _), c in zip(named, listed, counted, strict=True)]
    totals = processes.total([float(u) for u in own])
    result: dict[str, list[Tensor]] = {name: [] for name in found}
    for (name, stream), mask, how, total in zip(listed, counted, named, totals, strict=True):
        step = steps[name]
        mean = reduction(how, step.layout, mask, step.horizon, int(total)).to(stream.weight)
        result[name].append(stream.weight * mean * stream.term.coefficient(step.progress))
    return result


def _counted(stream: Stream, step: Step, sequences: Sequence[int]) -> Bool[Tensor, " N"]:
    chosen = torch.zeros(step.layout.sequences, dtype=torch.bool, device=step.tokens.device)
    chosen[list(sequences)] = True
    return (stream.weight > 0) & chosen[step.layout.seq]


def row_terms(
    found: Sequence[Stream], coefs: Sequence[Float[Tensor, " N"]], step: Step, index: Tensor | None = None
) -> list[RowTerm]:
    """The terms restricted to some flat positions (all, when no index is given), ready for the head."""
    if index is None:
        index = torch.arange(step.tokens.shape[0], device=step.tokens.device)
    rows = step.rows(index)
    return [
        RowTerm(s.term.loss, rows, None if s.signal is None else s.signal[index], coef[index])
        for s, coef in zip(found, coefs, strict=True)
    ]


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences of one source that go through the student together. Rows of its step are cut when they are due:
    all batches' copies at once would be the step a second time."""

    batch: Batch
    rollouts: Sequence[Rollout]  # of which the batch takes some
    index: Int[Tensor, " n"]  # its trained tokens on the flat axis
    step: Step
    streams: Sequence[Stream]
    coefs: Sequence[Float[Tensor, " N"]]

    def terms(self) -> list[RowTerm]:
        return row_terms(self.streams, self.coefs, self.step, self.index)


def plan(
    student: LanguageModel, rollouts: Mapping[str, Sequence[Rollout]], steps: Mapping[str, Step],
    found: Mapping[str, Sequence[Stream]], coefs: Mapping[str, Sequence[Tensor]], part: Part, budget: int,
) -> list[MicroBatch]:  # fmt: skip
    """Cut one update into micro-batches under a token budget; those in which no token counts are left out."""
    planned = []
    for name, step in steps.items():
        sequences = part[name] if found[name] else []
        chosen = [rollouts[name][s] for s in sequences]
        for batch in batches(student, chosen, budget):
            index = flat_index(step, [sequences[i] for i in batch.index])
            if any(bool(coef[index].any()) for coef in coefs[name]):
                planned.append(MicroBatch(batch, chosen, index, step, found[name], coefs[name]))
    return planned


def losses(
    student: LanguageModel,
    planned: Sequence[MicroBatch],
    expected: int,
    chunk: int | None,
    kernel: HeadKernel = "torch",
) -> Iterator[Float[Tensor, ""]]:
    """Yield each micro-batch's share of the loss; the caller runs backward on it. The shares add up to the loss.

    `expected` micro-batches are due in every process that shares the student: the missing ones are passes over one
    token that contribute 0.
    """
    for batch in planned:
        hidden = batch.batch.states(student, batch.rollouts)
        loss, _ = objective(hidden, student.head(), batch.terms(), chunk, kernel)
        yield loss
    for _ in range(expected - len(planned)):
        yield student.hidden(torch.zeros(1, 1, dtype=torch.long, device=student.device)).sum() * 0.0


def expected_batches(student: LanguageModel, planned: Sequence[MicroBatch], processes: Processes) -> int:
    """How many micro-batches this process must run: where processes share the student, as many as the busiest one."""
    return processes.largest(len(planned)) if is_sharded(student) else len(planned)
