"""SOD: turn weights by hand and by their identities, the advantage they make with an outcome, what is logged of them."""

import json
import math
from dataclasses import replace

import pytest
import torch
from synthetic import logit_gradient, logits, make_step
from test_loop import metrics, run

from opdkit.catalogue import build_method
from opdkit.errors import MethodError, RecipeError
from opdkit.method import Method, Term, View
from opdkit.metrics import averages, by_turn, step_metrics, watched
from opdkit.pieces import plus, scale, times
from opdkit.rewards.verify import verify_rollouts
from opdkit.rollouts.rollout import Rollout
from opdkit.signals import log_ratio, outcome
from opdkit.step import Layout, Scores, Step, take_rows
from opdkit.train.update import streams
from opdkit.turns import outcome_gate, turn_gap, turn_weight, within

EPS = 1e-6


def turns_step(*sequences, student=None, bad=None, **fields) -> Step:
    """A step with one sequence per argument; each is a list of turns, each turn a list of log q - log p of its tokens."""
    seq, turn, gap, n = [], [], [], 0
    for s, turns in enumerate(sequences):
        for values in turns:
            seq += [s] * len(values)
            turn += [n] * len(values)
            gap += values
            n += 1
    layout = Layout(torch.tensor(seq), torch.tensor(turn), fields.pop("group", torch.arange(len(sequences))))
    p = torch.full((len(gap),), -1.0).double() if student is None else student
    wrong = None if bad is None else torch.tensor(bad)
    teacher = Scores(p + torch.tensor(gap, dtype=torch.float64), bad=wrong)
    return Step(layout, torch.zeros(len(gap), dtype=torch.long), {"student": Scores(p), "teacher": teacher}, **fields)


def of_turns(step: Step, values) -> list[float]:
    """The value of every turn of the step, which must be one."""
    found = []
    for turn in step.layout.turn.unique():
        own = values[step.layout.turn == turn]
        assert (own == own[0]).all()
        found.append(float(own[0]))
    return found


def weights_of(d, **arguments) -> list[float]:
    """Weights of one sequence whose k-th turn is a single token with |log ratio| d_k."""
    step = turns_step([[-x] for x in d])
    return of_turns(step, turn_weight(**arguments)(step))


# ---------------------------------------------------------------------------------------------------------------------
# Turn weights (card, i)


def test_divergence_and_weight_of_turns_by_hand():
    """d = mean(.1, .3) = .2, then .4, mean(.1, .05, .15) = .1, 1.0; the second sequence starts anew."""
    step = turns_step([[0.1, -0.3], [0.4], [-0.1, 0.05, 0.15], [-1.0]], [[2.0], [1.0, 3.0, 2.0]])
    assert of_turns(step, turn_gap()(step)) == pytest.approx([0.2, 0.4, 0.1, 1.0, 2.0, 2.0], abs=1e-15)
    w = of_turns(step, turn_weight()(step))
    assert w == pytest.approx([1, 0.200001 / 0.400001, 1.2, 0.200001 / 1.000001, 1, 1], abs=1e-15)
    assert [round(x, 6) for x in w[:4]] == [1.0, 0.500001, 1.2, 0.200001]  # the card's


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_the_running_product_telescopes(floor):
    """Against the product written out, on 40 sequences of 1 to 9 turns of 1 to 4 tokens."""
    draw = torch.Generator().manual_seed(0)
    sequences = []
    for _ in range(40):
        turns = int(torch.randint(1, 10, (1,), generator=draw))
        sizes = torch.randint(1, 5, (turns,), generator=draw).tolist()
        sequences.append([torch.randn(n, generator=draw).double().tolist() for n in sizes])
    step = turns_step(*sequences)
    d, expected = of_turns(step, turn_gap()(step)), []
    for turns in sequences:
        own, d = d[: len(turns)], d[len(turns) :]
        own[0], product = max(own[0], floor), 1.0
        expected.append(1.0)
        for u in range(len(own) - 1):
            product *= (own[u] + EPS) / (own[u + 1] + EPS)
            expected.append(min(product, 1.2))
    for form in ("ratio", "product"):
        found = of_turns(step, turn_weight(form=form, floor=floor)(step))
        assert found == pytest.approx(expected, abs=1e-12)
    assert sum(w == 1.2 for w in expected) > 20 and sum(w < 0.9 for w in expected) > 20


def test_the_cap_acts_on_the_result_and_does_not_stick():
    capped, free = weights_of([0.2, 0.01, 0.8]), weights_of([0.2, 0.01, 0.8], cap=None)
    assert capped[1] == 1.2 and free[1] == pytest.approx(0.200001 / 0.010001)
    assert capped[2] == free[2] == pytest.approx(0.200001 / 0.800001)


def test_equal_divergences_weigh_one_and_scale_drops_out():
    assert weights_of([0.7] * 5) == [1.0] * 5
    for a, b in zip(weights_of([0.3, 0.5, 0.9]), weights_of([3.0, 5.0, 9.0]), strict=True):
        assert a == pytest.approx(b, abs=5e-6)


def test_a_first_turn_that_the_student_copies_needs_a_floor():
    assert weights_of([0.0, 0.1, 0.1]) == pytest.approx([1, 1e-5, 1e-5], rel=1e-4)  # the card's edge
    assert weights_of([0.0, 0.1, 0.4], floor=0.1) == pytest.approx([1, 1, 0.25], abs=1e-5)
    assert weights_of([0.2, 0.1, 0.4], floor=0.1) == weights_of([0.2, 0.1, 0.4])  # d_1 is above it


def test_a_later_turn_without_divergence_is_capped():
    assert weights_of([0.5, 0.0, 0.5]) == [1.0, 1.2, 1.0]
    assert weights_of([0.0, 0.0]) == [1.0, 1.0]


def test_weights_depend_on_their_own_sequence_and_on_its_past():
    a, b = [[0.2], [0.5, 0.7], [0.1]], [[1.0, 0.4], [0.3]]
    one, two = turns_step(a, b), turns_step(b, a)
    first, second = (of_turns(step, turn_weight()(step)) for step in (one, two))
    assert first[:3] == second[2:] and first[3:] == second[:2]
    longer = turns_step([*a, [9.0]], b)
    assert of_turns(longer, turn_weight()(longer))[:3] == first[:3]


def test_no_turn_pulls_harder_than_the_first():
    """Mean |w (q - p)| of a turn: d_k w_k, at most d_1 + eps where the cap is inactive, else 1.2 d_k."""
    step = turns_step([[0.3, -0.5], [0.9, 1.5, 0.6], [0.2, -0.2], [-4.0]])
    w, d = (of_turns(step, piece(step)) for piece in (turn_weight(), turn_gap()))
    pull = of_turns(step, turn_gap(of=times(turn_weight(), log_ratio()))(step))
    assert pull == pytest.approx([a * b for a, b in zip(w, d, strict=True)], abs=1e-15)
    assert all(x <= d[0] + EPS for x, y in zip(pull, w, strict=True) if y < 1.2)
    assert w[2] == 1.2 and pull[2] == pytest.approx(1.2 * 0.2)


def test_one_turn_weighs_one():
    step = turns_step([[0.1, 5.0, -3.0]], [[0.0]], [[7.0]])
    assert turn_weight()(step).tolist() == [1.0] * 5


def test_sequences_without_trained_tokens_and_single_precision():
    step = turns_step([[0.2], [0.4]], [], [[0.1], [0.05]])
    assert of_turns(step, turn_weight()(step)) == pytest.approx([1, 0.5, 1, 1.2], abs=1e-5)
    student, teacher = (Scores(step.views[v].sampled.float()) for v in ("student", "teacher"))
    single = Step(step.layout, step.tokens, {"student": student, "teacher": teacher})
    assert turn_weight()(single).dtype == torch.float32
    assert (turn_weight()(single) - turn_weight()(step)).abs().max() < 1e-5
    assert within(of=turn_weight(), low=1.2)(single).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_tokens_without_a_teacher_number_are_left_out_of_the_means():
    """Bad scores stand in as log ratio 0; they neither lower a turn's divergence nor make the first turn's 0."""
    sequences = [[[0.0, 0.0], [0.2, 0.0], [0.4], [0.0]]]
    step = turns_step(*sequences, bad=[True, True, False, True, False, True])
    assert of_turns(step, turn_gap()(step)) == pytest.approx([0.0, 0.2, 0.4, 0.0])
    for form in ("ratio", "product"):  # the second turn is the first that is known; the last one is not
        assert of_turns(step, turn_weight(form=form)(step)) == pytest.approx([1, 1, 0.5, 1], abs=1e-5)


def test_weights_of_another_reading():
    """Any signal [N] can say how far a turn is off, such as the exact KL of the teacher's distribution."""
    step = turns_step([[0.1], [0.2]])
    doubled = turn_weight(of=plus(log_ratio(), scale(3.0, log_ratio())))
    assert of_turns(step, doubled(step)) == pytest.approx([1, 0.5], abs=1e-5)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: turn_weight(cap=0.9), r"turn_weight\(cap=0.9\): expected at least 1"),
    (lambda: turn_weight(eps=0.0), r"eps=0.0, floor=0.0\): expected eps above 0 and a floor of 0 nats or more"),
    (lambda: turn_weight(floor=-1.0), r"floor=-1.0\): expected eps above 0 and a floor"),
    (lambda: turn_weight(form="sum"), "form must be one of ratio, product"),
    (lambda: within(of=log_ratio()), r"within\(low=None, high=None\): expected at least one bound"),
    (lambda: outcome_gate(of=outcome(), low=0.2, high=0.1), "expected 0 <= low < high"),
])  # fmt: skip
def test_arguments_without_sense_are_refused(make, message):
    with pytest.raises(MethodError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# The method


def two_turns(p, q, tokens, method, **fields):
    """Two responses to one prompt, each of two turns of two tokens."""
    layout = Layout(torch.arange(8) // 4, torch.arange(8) // 2, torch.zeros(2, dtype=torch.long))
    return make_step(method, p, q, tokens, layout=layout, **fields)


P, Q, TOKENS = logits(8, 6, seed=1), logits(8, 6, seed=2), torch.tensor([0, 5, 2, 2, 1, 4, 3, 0])
REWARD = torch.tensor([1.0, -1.0]).double()


@pytest.mark.parametrize("how", ["signal", "terms"])
def test_the_first_gradient_is_the_cards(how):
    """-(1 / sum m) sum A_t grad log p(y_t) with A = +-1 / (2^.5 + 1e-6) + c w_k (log q - log p), everything by hand."""
    method = build_method("sod", {"how": how, "opd_coef": 0.7})
    step = two_turns(P, Q, TOKENS, method, reward=REWARD)
    p, q = (x.log_softmax(-1).gather(1, TOKENS[:, None]).squeeze(1) for x in (P, Q))
    d = (q - p).abs().reshape(4, 2).mean(1)
    w = torch.tensor([1, min(float((d[0] + EPS) / (d[1] + EPS)), 1.2), 1, min(float((d[2] + EPS) / (d[3] + EPS)), 1.2)])
    a = torch.tensor([1.0] * 4 + [-1.0] * 4) / (2**0.5 + 1e-6) + 0.7 * w.double().repeat_interleave(2) * (q - p)
    expected = -a[:, None] * (torch.nn.functional.one_hot(TOKENS, 6) - P.softmax(-1)) / 8
    assert (logit_gradient(method, P, step)[1] - expected).abs().max() < 1e-7  # w is rounded to float32 above


def test_one_turn_is_grpo_plus_distillation_and_equal_rewards_are_plain_opd():
    layout = Layout(torch.arange(8) // 4, torch.arange(8) // 4, torch.zeros(2, dtype=torch.long))
    sod, both = build_method("sod", {}), build_method("grpo_opd", {"high": 0.28, "dual": 3.0})
    opd = build_method("opd", {"low": 0.2, "high": 0.28, "dual": 3.0})
    for reward, other in ((REWARD, both), (torch.ones(2).double(), both), (torch.ones(2).double(), opd)):
        for old in (P, P + 0.3 * logits(8, 6, seed=3)):  # at ratio 1 and away from it
            step = make_step(sod, old, Q, TOKENS, layout=layout, reward=reward)
            found = [logit_gradient(m, P, step)[1] for m in (sod, other)]
            assert torch.equal(*found) and found[0].abs().max() > 1e-3


def test_without_a_cap_to_bind_and_equal_divergences_it_is_grpo_opd():
    """Teacher logits = student logits shifted on the sampled token so that |log q - log p| is the same at every token."""
    sod, both = build_method("sod", {}), build_method("grpo_opd", {"high": 0.28, "dual": 3.0})
    logp = P.log_softmax(-1)
    q = logp.gather(1, TOKENS[:, None]) - 0.25
    rest = (1 - q.exp()).log() - (1 - logp.gather(1, TOKENS[:, None]).exp()).log()
    teacher = torch.where(torch.nn.functional.one_hot(TOKENS, 6).bool(), q, logp + rest)
    step = two_turns(P, teacher, TOKENS, sod, reward=REWARD)
    assert (turn_gap()(step) - 0.25).abs().max() < 1e-12
    assert (logit_gradient(sod, P, step)[1] - logit_gradient(both, P, step)[1]).abs().max() < 1e-12


def test_one_signal_and_two_terms_differ_under_the_clip_only():
    one, two = build_method("sod", {}), build_method("sod", {"how": "terms"})
    for old, equal in ((P, True), (P + logits(8, 6, seed=4), False)):
        step = two_turns(old, Q, TOKENS, one, reward=REWARD)
        a, b = (logit_gradient(m, P, step)[1] for m in (one, two))
        assert bool((a - b).abs().max() < 1e-15) is equal


def test_a_weight_on_the_term_is_the_weight_on_the_signal():
    """It is positive, so it changes neither the sign of the signal nor the tokens that count."""
    old, loss = P + 0.5 * logits(8, 6, seed=5), build_method("sod", {}).terms[0].loss
    on_signal, on_term = (
        Method(name="m", views={"teacher": View("teacher")}, terms=(term,))
        for term in (
            Term(loss=loss, signal=times(turn_weight(), log_ratio())),
            Term(loss=loss, signal=log_ratio(), weight=turn_weight()),
        )
    )
    step = two_turns(old, Q, TOKENS, on_signal)
    assert (logit_gradient(on_signal, P, step)[1] - logit_gradient(on_term, P, step)[1]).abs().max() < 1e-15


def test_the_released_gated_weight():
    """beta = .1 sigmoid(-A): the response that did worse is distilled harder; by hand for A = +-1 / (2^.5 + 1e-6)."""
    step = two_turns(P, Q, TOKENS, build_method("sod", {}), reward=REWARD)
    beta = outcome_gate(of=outcome())(step)
    a = 1 / (2**0.5 + 1e-6)
    expected = [0.1 / (1 + math.exp(s * a)) for s in (1, -1)]
    assert beta[[0, 4]].tolist() == pytest.approx(expected, abs=1e-15)
    assert (beta[:4] == beta[0]).all() and (beta[4:] == beta[4]).all()


def test_shaping_of_the_method():
    names = [type(part).__name__ for part in build_method("sod", {"overlong": 8}).prepare]
    assert names == ["RewardScale", "CallBonus", "Overlong"]  # the released order
    assert build_method("sod", {"signed": False, "call_bonus": 0.0}).prepare == ()
    assert build_method("grpo", {"overlong": 8}).prepare == build_method("sod", {"overlong": 8}).prepare[2:]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"opd_coef": 0.0}, "opd_coef = 0.0 must be positive; without distillation take grpo"),
    ({"call_bonus": 0.0, "call_bonus_most": 0.2}, "call_bonus_most = 0.2 has no effect without call_bonus"),
    ({"overlong_factor": 2.0}, "overlong_factor = 2.0 has no effect without overlong"),
    ({"cap": 0.5}, r"turn_weight\(cap=0.5\): expected at least 1"),
    ({"std": "half"}, "std='half': expected"),
])  # fmt: skip
def test_settings_without_effect_or_sense_are_refused(arguments, message):
    with pytest.raises((RecipeError, MethodError), match=message):
        build_method("sod", arguments)


# ---------------------------------------------------------------------------------------------------------------------
# What is logged, and runs


def test_numbers_by_turn_by_hand():
    """Turn means first, then their mean by place: a long turn counts as much as a short one."""
    step = turns_step([[0.1, -0.3], [0.4]], [[0.6], [1.0, 3.0, 2.0], [0.5]])
    found = averages(step_metrics(step, [], 4, 8))
    assert {k: v for k, v in found.items() if k.startswith("turn_gap")} == pytest.approx(
        {"turn_gap/1": 0.4, "turn_gap/2": 1.2, "turn_gap/3": 0.5}
    )
    seen = watched("w", turn_weight(), step)
    assert set(seen) == {"w", "w/1", "w/2", "w/3"} and seen["w/3"] == (pytest.approx(1.2), 1.0)
    assert averages(seen)["w/2"] == pytest.approx((0.5 + 0.3) / 2, abs=1e-5)


def test_many_turns_share_the_last_number_and_one_turn_has_none():
    step = turns_step([[float(k)] for k in range(1, 11)])
    found = averages(by_turn("x", log_ratio()(step), step, None))
    assert list(found) == [f"x/{k}" for k in range(1, 9)]
    assert found["x/7"] == 7.0 and found["x/8"] == 9.0  # 8, 9 and 10
    single = turns_step([[1.0, 2.0]], [[3.0]])
    assert by_turn("x", log_ratio()(single), single, None) == {}


def test_a_run_from_end_to_end(recipe_data):
    method = {"name": "sod", "overlong": 4}
    recipe_data |= {"method": method, "sampling": {"group": 4, "max_new_tokens": 8}}
    whole = run(recipe_data, train__steps=4, train__minibatches=2)
    rows = metrics(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["turn_weight"] == 1.0 and row["weighted_gap"] == row["turn_gap"] > 0  # one turn: no weights
        assert row["capped_weight"] == row["small_weight"] == 0.0
        assert -2.0 <= row["prepared_reward"] <= -1 + 2 * row["reward"] + 1e-9
    shown = json.loads((whole / "rollouts" / "step-000004.json").read_text())["rollouts"]
    assert [len(r["turns"]) for r in shown] == [1] * 4
    assert all(r["turns"][0]["tokens"] == len(r["tokens"]) and r["turns"][0]["turn_weight"] == 1.0 for r in shown)


def with_tools(rollout: Rollout) -> Rollout:
    """The response as if its second and fifth token were a tool's answers: up to three turns."""
    n = len(rollout.response_ids)
    trained, turns = tuple(i not in (1, 4) for i in range(n)), tuple((i > 1) + (i > 4) for i in range(n))
    own = torch.tensor([i for i in range(n) if trained[i]])
    return replace(rollout, trained=trained, turns=turns, capture=take_rows(rollout.capture, own))


def test_a_run_with_turns(recipe_data, monkeypatch):
    """The whole path: what is scored, weighed, trained on, logged and saved of responses with up to three turns."""
    seen, steps = [], []

    def verified(task, rollouts):
        return [with_tools(r) for r in verify_rollouts(task, rollouts)]

    def streamed(method, given):
        steps.append(given["policy"])
        return streams(method, given)

    monkeypatch.setattr("opdkit.train.rolling.verify_rollouts", verified)
    monkeypatch.setattr("opdkit.train.loop.streams", streamed)
    recipe_data["sampling"] |= {"group": 4}
    path = run(recipe_data, method={"name": "sod"}, train__steps=3)
    for row, step in zip(metrics(path), steps, strict=True):
        d, w = turn_gap()(step), turn_weight()(step)
        by_hand: dict[int, list[tuple[float, float, float]]] = {}
        for s in range(step.layout.sequences):
            mine = [(d[step.layout.turn == t][0].item(), w[step.layout.turn == t][0].item())
                    for t in step.layout.turn[step.layout.seq == s].unique()]  # fmt: skip
            for k, (gap, weight) in enumerate(mine):
                expected = min((mine[0][0] + EPS) / (gap + EPS), 1.2) if k else 1.0
                assert weight == pytest.approx(expected, rel=1e-5)
                by_hand.setdefault(k + 1, []).append((gap, weight, gap * weight))
        assert set(by_hand) == {1, 2, 3}
        for k, found in by_hand.items():
            means = [sum(x) / len(found) for x in zip(*found, strict=True)]
            logged = [row[f"{name}/{k}"] for name in ("turn_gap", "turn_weight", "weighted_gap")]
            assert logged == pytest.approx(means, rel=1e-5)
        assert row["capped_weight"] == pytest.approx(((w > 1.19).double().mean()).item()) and row["capped_weight"] > 0
        assert row["small_weight"] == pytest.approx(((w < 0.5).double().mean()).item())
        assert -1.0 < row["prepared_reward"] <= -0.8 and row["reward"] == 0.0  # one or two calls each, all wrong
        seen += [row["grad_norm"]]
    assert min(seen) > 0
    shown = json.loads((path / "rollouts" / "step-000003.json").read_text())["rollouts"]
    assert all(sum(t["tokens"] for t in r["turns"]) == sum("student" in t for t in r["tokens"]) for r in shown)
    assert max(len(r["turns"]) for r in shown) == 3


@pytest.mark.parametrize("method", [{"name": "opd"}, {"name": "grpo_opd"}], ids=lambda m: m["name"])
def test_other_methods_log_their_gap_by_turn(recipe_data, monkeypatch, method):
    def verified(task, rollouts):
        return [with_tools(r) for r in verify_rollouts(task, rollouts)]

    monkeypatch.setattr("opdkit.train.rolling.verify_rollouts", verified)
    row = metrics(run(recipe_data, method=method, train__steps=1))[0]
    assert {k for k in row if k.startswith("turn_")} == {"turn_gap/1", "turn_gap/2", "turn_gap/3"}
