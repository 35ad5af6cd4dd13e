"""What the reproductions have in common: intervals, differences within seeds, and runs that are read instead of repeated."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from opdkit.config import dump_recipe
from opdkit.errors import RunError

sys.path.insert(0, str(Path(__file__).parents[1] / "reproductions"))

import compare
from compare import Arm, Run, differences, interval, run, run_all, table, verdict

ARM = Arm("an arm", "cpu/prune", ("train.steps=3",))


def leave(arm: Arm, seed: int, accuracy: float, *, finished: str | None = "now") -> Path:
    """What a run of an arm with a seed leaves in runs/test: two evaluations and three steps."""
    output = compare.place(arm, seed, "test")
    output.mkdir(parents=True)
    (output / "recipe.yaml").write_text(dump_recipe(arm.settings(seed, str(output))))
    (output / "run.json").write_text(json.dumps({"finished": finished}))
    evals = [{"step": 0, "who": "student", "accuracy": 0.25}, {"step": 0, "who": "teacher", "accuracy": 0.75},
             {"step": 3, "who": "student", "accuracy": accuracy}]  # fmt: skip
    steps = [{"step": 1, "tokens": 10}, {"step": 2, "tokens": 20, "drift": 0.5}, {"step": 3, "tokens": 60}]
    for name, records in (("evals", evals), ("metrics", steps)):
        (output / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return output


@pytest.fixture
def trained(monkeypatch, tmp_path) -> list[tuple[str, bool]]:
    """In an empty folder: the (output, resume) of every training that is asked for; it leaves a run with accuracy 0.5."""
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str, bool]] = []

    def train(recipe, *, resume=False):
        asked.append((recipe.output, resume))
        if not resume:
            leave(ARM, recipe.seed, 0.5)

    monkeypatch.setattr(compare, "train", train)
    return asked


def runs(*after: float) -> list[Run]:
    return [Run([{"who": "student", "step": 0, "accuracy": a}], []) for a in after]


def test_an_interval_is_students_t_over_the_seeds():
    mean, half = interval([1.0, 2.0, 6.0])  # deviations -2, -1, 3: variance 14 / 2; t = 4.303 at two degrees of freedom
    assert mean == 3.0
    assert half == pytest.approx(4.303 * (7 / 3) ** 0.5)
    assert interval([1.0, 2.0])[1] == pytest.approx(12.706 * 0.5)
    with pytest.raises(ValueError, match="at least two seeds, given 1"):
        interval([1.0])


def test_a_claim_is_reproduced_where_the_interval_lies_on_its_side():
    assert verdict([1.0, 1.1, 0.9]) == verdict([-1.0, -1.1, -0.9], claimed=-1) == "reproduced"
    assert verdict([-1.0, -1.1, -0.9]) == "the opposite"
    assert verdict([1.0, 2.0, 6.0]) == "not shown: the interval holds 0"
    assert (verdict([1.0, 2.0, 6.0], 0), verdict([1.0, 1.1, 0.9], 0)) == ("consistent", "not reproduced")


def test_differences_are_taken_within_seeds():
    found = {"plain": runs(10.0, 20.0, 30.0), "new": runs(11.0, 22.0, 33.0)}
    assert differences(found, "new", "plain", Run.accuracy) == [1.0, 2.0, 3.0]
    lines = table(found, {"accuracy": Run.accuracy, "half": lambda r: r.accuracy() / 2}, {"accuracy": ".1f", "half": ".2f"},
                  against="plain")  # fmt: skip
    # both arms spread by 10 over the seeds, their difference by 1 only: 4.303 / 3 ** 0.5 = 2.484
    assert lines == [
        "| arm | accuracy | half | difference to plain |",
        "|---|---|---|---|",
        "| plain | 10.0, 20.0, 30.0: **20.0 ± 24.8** | 5.00, 10.00, 15.00: **10.00 ± 12.42** | - |",
        "| new | 11.0, 22.0, 33.0: **22.0 ± 27.3** | 5.50, 11.00, 16.50: **11.00 ± 13.66** | +2.0 ± 2.5 |",
    ]


def test_a_finished_run_is_read_and_not_repeated(trained):
    leave(ARM, 0, 0.6)
    found = run_all([ARM], [0, 1], "test")
    assert trained == [("runs/test/an_arm-1", False)]
    assert [r.accuracy() for r in found["an arm"]] == [0.6, 0.5]
    one = found["an arm"][0]
    assert (one.accuracy(0), one.accuracy(0, "teacher"), one.at(3), one.at(0)) == (0.25, 0.75, 0.6, 0.25)
    assert (one.total("tokens"), one.mean("tokens", since=1), one.mean("tokens", until=2), one.mean("drift")) == (
        90,
        40,
        15,
        0.5,
    )


def test_a_run_that_was_cut_off_goes_on(trained):
    leave(ARM, 0, 0.6, finished=None)
    run(ARM, 0, "test")
    assert trained == [("runs/test/an_arm-0", True)]


def test_a_run_with_other_settings_is_not_taken_for_this_one(trained):
    leave(Arm("an arm", "cpu/prune", ("train.steps=2", "log.top_k=2")), 0, 0.6)
    with pytest.raises(RunError, match=r"runs/test/an_arm-0 was made with another train\.steps; remove it"):
        run(ARM, 0, "test")
    assert trained == []


def test_no_run_begins_when_the_time_is_over_and_finished_ones_are_still_read(trained):
    leave(ARM, 0, 0.6)
    with pytest.raises(SystemExit, match="0 minutes are over before runs/test/an_arm-1; call again"):
        run_all([ARM], [0, 1], "test", minutes=0)
    assert trained == []


def test_the_runs_seed_goes_to_the_models_that_name_none():
    kin = ARM.settings(3, "x")
    assert (kin.student.path, kin.teachers["teacher"].path) == ("testbed:lists-weak@3", "testbed:lists@3")
    other = Arm("other", "cpu/prune", lambda seed: (f"teachers.teacher.path=testbed:lists@{seed + 1}",)).settings(
        3, "x"
    )
    assert (other.seed, other.student.path) == (3, "testbed:lists-weak@3")
    assert other.teachers["teacher"].path == "testbed:lists@4"
    assert Arm("another", "cpu/prune", ("teachers.teacher.path=testbed:sft",)).settings(5, "x").teachers[
        "teacher"
    ].path == ("testbed:sft@5")


def test_the_index_has_every_script_of_make_reproduce_and_every_page():
    root = Path(compare.__file__).parents[1]
    index = (root / "reproductions" / "README.md").read_text()
    names = re.search(r"^REPRODUCTIONS := (.+)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert names
    for name in names[1].split():
        assert (root / "reproductions" / f"{name}.py").is_file()
        assert f"`{name}`" in index
    pages = {page.name for page in (root / "reproductions").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", index))


def every_number(arm: str, seed: int) -> Run:
    """A run whose evaluations and steps hold everything that the scripts read, a little different for each arm and seed."""
    own = len(arm) + seed
    evals = [{"step": step, "who": who, "problems": 100, "accuracy": (own + step) / 200, "reverse_kl": 0.1}
             for step in range(0, 65, 8) for who in ("student", "teacher")]  # fmt: skip
    keys = ("tokens", "drift", "length/limit", "length/effective", "jump/accepted", "jump/responses", "jump/seconds")
    return Run(evals, [{"step": step, "seconds/step": 10.0, **dict.fromkeys(keys, 1.0 + own)} for step in range(1, 65)])


@pytest.mark.parametrize(
    ("name", "row"),  # an arm's accuracy is half a point a letter of its name
    [
        ("prune_opd", "| 2. Stranger: within noise of plain distillation | stranger, pruned less stranger, plain: "
                      "+0.5 ± 0.0 points | not reproduced |"),
        ("effopd", "| EffOPD is ahead after 16 steps | better (released) less plain, 16 steps: +6.0 ± 0.0 points | "
                   "reproduced |"),
    ],
)  # fmt: skip
def test_a_script_makes_its_page_of_the_runs(name, row, monkeypatch):
    def run_all(arms, seeds, folder, minutes=None):
        return {arm.name: [every_number(arm.name, seed) for seed in seeds] for arm in arms}

    monkeypatch.setattr(compare, "run_all", run_all)
    monkeypatch.setattr(compare, "write", lambda page, lines: "\n".join([page, *lines]))
    page = importlib.import_module(name).report(3, None)
    assert page.startswith(f"{name}\n# ")
    assert row in page.splitlines()
