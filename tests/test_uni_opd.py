"""Uni-OPD: distillation returns, margins (shift, mask), online balancing, and the method, by the identities of its card."""

import json
from dataclasses import replace
from math import inf

import pytest
import torch
from synthetic import expected_gradient, logit_gradient, logits, make_step

from opdkit.catalogue import build_method
from opdkit.errors import MethodError, RecipeError
from opdkit.margins import below_margin, distillation_return, margin_mask, margin_shift, within_log_ratio
from opdkit.method import Method, Term, View
from opdkit.prepare import Batch
from opdkit.rollouts.balance import Balance
from opdkit.rollouts.rollout import Rollout
from opdkit.signals import log_ratio
from opdkit.step import Layout, Scores, Step
from opdkit.tasks.problem import Problem

R = log_ratio()


def rewards(*responses: list[float], correct: str, groups: str | None = None, **fields) -> Step:
    """A step whose log ratio is given token by token; `correct` is a string of + and -, `groups` one of digits."""
    flat = torch.tensor([r for response in responses for r in response], dtype=torch.float64)
    seq = torch.tensor([s for s, response in enumerate(responses) for _ in response])
    group = torch.tensor([int(g) for g in groups or "0" * len(responses)])
    views = {"teacher": Scores(flat), "student": Scores(torch.zeros_like(flat))}
    right = torch.tensor([c == "+" for c in correct])
    return Step(Layout(seq, seq, group), torch.zeros_like(seq), views, reward=right.double(), correct=right, **fields)


def flat_returns(*g: float) -> list[list[float]]:
    """Responses of different lengths whose token rewards average to the given returns."""
    return [[x + (i - n / 2 + 0.5) * 0.3 for i in range(n)] for n, x in enumerate(g, 1)]


def g_of(step: Step, signal) -> list[float]:
    return step.layout.seq_mean(signal(step)).tolist()


CARD = rewards(*flat_returns(-0.30, -0.19, -0.11, -0.25), correct="++--")


def test_the_distillation_return_is_the_mean_over_a_responses_tokens():
    step = rewards([1.0, 2.0, 6.0], [-1.0], correct="+-")
    assert distillation_return(of=R)(step).tolist() == [3.0, 3.0, 3.0, -1.0]


# ---------------------------------------------------------------------------------------------------------------------
# Margin shift


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        ("both", [-0.0675, 0.0425, -0.3425, -0.4825]),
        ("up", [0.165, 0.275, -0.11, -0.25]),
        ("down", [-0.30, -0.19, -0.575, -0.715]),
    ],
)
def test_the_cards_example(direction, expected):
    """Mean margin -.065, gap .465; responses of 1 to 4 tokens move by the same constant."""
    assert g_of(CARD, margin_shift(of=R, direction=direction)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("direction", ["both", "up", "down"])
def test_the_new_mean_margin_is_delta_and_differences_within_a_response_stay(direction):
    g = torch.tensor(g_of(CARD, margin_shift(of=R, delta=0.7, direction=direction)), dtype=torch.float64)
    assert float(g[:2].mean() - g[2:].mean()) == pytest.approx(0.7, abs=1e-12)
    moved = margin_shift(of=R, delta=0.7, direction=direction)(CARD) - R(CARD)
    for s in range(4):
        own = moved[CARD.layout.seq == s]
        assert float(own.max() - own.min()) < 1e-15


def test_minmax_and_up_lift_the_worst_correct_response_delta_above_the_best_incorrect_one():
    """Margin -.30 + .11 = -.19, gap .59."""
    g = g_of(CARD, margin_shift(of=R, mode="minmax", direction="up"))
    assert min(g[:2]) - max(g[2:]) == pytest.approx(0.4, abs=1e-12)
    assert g[0] == pytest.approx(-0.30 + 0.59, abs=1e-12)


@pytest.mark.parametrize(
    "step",
    [
        rewards([0.5, -0.0], [-0.2], correct="+-"),  # margin .45 >= .4
        rewards([0.5], [-0.0, -0.2], correct="++"),
        rewards([-0.5], [-0.0, 0.2], correct="--"),
        rewards([-0.5], [-0.0, 0.2], correct="+-", groups="01"),
    ],
    ids=["margin holds", "all right", "all wrong", "other prompts"],
)
def test_where_nothing_is_triggered_the_rewards_are_the_same_to_the_bit(step):
    for signal in (margin_shift(of=R, delta=0.4), margin_shift(of=R, delta=0.4, mode="minmax", direction="up")):
        assert signal(step).numpy().tobytes() == R(step).numpy().tobytes()
    assert margin_mask(of=R, delta=0.4)(step).tolist() == [1.0] * step.tokens.numel()


def test_delta_minus_infinity_is_plain_opd():
    assert margin_shift(of=R, delta=-inf)(CARD).numpy().tobytes() == R(CARD).numpy().tobytes()


def test_prompts_are_calibrated_one_by_one_and_a_batch_as_one():
    step = rewards([0.0], [1.0], [2.0], [0.0], correct="+-+-", groups="0011")
    assert margin_shift(of=R, delta=0.0)(step).tolist() == [0.5, 0.5, 2.0, 0.0]
    # mean over correct 1, over incorrect .5: margin .5
    assert margin_shift(of=R, delta=0.5, scope="batch")(step).tolist() == [0.0, 1.0, 2.0, 0.0]
    assert margin_shift(of=R, delta=0.7, scope="batch")(step).tolist() == pytest.approx([0.1, 0.9, 2.1, -0.1])


def test_teacher_equal_to_student():
    step = rewards([0.0, 0.0], [0.0], correct="+-")
    assert margin_shift(of=R, delta=0.0)(step).tolist() == [0.0, 0.0, 0.0]
    assert margin_shift(of=R)(step).tolist() == [0.2, 0.2, -0.2]


def test_permuting_the_responses_permutes_the_shift():
    order = [2, 0, 3, 1]
    responses = flat_returns(-0.30, -0.19, -0.11, -0.25)
    other = rewards(*(responses[s] for s in order), correct="-+-+")
    assert g_of(other, margin_shift(of=R)) == pytest.approx([g_of(CARD, margin_shift(of=R))[s] for s in order])


def test_unusable_tokens_and_responses_do_not_count_in_the_return():
    """A token without a number leaves its response's mean; a response of such tokens alone stands on no side."""
    bad = torch.tensor([False, True, True, False])
    views = {"teacher": Scores(torch.tensor([-1.0, 0.0, 0.0, 3.0]).double(), bad=bad),
             "student": Scores(torch.zeros(4).double())}  # fmt: skip
    seq = torch.tensor([0, 0, 1, 2])
    step = Step(
        Layout(seq, seq, torch.zeros(3, dtype=torch.long)), seq, views, correct=torch.tensor([True, True, False])
    )
    assert distillation_return(of=R)(step).tolist() == [-1.0, -1.0, 0.0, 3.0]
    assert margin_shift(of=R, delta=0.0, direction="up")(step).tolist() == [3.0, 4.0, 0.0, 3.0]  # gap 4, not 3.5


# ---------------------------------------------------------------------------------------------------------------------
# Margin mask


MASKED = rewards(*([x] for x in (-0.5, -0.2, -0.1, -0.05, -0.3, -0.4)), correct="+++---")


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ({"delta": 0.0, "mode": "minmax"}, [0, 1, 1, 0, 1, 1]),  # -.5, then -.05: gap .10
        ({"delta": 0.2, "mode": "mean"}, [0, 1, 1, 0, 0, 1]),  # then -.3: gap .25
        ({"delta": 9.0, "mode": "mean"}, [0, 0, 1, 0, 0, 1]),  # never empties a side
        ({"delta": 9.0, "mode": "mean", "keep": 0.7}, [0, 1, 1, 0, 1, 1]),  # int(.7 x 3) = 2 stay
        ({"delta": 9.0, "mode": "mean", "keep": 1.0}, [1] * 6),
    ],
)
def test_the_greedy_mask(arguments, left):
    assert margin_mask(of=R, **arguments)(MASKED).tolist() == left


def test_the_mask_stops_where_nothing_raises_the_margin():
    step = rewards([0.1], [0.1], [0.3], [0.3], correct="++--")
    assert margin_mask(of=R)(step).tolist() == [1.0] * 4


def test_of_two_equal_removals_the_correct_response_goes():
    step = rewards([0.0], [1.0], [0.0], [1.0], correct="++--")
    assert margin_mask(of=R, delta=0.5)(step).tolist() == [0.0, 1.0, 1.0, 1.0]


def test_the_mask_is_idempotent():
    left = [s for s, x in enumerate(margin_mask(of=R, delta=0.2)(MASKED).tolist()) if x]
    again = rewards(*([float(R(MASKED)[s])] for s in left), correct="".join("+++---"[s] for s in left))
    assert margin_mask(of=R, delta=0.2)(again).tolist() == [1.0] * 3


def test_inverted_and_close_prompts_are_seen():
    step = rewards([0.0], [0.1], [1.0], [0.0], [0.0], correct="+-+-+", groups="00112")
    assert below_margin(of=R)(step).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert below_margin(of=R, delta=2.0, mode="mean")(step).tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_tokens_at_the_range_of_the_log_ratio_leave():
    step = rewards([9.999, 10.0, -10.0, -100.0], correct="+")
    assert within_log_ratio()(step).tolist() == [1.0, 0.0, 0.0, 0.0]
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(MethodError, match="a number of nats above 0, else every token is left out"):
            within_log_ratio(limit=limit)


# ---------------------------------------------------------------------------------------------------------------------
# Online balancing


def judged(right: int, wrong: int, problem: str = "p", group: int = 0) -> list[Rollout]:
    verdicts = [True] * right + [False] * wrong
    return [Rollout(Problem(problem, "?"), (1,), (i,), "", group, "stop", correct=c) for i, c in enumerate(verdicts)]


def counts(rollouts: list[Rollout]) -> tuple[int, int]:
    return sum(bool(r.correct) for r in rollouts), sum(not r.correct for r in rollouts)


@pytest.mark.parametrize(
    ("ratio", "before", "after"),
    [
        (1.0, (12, 4), (4, 4)), (1.0, (3, 13), (3, 3)), (1.0, (16, 0), (16, 0)), (1.0, (0, 16), (0, 16)),
        (1.5, (5, 4), (5, 3)), (1.0, (8, 8), (8, 8)), (2.0, (1, 4), (1, 4)), (0.1, (9, 3), (9, 3)),
        (0.0, (3, 5), (0, 5)), (inf, (3, 5), (3, 0)), (inf, (0, 5), (0, 0)), (0.0, (5, 0), (0, 0)),
    ],
)  # fmt: skip
def test_how_many_stay(ratio, before, after):
    assert counts(Balance(ratio)(judged(*before), Batch(8, 1))) == after


def test_the_choice_is_random_reproducible_and_differs_between_problems_and_steps():
    def chosen(seed: int, problem: str = "p") -> list[int]:
        return [r.response_ids[0] for r in Balance()(judged(12, 4, problem), Batch(8, seed))]

    assert chosen(1) == chosen(1) and chosen(1)[4:] == [12, 13, 14, 15]
    assert len({tuple(chosen(seed)) for seed in range(20)}) > 15
    assert chosen(1) != chosen(1, "q")
    assert {i for seed in range(60) for i in chosen(seed)[:4]} == set(range(12))


def test_groups_and_the_batch():
    batch = judged(3, 1, "a", 0) + judged(4, 0, "b", 1) + judged(1, 3, "c", 2)
    kept = Balance()(batch, Batch(8, 1))
    assert [counts([r for r in kept if r.group == g]) for g in range(3)] == [(1, 1), (4, 0), (1, 1)]
    assert [r.group for r in kept] == sorted(r.group for r in kept)
    assert counts(Balance(scope="batch")(batch, Batch(8, 1))) == (4, 4)
    assert counts(Balance()([*judged(1, 0), *[r for r in judged(0, 1)], *judged(2, 0)], Batch(8, 1))) == (1, 1)
    unknown = [Rollout(Problem("p", "?"), (1,), (9,), "", 0, "stop")]
    assert len(Balance()(judged(3, 0) + unknown, Batch(8, 1))) == 2
    with pytest.raises(MethodError, match="0 or more"):
        Balance(-1.0)


# ---------------------------------------------------------------------------------------------------------------------
# The method


def gradient_on(method: Method, p, q, correct: str, tokens, seq, group):
    layout = Layout(torch.tensor(seq), torch.tensor(seq), torch.tensor(group))
    right = torch.tensor([c == "+" for c in correct])
    step = make_step(method, p, q, torch.tensor(tokens), layout=layout, reward=right.double(), correct=right)
    return logit_gradient(method, p, step)[1]


LONG = {"tokens": [3, 1, 4, 1, 5, 9, 2], "seq": [0, 0, 0, 1, 2, 2, 3], "group": [0, 0, 1, 1]}
P, Q = logits(7, 12, seed=1), logits(7, 12, seed=2)


def test_reduces_to_plain_opd_where_every_prompt_is_one_sided_or_delta_is_minus_infinity():
    plain = Method(name="plain", views={"teacher": View("teacher")},
                   terms=(Term(signal=R, reduction="seq_mean_token_mean"),))  # fmt: skip
    expected = gradient_on(plain, P, Q, "++--", **LONG)
    assert torch.equal(gradient_on(build_method("uni_opd", {}), P, Q, "++--", **LONG), expected)
    assert torch.equal(gradient_on(build_method("uni_opd", {"least_margin": -inf}), P, Q, "+--+", **LONG), expected)
    assert torch.equal(gradient_on(build_method("uni_opd", {"margin": "none"}), P, Q, "+--+", **LONG), expected)
    assert (
        gradient_on(build_method("uni_opd", {"least_margin": 5.0}), P, Q, "+--+", **LONG) - expected
    ).abs().max() > 0.05


def test_the_shift_is_an_outcome_policy_gradient_with_a_coefficient_for_each_prompt():
    """Teacher = student: r = 0, so only + and - delta / 2 is left on every token."""
    outcome = torch.tensor([0.2, 0.2, 0.2, -0.2, 0.2, 0.2, -0.2], dtype=torch.float64)
    mean = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1, 1 / 2, 1 / 2, 1], dtype=torch.float64) / 4
    one = torch.nn.functional.one_hot(torch.tensor(LONG["tokens"]), 12)
    expected = -(outcome * mean)[:, None] * (one - P.softmax(-1))
    assert (gradient_on(build_method("uni_opd", {}), P, P, "+-+-", **LONG) - expected).abs().max() < 1e-15


def test_every_response_has_equal_weight_whatever_its_length_and_order():
    found = gradient_on(build_method("uni_opd", {"margin": "none"}), P, Q, "+-+-", **LONG)
    each = [gradient_on(build_method("uni_opd", {"margin": "none"}), P[rows], Q[rows], "+",
                        [LONG["tokens"][i] for i in rows], [0] * len(rows), [0])
            for rows in ([0, 1, 2], [3], [4, 5], [6])]  # fmt: skip
    assert (found - torch.cat(each) / 4).abs().max() < 1e-16
    turned = {"tokens": [2, 1, 3, 1, 4, 5, 9], "seq": [0, 1, 2, 2, 2, 3, 3], "group": [0, 1, 1, 0]}
    rows = [6, 3, 0, 1, 2, 4, 5]
    other = gradient_on(build_method("uni_opd", {}), P[rows], Q[rows], "--++", **turned)
    assert (other - gradient_on(build_method("uni_opd", {}), P, Q, "+-+-", **LONG)[rows]).abs().max() < 1e-15


def test_masked_responses_and_tokens_out_of_range_have_no_gradient():
    masked = gradient_on(build_method("uni_opd", {"margin": "mask", "least_margin": 9.0}), P, Q, "++--",
                         [3, 1, 4, 1, 5, 9, 2], [0, 0, 0, 1, 2, 2, 3], [0, 0, 0, 0])  # fmt: skip
    zero = masked.abs().max(-1).values == 0
    assert zero.sum() in (2, 3, 4, 5) and not zero.all()
    far = gradient_on(build_method("uni_opd", {"log_ratio_limit": 0.5, "margin": "none"}), P, Q, "+-+-", **LONG)
    gap = (Q.log_softmax(-1) - P.log_softmax(-1)).gather(1, torch.tensor(LONG["tokens"])[:, None]).squeeze(1)
    assert torch.equal(far.abs().max(-1).values == 0, gap.abs() >= 0.5) and (gap.abs() >= 0.5).any()


@pytest.mark.parametrize("margin", ["shift", "mask"])
def test_tokens_without_a_teachers_number_have_no_gradient_though_their_response_is_shifted(margin):
    """In the released code such tokens get the shift, and only a later mask of the loss takes it away again."""
    method = build_method("uni_opd", {"margin": margin, "least_margin": 5.0})
    layout = Layout(torch.tensor(LONG["seq"]), torch.tensor(LONG["seq"]), torch.tensor(LONG["group"]))
    right = torch.tensor([True, False, True, False])
    step = make_step(method, P, Q, torch.tensor(LONG["tokens"]), layout=layout, reward=right.double(), correct=right)
    bad = torch.tensor([False, True, False, False, False, True, False])
    step = replace(step, views={**step.views, "teacher": replace(step.views["teacher"], bad=bad)})
    rows = logit_gradient(method, P, step)[1].abs().max(-1).values
    assert not rows[bad].any() and (rows[~bad] > 0).all()
    if margin == "shift":
        shift = method.terms[0].signal(step) - R(step)
        assert (shift.abs() > 0.1).all()  # the response's constant is there on every token


def test_its_expected_gradient_at_a_prefix_is_that_of_the_reverse_kl():
    p, q = logits(9, seed=5), logits(9, seed=6)
    right = {"correct": torch.arange(9) % 2 == 0}
    plain = expected_gradient(build_method("opd", {}), p, q)
    assert (expected_gradient(build_method("uni_opd", {}), p, q, **right) - plain).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"margin": "mask", "direction": "up"}, "direction has no effect with margin = 'mask'"),
        ({"margin": "none", "least_margin": 0.1}, "least_margin, mode and scope has no effect"),
        ({"keep": 0.5}, "keep has no effect with margin = 'shift'"),
        ({"teacher": {}}, "names no teacher"),
    ],
)
def test_arguments_without_effect_are_refused(arguments, said):
    with pytest.raises((RecipeError, MethodError), match=said):
        build_method("uni_opd", arguments)


def test_it_serialises_with_a_teacher_for_each_domain():
    method = build_method("uni_opd", {"teacher": {"sums": "a", "*": "b"}, "margin": "mask", "balance": inf})
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert method.models == ("a", "b") and method.needs_reward and method.needs_group
