"""Do outcomes and token rewards disagree, and does it help to make them agree? (Uni-OPD, arXiv:2605.03677, card section h)

Before training: 16 responses to each of 64 prompts, and how the distillation returns G of correct and incorrect ones lie.
Training: the recipe cpu/uni_opd with its parts left out one by one, with correct responses only, and with a teacher for
sums that errs. Every seed builds its own student and teachers.

    python reproductions/uni_opd.py            # half an hour; writes reproductions/uni_opd.md

Left out: prompts by difficulty (claim 5), and margins so large that only the outcome counts (the end of claim 3).
"""

from collections.abc import Sequence
from dataclasses import replace

import compare
import torch
from compare import Arm, Run, with_interval

from opdkit.margins import margin, margin_shift, returns, sides
from opdkit.signals import log_ratio
from opdkit.step import Step
from opdkit.train.loop import make_step
from opdkit.train.rolling import Rolling
from opdkit.train.setup import set_up

RECIPE, DELTA, SIZES = "cpu/uni_opd", 0.4, (4, 8, 16)
ERRS = (
    "teachers.adder.path=testbed:base-m"  # knows both formats, as the student does, and adds less well than the adder
)
PLAIN = ("method.margin=none", "method.balance=null")
ARMS = [
    Arm("plain", RECIPE, PLAIN),
    Arm("Uni-OPD", RECIPE),
    Arm("margins only", RECIPE, ("method.balance=null",)),
    Arm("balance only", RECIPE, ("method.margin=none",)),
    Arm("correct only", RECIPE, ("method.margin=none", "method.balance=.inf")),
]
ERRING = [Arm("plain, one erring teacher", RECIPE, (*PLAIN, ERRS)),
          Arm("margins, one erring teacher", RECIPE, ("method.balance=null", ERRS))]  # fmt: skip
COLUMNS = {
    "accuracy, %": lambda r: 100 * r.accuracy(),
    "sums, %": lambda r: 100 * r.evals[-1]["accuracy/sums"],
    "words, %": lambda r: 100 * r.evals[-1]["accuracy/gym"],
    "reverse KL to the adder": lambda r: r.evals[-1]["reverse_kl/adder"],
    "inverted, %": lambda r: 100 * r.mean("margin/inverted", since=r.steps[-1]["step"] - 50),
}
FORMS = dict.fromkeys(COLUMNS, ".1f") | {"reverse KL to the adder": ".2f"}

# ---------------------------------------------------------------------------------------------------------------------
# Before training: the order of returns


def sampled(seed: int) -> Step:
    """The untrained student's responses to 64 prompts, 16 each, scored by the teacher of their domain."""
    recipe = Arm("order", RECIPE, (*PLAIN, "sampling.group=16", "train.prompts_per_step=64")).settings(
        seed, "runs/none"
    )
    setup = set_up(recipe)
    return make_step(setup, "policy", Rolling(setup).step(1)["policy"], 1, {})


def order(step: Step, size: int, *, shifted: bool = False) -> dict[str, float]:
    """Shares in % of what the margins of the prompts are, with the responses in groups of `size`."""
    group = torch.arange(step.layout.sequences) // size
    step = replace(step, layout=replace(step.layout, group=group))
    found = returns(step, margin_shift(of=log_ratio(), delta=DELTA) if shifted else log_ratio())
    mixed = sides(step, found.counted, "group")
    pairs = [(found.of_each[right], found.of_each[wrong]) for right, wrong in mixed]
    inverted = sum(margin(*pair, "minmax") < 0 for pair in pairs)
    return {
        "mixed": 100 * len(pairs) / (int(group.max()) + 1),
        "inverted of mixed": 100 * inverted / len(pairs),
        "inverted of all": 100 * inverted / (int(group.max()) + 1),
        "below": 100 * sum(margin(*pair, "mean") < DELTA - 1e-6 for pair in pairs) / len(pairs),
        "in order": ordered(pairs),
        "in order, all": ordered([(found.of_each[a], found.of_each[b]) for a, b in sides(step, found.counted, "batch")]),
    }  # fmt: skip


def ordered(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Share in % of the pairs of a correct and an incorrect response of which the correct one has the larger G."""
    right = sum(float((a[:, None] > b[None]).sum() + 0.5 * (a[:, None] == b[None]).sum()) for a, b in pairs)
    return 100 * right / sum(a.numel() * b.numel() for a, b in pairs)


def before_training(seeds: int) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Markdown of the orders, and the rows of claims 1 and 2."""
    steps = [sampled(seed) for seed in range(seeds)]
    found = {size: [order(step, size) for step in steps] for size in SIZES}
    calibrated = [order(step, SIZES[-1], shifted=True) for step in steps]
    lines = [
        "| responses a prompt | mixed prompts, % | of them inverted, % | of all prompts inverted, % |",
        "|---|---|---|---|",
    ]
    for size, orders in found.items():
        cells = (with_interval([o[key] for o in orders]) for key in ("mixed", "inverted of mixed", "inverted of all"))
        lines.append(f"| {size} | {' | '.join(cells)} |")
    largest = found[SIZES[-1]]
    lines += ["", f"With {SIZES[-1]} responses a prompt:", "", "| | before the shift | after |", "|---|---|---|"]
    names = {"below": f"mixed prompts with a mean margin below {DELTA:g}, %", "inverted of mixed": "inverted, %",
             "in order": "pairs of one prompt in order, %", "in order, all": "pairs of all prompts in order, %"}  # fmt: skip
    for key, name in names.items():
        before, after = ([o[key] for o in orders] for orders in (largest, calibrated))
        lines.append(f"| {name} | {with_interval(before)} | {with_interval(after)} |")
    grows = [b["inverted of mixed"] - a["inverted of mixed"] for a, b in zip(found[SIZES[0]], largest, strict=True)]
    rises = [b["in order, all"] - a["in order, all"] for a, b in zip(largest, calibrated, strict=True)]
    overlap = [o["in order, all"] for o in largest]
    below = max(o["below"] for o in calibrated)
    rows = [
        ("1. Many mixed prompts are inverted, more with more responses",
         f"{SIZES[-1]} less {SIZES[0]} responses: {with_interval(grows, sign='+')} points", compare.verdict(grows)),
        ("1. Returns of correct and incorrect responses overlap strongly: under three quarters of the pairs are in order",
         f"{with_interval(overlap)} %; the paper has about 55 %, and 50 % is no relation",
         compare.verdict([o - 75 for o in overlap], -1)),
        (f"2. After the shift no mean margin is below {DELTA:g}", f"at most {below:.1f} % of the mixed prompts",
         "not reproduced" if below else "reproduced"),
        ("2. The order of returns follows the outcome better then",
         f"pairs in order: {with_interval(rises, sign='+')} points", compare.verdict(rises)),
    ]  # fmt: skip
    return lines, rows


# ---------------------------------------------------------------------------------------------------------------------
# Training


def training_claims(found: dict[str, list[Run]]) -> list[tuple[str, str, str]]:
    """The rows of claims 3 and 4, and of the method as a whole: differences of accuracy within seeds."""
    asked = [
        ("Uni-OPD is better than plain distillation", "Uni-OPD", "plain", 1),
        ("3. With a teacher that errs, margins raise accuracy", ERRING[1].name, ERRING[0].name, 1),
        ("3. With good teachers they do not", "margins only", "plain", 0),
        ("4. Correct responses only are worse than all", "correct only", "plain", -1),
        ("4. As many correct as incorrect ones are best or tied", "balance only", "plain", 1),
    ]
    rows = []
    for claim, arm, against, sign in asked:
        apart = compare.differences(found, arm, against, COLUMNS["accuracy, %"])
        found_here = f"{arm} less {against}: {with_interval(apart, sign='+')} points"
        rows.append((claim, found_here, compare.verdict(apart, sign)))
    return rows


def teachers(found: dict[str, list[Run]]) -> list[str]:
    """Accuracy of the teachers on their domains, and of the student before training."""
    good, erring, start = found["plain"], found[ERRING[0].name], []
    for name, runs, who, key in (("adder", good, "adder", "sums"), ("speller", good, "speller", "gym"),
                                 ("erring teacher", erring, "adder", "sums")):  # fmt: skip
        start.append(f"{name} {with_interval([100 * own(r, who)[f'accuracy/{key}'] for r in runs])} %")
    student = (f"{key} {with_interval([100 * r.evals[0][f'accuracy/{domain}'] for r in good])} %"
               for key, domain in (("sums", "sums"), ("words", "gym")))  # fmt: skip
    return [
        f"Held-out accuracy before training: student {', '.join(student)}; on their domain the {', the '.join(start)}."
    ]


def own(run: Run, who: str) -> dict[str, float]:
    return next(r for r in run.evals if r["who"] == who)


def report(seeds: int, steps: int, minutes: float | None) -> str:
    arms = [replace(arm, changes=(*arm.changes, f"train.steps={steps}")) for arm in (*ARMS, *ERRING)]
    found = compare.run_all(arms, range(seeds), "uni_opd", minutes)
    lines, rows = before_training(seeds)
    dropped = [r.mean("count/dropped_rollouts") for r in found["Uni-OPD"]]
    erring = {arm.name: found[arm.name] for arm in ERRING}
    problems = found["plain"][0].evals[0]["problems"]
    setting = (
        f"`cpu/uni_opd`: sums (three quarters of the problems) and reversed words, a teacher for each; {seeds} seeds."
    )
    return compare.write("uni_opd", [
        *compare.opening("Uni-OPD: outcomes and token rewards", "uni_opd", setting),
        *compare.claims([*rows, *training_claims(found),
                 ("3. A large margin comes to outcome-only learning; 5. prompts by difficulty", "", "not tested")]), "",
        "## Before training", "",
        "G of a response is the mean of log q - log p over its tokens. A prompt with correct and incorrect responses is "
        "inverted where some incorrect one has a larger G than some correct one. 64 prompts, 16 responses each; smaller "
        "groups are parts of these.", "", *lines, "",
        "## Training", "",
        f"{steps} steps of 16 prompts with 8 responses; {problems} held-out problems, one sample each. Inverted: tokens of "
        f"inverted prompts in the last 50 steps. Balancing leaves out {with_interval(dropped)} of a step's 128 responses.", "",
         *teachers(found), "",
        *compare.table({arm.name: found[arm.name] for arm in ARMS}, COLUMNS, FORMS, against="plain"), "",
        "One teacher for both domains, which errs on sums:", "",
        *compare.table(erring, COLUMNS, FORMS, against=ERRING[0].name),
    ])  # fmt: skip


if __name__ == "__main__":
    parser = compare.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=120)
    given = parser.parse_args()
    print(report(given.seeds, given.steps, given.minutes))
