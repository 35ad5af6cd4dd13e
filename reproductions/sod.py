"""Does it help that turns count less where student and teacher have come apart? (arXiv:2605.07725)

Two settings on the testbed's calculator; a seed has its own student and teacher.

clumsy   Some 40 % of the student's calls fail at the start, and the teacher has never read an error: the paper's case.
weak     The student's calls are well formed and often wrong: there is hardly any error. Only on request.

    python reproductions/sod.py             # 80 s of one core a run, nine runs; writes reproductions/sod.md
    python reproductions/sod.py --settings sod-clumsy sod-weak

Left out: the ablations that know which call failed (zero or less weight after the first error): a step knows gaps, not
errors. No cap, and GRPO without a teacher.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from compare import Arm, Run, arguments, claims, differences, each, run_all, table, verdict, with_interval, write

UNIFORM, SOD, FLOORED = "grpo_opd", "sod", "sod, floor 0.2"
COMMON = ("eval.teacher=false", "eval.every=null", "log.rollouts=128")
WEAK = ("student.path=testbed:caller-weak", "tools.turns=6", "sampling.max_new_tokens=64", "train.steps=60")
METHODS = {
    UNIFORM: ("method.floor=100.0", "method.cap=1.0"),  # every weight is 1
    SOD: (),
    FLOORED: ("method.floor=0.2",),
}
TURNS = range(1, 7)


def arms(more: tuple[str, ...] = ()) -> list[Arm]:
    return [Arm(name, "cpu/sod", (*COMMON, *more, *changes)) for name, changes in METHODS.items()]


SETTINGS = {"sod-clumsy": arms(), "sod-weak": arms(WEAK)}

PLACES = {"sod-clumsy": "where calls fail", "sod-weak": "where they work"}

# ---------------------------------------------------------------------------------------------------------------------
# Turns of saved responses


@dataclass(frozen=True)
class Turn:
    """One block of the student's own tokens."""

    number: int  # in its response, from 1
    errors: int  # how many errors in a row stand before it
    failed: bool | None  # its own call; None = it has none that was answered
    correct: bool  # the whole response
    gap: float  # mean of |log q - log p|, nats/token
    push: float  # sum of log q - log p, nats


def turns_of(rollout: dict[str, Any]) -> list[Turn]:
    """The turns of a saved rollout: a tool's tokens are those without a student's number."""
    blocks: list[tuple[bool, list[dict[str, Any]]]] = []
    for token in rollout["tokens"]:
        own = "student" in token
        if not blocks or blocks[-1][0] is not own:
            blocks.append((own, []))
        blocks[-1][1].append(token)
    said = ["".join(t["text"] for t in tokens).startswith("ERROR") for own, tokens in blocks if not own]
    found, errors = [], 0
    for k, tokens in enumerate(tokens for own, tokens in blocks if own):
        ratios = [t["teacher"] - t["student"] for t in tokens]
        failed = said[k] if k < len(said) else None
        gap = statistics.fmean(map(abs, ratios))
        found.append(Turn(k + 1, errors, failed, rollout["correct"], gap, sum(ratios)))
        errors = errors + 1 if failed else 0
    return found


def first_step(run: Run) -> list[Turn]:
    """The turns of the first step's responses, which the student wrote before any update."""
    saved = json.loads((run.path / "rollouts" / "step-000001.json").read_text())["rollouts"]
    return [turn for rollout in saved for turn in turns_of(rollout)]


def mean_of(turns: Sequence[Turn], number: Callable[[Turn], float], keep: Callable[[Turn], bool]) -> float | None:
    values = [number(t) for t in turns if keep(t)]
    return statistics.fmean(values) if values else None


def matched(turns: Sequence[Turn], keep: Callable[[Turn], bool] = lambda t: True) -> float:
    """Mean gap of turns after an error minus that of turns after a result at the same place, in nats/token."""
    found = []
    for number in {t.number for t in turns}:
        here = [t for t in turns if t.number == number and keep(t)]
        after, plain = ([t.gap for t in here if bool(t.errors) is error] for error in (True, False))
        found += [gap - statistics.fmean(plain) for gap in after] if plain else []
    return statistics.fmean(found)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def gaps_before_training(runs: Sequence[Run]) -> list[str]:
    turns = [first_step(run) for run in runs]
    groups: dict[str, Callable[[Turn], bool]] = {
        "first turn": lambda t: t.number == 1,
        "after a result": lambda t: t.number > 1 and not t.errors,
        "after 1 error": lambda t: t.errors == 1,
        "after 2 errors in a row": lambda t: t.errors == 2,
        "after 3 or more": lambda t: t.errors > 2,
    }
    numbers: dict[str, tuple[Callable[[Turn], float], Callable[[Turn], bool]]] = {
        "gap of all": (lambda t: t.gap, lambda t: True),
        "of turns with a call that works": (lambda t: t.gap, lambda t: t.failed is False),
        "the same, in responses that are correct": (lambda t: t.gap, lambda t: t.failed is False and t.correct),
        "sum of log q - log p there, nats a turn": (lambda t: t.push, lambda t: t.failed is False and t.correct),
    }
    lines = [f"| turn | how many | {' | '.join(numbers)} |", "|---" * (len(numbers) + 2) + "|"]
    for name, group in groups.items():
        cells = [name, ", ".join(str(sum(map(group, own))) for own in turns)]
        for number, keep in numbers.values():
            values = [mean_of(own, number, lambda t, keep=keep, group=group: group(t) and keep(t)) for own in turns]
            known = [v for v in values if v is not None]
            shown = ", ".join("-" if v is None else f"{v:.2f}" for v in values)
            cells.append(f"{shown}: **{statistics.fmean(known):.2f}**" if known else shown)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def by_turn(found: dict[str, Sequence[Run]]) -> list[str]:
    """Logged numbers of every turn, means over all steps and seeds."""
    lines = ["| arm | number | " + " | ".join(f"turn {k}" for k in TURNS) + " |", "|---" * (len(TURNS) + 2) + "|"]
    for name, runs in found.items():
        for key in ("turn_gap", "turn_weight", "weighted_gap"):
            reached = [[r.mean(f"{key}/{k}") for r in runs if any(f"{key}/{k}" in s for s in r.steps)] for k in TURNS]
            cells = [f"{statistics.fmean(values):.2f}" if values else "-" for values in reached]
            lines.append(f"| {name} | `{key}` | " + " | ".join(cells) + " |")
    return lines


def percent(key: str, which: int) -> Callable[[Run], float]:
    """A number of evals.jsonl in percent; which: 0 = before training, -1 = after."""
    return lambda run: 100 * float(run.evals[which][key])


def results(found: dict[str, Sequence[Run]]) -> list[str]:
    accuracy = {"accuracy after, %": percent("accuracy", -1), "before": percent("accuracy", 0)}
    failing = {"failing calls after, %": percent("tools/error_share", -1), "before": percent("tools/error_share", 0)}
    return [
        *table(found, accuracy, against=UNIFORM), "", *table(found, failing, against=UNIFORM), "",
        *table(found, {"gradient norm, mean over steps": lambda run: run.mean("grad_norm")}, ".2f"), "",
    ]  # fmt: skip


def claimed(found: dict[str, dict[str, list[Run]]]) -> list[str]:
    clumsy = found["sod-clumsy"]
    turns = [first_step(run) for run in clumsy[UNIFORM]]
    larger = "the gap is larger after an error than after a result at the same place"
    numbers: list[tuple[str, list[float], str]] = [
        (f"{larger}, nats/token", [matched(own) for own in turns], ".2f"),
        (f"{larger}, turns whose own call works", [matched(own, lambda t: t.failed is False) for own in turns], ".2f"),
    ]
    for name in (SOD, FLOORED):
        for place, runs in found.items():
            words = f"accuracy of {name} minus that of uniform weights, {PLACES[place]}, points"
            numbers.append((words, differences(runs, name, UNIFORM, percent("accuracy", -1)), ".1f"))
    growth = [grown(a) - grown(b) for a, b in zip(clumsy[UNIFORM], clumsy[SOD], strict=True)]
    numbers.append(("a turn's mean pull w d, turn 4 over turn 1: uniform weights minus SOD", growth, ".2f"))
    rows = [(f"{words} (above 0)", f"{each(values, form)}: **{with_interval(values, form)}**", verdict(values))
            for words, values, form in numbers]  # fmt: skip
    return claims(
        [*rows, ("zero weight after the first error is worse; without a cap the gradient is noisier", "not run", "")]
    )


def grown(run: Run) -> float:
    return run.mean("weighted_gap/4") / run.mean("weighted_gap/1")


HEAD = """# SOD: turns that count less

Generated by `sod.py`; do not edit.

Claim (2605.07725): where calls of tools fail, the teacher is lost in what follows, its large gap is noise, and OPD does
better when turns with a grown gap weigh less: average@32 42.98 against 34.70 with uniform weights (1.7B student), 24.22
against OPD's 20.04 (0.6B).

`grpo_opd` is `sod` with every weight 1 (floor 100, cap 1): same rewards, same clip. The floor is the least d_1; the paper
has none. Each seed has its own student, teacher and problems. Cells: every seed, then the mean with the 95 % interval of
Student's t over seeds; differences are taken within seeds."""


def setting(title: str, words: str, found: dict[str, Sequence[Run]]) -> list[str]:
    return [f"## {title}", "", words, "", *results(found), "By turn, means over all steps:", "", *by_turn(found), ""]


def report(seeds: Sequence[int], places: Sequence[str], minutes: float | None = None) -> list[str]:
    found: dict[str, dict[str, list[Run]]] = {k: run_all(SETTINGS[k], seeds, k, minutes) for k in places}
    clumsy = found["sod-clumsy"]
    lines = [
        HEAD, "", f"Seeds: {', '.join(map(str, seeds))}.", "", "## Claims", "", *claimed(found), "",
        *setting("Calls that fail", "`cpu/sod` as it is: 0.23M student `caller-clumsy`, 0.58M teacher `caller`, 40 steps "
                 "of 16 prompts x 8, 300 held-out problems.", clumsy),
        "The 128 responses of the first step, before any update (teacher q, student p; every seed, then the mean):", "",
        *gaps_before_training(clumsy[UNIFORM]),
    ]  # fmt: skip
    if "sod-weak" in found:
        words = "The same with student `caller-weak`, 6 turns, 64 tokens, 60 steps."
        lines += ["", *setting("Calls that work", words, found["sod-weak"])[:-1]]
    return lines


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=["sod-clumsy"])
    options = parser.parse_args()
    print(write("sod", report(range(options.seeds), options.settings, options.minutes)))
