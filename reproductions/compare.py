"""Runs of several methods over several seeds, and their differences with intervals: what the scripts here have in common.

Every arm runs with every seed, and a seed is one choice of student, teachers, data order and sampling, shared by the arms:
differences between two arms are taken within seeds. A run that is there and finished is read, not repeated.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdkit.config import Recipe, load_recipe
from opdkit.train.loop import train

HERE = Path(__file__).parent
Record = dict[str, Any]
# Two-sided 95 % of Student's t by degrees of freedom; with three seeds an interval is 4.3 standard errors wide each side.
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Arm:
    """One way of training: a shipped recipe and what it changes there."""

    name: str
    recipe: str
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """What one finished run left behind."""

    evals: list[Record]  # evals.jsonl
    steps: list[Record]  # metrics.jsonl
    path: Path  # its folder

    def accuracy(self, which: int = -1, who: str = "student") -> float:
        """Held-out accuracy of the student (0 = before training, -1 = after), or of a teacher."""
        return float([r["accuracy"] for r in self.evals if r["who"] == who][which])

    def mean(self, key: str, since: int = 0) -> float:
        """Mean of a logged number over the steps after `since` that have it."""
        return statistics.fmean(r[key] for r in self.steps if r["step"] > since and key in r)


def seeded(recipe: str, seed: int, changes: Sequence[str] = ()) -> list[str]:
    """Overrides that give a run its seed, and models of that seed from the testbed, those that `changes` name included."""
    plain = load_recipe(recipe, changes)
    paths = {"student": plain.student.path} | {f"teachers.{name}": t.path for name, t in plain.teachers.items()}
    models = [f"{key}.path={path}@{seed}" for key, path in paths.items() if path.startswith("testbed:")]
    return [f"seed={seed}", "log.trackers=[]", *models]


def run(arm: Arm, seed: int, folder: str) -> Run:
    """Train an arm with a seed in runs/FOLDER/NAME-SEED, or read the finished run there."""
    output = Path("runs") / folder / f"{arm.name.replace(' ', '_')}-{seed}"
    recipe: Recipe = load_recipe(arm.recipe, [f"output={output}", *arm.changes, *seeded(arm.recipe, seed, arm.changes)])
    info = output / "run.json"
    if not (info.exists() and json.loads(info.read_text()).get("finished")):
        train(recipe)
    lines = {name: (output / f"{name}.jsonl").read_text().splitlines() for name in ("evals", "metrics")}
    evals, steps = ([json.loads(line) for line in lines[name]] for name in ("evals", "metrics"))
    return Run(evals, steps, output)


def run_all(arms: Sequence[Arm], seeds: Sequence[int], folder: str) -> dict[str, list[Run]]:
    """All arms with all seeds, seed by seed."""
    found: dict[str, list[Run]] = {arm.name: [] for arm in arms}
    for seed in seeds:
        for arm in arms:
            found[arm.name].append(run(arm, seed, folder))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % interval by Student's t over the seeds)."""
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two seeds, given {len(values)}")
    half = STUDENT_T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def with_interval(values: Sequence[float], form: str = ".1f") -> str:
    mean, half = interval(values)
    return f"{mean:{form}} ± {half:{form}}"


def table(
    found: Mapping[str, Sequence[Run]], columns: Mapping[str, Callable[[Run], float]], form: str = ".1f",
    against: str | None = None,
) -> list[str]:  # fmt: skip
    """Markdown: an arm a row, a number a column as "each seed: mean ± half of 95 %".

    With `against`, a last column has the first number's difference to that arm, taken within seeds.
    """
    first = next(iter(columns.values()))
    heads = ["arm", *columns, *([f"difference to {against}"] if against else [])]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, runs in found.items():
        cells = [name]
        for number in columns.values():
            values = [number(r) for r in runs]
            cells.append(f"{', '.join(format(v, form) for v in values)}: **{with_interval(values, form)}**")
        if against:
            pairs = zip(runs, found[against], strict=True)
            cells.append("-" if name == against else with_interval([first(a) - first(b) for a, b in pairs], form))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def write(name: str, lines: Sequence[str]) -> str:
    """Write NAME.md beside the scripts and return its text."""
    text = "\n".join([*lines, ""])
    (HERE / f"{name}.md").write_text(text)
    return text
