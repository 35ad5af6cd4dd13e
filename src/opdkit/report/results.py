"""Before and after: which evaluations count, and how much of the gap to a teacher was recovered."""

import math
from dataclasses import dataclass

from opdkit.report.read import Evaluation, RunData

STUDENT = "student"


@dataclass(frozen=True)
class Gap:
    """Share of the accuracy gap to one teacher that training closed, with its standard error (None when unknown)."""

    teacher: str
    recovered: float
    se: float | None


@dataclass(frozen=True)
class Results:
    """The evaluations of the student before and after training, and of every teacher."""

    before: Evaluation | None
    after: Evaluation | None
    teachers: tuple[Evaluation, ...]
    gaps: tuple[Gap, ...]  # only for teachers that were ahead of the student

    @property
    def best(self) -> Evaluation | None:
        """The most accurate teacher."""
        known = [t for t in self.teachers if t.accuracy is not None]
        return max(known, key=lambda t: t.accuracy or 0.0, default=None)

    @property
    def gap(self) -> Gap | None:
        """The gap to the most accurate teacher."""
        best = self.best
        return next((g for g in self.gaps if best is not None and g.teacher == best.who), None)

    def gap_to(self, teacher: str) -> Gap | None:
        return next((g for g in self.gaps if g.teacher == teacher), None)


def results(run: RunData) -> Results:
    """Collect the before-and-after numbers of a run. `after` is the student's last evaluation past step 0."""
    student = [e for e in run.evals if e.who == STUDENT]
    before = next((e for e in student if e.step == 0), None)
    after = next((e for e in reversed(student) if e.step > 0), None)
    latest = {e.who: e for e in run.evals if e.who != STUDENT}
    gaps = [gap_recovered(before, after, t) for t in latest.values()] if before and after else []
    return Results(before, after, tuple(latest.values()), tuple(g for g in gaps if g is not None))


def gap_recovered(before: Evaluation, after: Evaluation, teacher: Evaluation) -> Gap | None:
    """(after - before) / (teacher - before), or None when an accuracy is missing or the teacher was not ahead.

    The standard error is first-order, with the three accuracies taken as independent; they share their problems,
    so it tends to be too large rather than too small.
    """
    if before.accuracy is None or after.accuracy is None or teacher.accuracy is None:
        return None
    room = teacher.accuracy - before.accuracy
    if room <= 0:
        return None
    share = (after.accuracy - before.accuracy) / room
    errors = (before.accuracy_se, after.accuracy_se, teacher.accuracy_se)
    if None in errors:
        return Gap(teacher.who, share, None)
    slopes = (1 - share, 1.0, share)
    variance = sum((slope * (error or 0.0)) ** 2 for slope, error in zip(slopes, errors, strict=True))
    return Gap(teacher.who, share, math.sqrt(variance) / room)
