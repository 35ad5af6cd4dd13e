"""The extrapolation cliff: the card's formulas and identities, the measurement, `opd cliff`, and `listopd`."""

import json
from math import exp, inf, log
from random import Random

import pytest
import torch
from conftest import make_model
from synthetic import identity, logit_gradient, logits, make_step
from typer.testing import CliRunner

from opdkit.catalogue import build_method
from opdkit.cli import app
from opdkit.cliff_command import cliff
from opdkit.config import parse_recipe
from opdkit.diagnostics.cliff import (
    entropy_shift,
    first_passage_linear,
    first_passage_steps,
    lambda_dagger,
    lambda_flip,
    lambda_star,
    lambda_star_as_printed,
    logit,
    safe_limit,
    sigmoid,
    target,
    warmed_up,
)
from opdkit.diagnostics.structure import Position, greedy, measure, summarise
from opdkit.errors import RecipeError, RunError
from opdkit.support import Sampled
from opdkit.train.loop import train
from opdkit.train.setup import set_up
from opdkit.views.local import score_batch

PRINTED = [(0.9993, 0.5, 5.0, 1.2216), (0.9993, 0.81, 5.0, 1.2769), (0.9993, 0.81, 1.5, 1.0698), (0.99996, 0.81, 5.0, 1.1855),
           (0.99996, 0.5, 5.0, 1.1589), (0.999, 0.5, 5.0, 1.2331), (0.9, 0.5, 5.0, 1.7712), (0.7, 0.5, 5.0, 3.2474),
           (0.99511, 0.81, 5.0, 1.4174), (0.9993, 0.95, 5.0, 1.3727), (0.9993, 0.99, 5.0, 1.6033)]  # fmt: skip


def triples(n: int):
    random = Random(1)
    for _ in range(n):
        p = random.uniform(0.501, 0.9999)
        yield p, random.uniform(0.001, p - 1e-4), random.uniform(1.01, 20)


# The formulas


@pytest.mark.parametrize(("p", "b", "c", "printed"), PRINTED)
def test_lambda_star_is_the_papers(p, b, c, printed):
    assert lambda_star(p, b, c) == pytest.approx(printed, abs=5.1e-5)


def test_lambda_star_is_where_the_target_meets_the_cap():
    random = Random(2)
    for p, b, c in triples(5_000):
        star = lambda_star(p, b, c)
        assert abs(star - lambda_star_as_printed(p, b, c)) < 1e-11 * star
        lam = random.uniform(0, 2 * star)
        if abs(lam - star) > 1e-6:
            assert (target(p, b, lam) < safe_limit(p, c)) == (lam < star)
    p, b, c = 0.95, 0.7, 2.0
    assert (1 - p) / (1 - target(p, b, lambda_star(p, b, c))) == pytest.approx(c, rel=1e-12)


def test_lambda_star_grows_with_c_and_b_falls_with_p_and_is_1_without_a_cap_to_meet():
    for p, b, c in triples(500):
        star = lambda_star(p, b, c)
        assert lambda_star(p, b, c + 0.1) > star and lambda_star(p, b + 5e-5, c) > star
        assert lambda_star(min(p + 5e-5, 0.99995), b, c) < star
        assert lambda_star(p, b, 1.0) == 1.0 and lambda_dagger(p, b, 1.0) == pytest.approx(1.0, abs=1e-9)
    p, b, c, step = 0.95, 0.7, 2.0, 1e-6
    slope = (lambda_star(p, sigmoid(logit(b) + step), c) - lambda_star(p, sigmoid(logit(b) - step), c)) / (2 * step)
    assert slope == pytest.approx(log(1 + (c - 1) / p) / (logit(p) - logit(b)) ** 2, rel=1e-8)


def test_a_base_that_is_surer_has_no_lambda_star_but_a_flip():
    for p, b in [(0.9, 0.9), (0.85, 0.9999)]:
        assert lambda_star(p, b, 5.0) == lambda_star_as_printed(p, b, 5.0) == lambda_dagger(p, b, 5.0) == inf
    assert lambda_flip(0.9, 0.9) == lambda_flip(0.9, 0.5) == inf
    assert lambda_flip(0.85, 0.9999) == pytest.approx(1.2320, abs=1e-4)  # 9.2102 / (9.2102 - 1.7346)
    assert target(0.85, 0.9999, lambda_flip(0.85, 0.9999)) == pytest.approx(0.5, abs=1e-12)
    assert target(0.85, 0.9999, 1.2) > 0.5 > target(0.85, 0.9999, 1.3)


def test_lambda_dagger():
    assert lambda_star(0.95, 0.7, 5.0) == pytest.approx(1.787, abs=5e-4)
    assert lambda_dagger(0.9993, 0.81, 5.0) == pytest.approx(1.285, abs=5e-4)
    assert lambda_dagger(0.95, 0.7, 5.0) == pytest.approx(1.874, abs=5e-4)
    for p, b, c in triples(500):
        assert lambda_dagger(p, b, c) >= lambda_star(p, b, c)


def test_the_other_formulas():
    assert target(0.9, 0.5, 2.0) == pytest.approx(0.81 / 0.82)  # b = 1/2: pi_T^lam / Z
    assert (target(0.9, 0.6, 0.0), target(0.9, 0.6, 1.0)) == (pytest.approx(0.6), pytest.approx(0.9))
    assert safe_limit(0.95, 2.0) == pytest.approx(0.975)
    assert entropy_shift(0.9993, 0.81, 5.0, 1e-3) == pytest.approx(1.5e-3, rel=0.02)
    assert [round(warmed_up(1.22, 42, n), 2) for n in (10, 20)] == [1.6, 2.33]
    one = 0.8 * 0.2 * (logit(target(0.99, 0.8, 9.0)) - logit(0.8))  # one step of learning rate 1 from logit 0.8
    assert one + logit(0.8) > logit(safe_limit(0.99, 3.0)) and first_passage_steps(0.99, 0.8, 3.0, 9.0, 1.0) == 1


@pytest.mark.parametrize(("steps", "onset"), [(100, 2.02), (300, 1.48), (1000, 1.351), (3000, 1.3445)])
def test_a_longer_budget_moves_the_crossing_left_to_lambda_star(steps, onset):
    assert (
        first_passage_steps(0.99, 0.8, 3.0, onset + 0.006, 1.0)
        <= steps
        < first_passage_steps(0.99, 0.8, 3.0, onset - 0.006, 1.0)
    )


def test_no_budget_crosses_at_or_below_lambda_star():
    star = lambda_star(0.99, 0.8, 3.0)
    for passage in (first_passage_steps, first_passage_linear):
        assert passage(0.99, 0.8, 3.0, star, 1.0) == passage(0.99, 0.8, 3.0, 1.2, 1.0) == inf
        assert passage(0.99, 0.8, 3.0, star + 0.01, 1.0) > passage(0.99, 0.8, 3.0, star + 0.1, 1.0)
    assert first_passage_steps(0.99, 0.8, 3.0, star + 0.01, 1.0, at_most=10) == inf
    goal, rate = 2 * logit(0.99) - logit(0.8), 2 * 0.99 * 0.01
    gaps = (goal - logit(0.8)) / (goal - logit(safe_limit(0.99, 3.0)))
    assert first_passage_linear(0.99, 0.8, 3.0, 2.0, 1.0) == pytest.approx(log(gaps) / -log(1 - rate))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: lambda_star(0.5, 0.2, 5.0), "p = 0.5: expected more than 1/2"),
    (lambda: lambda_star(1.0, 0.2, 5.0), "p = 1.0: expected more than 1/2 and less than 1"),
    (lambda: lambda_star(0.9, 0.0, 5.0), "p = 0.0: expected a probability strictly between"),
    (lambda: lambda_star(0.9, 0.5, 0.5), "c = 0.5: expected a finite number of at least 1"),
    (lambda: lambda_star(0.9, 0.5, float("nan")), "c = nan: expected a finite number of at least 1"),
    (lambda: entropy_shift(0.8, 0.9, 5.0, 0.1), "b = 0.9 is not below p = 0.8"),
    (lambda: warmed_up(1.2, 20, 20), "warmup = 20 of 20 steps"),
    (lambda: first_passage_steps(0.9, 0.5, 5.0, 2.0, 5.0), "lr = 5.0: expected above 0 and at most 4"),
    (lambda: first_passage_linear(0.6, 0.5, 1.1, 2.1, 4.0), "the linearised step overshoots"),
])  # fmt: skip
def test_values_without_sense_are_refused(call, message):
    with pytest.raises(RecipeError, match=message):
        call()


# The method, through the code that training runs


def two_outcomes(arguments: dict, p: float, b: float, q: float) -> float:
    """The expected ascent of logit q at a position of two tokens."""
    method = build_method("listopd", arguments)
    student, teacher, base = (
        torch.tensor([[logit(x), 0.0]], dtype=torch.float64).expand(2, 2).contiguous() for x in (q, p, b)
    )
    step = make_step(method, student, teacher, torch.arange(2), top_k=1)
    step.views["reference"] = score_batch(identity(2), base, step, Sampled(), 1)  # type: ignore[index]
    _, gradient = logit_gradient(method, student, step)
    return -2 * float(q * gradient[0, 0] + (1 - q) * gradient[1, 0])


@pytest.mark.parametrize(("p", "b", "c", "q"), [(0.9, 0.6, 1.5, 0.7), (0.95, 0.7, 5.0, 0.97), (0.99, 0.8, 3.0, 0.2)])
def test_the_expected_step_is_the_cards_flow(p, b, c, q):
    lam = 1.3
    plain = q * (1 - q) * (logit(target(p, b, lam)) - logit(q))
    assert two_outcomes({"lam": lam}, p, b, q) == pytest.approx(plain, rel=1e-10)
    modal, rest = lam * log(p / b) - log(q / b), lam * log((1 - p) / (1 - b)) - log((1 - q) / (1 - b))
    stated = q * (1 - q) * (min(c, p / q) * modal - min(c, (1 - p) / (1 - q)) * rest)
    arguments = {"lam": lam, "cap": c, "ratio": "teacher"}
    assert two_outcomes(arguments, p, b, q) == pytest.approx(stated, rel=1e-10)


@pytest.mark.parametrize(("p", "b", "c"), [(0.9, 0.6, 1.5), (0.95, 0.7, 2.0), (0.9993, 0.81, 5.0)])
def test_the_fixed_point_meets_the_cap_at_lambda_star_and_at_lambda_dagger(p, b, c):
    q = safe_limit(p, c)
    for arguments, lam in [({}, lambda_star(p, b, c)), ({"ratio": "teacher", "cap": c}, lambda_dagger(p, b, c))]:
        assert abs(two_outcomes({**arguments, "lam": lam}, p, b, q)) < 1e-12
        assert two_outcomes({**arguments, "lam": lam + 0.01}, p, b, q) > 0
        assert abs(two_outcomes({**arguments, "lam": 1.0}, p, b, p)) < 1e-12  # lam 1 leaves the teacher fixed
    assert two_outcomes({"ratio": "teacher", "cap": c, "lam": 1.1}, p, b, target(p, b, 1.1)) < 0  # below p_lambda


def test_with_the_samplers_ratio_it_is_gopd():
    stated = build_method("gopd", {"lam": 1.15})
    assert build_method("listopd", {}).terms == stated.terms and build_method("listopd", {}).views == stated.views
    p, q = logits(9, 20, seed=1), logits(9, 20, seed=2)
    gradients = []
    for method in (build_method("listopd", {"lam": 1.0}), build_method("opd", {})):
        step = make_step(method, p, q, torch.arange(9))
        gradients.append(logit_gradient(method, p, step)[1])
    assert torch.equal(*gradients)


def test_arguments_that_contradict_are_refused(tmp_path):
    file = tmp_path / "cliff.json"
    file.write_text('{"recommended": 1.22}')
    assert build_method("listopd", {"cliff": str(file)}) == build_method("listopd", {"lam": 1.22})
    for arguments, message in [
        ({"lam": 1.2, "cliff": str(file)}, "lam = 1.2 and cliff = .* both set lam"),
        ({"lam": -1.0}, "lam = -1.0: expected at least 0"),
        ({"cliff": str(tmp_path / "none")}, ".*holds no recommendation .*opd cliff RECIPE --json"),
        ({"ratio": "both"}, "ratio='both': expected"),
    ]:
        with pytest.raises(RecipeError, match=f"method listopd: {message}"):
            build_method("listopd", arguments)
    for text in ("[]", '{"recommended": NaN}', '{"recommended": "x"}'):
        file.write_text(text)
        with pytest.raises(RecipeError, match="holds no recommendation"):
            build_method("listopd", {"cliff": str(file)})


# The summary of a measurement


def at(p: float, b: float, token: int = 0) -> Position:
    return Position(token, logit(p), logit(b))


def test_the_summary_by_hand():
    """Prompt means of p: (.95 + .97) / 2 = .96 and .99; of b there: (.6 + .8) / 2 = .7 and .9."""
    found = summarise([[at(0.95, 0.6), at(0.97, 0.8), at(0.6, 0.5)], [at(0.99, 0.9), at(0.7, 0.9, token=7)]], cap=5.0)
    assert (found.responses, found.positions, found.structural, found.surer, found.surer_below) == (2, 5.0, 3, 0, 1)
    assert found.typ.star == pytest.approx(lambda_star(0.975, 0.8, 5.0))
    assert found.typ.dagger == pytest.approx(lambda_dagger(0.975, 0.8, 5.0))
    assert found.safe.star == pytest.approx(lambda_star(0.99, 0.8, 5.0))
    assert found.geometric_base == pytest.approx((0.6 * 0.8 * 0.9) ** (1 / 3))
    flip = lambda_flip(0.7, 0.9)
    assert found.flips == (pytest.approx(flip), inf) and found.tokens == ((7, 1),)
    assert (found.flip(0.05), found.flip(0.5), found.flip(0.51)) == (pytest.approx(flip), pytest.approx(flip), inf)
    assert (found.flipped(flip - 0.01), found.flipped(flip + 0.01)) == (0.0, 0.5)
    shown = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert shown["reference_surer"] == {"structural": 0.0, "below_tau": 0.2, "lambda_flip": {
        "0.05": pytest.approx(flip), "0.2": pytest.approx(flip), "0.5": pytest.approx(flip)}}  # fmt: skip


def test_the_recommendation_is_one_grid_step_below_lambda_star():
    found = summarise([[at(0.9993, 0.81)], [at(0.99996, 0.81)]], cap=5.0)
    assert found.bound == ("lambda* at p_safe", pytest.approx(1.1855, abs=5e-5)) and found.recommended == 1.13
    assert summarise([[at(0.99, 0.01)]], cap=1.05).recommended == 1.0  # 1.005 - 0.05 is below plain distillation


def test_a_reference_that_is_surer_on_average_is_bounded_by_flips_alone():
    """lambda_flip of p = .95 and b = .9999 is 1.47; 1 response in 11 has it, or 1 in 21, which is less than 5 %."""
    few, fewer = ([[at(0.95, 0.9999)], *[[at(0.95, 0.9499)]] * n] for n in (10, 20))
    found = summarise(few, cap=5.0)
    assert found.typ.star == found.safe.star == inf and found.to_dict()["typ"]["lambda_star"] is None
    assert found.bound == ("lambda_flip of 5% of the responses", pytest.approx(1.4699, abs=1e-4))
    assert found.recommended == 1.41
    assert summarise(fewer, cap=5.0).bound[1] == inf and summarise(fewer, cap=5.0).recommended == 1.0


def test_odds_too_large_for_a_probability_still_count():
    sure = Position(0, 60.0, 50.0)  # p and b both round to 1
    assert summarise([[sure]], cap=5.0).safe.star == pytest.approx(1 + log(5) / 10)
    assert summarise([[sure]], cap=5.0).safe.dagger >= summarise([[sure]], cap=5.0).safe.star


@pytest.mark.parametrize(("measured", "options", "message"), [
    ([[at(0.7, 0.5)], [at(0.8, 0.5)]], {}, "never as sure as tau = 0.9 at 2 positions of 2 responses"),
    ([[at(0.95, 0.96), at(0.7, 0.5)], [at(0.92, 0.92)]], {}, "at least as sure as the teacher at all 2 structural"),
    ([[at(0.95, 0.5)]], {"tau": 0.5}, "tau = 0.5: expected above 1/2"),
    ([[at(0.95, 0.5)]], {"cap": 0.5}, "c = 0.5: expected a finite number of at least 1"),
])  # fmt: skip
def test_measurements_without_a_cliff_are_refused(measured, options, message):
    with pytest.raises(RecipeError, match=message):
        summarise(measured, **{"cap": 5.0, **options})


# End to end on the tiny models


@pytest.fixture(scope="module")
def sure_path(tmp_path_factory) -> str:
    """A teacher that is sure of its tokens."""
    return make_model(tmp_path_factory.mktemp("sure"), seed=2, layers=3, scale=25.0)


@pytest.fixture
def data(recipe_data, sure_path):
    recipe_data["method"] = {"name": "listopd"}
    recipe_data["teachers"]["teacher"]["path"] = sure_path
    recipe_data["teachers"]["reference"] = {"path": "student:base"}
    recipe_data["log"]["top_k"] = 2
    return recipe_data


@pytest.mark.parametrize("on", ["teacher", "student"])
def test_the_measured_odds_are_those_of_the_models(data, on):
    setup = set_up(parse_recipe(data))
    measured = measure(setup, teacher="teacher", reference="reference", prompts=3, on=on)
    lms = {"teacher": setup.teachers["teacher"], "student": setup.student}
    rollouts = greedy(setup, lms[on], setup.eval[:3])
    assert len(measured) == 3 and [len(m) for m in measured] == [len(r.response_ids) for r in rollouts]
    for positions, rollout in zip(measured, rollouts, strict=True):
        ids = torch.tensor([*rollout.prompt_ids, *rollout.response_ids])
        start = len(rollout.prompt_ids)
        with torch.no_grad():
            rows = {
                name: lm.model(ids[None]).logits[0, start - 1 : -1, : lm.vocab].double() for name, lm in lms.items()
            }
        assert rows[on].argmax(-1).tolist() == list(rollout.response_ids)  # greedy
        for i, found in enumerate(positions):
            teacher, base = rows["teacher"][i].softmax(-1), rows["student"][i].softmax(-1)
            assert found.token == int(teacher.argmax())
            assert sigmoid(found.teacher) == pytest.approx(float(teacher[found.token]), abs=1e-5)
            assert exp(-found.base) == pytest.approx(float((1 - base[found.token]) / base[found.token]), rel=1e-3)


def test_measure_then_train_with_it_then_resume(data, tmp_path):
    data["method"] = {"name": "listopd", "cliff": str(tmp_path / "cliff.json")}  # not there yet
    data["train"]["checkpoint_every"] = 1
    found = cliff(parse_recipe(data), tau=0.55, as_json=True)
    assert json.loads(found).keys() >= {"task", "on", "teacher", "reference", "recommended", "typ", "safe", "cap"}
    assert json.loads(found)["cap"] == 5.0 and json.loads(found)["responses"] == 8
    (tmp_path / "cliff.json").write_text(found.replace(f'"recommended": {json.loads(found)["recommended"]}',
                                                       '"recommended": 1.3'))  # fmt: skip
    run = train(parse_recipe({**data, "train": {**data["train"], "steps": 2}}))
    assert "scale(0.30000000000000004" in json.loads((run / "run.json").read_text())["method"]
    train(parse_recipe(data), resume=True)
    resumed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    whole = train(parse_recipe({**data, "output": str(tmp_path / "whole")}))
    straight = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in resumed] == [row["loss"] for row in straight] and len(straight) == 4
    (tmp_path / "cliff.json").write_text('{"recommended": 1.1}')
    data["train"]["steps"] = 5
    with pytest.raises(RunError, match=r"method listopd is not the one .* a file that it reads has changed"):
        train(parse_recipe(data), resume=True)


def test_the_command_prints_or_explains(data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(data))

    def run(*arguments: str):
        return CliRunner().invoke(app, ["cliff", str(recipe), *arguments])

    shown = run("--tau", "0.55", "--prompts", "4", "--cap", "3")
    assert shown.exit_code == 0 and "4 held-out prompts" in shown.stdout and "cap c = 3" in shown.stdout
    assert "recommended: method.lam=" in shown.stdout and "typical " in shown.stdout
    for arguments, message in [
        (("method.name=opd",), "method opd with these arguments has no view 'reference'"),
        (("method.name=gopd", "method.importance_cap=null"), "no importance weight with a cap.* give --cap"),
        (("--tau", "0.99999"), "none is structural; lower --tau"),
        (("teachers.teacher.path=student:base", "--tau", "0.55"), "at least as sure as the teacher at all"),
    ]:
        overrides = [a for a in arguments if "=" in a]
        if overrides[:1] == ["method.name=opd"]:
            recipe.write_text(json.dumps({**data, "teachers": {"teacher": data["teachers"]["teacher"]}}))
        shown = run(*arguments)
        recipe.write_text(json.dumps(data))
        assert shown.exit_code == 2 and message.split(".*")[0] in " ".join(shown.output.split()), shown.output
