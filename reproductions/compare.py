"""Runs of several methods over several seeds, and their differences with intervals: what the scripts here have in common.

Every arm runs with every seed, and a seed is one choice of student, teachers, data order and sampling, shared by the arms:
differences between two arms are taken within seeds. A run that is there and finished is read, not repeated; one that was
cut off goes on from its last checkpoint. With `--minutes` a script stops between two runs, and goes on when called again.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdkit.config import Recipe, load_recipe
from opdkit.errors import RunError
from opdkit.train.loop import train
from opdkit.train.run import recipe_differences

HERE = Path(__file__).parent
Record = dict[str, Any]
# Two-sided 95 % of Student's t by degrees of freedom; with three seeds an interval is 4.3 standard errors wide each side.
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
HOW = (
    "Every seed has its own student and teachers. ± is half of a 95 % interval over the seeds (Student's t); differences are "
    'taken within seeds. A difference is reproduced where its whole interval lies on the claimed side of 0; "consistent" '
    "means only that an interval holds the 0 that was claimed."
)


@dataclass(frozen=True)
class Arm:
    """One way of training: a shipped recipe and what it changes there, as a function of the seed where it depends on it."""

    name: str
    recipe: str
    changes: tuple[str, ...] | Callable[[int], tuple[str, ...]] = ()

    def settings(self, seed: int, output: str) -> Recipe:
        """The recipe of one run; testbed models without a seed of their own get the run's."""
        own = self.changes(seed) if callable(self.changes) else self.changes
        plain = [f"output={output}", f"seed={seed}", "log.trackers=[]", *own]
        return load_recipe(self.recipe, [*plain, *seeded(load_recipe(self.recipe, plain), seed)])


@dataclass(frozen=True)
class Run:
    """What one finished run left behind."""

    evals: list[Record]  # evals.jsonl
    steps: list[Record]  # metrics.jsonl
    path: Path = Path()  # its folder

    def accuracy(self, which: int = -1, who: str = "student") -> float:
        """Held-out accuracy of the student (0 = before training, -1 = after), or of a teacher."""
        return float([r["accuracy"] for r in self.evals if r["who"] == who][which])

    def mean(self, key: str, since: int = 0, until: float = math.inf) -> float:
        """Mean of a logged number over the steps after `since`, up to and with `until`, that have it."""
        return statistics.fmean(r[key] for r in self.steps if since < r["step"] <= until and key in r)

    def total(self, key: str) -> float:
        """Sum of a logged number over the steps that have it."""
        return float(sum(r[key] for r in self.steps if key in r))

    def at(self, step: int, key: str = "accuracy") -> float:
        """A number of the student's evaluation after a step."""
        return float(next(r[key] for r in self.evals if r["who"] == "student" and r["step"] == step))


def seeded(recipe: Recipe, seed: int) -> list[str]:
    """Overrides that give the testbed models of a recipe a seed, where they name none."""
    paths = {"student": recipe.student.path} | {f"teachers.{name}": t.path for name, t in recipe.teachers.items()}
    return [
        f"{key}.path={path}@{seed}" for key, path in paths.items() if path.startswith("testbed:") and "@" not in path
    ]


def place(arm: Arm, seed: int, folder: str) -> Path:
    """Where the run of an arm with a seed lies."""
    return Path("runs") / folder / f"{arm.name.replace(' ', '_')}-{seed}"


def finished(output: Path) -> bool:
    info = output / "run.json"
    return info.exists() and bool(json.loads(info.read_text()).get("finished"))


def run(arm: Arm, seed: int, folder: str) -> Run:
    """Train an arm with a seed in runs/FOLDER/NAME-SEED, or read the finished run there.

    Raises RunError where the run there was made with other settings.
    """
    output = place(arm, seed, folder)
    recipe = arm.settings(seed, str(output))
    if not finished(output):
        train(recipe, resume=(output / "recipe.yaml").exists())
    made = load_recipe(str(output / "recipe.yaml"))
    changed = [key for key in recipe_differences(made, recipe) if key != "output" and not key.startswith("log.")]
    if changed:
        raise RunError(f"{output} was made with another {', '.join(changed)}; remove it to run it again")
    return Run(*(_records(output / f"{name}.jsonl") for name in ("evals", "metrics")), output)


def _records(file: Path) -> list[Record]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def run_all(
    arms: Sequence[Arm], seeds: Sequence[int], folder: str, minutes: float | None = None
) -> dict[str, list[Run]]:
    """All arms with all seeds, seed by seed. Raises SystemExit before a run that would begin after `minutes`."""
    found: dict[str, list[Run]] = {arm.name: [] for arm in arms}
    started = time.monotonic()
    for seed in seeds:
        for arm in arms:
            late = minutes is not None and time.monotonic() - started > 60 * minutes
            if late and not finished(output := place(arm, seed, folder)):
                raise SystemExit(f"{minutes:g} minutes are over before {output}; call again to go on")
            found[arm.name].append(run(arm, seed, folder))
    return found


def arguments(about: str | None, seeds: int = 3) -> argparse.ArgumentParser:
    """The options that the scripts share: --seeds N and --minutes M."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help="runs of every arm")
    parser.add_argument("--minutes", type=float, help="begin no run after so many; call again to go on")
    return parser


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % interval by Student's t over the seeds)."""
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two seeds, given {len(values)}")
    half = STUDENT_T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def each(values: Sequence[float], form: str = ".1f") -> str:
    return ", ".join(format(v, form) for v in values)


def with_interval(values: Sequence[float], form: str = ".1f", sign: str = "") -> str:
    """ "mean ± half width"; with sign "+" the mean has its sign, as differences do."""
    mean, half = interval(values)
    return f"{mean:{sign}{form}} ± {half:{form}}"


def differences(
    found: Mapping[str, Sequence[Run]], arm: str, against: str, number: Callable[[Run], float]
) -> list[float]:
    """A number of one arm less that of another, seed by seed."""
    return [number(a) - number(b) for a, b in zip(found[arm], found[against], strict=True)]


def verdict(differences: Sequence[float], claimed: int = 1) -> str:
    """What an interval says of the claim that a difference is above 0 (claimed = 1), below it (-1), or none (0).

    That there is none cannot be shown by an interval that holds 0; it can be refuted by one that does not.
    """
    mean, half = interval(differences)
    if not claimed:
        return "consistent" if abs(mean) <= half else "not reproduced"
    if claimed * mean > half:
        return "reproduced"
    return "the opposite" if -claimed * mean > half else "not shown: the interval holds 0"


def table(
    found: Mapping[str, Sequence[Run]], columns: Mapping[str, Callable[[Run], float]],
    form: str | Mapping[str, str] = ".1f", against: str | None = None,
) -> list[str]:  # fmt: skip
    """Markdown: an arm a row, a number a column as "each seed: mean ± half of 95 %", in one form or in one for each.

    With `against`, a last column has the first number's difference to that arm, taken within seeds.
    """
    forms = dict.fromkeys(columns, form) if isinstance(form, str) else form
    name_of_first, first = next(iter(columns.items()))
    heads = ["arm", *columns, *([f"difference to {against}"] if against else [])]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, runs in found.items():
        cells = [name]
        for column, number in columns.items():
            values = [number(r) for r in runs]
            cells.append(f"{each(values, forms[column])}: **{with_interval(values, forms[column])}**")
        if against:
            apart = differences(found, name, against, first)
            cells.append("-" if name == against else with_interval(apart, forms[name_of_first], "+"))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def opening(title: str, script: str, setting: str) -> list[str]:
    """The first lines of a generated page; `setting` says what was run."""
    return [f"# {title}", "", f"Generated by `{script}.py`; do not edit.", "", f"{setting} {HOW}", ""]


def claims(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Markdown: what a paper says, what was found, and whether that is it."""
    return ["| claim | found | |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]


def write(name: str, lines: Sequence[str]) -> str:
    """Write NAME.md beside the scripts and return its text."""
    text = "\n".join([*lines, ""])
    (HERE / f"{name}.md").write_text(text)
    return text
