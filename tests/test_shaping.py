"""Shaping of rewards by hand, the normalised outcome at its edges, and what of both a run logs."""

from pathlib import Path

import pytest
import torch
from test_loop import changed, metrics, run

from opdkit.catalogue import build_method
from opdkit.errors import MethodError, RecipeError
from opdkit.metrics import averages, rollout_metrics
from opdkit.prepare import Batch
from opdkit.rewards.shaping import CallBonus, Overlong, RewardScale, shaping, tool_calls
from opdkit.rollouts.rollout import Rollout
from opdkit.signals import outcome
from opdkit.step import Layout, Scores, Step
from opdkit.tasks.problem import Problem


def response(*, reward=0.0, correct=None, calls=0, length=None, ends_with_tool=False) -> Rollout:
    """A response of `calls` tool texts of three tokens, each behind two tokens of the model's, and two or more at the end."""
    trained = ((True,) * 2 + (False,) * 3) * calls + (() if ends_with_tool else (True,) * 2)
    if length is not None:
        trained += (True,) * (length - len(trained))
    right = reward > 0 if correct is None else correct
    ids = (5,) * len(trained)
    return Rollout(Problem("p", "p"), (1,), ids, "t", 0, "stop", trained=trained, reward=reward, correct=right)


def shaped(parts, *rollouts, limit=100) -> list[float]:
    for part in parts:
        rollouts = part(list(rollouts), Batch(limit, 0))
    return [r.reward for r in rollouts]


# ---------------------------------------------------------------------------------------------------------------------
# Prepare steps


def test_wrong_answers_with_calls_have_the_cards_rewards():
    """0, 1, 2, 4, 9 calls: -1, -.9, -.8, -.6, -.6; a right answer has +1 whatever it called."""
    parts = shaping(signed=True, call_bonus=0.1)
    wrong = [response(calls=n) for n in (0, 1, 2, 4, 9)]
    assert shaped(parts, *wrong) == pytest.approx([-1.0, -0.9, -0.8, -0.6, -0.6], abs=1e-15)
    assert shaped(parts, *[response(reward=1.0, calls=n) for n in (0, 3)]) == [1.0, 1.0]
    assert shaped([CallBonus(0.1, 0.4)], *wrong) == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.4])  # rewards of 0 and 1


def test_calls_are_blocks_of_tool_text():
    assert [tool_calls(response(calls=n)) for n in (0, 1, 3)] == [0, 1, 3]
    assert tool_calls(response(calls=2, ends_with_tool=True)) == 2
    plain = Rollout(Problem("p", "p"), (1,), (5, 6), "t", 0, "stop")
    assert plain.trained is None and tool_calls(plain) == 0


def test_the_verdict_and_not_the_reward_decides_about_the_bonus():
    partly = response(reward=0.7, correct=False, calls=1)
    assert shaped([CallBonus()], partly) == pytest.approx([0.8])
    assert not CallBonus()([partly], Batch(10, 0))[0].correct


def test_overlong_by_hand():
    """limit 20, buffer 8: nothing up to 12, then (length - 12) / 8; tool text counts; beyond the limit it stays at 1."""
    lengths = (3, 12, 13, 16, 20, 23)
    rollouts = [response(reward=1.0, length=n) for n in lengths]
    expected = [1.0, 1.0, 0.875, 0.5, 0.0, 0.0]
    assert shaped([Overlong(8)], *rollouts, limit=20) == expected
    assert shaped([Overlong(8, limit=20)], *rollouts, limit=500) == expected
    assert shaped([Overlong(8, factor=0.5)], *rollouts, limit=20) == [1.0, 1.0, 0.9375, 0.75, 0.5, 0.5]
    for n in lengths[:5]:  # the released formula
        assert -Overlong(8).penalty(n, 20) == min(-(n - (20 - 8)) / 8 * 1.0, 0)
    tool = response(reward=1.0, calls=3, length=20)
    assert shaped([Overlong(8)], tool, limit=20) == [0.0]


def test_dapos_numbers():
    """2503.14476: at most 16384 tokens without penalty, 4096 to the limit of 20480."""
    penalty = Overlong(4096).penalty
    assert [penalty(n, 20480) for n in (16384, 18432, 20480)] == [0.0, 0.5, 1.0]


def test_a_buffer_that_is_longer_than_the_limit_is_an_error():
    with pytest.raises(
        RecipeError, match=r"Overlong\(buffer=1024\): the buffer is longer than the response limit of 64"
    ):
        shaped([Overlong(1024)], response(), limit=64)
    assert shaped([Overlong(64)], response(reward=1.0, length=32), limit=64) == [0.5]


def test_scale_by_hand():
    assert shaped([RewardScale()], *[response(reward=x) for x in (0.0, 0.25, 1.0)]) == [-1.0, -0.5, 1.0]
    assert shaped([RewardScale(0.0, 2.0)], response(reward=0.5)) == [1.0]


@pytest.mark.parametrize(("make", "message"), [
    (lambda: RewardScale(1.0, -1.0), "expected low < high"),
    (lambda: RewardScale(0.0, 1.0), "which changes nothing"),
    (lambda: CallBonus(0.0), "expected 0 < each <= most"),
    (lambda: CallBonus(0.5, 0.4), r"CallBonus\(each=0.5\): expected 0 < each <= most"),
    (lambda: Overlong(0), "a buffer of 1 token or more"),
    (lambda: Overlong(8, factor=0.0), "a factor above 0"),
    (lambda: Overlong(8, limit=7), "no limit below the buffer"),
])  # fmt: skip
def test_shaping_without_sense_is_refused(make, message):
    with pytest.raises(MethodError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# The outcome


def advantages(reward, group=None, dtype=torch.float64, **arguments) -> list[float]:
    n = len(reward)
    layout = Layout(torch.arange(n), torch.arange(n), torch.tensor(group or [0] * n))
    scores = Scores(torch.zeros(n, dtype=dtype))
    step = Step(layout, torch.zeros(n, dtype=torch.long), {"student": scores}, reward=torch.tensor(reward, dtype=dtype))
    return outcome(**arguments)(step).tolist()


def test_the_cards_advantage():
    assert advantages([1, 1, -1, -1]) == pytest.approx([0.866025, 0.866025, -0.866025, -0.866025], abs=1e-6)


def test_both_standard_deviations():
    """(1, 1, -1, -1): variance 4/3 with G - 1, 1 with G."""
    assert advantages([1, 1, -1, -1], std="population") == pytest.approx([1, 1, -1, -1], abs=2e-6)
    one, two = advantages([3, 1, 0, 7, 2]), advantages([3, 1, 0, 7, 2], std="population")
    assert [b / a for a, b in zip(one, two, strict=True)] == pytest.approx([1.25**0.5] * 5, abs=1e-5)
    assert advantages([1, 1, -1, -1], eps=1.0, std="population") == pytest.approx([0.5, 0.5, -0.5, -0.5])


def test_leave_one_out_by_hand():
    """(1, 0, 0, 1): the others of a right answer have the mean 1/3, of a wrong one 2/3; (3, 0): 0 and 3."""
    reward, group = [1, 0, 0, 1, 3, 0], [0, 0, 0, 0, 1, 1]
    plain = advantages(reward, group, baseline="leave_one_out", std=False)
    assert plain == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3, 3, -3], abs=1e-15)
    scaled = advantages(reward, group, baseline="leave_one_out")  # unbiased variances 1/3 and 9/2
    assert scaled == pytest.approx([a / (s + 1e-6) for a, s in zip(plain, [3**-0.5] * 4 + [4.5**0.5] * 2, strict=True)])


@pytest.mark.parametrize("arguments", [
    {}, {"std": False}, {"std": "population"}, {"baseline": "leave_one_out"}, {"std": False, "baseline": "leave_one_out"},
])  # fmt: skip
def test_groups_of_one_reward_have_exactly_no_advantage(arguments):
    """In float32 the mean of 16 rewards of -.6 is not -.6, and the rounding over eps would be an advantage of .1."""
    same = [-0.6] * 16 + [0.1] * 3 + [1.0]
    group = [0] * 16 + [1] * 3 + [2]
    assert advantages(same, group, torch.float32, **arguments) == [0.0] * 20


@pytest.mark.parametrize(("arguments", "message"), [
    ({"std": "biased"}, "expected true, false or population"), ({"eps": -1.0}, r"outcome\(eps=-1.0\): expected 0 or more"),
])  # fmt: skip
def test_outcomes_without_sense_are_refused(arguments, message):
    with pytest.raises(MethodError, match=message):
        outcome(**arguments)


def test_shares_of_mixed_groups_and_of_those_without_a_right_answer():
    verdicts = {0: (True, False, False), 1: (False, False), 2: (True, True), 3: (False,)}
    rollouts = [
        Rollout(Problem("p", "p"), (1,), (5,), "t", group, "stop", reward=float(v), correct=v)
        for group, found in verdicts.items() for v in found
    ]  # fmt: skip
    found = averages(rollout_metrics(rollouts))
    assert (
        found["groups_mixed"] == found["groups_all_wrong"] == 1 / 3
    )  # the rest is all right; one response is no group


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_grpo_with_a_penalty_for_length_learns_from_the_shaped_reward(recipe_data):
    """No answer of the random student is right, so only lengths differ: the raw reward is 0, the penalty is not."""
    recipe_data["sampling"] |= {"group": 4}
    path = run(recipe_data, method={"name": "grpo", "overlong": 4}, teachers={}, train__steps=2)
    plain = run(recipe_data, method={"name": "grpo"}, teachers={}, train__steps=2, output=recipe_data["output"] + "2")
    for row, other in zip(metrics(path), metrics(plain), strict=True):
        assert row["reward"] == 0.0 and -1.0 <= row["prepared_reward"] < 0.0 and row["grad_norm"] > 0
        assert row["groups_mixed"] == 0.0 and row["groups_all_wrong"] == 1.0
        assert "prepared_reward" not in other and other["grad_norm"] == 0.0


def test_a_penalty_that_does_not_fit_the_recipe_stops_it(recipe_data):
    with pytest.raises(RecipeError, match="the buffer is longer than the response limit of 8 tokens"):
        run(recipe_data, method={"name": "grpo", "overlong": 9}, teachers={}, train__steps=1)
    assert not Path(recipe_data["output"]).exists()


@pytest.mark.parametrize(("overlong", "fits"), [(3, True), (4, False)])
def test_a_buffer_must_fit_the_least_limit_of_a_length_control(recipe_data, overlong, fits):
    """sampling.max_new_tokens is 8, but the controller may go down to 3 tokens."""
    control = "LengthControl(reliable(event=low_overlap(k=4)), start=6, least=3, step=1, margin=1)"
    method = {"name": "compose", "controllers": [control], "prepare": [f"Overlong({overlong})"],
              "terms": ["Term(signal=outcome())"], "views": {"teacher": "View('teacher')"}}  # fmt: skip
    data = changed(recipe_data, method=method, train__steps=1)
    if fits:
        run(data)
    else:
        with pytest.raises(
            RecipeError, match=r"Overlong\(buffer=4\): .* response limit of 3 tokens.*`least` of a length"
        ):
            run(data)
        assert not Path(recipe_data["output"]).exists()


def test_a_method_with_shaping_says_so():
    shown = str(build_method("grpo", {"overlong": 4, "overlong_factor": 0.5}))
    assert "prepare   Overlong(buffer=4, factor=0.5)" in shown
