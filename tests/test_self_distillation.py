"""OPSD, SDPO and SDFT, and the teachers that are the student: live, averaged, before training."""

import math

import pytest
import torch
from synthetic import logit_gradient, logits, make_step
from test_loop import changed, metrics, run, same, weights

from opdkit.catalogue import build_method
from opdkit.config import parse_recipe
from opdkit.divergences import divergence
from opdkit.errors import RecipeError
from opdkit.lora import adapter_weights
from opdkit.models import load_models
from opdkit.plan.plan import plan
from opdkit.plan.show import as_text
from opdkit.rollouts.rollout import Rollout
from opdkit.self_teacher import Averages
from opdkit.tasks.problem import Problem
from opdkit.train import loop
from opdkit.train.checkpoint import latest_checkpoint, load_checkpoint
from opdkit.train.evaluate import evaluate_run
from opdkit.train.setup import set_up

V = 11
P, Q = logits(6, V, seed=1), logits(6, V, seed=2)
TOKENS = torch.tensor([0, 2, 4, 6, 8, 10])
LORA = {"rank": 2, "targets": ["q_proj", "lm_head"]}


@pytest.fixture
def self_data(recipe_data):
    """A recipe whose teacher is the student and reads plain text."""
    return recipe_data | {
        "method": {"name": "opsd"},
        "teachers": {"teacher": {"path": "student:base"}},
        "task": recipe_data["task"] | {"template": "plain"},
        "optim": {"lr": 5e-3},
    }


def models(data, **changes):
    recipe = parse_recipe(changed(data, **changes))
    student, teachers = load_models(recipe, torch.device("cpu"), 0)
    return student, teachers["teacher"], Averages(student, teachers, recipe.teachers)


def rows_of(lm, ids=((3, 4, 5, 6),)):
    with torch.no_grad():
        return lm.head().logits(lm.hidden(torch.tensor(ids))[0])


def move(student, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in student.model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Objectives


def value_and_gradient(method, **fields):
    step = make_step(method, P, Q, TOKENS, **fields)
    return logit_gradient(method, P, step)


def expected(kind, mix=0.5, cap=None):
    """(loss, gradient) by autograd of the textbook formulas, token mean."""
    leaf = P.clone().requires_grad_(True)
    p, q = leaf.log_softmax(-1), Q.log_softmax(-1)
    m = (mix * q.exp() + (1 - mix) * p.exp()).log()
    entries = {"forward_kl": q.exp() * (q - p), "reverse_kl": p.exp() * (p - q),
               "jsd": mix * q.exp() * (q - m) + (1 - mix) * p.exp() * (p - m)}[kind]  # fmt: skip
    loss = (entries if cap is None else entries.clamp(max=cap)).sum(-1).mean()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize(("arguments", "reference"), [
    ({}, ("forward_kl",)),
    ({"entry_max": 0.1}, ("forward_kl", 0.5, 0.1)),
    ({"kind": "jsd"}, ("jsd",)),
    ({"kind": "jsd", "mix": 0.3}, ("jsd", 0.3)),
    ({"kind": "reverse_kl"}, ("reverse_kl",)),
])  # fmt: skip
def test_opsd_is_the_full_divergence_with_capped_entries(arguments, reference):
    loss, gradient = value_and_gradient(build_method("opsd", arguments))
    by_hand = expected(*reference)
    assert loss.item() == pytest.approx(by_hand[0].item(), abs=1e-12) and (gradient - by_hand[1]).abs().max() < 1e-12


def test_opsd_on_the_teachers_top_k_renormalises():
    loss, _ = value_and_gradient(build_method("opsd", {"k": 4, "kind": "jsd"}))
    ids = Q.topk(4).indices
    p, q = P.gather(1, ids).log_softmax(-1), Q.gather(1, ids).log_softmax(-1)
    assert loss.item() == pytest.approx(divergence(p, q, "jsd").mean().item(), abs=1e-12)


@pytest.mark.parametrize("name", ["sdpo", "sdft"])
def test_sdpo_and_sdft_compare_the_students_top_k_and_a_bucket(name):
    loss, _ = value_and_gradient(build_method(name, {"k": 4}))
    ids = P.topk(4).indices
    p, q = (x.log_softmax(-1).gather(1, ids) for x in (P, Q))
    lumped = [torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in (p, q)]
    assert all((x.exp().sum(-1) - 1).abs().max() < 1e-14 for x in lumped)
    assert loss.item() == pytest.approx(divergence(*lumped, "jsd").mean().item(), abs=1e-10)


@pytest.mark.parametrize("name", ["sdpo", "sdft"])
@pytest.mark.parametrize(("arguments", "reference"), [({"mix": 0.3}, ("jsd", 0.3)), ({"kind": "forward_kl"}, ("forward_kl",)),
                                                      ({"kind": "reverse_kl"}, ("reverse_kl",))])  # fmt: skip
def test_on_the_whole_vocabulary_alpha_is_our_mix_and_its_ends_are_the_two_kls(name, arguments, reference):
    loss, gradient = value_and_gradient(build_method(name, {"k": V} | arguments))
    by_hand = expected(*reference)
    assert loss.item() == pytest.approx(by_hand[0].item(), abs=1e-12) and (gradient - by_hand[1]).abs().max() < 1e-12


def test_the_jsd_ends_in_the_two_kls():
    p, q = P.log_softmax(-1), Q.log_softmax(-1)
    for mix, kind in ((1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")):  # over the vanishing share
        got = divergence(p, q, "jsd", mix) / min(mix, 1 - mix)
        assert torch.allclose(got, divergence(p, q, kind), rtol=1e-4)


@pytest.mark.parametrize("name", ["sdpo", "sdft", "opsd"])
def test_rollouts_without_a_demonstration_leave_the_mean(name):
    from dataclasses import replace

    method = build_method(name, {} if name == "opsd" else {"k": 4})
    step = make_step(method, P, Q, TOKENS)
    flags = torch.tensor([True, False, True, False, False, True])
    views = {**step.views, "teacher": replace(step.views["teacher"], informed=flags)}
    _, masked = logit_gradient(method, P, replace(step, views=views))
    _, whole = logit_gradient(method, P, step)
    assert masked[~flags].abs().max() == 0
    assert (masked[flags] - 2 * whole[flags]).abs().max() < 1e-14  # 3 counted tokens instead of 6


def test_the_ratio_of_sampler_and_student_is_capped():
    from dataclasses import replace

    method = build_method("sdpo", {"k": 4})
    step = make_step(method, P, Q, TOKENS)
    gap = torch.tensor([0.0, math.log(1.5), math.log(4), -math.log(2), 0.0, 0.0], dtype=torch.float64)
    views = {**step.views, "behaviour": replace(step.views["behaviour"], sampled=step.views["student"].sampled - gap)}
    ratio = torch.tensor([1.0, 1.5, 2.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    found, plain = (logit_gradient(method, P, s)[1] for s in (replace(step, views=views), step))
    assert (found - ratio[:, None] * plain).abs().max() < 1e-14


# ---------------------------------------------------------------------------------------------------------------------
# Through the real scoring path


def test_the_information_of_a_response_telescopes(self_data):
    """Card i 6: sum_t u_t is the difference of the response's log-probs after the two prompts."""
    data = changed(self_data, method={"name": "antisd", "gate": False}, teachers__teacher__path="student:live")
    setup = set_up(parse_recipe(data))
    lm, encode = setup.student, setup.student.tokenizer.encode
    problem = Problem("p", "2+3=", answer="5", response="2+3 is 5.")
    responses = ["5", "4+1-7", "a much longer one"]
    rollouts = [Rollout(problem, tuple(encode("2+3=")), tuple(encode(text)), text, 0, "stop", reward=0.0, correct=False)
                for text in responses]  # fmt: skip
    step = loop.make_step(setup, "policy", rollouts, 1, {})
    u = step.views["teacher"].sampled.double() - student_scores(setup, rollouts, step).double()
    shown = tuple(encode("2+3 is 5.\nincorrect\n2+3="))
    for s, r in enumerate(rollouts):
        expected = sequence_logp(lm, shown, r.response_ids) - sequence_logp(lm, r.prompt_ids, r.response_ids)
        assert step.layout.seq_sum(u)[s].item() == pytest.approx(expected, abs=5e-5)
    assert u.abs().max() > 0.05 and bool(step.views["teacher"].informed.all())


def student_scores(setup, rollouts, step):
    from opdkit.support import Sampled
    from opdkit.views.local import score

    return score(setup.student, rollouts, step, Sampled(), budget=512).sampled


def sequence_logp(lm, prompt, response):
    with torch.no_grad():
        rows = (
            lm.model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, :, : lm.vocab].double().log_softmax(-1)
        )
    return sum(rows[len(prompt) - 1 + i, token].item() for i, token in enumerate(response))


def test_nothing_to_show_means_no_information(self_data):
    """Card i 4: the same prompt and the same weights give u = 0."""
    data = changed(self_data, method={"name": "sdpo", "k": 4}, teachers__teacher__path="student:live")
    setup = set_up(parse_recipe(data))
    encode = setup.student.tokenizer.encode
    rollouts = [Rollout(Problem(p, "1+1="), tuple(encode("1+1=")), tuple(encode("3 or 4")), "", g, "stop", reward=0.0)
                for g, p in enumerate("ab")]  # fmt: skip
    how = parse_recipe(changed(data, sampling__rescore=True))
    setup.recipe = how
    step = loop.make_step(setup, "policy", rollouts, 1, {})
    assert not step.views["teacher"].informed.any()
    assert (step.views["teacher"].sampled - step.views["student"].sampled).abs().max() < 1e-6


def test_no_gradient_reaches_a_live_teacher(self_data, tmp_path):
    """At the start the live and the frozen teacher are equal, and so are the first updates, bit for bit."""
    frozen = run(self_data, train__steps=1, output=str(tmp_path / "a"))
    live = run(self_data, teachers__teacher__path="student:live", train__steps=1, output=str(tmp_path / "b"))
    averaged = run(self_data, teachers__teacher__path="student:ema", train__steps=1, output=str(tmp_path / "c"))
    assert same(weights(frozen), weights(live)) and same(weights(frozen), weights(averaged))
    assert metrics(frozen)[0]["loss"] > 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# The teachers


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_live_teacher_is_the_student_without_a_copy(self_data, lora):
    student, teacher, averages = models(
        self_data, teachers__teacher={"path": "student:live", "temperature": 2.0}, lora=lora
    )
    assert teacher.model is student.model and not averages.state()
    move(student)
    assert torch.equal(rows_of(student) / 2, rows_of(teacher))
    assert any(p.requires_grad for p in student.model.parameters())


@pytest.mark.parametrize("lora", [None, LORA])
def test_an_average_follows_the_student_by_its_rate(self_data, lora):
    student, teacher, averages = models(self_data, teachers__teacher={"path": "student:ema", "ema": 0.25}, lora=lora)
    assert (teacher.model is student.model) is (lora is not None)
    first = rows_of(student)
    assert torch.equal(rows_of(teacher), first)
    history = [[p.detach().clone() for p in student.model.parameters() if p.requires_grad]]
    for seed in range(3):
        move(student, seed)
        history.append([p.detach().clone() for p in student.model.parameters() if p.requires_grad])
        own = rows_of(student)
        averages.update()
        assert torch.equal(rows_of(student), own)
    found = averages.state()["averages"]["teacher"]
    for i, value in enumerate(found):
        by_hand = history[0][i].double()
        for weights_then in history[1:]:
            by_hand = 0.75 * by_hand + 0.25 * weights_then[i].double()
        assert (value.double() - by_hand).abs().max() < 1e-6
    after = rows_of(teacher)
    for p, value in zip([p for p in student.model.parameters() if p.requires_grad], found, strict=True):
        p.data.copy_(value)
    assert (rows_of(student) - after).abs().max() < 1e-5 and not torch.equal(after, first)


def test_a_rate_of_one_is_the_live_student(self_data):
    student, teacher, averages = models(self_data, teachers__teacher={"path": "student:ema", "ema": 1.0})
    move(student)
    averages.update()
    assert torch.equal(rows_of(student), rows_of(teacher))


def test_small_moves_of_a_teacher_in_half_precision_add_up(self_data):
    student, teacher, averages = models(
        self_data, teachers__teacher={"path": "student:ema", "ema": 0.01, "dtype": "bfloat16"}
    )
    before = next(student.model.parameters()).detach().clone()
    with torch.no_grad():
        next(student.model.parameters()).mul_(1.02)  # each step moves the average by less than a bfloat16 step
    for _ in range(200):
        averages.update()
    share = 1 - 0.99**200
    kept = averages.state()["averages"]["teacher"][0]
    assert kept.dtype == torch.float32 and torch.allclose(kept, before * (1 + 0.02 * share), atol=1e-5)
    assert torch.equal(next(teacher.model.parameters()), kept.bfloat16())


def test_averaged_adapters_leave_the_student_and_its_checkpoint_alone(self_data):
    student, teacher, averages = models(self_data, teachers__teacher={"path": "student:ema"}, lora=LORA)
    move(student)
    stored = {k: v.clone() for k, v in adapter_weights(student.saved).items()}
    pointers = [p.data_ptr() for p in student.model.parameters()]
    with teacher.switched(), teacher.switched():
        rows_of(teacher)
    assert [p.data_ptr() for p in student.model.parameters()] == pointers
    assert same({k: v.clone() for k, v in adapter_weights(student.saved).items()}, stored)
    assert all(k in stored for k in stored) and len(averages.state()["averages"]["teacher"]) == len(stored)


def test_averaged_adapters_under_autocast(self_data):
    """Autocast keeps the rounded weights of a parameter: swapped numbers must not meet those of the student."""
    student, teacher, _ = models(self_data, teachers__teacher={"path": "student:ema"}, lora=LORA)
    before = rows_of(student)
    move(student)
    with torch.autocast("cpu", torch.bfloat16):
        own, theirs, again = rows_of(student), rows_of(teacher), rows_of(student)
    with torch.autocast("cpu", torch.bfloat16):
        alone = rows_of(teacher)
    assert torch.equal(own, again) and torch.equal(theirs, alone)
    assert (theirs.float() - before).abs().max() < (theirs.float() - own.float()).abs().max()


@pytest.mark.parametrize(("teacher", "lora", "message"), [
    ({"path": "student:avg"}, None, "there is no such teacher: did you mean 'student:"),
    ({"path": "student:live", "ema": 0.1}, None, "ema = 0.1 has no effect with path student:live; set path: student:ema"),
    ({"path": "student:live", "dtype": "bfloat16"}, None, "dtype = bfloat16 has no effect: student:live is the student's own"),
    ({"path": "student:ema", "dtype": "float16"}, LORA, "dtype = float16 has no effect: student:ema is the student's own"),
    ({"path": "student:ema", "quantize": "nf4"}, None, "quantised weights cannot be averaged"),
])  # fmt: skip
def test_settings_without_effect_on_a_self_teacher(self_data, teacher, lora, message):
    with pytest.raises(RecipeError, match=message):
        models(self_data, teachers__teacher=teacher, lora=lora)


def test_a_student_cannot_be_its_own_average(self_data):
    with pytest.raises(RecipeError, match=r"student\.path = student:ema names the student itself"):
        models(self_data, student__path="student:ema")


def test_a_teacher_that_moves_between_updates_must_not_be_read_lazily(self_data):
    with pytest.raises(RecipeError, match=r"view 'teacher' has support Full\(\).*use one update a rollout batch"):
        set_up(parse_recipe(changed(self_data, teachers__teacher__path="student:live", train__epochs=2)))


@pytest.mark.parametrize(("path", "lora", "shared"), [("student:live", None, True), ("student:ema", None, False),
                                                      ("student:live", LORA, True), ("student:ema", LORA, True)])  # fmt: skip
def test_a_plan_counts_a_self_teachers_weights_once(self_data, path, lora, shared):
    found = plan(parse_recipe(changed(self_data, teachers__teacher__path=path, lora=lora)))
    student, teacher = found.models["student"], found.models["teacher"]
    assert (teacher.shared, teacher.bytes, teacher.trained) == (shared, 0 if shared else student.bytes, 0)
    assert teacher.parameters == student.parameters
    assert ("the student itself" in as_text(found)) is shared
    assert any(note.startswith("view 'teacher': teacher reads prompts of ") for note in found.notes)


# ---------------------------------------------------------------------------------------------------------------------
# Runs

RUNS = [
    ({"name": "opsd"}, "student:base"), ({"name": "opsd", "kind": "jsd", "k": 8}, "student:live"),
    ({"name": "sdpo", "k": 8, "threshold": 0.0}, "student:ema"),
    ({"name": "sdft", "k": 8, "demonstration": "answer"}, "student:base"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "teacher"), RUNS, ids=lambda x: x if isinstance(x, str) else x["name"])
def test_every_method_trains_with_its_teacher(self_data, method, teacher):
    path = run(self_data, method=method, teachers__teacher__path=teacher, train__steps=2)
    rows = metrics(path)
    assert all(row["informed"] == 1.0 and row["loss"] > 0 for row in rows)
    who = [(e["step"], e["who"]) for e in metrics(path, "evals.jsonl")]
    assert who == [(0, "student"), *([(0, "teacher")] if teacher == "student:base" else []), (2, "student")]
    assert ("reverse_kl" in metrics(path, "evals.jsonl")[0]) is (teacher != "student:live")


def test_a_step_in_which_nobody_succeeds_changes_nothing(self_data):
    path = run(self_data, method={"name": "sdpo", "k": 8}, teachers__teacher__path="student:ema", train__steps=1,
               task__verifier="exact", sampling__max_new_tokens=1, sampling__top_k=1)  # fmt: skip
    row = metrics(path)[0]
    assert row["accuracy"] == 0 and row["informed"] == 0 and row["loss"] == 0 and row["grad_norm"] == 0


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_run_with_an_average_goes_on_exactly(self_data, tmp_path, lora):
    data = changed(self_data, method={"name": "sdpo", "k": 8, "threshold": 0.0}, lora=lora, train__minibatches=2,
                   teachers__teacher={"path": "student:ema", "ema": 0.3})  # fmt: skip
    whole = run(data, train__steps=4, output=str(tmp_path / "whole"))
    part = run(data, train__steps=2, output=str(tmp_path / "part"))
    run(data, train__steps=4, output=str(tmp_path / "part"), resume=True)
    keys = ["loss", "reverse_kl", "grad_norm"]
    assert [[r[k] for k in keys] for r in metrics(whole)] == [[r[k] for k in keys] for r in metrics(part)]
    ends = [load_checkpoint(latest_checkpoint(path))["averages"]["teacher"] for path in (whole, part)]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert metrics(whole, "evals.jsonl")[-1] == metrics(part, "evals.jsonl")[-1]
    value = metrics(whole, "evals.jsonl")[-1]["reverse_kl"]
    assert f"reverse kl {value:.4f}" in evaluate_run(str(whole), [])  # the average of the checkpoint, not the student
