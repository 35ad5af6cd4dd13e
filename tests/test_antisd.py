"""AntiSD: the identities of its signal, the gate's state machine, and what it reduces to."""

import math

import pytest
import torch
from synthetic import expected_gradient, logit_gradient, logits, make_step
from test_loop import changed, metrics, run, same, weights

from opdkit.catalogue import build_method
from opdkit.config import parse_recipe
from opdkit.controllers import Controller
from opdkit.divergences import divergence
from opdkit.errors import MethodError, RecipeError
from opdkit.gate import EntropyGate
from opdkit.losses import PolicyGradient
from opdkit.method import Method, Term, View
from opdkit.pieces import minus, plus, scale
from opdkit.pmi import gated, phi
from opdkit.signals import log_ratio, outcome
from opdkit.step import Layout, Scores, Step
from opdkit.train.setup import notes, set_up

V = 13
P, Q = logits(V, seed=1), logits(V, seed=2)
LOGP, LOGQ = P.log_softmax(-1), Q.log_softmax(-1)
OPEN, CLOSED = {"gate": {"open": True}}, {"gate": {"open": False}}


def phi_of(u, mix=0.5):
    u = torch.as_tensor(u, dtype=torch.float64)
    none = torch.arange(u.numel())
    step = Step(Layout(none, none, none), none, {"student": Scores(torch.zeros_like(u)), "teacher": Scores(u)})
    return phi(of=log_ratio(), mix=mix)(step)


def method(signal):
    return Method(name="m", views={"teacher": View("teacher")}, terms=(Term(signal=signal),))


def gradient_of(kind, mix=0.5):
    leaf = P.clone().requires_grad_(True)
    return torch.autograd.grad(divergence(leaf.log_softmax(-1)[None], LOGQ[None], kind, mix).sum(), leaf)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The signal (card, i 1-3 and 5)


def test_phi_at_numbers_worked_by_hand():
    found = phi_of([0.0, math.log(3), -math.log(3), 60.0, -60.0])
    # (log(1 + e^u) - log 2) / 2: 0; log(4 / 2) / 2; log((4 / 3) / 2) / 2; (60 - log 2) / 2; -log(2) / 2
    expected = [0.0, math.log(2) / 2, math.log(2 / 3) / 2, (60 - math.log(2)) / 2, -math.log(2) / 2]
    assert found.tolist() == pytest.approx(expected, abs=1e-14)
    assert -math.log(0.5) / 2 == pytest.approx(0.34657, abs=1e-5)


@pytest.mark.parametrize("mix", [0.5, 0.1, 0.8])
def test_phi_is_increasing_bounded_below_and_linear_above(mix):
    u = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    value = phi_of(u, mix)
    assert (value.diff() >= 0).all() and (value > (1 - mix) * math.log(1 - mix) - 1e-15).all()
    assert (value.abs() <= u.abs() * max(0.5, 1 - mix) + 1e-15).all()
    assert value[-1] == pytest.approx((1 - mix) * (40 + math.log(mix)), abs=1e-12)
    leaf = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(phi_of(leaf, mix).sum(), leaf)[0].item() == pytest.approx((1 - mix) * mix, abs=1e-15)


def test_phi_near_zero_and_in_float32_at_the_far_ends():
    u = torch.tensor([1e-3, -1e-3, 1e-2], dtype=torch.float64)
    assert (-phi_of(u) - (-u / 4 - u**2 / 16)).abs().max() < 1e-10
    assert torch.isfinite(phi_of(torch.tensor([-1e4, 1e4], dtype=torch.float64))).all()


@pytest.mark.parametrize("mix", [0.5, 0.2, 0.7])
def test_the_signal_ascends_the_jsd_exactly(mix):
    found = expected_gradient(method(scale(-1.0, phi(of=log_ratio(), mix=mix))), P, Q)
    assert (found + gradient_of("jsd", mix)).abs().max() < 1e-12
    # the same by the card's sum, without the engine
    p, signal = LOGP.exp(), -phi_of(LOGQ - LOGP, mix)
    by_hand = (p * signal) @ (torch.eye(V, dtype=torch.float64) - p)
    assert (by_hand - gradient_of("jsd", mix)).abs().max() < 1e-12
    assert (expected_gradient(method(phi(of=log_ratio(), mix=mix)), P, Q) - gradient_of("jsd", mix)).abs().max() < 1e-12


def test_the_other_forms_descend_and_ascend_reverse_kl():
    for form, sign in (("sd", 1.0), ("reverse_kl", -1.0)):
        made = build_method("antisd", {"form": form, "lam": 0.7, "gate": False})
        found = expected_gradient(made, P, Q, reward=torch.ones(V, dtype=torch.float64))
        assert (found - sign * 0.7 * gradient_of("reverse_kl")).abs().max() < 1e-12


@pytest.mark.parametrize("mix", [0.5, 0.3])
def test_the_mean_of_the_signal_is_not_zero(mix):
    mean = (LOGP.exp() * -phi_of(LOGQ - LOGP, mix)).sum()
    m = ((1 - mix) * LOGP.exp() + mix * LOGQ.exp()).log()
    assert mean.item() == pytest.approx((1 - mix) * (LOGP.exp() * (LOGP - m)).sum().item(), abs=1e-14) and mean > 0


def test_the_f_form_of_the_jsd():
    u = torch.linspace(-5, 5, 11, dtype=torch.float64)
    r = (-u).exp().requires_grad_(True)
    f = r / 2 * (2 * r / (1 + r)).log() + (2 / (1 + r)).log() / 2
    (slope,) = torch.autograd.grad(f.sum(), r)
    assert (slope + phi_of(u)).abs().max() < 1e-12
    total = (LOGQ.exp() * ((LOGP - LOGQ).exp() / 2 * (2 / (1 + (LOGQ - LOGP).exp())).log()
                           + (2 / (1 + (LOGP - LOGQ).exp())).log() / 2)).sum()  # fmt: skip
    assert total.item() == pytest.approx(divergence(LOGP[None], LOGQ[None], "jsd").item(), abs=1e-14)


def test_a_mixture_without_both_sides_is_refused():
    for mix in (0.0, 1.0):
        with pytest.raises(MethodError, match="strictly between 0 and 1"):
            phi(of=log_ratio(), mix=mix)


# ---------------------------------------------------------------------------------------------------------------------
# The whole advantage (card, c 6 and i 4, 7)


def group_step(made, q, state, reward=(1.0, 0.0, 0.0, 1.0)):
    p = logits(4, V, seed=3)
    layout = Layout(torch.arange(4), torch.arange(4), torch.zeros(4, dtype=torch.long))
    reward = torch.tensor(reward, dtype=torch.float64)
    return p, make_step(made, p, q, torch.tensor([0, 3, 5, 7]), layout=layout, reward=reward, state=state)


def test_the_advantage_is_the_outcome_minus_lam_phi():
    made = build_method("antisd", {"lam": 0.3})
    _, step = group_step(made, logits(4, V, seed=4), OPEN)
    u = step.views["teacher"].sampled - step.views["student"].sampled
    spread = math.sqrt(1 / 3)  # rewards 1, 0, 0, 1: unbiased standard deviation
    outcomes = torch.tensor([0.5, -0.5, -0.5, 0.5], dtype=torch.float64) / (spread + 1e-6)
    expected = outcomes - 0.3 * (torch.nn.functional.softplus(u) - math.log(2)) / 2
    assert (made.terms[0].signal(step) - expected).abs().max() < 1e-12


@pytest.mark.parametrize(("state", "same_as_student"), [(CLOSED, False), (OPEN, True)])
def test_a_closed_gate_and_an_empty_context_are_grpo_exactly(state, same_as_student):
    made, grpo = build_method("antisd", {}), build_method("grpo", {})
    p, step = group_step(made, logits(4, V, seed=3 if same_as_student else 4), state)
    found, expected = logit_gradient(made, p, step)[1], logit_gradient(grpo, p, step)[1]
    assert torch.equal(found, expected) and found.abs().max() > 0


def test_equal_rewards_and_a_closed_gate_give_no_gradient():
    made = build_method("antisd", {})
    p, step = group_step(made, logits(4, V, seed=4), CLOSED, reward=(1.0,) * 4)
    assert logit_gradient(made, p, step)[1].abs().max() == 0
    p, step = group_step(made, logits(4, V, seed=4), OPEN, reward=(1.0,) * 4)
    assert logit_gradient(made, p, step)[1].abs().max() > 1e-3


def test_the_closed_form_baseline_keeps_the_gradient():
    """Card i 3: the mean is not 0; subtracting a constant of the prefix changes the variance only."""
    bonus = scale(-1.0, phi(of=log_ratio()))
    centred = Method(name="m", views={"teacher": View("teacher")},
                     terms=(Term(loss=PolicyGradient(), signal=minus(bonus, gated(of=outcome(std=False)))),),
                     controllers=(EntropyGate(),))  # fmt: skip
    found = expected_gradient(centred, P, Q, reward=torch.full((V,), 2.0, dtype=torch.float64), state=OPEN)
    assert (found + gradient_of("jsd")).abs().max() < 1e-12


@pytest.mark.parametrize("arguments", [
    {"lam": 0.0}, {"form": "sd", "mix": 0.3}, {"gate": False, "warmup": 3}, {"siblings": False, "threshold": 0.5},
    {"siblings": False, "solution": None},
])  # fmt: skip
def test_arguments_without_effect_are_refused(arguments):
    with pytest.raises((RecipeError, MethodError)):
        build_method("antisd", arguments)


# ---------------------------------------------------------------------------------------------------------------------
# The gate


def follow(gate, entropies):
    state, found = gate.init(), []
    for entropy in entropies:
        state = gate.update(state, torch.tensor([entropy, 9.0, 0.0]))
        found.append(state["open"])
    return found, state


def test_the_gate_is_a_controller_with_hysteresis():
    gate = EntropyGate(warmup=3)
    assert isinstance(gate, Controller)
    found, _ = follow(gate, [1, 1, 1, 0.95, 0.92, 0.95, 1.0])
    assert found == [False, False, False, True, False, False, True]
    found, _ = follow(gate, [1, 1, 1, 0.5, 1.5, 0.93, 0.9299])
    assert found == [False, False, False, False, True, True, False]


def test_the_level_is_the_median_of_the_warm_ups_medians():
    _, state = follow(EntropyGate(warmup=4), [4, 1, 3, 2])
    assert EntropyGate(warmup=4).metrics(state) == {"open": 0.0, "entropy": 2.0, "level": 2.5}
    assert EntropyGate(warmup=5).metrics(state) == {"open": 0.0, "entropy": 2.0}
    bad = EntropyGate().update(EntropyGate().init(), torch.tensor([1.0, float("nan"), 3.0]))
    assert bad["entropy"] == 2.0 and EntropyGate().update(bad, torch.tensor([float("nan")])) == bad
    two = EntropyGate().update(EntropyGate().init(), torch.tensor([1.0, 2.0, 10.0, 4.0]))
    assert two["entropy"] == 3.0  # torch.median would say 2


def test_a_level_of_nothing_leaves_the_gate_open():
    found, _ = follow(EntropyGate(warmup=1), [9e-4, 1e-6, 0.0])
    assert found == [False, True, True]
    found, _ = follow(EntropyGate(warmup=1), [2e-3, 1e-6])
    assert found == [False, False]


def test_the_gate_measures_every_token_of_its_view():
    _, step = group_step(build_method("antisd", {}), logits(4, V, seed=4), OPEN)
    q = logits(4, V, seed=4).log_softmax(-1)
    assert (EntropyGate().measure(step) + (q.exp() * q).sum(-1)).abs().max() < 1e-12
    assert torch.equal(EntropyGate(view="student").measure(step), step.views["student"].entropy)


def test_a_gate_composes_with_any_signal_and_bad_ones_are_refused():
    both = Method(name="m", views={"teacher": View("teacher")},
                  terms=(Term(signal=plus(log_ratio(), gated(of=log_ratio(), gate="g"))),),
                  controllers=(EntropyGate("g"),))  # fmt: skip
    _, step = group_step(both, logits(4, V, seed=4), {"g": {"open": True}})
    assert torch.equal(both.terms[0].signal(step), 2 * log_ratio()(step))
    assert Method.from_dict(both.to_dict()) == both
    for bad in ({"warmup": 0}, {"close": 1.0}, {"close": 0.0}):
        with pytest.raises(MethodError):
            EntropyGate(**bad)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def antisd_data(recipe_data):
    return recipe_data | {
        "method": {"name": "antisd", "warmup": 2, "close": 0.999},
        "teachers": {"teacher": {"path": "student:live"}},
        "task": recipe_data["task"] | {"template": "plain", "max_prompt_tokens": 64},
        "optim": {"lr": 5e-3},
    }


def test_a_run_logs_the_gate_and_the_information(antisd_data):
    rows = metrics(run(antisd_data, train__steps=4))
    assert [row["gate/open"] for row in rows[:2]] == [0.0, 0.0] and "gate/level" not in rows[0]
    assert all(row["pmi"] == pytest.approx(-row["reverse_kl"], abs=1e-6) and row["informed"] == 1 for row in rows)
    level = (rows[0]["gate/entropy"] + rows[1]["gate/entropy"]) / 2
    assert rows[2]["gate/level"] == pytest.approx(level, abs=1e-12)
    assert rows[2]["gate/open"] == float(rows[2]["gate/entropy"] >= 0.999 * level)


def test_another_temperature_than_the_students_is_said(antisd_data):
    """The student at sampling.temperature .7 and its teacher at 1 differ where nothing is shown too."""
    for teacher, said in ((1.0, True), (0.7, False)):
        data = changed(antisd_data, sampling__temperature=0.7, teachers__teacher__temperature=teacher)
        found = "\n".join(notes(set_up(parse_recipe(data))))
        assert ("to compare them set teachers.teacher.temperature=0.7" in found) is said


def test_the_warm_up_is_grpo_bit_for_bit(antisd_data, tmp_path):
    ours = run(antisd_data, train__steps=2, output=str(tmp_path / "a"))
    grpo = run(antisd_data | {"method": {"name": "grpo"}, "teachers": {}}, train__steps=2, output=str(tmp_path / "b"))
    assert same(weights(ours), weights(grpo))
    later = run(antisd_data, train__steps=2, method__warmup=1, output=str(tmp_path / "c"))
    assert metrics(later)[1]["gate/open"] == 1 and not same(weights(later), weights(grpo))


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_stopped_in_the_gates_life_goes_on_exactly(antisd_data, tmp_path, stop):
    whole = run(antisd_data, train__steps=5, output=str(tmp_path / "whole"))
    part = run(antisd_data, train__steps=stop, output=str(tmp_path / "part"))
    run(antisd_data, train__steps=5, output=str(tmp_path / "part"), resume=True)
    assert same(weights(whole), weights(part))
    keys = ["gate/open", "gate/entropy", "pmi", "loss"]
    assert [[r[k] for k in keys] for r in metrics(whole)] == [[r[k] for k in keys] for r in metrics(part)]
