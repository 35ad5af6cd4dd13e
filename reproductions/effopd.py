"""Does EffOPD reach plain distillation's accuracy in fewer steps? (arXiv:2605.11739, card section h, statements 4 and 5)

The recipe cpu/effopd without jumps, with the released and the paper's way of accepting one, and with every jump taken.
A larger learning rate without jumps shows what the jumps have to be compared with.

    python reproductions/effopd.py            # a quarter of an hour; writes reproductions/effopd.md

Left out: statements 1 to 3, about the geometry of updates of distillation and of policy gradients.
"""

from collections.abc import Callable

import compare
from compare import Arm, Run, with_interval

RECIPE, AT, WITHIN, SHARE = "cpu/effopd", (8, 16, 32, 64), 0.02, 0.6
PLAIN = Arm("plain", RECIPE, ("method.tries=0",))
FASTER = Arm("plain, lr 1e-4", RECIPE, ("method.tries=0", "optim.lr=1.0e-4"))
JUMPS = [
    Arm("better (released)", RECIPE),
    Arm("no worse (paper)", RECIPE, ("method.accept=no_worse",)),
    Arm("always", RECIPE, ("method.accept=always",)),
]


def percent_after(step: int) -> Callable[[Run], float]:
    return lambda run: 100 * run.at(step)


def first_step(run: Run, goal: float) -> float:
    """The first evaluated step at which the student is as good as `goal`; infinite where it never is."""
    return next(
        (r["step"] for r in run.evals if r["who"] == "student" and r["step"] and r["accuracy"] >= goal), float("inf")
    )


def needed(found: dict[str, list[Run]], arm: str) -> list[float]:
    """First step within 2 points of plain distillation's accuracy at the end, each seed."""
    goals = [run.accuracy() - WITHIN for run in found[PLAIN.name]]
    return [first_step(run, goal) for run, goal in zip(found[arm], goals, strict=True)]


COSTS: dict[str, Callable[[Run], float]] = {
    "jumps kept": lambda run: run.total("jump/accepted"),
    "extra responses, % of those trained on": lambda run: (
        100 * run.total("jump/responses") / (64 * run.steps[-1]["step"])
    ),
    "time of the jumps, % of all": lambda run: 100 * run.total("jump/seconds") / run.total("seconds/step"),
}


def accelerated(found: dict[str, list[Run]], arm: str) -> tuple[str, str, str]:
    """Statement 4 for one way of accepting: in every seed within 2 points of the end in 60 % of the steps."""
    last = found[PLAIN.name][0].steps[-1]["step"]
    steps, plain = needed(found, arm), needed(found, PLAIN.name)
    holds = sum(a <= SHARE * last for a in steps)
    earlier = sum(a < b for a, b in zip(steps, plain, strict=True))
    return (
        f"4. Plain accuracy after {last} steps, less 2 points, in {SHARE:.0%} of the steps: {arm}",
        f"after {compare.each(steps, 'g')} steps (plain distillation itself: {compare.each(plain, 'g')}); in time in {holds} "
        f"of {len(steps)} seeds, earlier than plain in {earlier}",
        "reproduced" if holds == earlier == len(steps) else "not reproduced",
    )


def compared(
    found: dict[str, list[Run]], arm: str, against: str, step: int, claim: str, way: int
) -> tuple[str, str, str]:
    apart = compare.differences(found, arm, against, percent_after(step))
    return (
        claim,
        f"{arm} less {against}, {step} steps: {with_interval(apart, sign='+')} points",
        compare.verdict(apart, way),
    )


def report(seeds: int, minutes: float | None) -> str:
    found = compare.run_all([PLAIN, *JUMPS, FASTER], range(seeds), "effopd", minutes)
    accepting = [arm.name for arm in JUMPS[:2]]
    rows = [accelerated(found, name) for name in accepting]
    rows += [compared(found, name, PLAIN.name, step, f"EffOPD is ahead after {step} steps", 1)
             for step in (16, 64) for name in accepting]  # fmt: skip
    rows += [
        compared(found, JUMPS[2].name, JUMPS[0].name, 64, "5. Jumps without a test end lower", -1),
        compared(found, JUMPS[0].name, FASTER.name, 64, "It beats a larger learning rate (not the paper's)", 1),
    ]
    problems = found[PLAIN.name][0].evals[0]["problems"]
    jumping = {arm.name: found[arm.name] for arm in JUMPS}
    setting = (f"`cpu/effopd`: sums, student and teacher of 0.58M parameters, lr 2e-5, 64 steps of 64 responses, {problems} "
               f"held-out problems every 8 steps; {seeds} seeds.")  # fmt: skip
    return compare.write("effopd", [
        *compare.opening("EffOPD: fewer steps by jumping ahead", "effopd", setting),
        *compare.claims(rows), "",
        "## Accuracy by steps, %", "",
        *compare.table(found, {f"{step} steps": percent_after(step) for step in AT}), "",
        "## What the jumps cost", "", *compare.table(jumping, COSTS),
    ])  # fmt: skip


if __name__ == "__main__":
    given = compare.arguments(__doc__).parse_args()
    print(report(given.seeds, given.minutes))
