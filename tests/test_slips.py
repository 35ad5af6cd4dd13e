"""Malformed calls in the testbed's calculator task: what is drawn, where the errors come from, and bad settings."""

from random import Random

import pytest

from opdkit.config import TaskConfig
from opdkit.errors import RecipeError
from opdkit.tasks.calculator import Calculator
from opdkit.tasks.load import load_task
from opdkit.testbed import build
from opdkit.testbed.build import content_hash, find
from opdkit.testbed.expressions import _malformed


def make(**fields):
    return load_task(TaskConfig.model_validate({"kind": "testbed", "name": "calculator", "eval_size": 20, **fields}))


def test_the_setting_changes_neither_problems_nor_verdicts():
    plain, clumsy = make(), make(settings={"slips": 0.4})
    assert [p.prompt for p in plain.train[:3]] == ["9+(9*(1+1))=", "(6*8)-(6*9)=", "(2+9)*(5*7)="]
    for a, b in zip([*plain.train[:200], *plain.eval], [*clumsy.train[:200], *clumsy.eval], strict=True):
        assert (a.prompt, a.answer, a.metadata["calls"]) == (b.prompt, b.answer, b.metadata["calls"])
        assert set(a.metadata) == {"calls"} and set(b.metadata) == {"calls", "slips"}
        right = clumsy.target(b).rpartition("\n")[2]
        assert clumsy.verify(b, right).correct and right == plain.target(a).rpartition("\n")[2]


def test_every_answer_is_the_environments_own():
    """Every line that the model writes goes through the calculator; what is left without the slips is the plain solution."""
    task, environment = make(settings={"slips": 0.4}), Calculator(operations=1)
    for problem in task.train[:200]:
        parts = task.target(problem).parts
        assert [own for _, own in parts] == [True, False] * (len(parts) // 2) + [True]
        right = []
        for (line, _), (said, _) in zip(parts[:-1:2], parts[1::2], strict=True):
            call = line.removeprefix("CALL ").strip()
            answer = environment.call("calculator", {"expression": call})
            assert said == f"{'ERROR' if answer.error else '='} {answer.text}\n"
            assert answer.error is said.startswith("ERROR ")
            right += [] if answer.error else [call]
        assert right == [call for call, _ in problem.metadata["calls"]] and parts[-1][0] == problem.answer


@pytest.mark.parametrize("slips", [0.2, 0.4])
def test_the_share_of_malformed_calls(slips):
    task = make(settings={"slips": slips})
    outcomes = [said.startswith("ERROR") for p in task.train[:2000] for said, own in task.target(p).parts if not own]
    error = (slips * (1 - slips) / len(outcomes)) ** 0.5
    assert abs(sum(outcomes) / len(outcomes) - slips) < 4 * error


def test_a_seed_always_makes_the_same_slips():
    first, again, other = (make(settings={"slips": 0.4}, seed=seed) for seed in (3, 3, 4))
    targets = [[task.target(p) for p in task.train[:30]] for task in (first, again, other)]
    assert targets[0] == targets[1] != targets[2]


class Nth(Random):
    """Random numbers of which `choice` takes the n-th, and of signs always +."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def choice(self, seq):
        return "+" if seq == "+-*" else seq[self.n]

    def randrange(self, start, stop=None, step=1):
        return 4


@pytest.mark.parametrize(("call", "expected"), [
    ("7+5", ["(7+5", "7+", "7 5", "7+5+4"]),
    ("-7*(-12)", ["(-7*(-12)", "-7*", "-7 (-12)", "-7*(-12)+4"]),
    ("48-54", ["(48-54", "48-", "48 54", "48-54+4"]),
])  # fmt: skip
def test_the_forms_by_hand(call, expected):
    found = [_malformed(call, Nth(n)) for n in range(4)]
    assert found == expected
    assert all(Calculator(operations=1).call("calculator", {"expression": f}).error for f in found)
    assert not Calculator(operations=1).call("calculator", {"expression": call}).error


@pytest.mark.parametrize(("slips", "message"), [
    (-0.1, r"task\.settings\.slips = -0\.1: .*greater than or equal to 0"),
    (1.0, r"task\.settings\.slips = 1\.0: .*less than 1"),
    (40, r"task\.settings\.slips = 40: .*less than 1"),
    ("many", r"task\.settings\.slips = 'many'"),
])  # fmt: skip
def test_a_share_outside_its_range_is_one_clear_error(slips, message):
    with pytest.raises(RecipeError, match=message):
        make(settings={"slips": slips})


def test_a_misspelt_setting_names_the_right_one():
    with pytest.raises(RecipeError, match="'calculator' has no setting 'slip': did you mean 'slips'"):
        make(settings={"slip": 0.4})


def test_the_clumsy_build_depends_on_what_the_calculator_answers(monkeypatch):
    clumsy = find("caller-clumsy@2")
    assert clumsy.start == "caller-weak@2" and clumsy.task["settings"] == {"slips": 0.4}
    before = content_hash(clumsy)
    monkeypatch.setitem(build.OWN, "calculator", ("testbed/expressions",))
    assert content_hash(clumsy) != before
