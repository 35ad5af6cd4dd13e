"""The data that a method reads: one optimiser step on a flat axis of trained tokens.

Axes: S sequences, N trained tokens of the step (flat, no padding), K support size, Kt size of a top-k list,
V vocabulary, D hidden. Log-probabilities are natural logs (nats).

Left out on purpose: masks. A token that is not trained on (prompt, tool output, padding) is not on the axis.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where each trained token sits, and the segment functions over sequences, turns, prefixes and groups."""

    seq: Int[Tensor, " N"]  # sequence of each token, non-decreasing
    turn: Int[Tensor, " N"]  # turn of each token, numbered over the whole step, non-decreasing
    group: Int[Tensor, " S"]  # prompt group of each sequence

    @property
    def sequences(self) -> int:
        return self.group.shape[0]

    def seq_len(self) -> Int[Tensor, " S"]:
        """Trained tokens of each sequence."""
        return torch.bincount(self.seq, minlength=self.sequences)

    def seq_sum(self, x: Float[Tensor, " N"]) -> Float[Tensor, " S"]:
        return x.new_zeros(self.sequences).index_add(0, self.seq, x)

    def seq_mean(self, x: Float[Tensor, " N"]) -> Float[Tensor, " S"]:
        """Mean over each sequence; a sequence without trained tokens gets 0."""
        return self.seq_sum(x) / self.seq_len().clamp(min=1)

    def turn_mean(self, x: Float[Tensor, " N"]) -> Float[Tensor, " M"]:
        """Mean over each turn of the step."""
        turns = int(self.turn.max()) + 1 if self.turn.numel() else 0
        count = torch.bincount(self.turn, minlength=turns).clamp(min=1)
        return x.new_zeros(turns).index_add(0, self.turn, x) / count

    def group_mean(self, x: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        """Mean over each prompt group, handed back to every member."""
        groups = int(self.group.max()) + 1
        count = torch.bincount(self.group, minlength=groups).clamp(min=1)
        return (x.new_zeros(groups).index_add(0, self.group, x) / count)[self.group]

    def group_size(self) -> Int[Tensor, " S"]:
        """How many sequences share the prompt of each sequence."""
        return torch.bincount(self.group)[self.group]

    def spread(self, x: Float[Tensor, " S"]) -> Float[Tensor, " N"]:
        """Give every token the value of its sequence."""
        return x[self.seq]

    def position(self) -> Int[Tensor, " N"]:
        """Index of each token among the trained tokens of its sequence, from 0."""
        start = torch.cumsum(self.seq_len(), 0) - self.seq_len()
        return torch.arange(self.seq.numel(), device=self.seq.device) - start[self.seq]

    def before(self, x: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Sum over the earlier tokens of the same sequence (exclusive prefix sum).

        Accumulated in float64: a difference of two running sums over the step loses float32's digits.
        """
        running = torch.cumsum(x.double(), 0) - x
        first = torch.cumsum(self.seq_len(), 0) - self.seq_len()
        return (running - running[first[self.seq]]).to(x.dtype)

    def after(self, x: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Sum over this and the later tokens of the same sequence (reward to go)."""
        wide = x.double()  # for the same reason as in `before`
        return (self.spread(self.seq_sum(wide)) - self.before(wide)).to(x.dtype)


@runtime_checkable
class FullRows(Protocol):
    """Full-vocabulary log-probabilities that are formed row by row on demand, never all at once."""

    def log_probs(self, rows: Int[Tensor, " n"] | slice) -> Float[Tensor, "n V"]: ...

    def take(self, rows: Int[Tensor, " n"]) -> "FullRows": ...


@dataclass(frozen=True)
class Candidates:
    """A teacher view's support: K token ids per position with the log-probs of both sides.

    All log-probabilities are normalised over the full vocabulary. `tail` is the log of the mass outside the valid
    candidates, formed from that complement, not as log(1 - sum).
    """

    ids: Int[Tensor, "N K"]
    valid: Bool[Tensor, "N K"]  # False: this column does not count (a duplicate, or not in the candidate set)
    student: Float[Tensor, "N K"]
    teacher: Float[Tensor, "N K"]
    student_tail: Float[Tensor, " N"] | None  # None where the student's head was not applied again
    teacher_tail: Float[Tensor, " N"]


@dataclass(frozen=True)
class Scores:
    """What one view says about the step's tokens (nats, float32, or float64 in tests)."""

    sampled: Float[Tensor, " N"]  # log-prob of the sampled token
    entropy: Float[Tensor, " N"] | None = None
    top_ids: Int[Tensor, "N Kt"] | None = None  # the view's own most probable ids, best first
    top: Float[Tensor, "N Kt"] | None = None  # their log-probs
    candidates: Candidates | None = None  # teacher views with support TopK
    full: FullRows | None = None  # views with support Full, and the student where one of them has it
    informed: Bool[Tensor, " N"] | None = None  # views with a context: whether it had anything to show for the rollout
    bad: Bool[Tensor, " N"] | None = None  # the model gave no number (train.bad_scores: mask)


@dataclass(frozen=True)
class Step:
    """All rollouts of one source in one optimiser update, flattened to N trained tokens."""

    layout: Layout
    tokens: Int[Tensor, " N"]
    views: Mapping[str, Scores]  # "student" = the policy that sampled; "behaviour" = after top-p / top-k truncation
    reward: Float[Tensor, " S"] | None = None
    correct: Bool[Tensor, " S"] | None = None
    domain: Int[Tensor, " S"] | None = None
    dropped: Bool[Tensor, " S"] | None = None  # prepare steps left nothing: weight 0 in every term
    horizon: int = 0  # maximum response length in tokens, for the reductions that divide by it
    progress: float = 0.0  # share of the run that is done, in [0, 1]
    state: Mapping[str, Any] = field(default_factory=dict)  # read-only; made by updaters, saved by the checkpoint

    def usable(self, views: Iterable[str]) -> Bool[Tensor, " N"] | None:
        """The tokens on which all of these views gave numbers, of sequences that were not dropped; None = every token."""
        bad = [self.views[name].bad for name in views if name in self.views]
        if self.dropped is not None:
            bad.append(self.dropped[self.layout.seq])
        known = [b for b in bad if b is not None]
        return ~torch.stack(known).any(0) if known else None

    def rows(self, index: Int[Tensor, " n"]) -> "Step":
        """The same step restricted to some tokens, for row-wise losses. Segment functions no longer apply to it."""
        layout = replace(self.layout, seq=self.layout.seq[index], turn=self.layout.turn[index])
        views = {name: take_rows(view, index) for name, view in self.views.items()}
        return replace(self, layout=layout, tokens=self.tokens[index], views=views)


def take_rows(value: Any, index: Int[Tensor, " n"]) -> Any:
    """Index the first axis of every tensor of a (nested) dataclass of [N, ...] tensors."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value[index]
    if is_dataclass(value) and not hasattr(value, "take"):
        return replace(value, **{f.name: take_rows(getattr(value, f.name), index) for f in fields(value)})  # type: ignore[type-var]
    return value.take(index)
