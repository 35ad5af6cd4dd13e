"""Routing: which teacher of a view scores a rollout, by the rollout's domain, and one set of scores made of all of theirs.

Axes: N trained tokens of the step, n rows, V vocabulary. Left out: several teachers at one token (`views.interpolated`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opdkit.errors import DataError, RecipeError
from opdkit.rollouts.rollout import Rollout
from opdkit.step import Candidates, FullRows, Scores
from opdkit.tasks.problem import Task, listed

EVERY = "*"  # in place of a domain: all that are not named


def teacher_of(model: str | Mapping[str, str], domain: str) -> str | None:
    """The teacher's name for a domain; None where a mapping {domain: teacher} has none."""
    return model if isinstance(model, str) else model.get(domain, model.get(EVERY))


def assign(model: str | Mapping[str, str], rollouts: Sequence[Rollout], view: str) -> dict[str, list[int]]:
    """Teacher -> the numbers of its rollouts, in their order. Raises DataError for a domain without a teacher."""
    found: dict[str, list[int]] = {}
    for number, rollout in enumerate(rollouts):
        teacher = teacher_of(model, rollout.problem.domain)
        if teacher is None:
            raise DataError(without_teacher(model, view, rollout.problem.domain, rollout.problem.id))
        found.setdefault(teacher, []).append(number)
    return found


def check_routes(model: str | Mapping[str, str], view: str, task: Task) -> None:
    """Raise RecipeError for a domain of the training problems without a teacher, or a teacher of a domain that they lack.

    Generated problems: only a missing teacher can be seen, in those that are looked at (`tasks.problem.listed`); a domain
    that comes up later stops the run with a DataError.
    """
    if isinstance(model, str):
        return
    problems, all_of_them = listed(task)
    first = {problem.domain: problem.id for problem in reversed(problems)}
    for domain, problem in first.items():
        if teacher_of(model, domain) is None:
            raise RecipeError(without_teacher(model, view, domain, problem))
    unused = [domain for domain in model if domain not in (*first, EVERY)]
    if EVERY in model and not set(first) - set(model):
        unused.append(EVERY)
    if unused and all_of_them:
        raise RecipeError(
            f"view '{view}' names a teacher for domain '{unused[0]}', but the training problems have "
            f"{', '.join(sorted(first))}; remove it, or map the domain's column with task.columns: {{domain: NAME}}"
        )


def without_teacher(model: str | Mapping[str, str], view: str, domain: str, problem: str) -> str:
    """What is wrong with a mapping that lacks a domain."""
    return (
        f"view '{view}' has no teacher for domain '{domain}' (problem {problem}); it has {_listed(model)}: name one for that "
        f"domain, or for every other one as '{EVERY}'"
    )


def _listed(model: str | Mapping[str, str]) -> str:
    return model if isinstance(model, str) else ", ".join(f"{domain}: {name}" for domain, name in model.items())


@dataclass(frozen=True)
class RoutedRows:
    """Full-vocabulary log-probs of several models: token i is row `row[i]` of `parts[part[i]]`."""

    parts: tuple[FullRows, ...]
    part: Int[Tensor, " N"]
    row: Int[Tensor, " N"]

    def log_probs(self, rows: Int[Tensor, " n"] | slice) -> Float[Tensor, "n V"]:
        part, row = self.part[rows], self.row[rows]
        found: Tensor | None = None
        for number, source in enumerate(self.parts):
            at = torch.nonzero(part == number).squeeze(1)
            if not at.numel() and (found is not None or number < len(self.parts) - 1):
                continue
            own = source.log_probs(row[at])
            if found is None:
                found = own.new_empty(part.shape[0], own.shape[1])
            found[at] = own
        assert found is not None
        return found

    def take(self, rows: Int[Tensor, " n"]) -> "RoutedRows":
        return RoutedRows(self.parts, self.part[rows], self.row[rows])


def merge(parts: Sequence[tuple[Int[Tensor, " _"], Scores]]) -> Scores:
    """One view's scores from those of several models: of each, where its tokens sit on the flat axis, and its scores."""
    if len(parts) == 1:
        return parts[0][1]
    back = torch.argsort(torch.cat([index for index, _ in parts]))
    scores = [s for _, s in parts]
    found: dict[str, Any] = {f.name: _cat(scores, f.name, back) for f in fields(Scores)
                             if f.name not in ("candidates", "full", "bad")}  # fmt: skip
    if any(s.bad is not None for s in scores):
        masks = [torch.zeros_like(s.sampled, dtype=torch.bool) if s.bad is None else s.bad for s in scores]
        found["bad"] = torch.cat(masks)[back]
    candidates = [s.candidates for s in scores if s.candidates is not None]
    if candidates:
        columns: dict[str, Any] = {f.name: _cat(candidates, f.name, back) for f in fields(Candidates)}
        found["candidates"] = Candidates(**columns)
    rows = [s.full for s in scores if s.full is not None]
    if rows:
        sizes = [s.sampled.shape[0] for s in scores]
        part = torch.cat([torch.full((n,), i, device=back.device) for i, n in enumerate(sizes)])
        row = torch.cat([torch.arange(n, device=back.device) for n in sizes])
        found["full"] = RoutedRows(tuple(rows), part[back], row[back])
    return Scores(**found)


def _cat(parts: Sequence[Any], name: str, back: Int[Tensor, " N"]) -> Tensor | None:
    values = [getattr(p, name) for p in parts]
    return None if values[0] is None else torch.cat(values)[back]
