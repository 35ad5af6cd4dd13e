"""Does Prune-OPD save tokens where the teacher is a stranger, and nothing where it is kin? (arXiv:2605.07804, card section h)

The recipe cpu/prune with two teachers for each seed: kin, trained longer from the student's own initialisation and data
order, and a stranger, trained in the same way from another seed. Both are compared with plain top-k distillation, with
the response cut at a fixed length, and with rollouts that end while they are sampled.

    python reproductions/prune_opd.py            # ten minutes; writes reproductions/prune_opd.md

Left out: the paper's other event (the accepted token), and weights in a random order of positions.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import compare
from compare import Arm, Run, with_interval

RECIPE, FULL, CUT = "cpu/prune", 80, 24
PLAIN = "method={name: topk_opd, k: 16}"
WAYS: dict[str, tuple[str, ...]] = {
    "plain": (PLAIN,),
    "pruned": (),
    "pruned, stopped early": ("method.stop_every=8",),
    f"plain, cut at {CUT}": (PLAIN, f"sampling.max_new_tokens={CUT}", f"eval.max_new_tokens={FULL}"),
}
GAMMAS = (0.6, 0.8, 0.9)  # besides the recipe's 0.7

COLUMNS: dict[str, Callable[[Run], float]] = {
    "accuracy, %": lambda run: 100 * run.accuracy(),
    "tokens, thousands": lambda run: run.total("tokens") / 1000,
    "reverse KL, nats/token": lambda run: float(run.evals[-1]["reverse_kl"]),
}
FORMS = {"accuracy, %": ".0f", "tokens, thousands": ".1f", "reverse KL, nats/token": ".3f"}
CONTROL: dict[str, Callable[[Run], float]] = {
    "limit at the end": lambda run: float(run.steps[-1]["length/limit"]),
    "events in the first 10 steps, %": lambda run: 100 * run.mean("drift", until=10),
    "in the last 10": lambda run: 100 * run.mean("drift", since=run.steps[-1]["step"] - 10),
    "effective length in the first 10 steps": lambda run: run.mean("length/effective", until=10),
    "in the last 10 ": lambda run: run.mean("length/effective", since=run.steps[-1]["step"] - 10),
}
Rows = list[tuple[str, str, str]]


def arms(seeds: int) -> dict[str, list[Arm]]:
    """Teacher -> its arms; a seed's stranger is the next seed's kin."""

    def stranger(way: tuple[str, ...]) -> Callable[[int], tuple[str, ...]]:
        return lambda seed: (f"teachers.teacher.path=testbed:lists@{(seed + 1) % seeds}", *way)

    kin = [Arm(f"kin, {name}", RECIPE, way) for name, way in WAYS.items()]
    kin += [Arm(f"kin, pruned, gamma {gamma:g}", RECIPE, (f"method.gamma={gamma:g}",)) for gamma in GAMMAS]
    return {"kin": kin, "stranger": [Arm(f"stranger, {name}", RECIPE, stranger(way)) for name, way in WAYS.items()]}


def saved(found: dict[str, list[Run]], arm: str, against: str) -> list[float]:
    """Tokens that an arm saves of another one's, in %, each seed."""
    pairs = zip(found[arm], found[against], strict=True)
    return [100 * (1 - a.total("tokens") / b.total("tokens")) for a, b in pairs]


def accuracy(found: dict[str, list[Run]], claim: str, arm: str, against: str, way: int) -> tuple[str, str, str]:
    apart = compare.differences(found, arm, against, COLUMNS["accuracy, %"])
    return claim, f"{arm} less {against}: {with_interval(apart, sign='+')} points", compare.verdict(apart, way)


def yes(holds: bool) -> str:
    return "reproduced" if holds else "not reproduced"


def limits(runs: Sequence[Run]) -> list[list[float]]:
    return [[float(step["length/limit"]) for step in run.steps] for run in runs]


def compatible(found: dict[str, list[Run]]) -> Rows:
    """Claims 1 and 5, about the kin."""
    spared = saved(found, "kin, pruned", "kin, plain")
    grown = limits(found["kin, pruned"])
    grows = all(a <= b for limit in grown for a, b in pairwise(limit)) and all(g[-1] == FULL for g in grown)
    events, lengths = list(CONTROL)[1:3], list(CONTROL)[3:5]
    fewer = [CONTROL[events[1]](run) - CONTROL[events[0]](run) for run in found["kin, pruned"]]
    longer = [CONTROL[lengths[1]](run) - CONTROL[lengths[0]](run) for run in found["kin, pruned"]]
    return [
        ("1. Kin: the limit only grows, to its maximum", f"it ends at {', '.join(f'{g[-1]:g}' for g in grown)}", yes(grows)),
        ("1. Kin: within 10 % of plain distillation's tokens", f"{with_interval(spared)} % saved",
         yes(sum(compare.interval(spared)) < 10)),
        accuracy(found, "1. Kin: at equal accuracy", "kin, pruned", "kin, plain", 0),
        ("5. Kin: fewer events as it learns", f"{with_interval(fewer, sign='+')} points", compare.verdict(fewer, -1)),
        ("5. Kin: the effective length grows with the limit", f"{with_interval(longer, sign='+')} tokens",
         compare.verdict(longer)),
    ]  # fmt: skip


def incompatible(found: dict[str, list[Run]]) -> Rows:
    """Claim 2, about the stranger."""
    spared = saved(found, "stranger, pruned", "stranger, plain")
    ends = [limit[-1] for limit in limits(found["stranger, pruned"])]
    return [
        ("2. Stranger: the limit stays near its minimum of 16", f"it ends at {', '.join(f'{e:g}' for e in ends)}",
         yes(max(ends) <= CUT)),
        ("2. Stranger: a third of the tokens or more are saved", f"{with_interval(spared)} % saved",
         compare.verdict([s - 100 / 3 for s in spared])),
        accuracy(found, "2. Stranger: within noise of plain distillation", "stranger, pruned", "stranger, plain", 0),
    ]  # fmt: skip


def controls(found: dict[str, list[Run]]) -> Rows:
    """Claims 3 and 4, and what ending rollouts early adds, which is not the paper's."""
    cut = list(WAYS)[-1]
    by_gamma = ["kin, pruned, gamma 0.6", "kin, pruned", "kin, pruned, gamma 0.8", "kin, pruned, gamma 0.9"]
    tokens = [[run.total("tokens") for run in found[name]] for name in by_gamma]
    steeper = all(b <= a for more, less in pairwise(tokens) for a, b in zip(more, less, strict=True))
    rows = [
        accuracy(found, "3. A fixed cut hurts with the kin", f"kin, {cut}", "kin, plain", -1),
        accuracy(found, "3. A fixed cut does not hurt with the stranger", f"stranger, {cut}", "stranger, plain", 0),
        (
            "4. A larger gamma never takes more tokens",
            "in every seed" if steeper else "not in every seed",
            yes(steeper),
        ),
        accuracy(found, "4. The strictest gamma costs accuracy", by_gamma[-1], by_gamma[0], -1),
    ]
    for teacher in ("kin", "stranger"):
        early, late = f"{teacher}, pruned, stopped early", f"{teacher}, pruned"
        less = with_interval(saved(found, early, late))
        rows.append(
            accuracy(found, f"Ending rollouts early saves {less} % more, at no cost (not the paper's)", early, late, 0)
        )
    return rows


def report(seeds: int, minutes: float | None) -> str:
    teachers = arms(seeds)
    found = compare.run_all([arm for own in teachers.values() for arm in own], range(seeds), "prune_opd", minutes)
    first = found["kin, plain"][0]
    sections = []
    for teacher, own in teachers.items():
        runs = {arm.name: found[arm.name] for arm in own}
        pruned = {name: own_runs for name, own_runs in runs.items() if "plain" not in name}
        good = with_interval([100 * run.accuracy(0, "teacher") for run in runs[own[0].name]], ".0f")
        sections += [f"## {teacher.capitalize()}", "", f"Accuracy of the teacher: {good} %.", "",
                     *compare.table(runs, COLUMNS, FORMS, against=own[0].name), "",
                     *compare.table(pruned, CONTROL, ".0f"), ""]  # fmt: skip
    start = with_interval([100 * run.accuracy(0) for run in found["kin, plain"]], ".0f")
    setting = (
        f"`cpu/prune`: JSON lists of up to {FULL} tokens, {first.steps[-1]['step']} steps of 16 responses, k 16, gamma 0.7; "
        f"ten events use a rollout up; {first.evals[0]['problems']} held-out problems; {seeds} seeds. Kin is a teacher that "
        "was trained longer from the student's own initialisation and data order; a stranger was trained in the same way from "
        f"another seed. The student starts at {start} %."
    )
    return compare.write("prune_opd", [
        *compare.opening("Prune-OPD: prefix drift and response limits", "prune_opd", setting),
        *compare.claims([*compatible(found), *incompatible(found), *controls(found)]), "",
        *sections,
    ][:-1])  # fmt: skip


if __name__ == "__main__":
    given = compare.arguments(__doc__).parse_args()
    print(report(given.seeds, given.minutes))
