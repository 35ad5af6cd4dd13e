"""Early stop while sampling: a teacher reads along, counts events, ends responses, and its states serve the scoring."""

import json
from pathlib import Path

import pytest
import torch
from test_loop import changed, metrics, run, same, weights

from opdkit.catalogue import build_method
from opdkit.config import ModelConfig
from opdkit.contexts import Shown, Solution
from opdkit.drift import low_overlap, reliable, unaccepted
from opdkit.errors import DataError, MethodError, NonFiniteError
from opdkit.method import Method, Term, View
from opdkit.models import LanguageModel, load_model
from opdkit.pieces import plus
from opdkit.rollouts.early import Watch
from opdkit.rollouts.flatten import flatten
from opdkit.rollouts.sampler import Keep, Mixture, Sampling
from opdkit.rollouts.sources import on_policy
from opdkit.signals import expected_log_ratio, log_ratio
from opdkit.sources import EarlyStop, OnPolicy
from opdkit.support import Full, Sampled, TopK
from opdkit.tasks.problem import Problem
from opdkit.views.local import hidden_rows, score

K = 8
DRIFTED = low_overlap(k=K, below=0.3)
PROMPTS = [(Problem(str(i), text), ids) for i, (text, ids) in enumerate(
    [("a", (5, 6, 7)), ("b", (9, 8)), ("c", (20, 3, 30, 4, 5)), ("d", (5, 6, 7))])]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(teacher_path) -> LanguageModel:
    return load_model(ModelConfig(path=teacher_path), "teacher")


def sampled(lm, teacher, *, event=DRIFTED, events=3, every=4, new=14, max_rows=256, mixture=None, stop=True):
    how = Sampling(3, new, eos_ids=(1, 2, 3), max_rows=max_rows)  # three ends, so that many rows end by themselves
    watch = Watch(teacher, [ids for _, ids in PROMPTS], EarlyStop(event, events, every), K) if stop else None
    return on_policy(lm, PROMPTS, how, 7, Keep(K, hidden=True), mixture=mixture, watch=watch)


def scored(lm, teacher, rollouts, support=None, view="teacher"):
    flat = flatten(rollouts, head=lm.head())
    found = score(teacher, rollouts, flat, support or Sampled(), budget=512, top_k=K, view=view)
    return flat, found


def event_counts(lm, teacher, rollouts, event=DRIFTED):
    """Running number of events of every rollout, from a second pass of the teacher."""
    from dataclasses import replace

    flat, found = scored(lm, teacher, rollouts, view="")
    events = event(replace(flat, views={**flat.views, "teacher": found}))
    return [e.cumsum(0).tolist() for e in events.split(flat.layout.seq_len().tolist())]


@pytest.mark.parametrize("every", [1, 4, 5, 100])
@pytest.mark.parametrize("event", [DRIFTED, unaccepted(k=K, mass=0.9)], ids=["overlap", "accept"])
def test_a_response_ends_at_the_first_look_after_its_events(lm, teacher, every, event):
    whole = sampled(lm, teacher, stop=False)
    cut = sampled(lm, teacher, every=every, event=event)
    for r, full, counts in zip(cut, whole, event_counts(lm, teacher, whole, event), strict=True):
        looks = [n for n in range(every, len(counts), every) if counts[n - 1] >= 3]
        if looks:  # a response that ends by itself at a look is not stopped there
            assert r.finish == "drift" and len(r.response_ids) == looks[0]
        else:
            assert (r.finish, r.text) == (full.finish, full.text) and len(r.response_ids) == len(counts)
        assert r.response_ids == full.response_ids[: len(r.response_ids)]
        assert torch.allclose(r.capture.logp, full.capture.logp[: len(r.response_ids)], atol=1e-5)
    assert {r.finish for r in cut} == ({"stop", "length"} if every == 100 else {"stop", "drift"}) | (
        {"length"} if any(r.finish == "length" for r in cut) else set()
    )


@pytest.mark.parametrize("max_rows", [256, 3, 2])
@pytest.mark.parametrize("every", [1, 3, 4, 100])
def test_the_states_are_those_of_a_second_pass(lm, teacher, every, max_rows):
    rollouts = sampled(lm, teacher, every=every, max_rows=max_rows)
    assert len({len(r.response_ids) for r in rollouts}) > 2
    flat = flatten(rollouts, head=lm.head())
    again = torch.empty(flat.tokens.shape[0], teacher.head().weight.shape[1])
    for index, hidden in hidden_rows(teacher, rollouts, flat, 512):
        again[index] = hidden
    assert torch.allclose(torch.cat([r.states["teacher"] for r in rollouts]), again, atol=1e-4)


@pytest.mark.parametrize("support", [Sampled(), TopK(K), TopK(K, "union"), Full()], ids=str)
def test_scoring_does_not_read_the_rollouts_again(lm, teacher, support, monkeypatch):
    rollouts = sampled(lm, teacher)
    _, expected = scored(lm, teacher, rollouts, support, view="")
    monkeypatch.setattr(LanguageModel, "run", lambda *a, **k: pytest.fail("a second pass"))
    flat, found = scored(lm, teacher, rollouts, support)
    assert torch.allclose(found.sampled, expected.sampled, atol=1e-4)
    assert torch.allclose(found.entropy, expected.entropy, atol=1e-4)
    if support == TopK(K):
        assert torch.equal(found.candidates.ids, expected.candidates.ids)
        assert torch.allclose(found.candidates.teacher, expected.candidates.teacher, atol=1e-4)
    if support == Full():
        rows = torch.arange(flat.tokens.shape[0])
        assert torch.allclose(found.full.log_probs(rows), expected.full.log_probs(rows), atol=1e-4)


def test_some_sequences_of_a_step_only(lm, teacher):
    """As where several teachers share a view's step: `at` says which sequences these are."""
    rollouts = sampled(lm, teacher)
    flat, whole = scored(lm, teacher, rollouts)
    at = [1, 4, 11]
    part = score(teacher, [rollouts[s] for s in at], flat, Sampled(), budget=512, at=at, view="teacher")
    chosen = torch.cat([torch.nonzero(flat.layout.seq == s).squeeze(1) for s in at])
    assert torch.equal(part.sampled, whole.sampled[chosen])


def test_a_mixture_may_be_stopped_too(lm, teacher):
    mixture = Mixture(teacher, 0.5)
    whole, cut = sampled(lm, teacher, mixture=mixture, stop=False), sampled(lm, teacher, mixture=mixture)
    assert any(r.finish == "drift" for r in cut)
    assert all(r.response_ids == f.response_ids[: len(r.response_ids)] for r, f in zip(cut, whole, strict=True))


def test_stopping_changes_no_effective_length(lm, teacher):
    """A rollout is stopped after its reliability is used up, so the length controller sees the same numbers."""
    from dataclasses import replace

    found = []
    for rollouts in (sampled(lm, teacher), sampled(lm, teacher, stop=False)):
        flat, scores = scored(lm, teacher, rollouts, view="")
        step = replace(flat, views={**flat.views, "teacher": scores})
        found.append(step.layout.seq_sum(reliable(event=DRIFTED, drop=0.34)(step)).tolist())
    assert found[0] == found[1]


def test_a_prompt_that_leaves_the_teacher_no_room_is_said(lm, teacher):
    long = [(*ids, *[4] * 120) for _, ids in PROMPTS]
    with pytest.raises(DataError, match="as teacher reads it"):
        on_policy(lm, PROMPTS, Sampling(1, 14), 7, watch=Watch(teacher, long, EarlyStop(DRIFTED, 3), K))


# ---------------------------------------------------------------------------------------------------------------------
# As part of a method


def stopping(early: EarlyStop, view: View) -> Method:
    return Method(name="m", rollouts={"policy": OnPolicy(stop_early=early)}, views={"teacher": view},
                  terms=(Term(signal=log_ratio()),))  # fmt: skip


def test_any_method_can_stop_early_and_is_a_value():
    method = stopping(EarlyStop(unaccepted(k=5), 7, 16), View("teacher"))
    assert method.top_list == 5 and "stop_early=EarlyStop(" in str(method)
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert build_method("prune_opd", {"stop_every": 32}).rollouts["policy"].stop_early.events == 100


@pytest.mark.parametrize(("early", "view", "said"), [
    (lambda: EarlyStop(DRIFTED, 0), View("teacher"), "at least 1 event"),
    (lambda: EarlyStop(DRIFTED, 1, 0), View("teacher"), "at least 1 event and 1 token"),
    (lambda: EarlyStop(expected_log_ratio(), 1), View("teacher"), "reads the distribution of a view"),
    (lambda: EarlyStop(log_ratio(num="student"), 1), View("teacher"), "reads no view"),
    (lambda: EarlyStop(plus(DRIFTED, low_overlap(teacher="b")), 1), View("teacher"), "reads b, teacher"),
    (lambda: EarlyStop(low_overlap(teacher="tutor"), 1), View("teacher"), "reads view 'tutor', but the views are teacher"),
    (lambda: EarlyStop(DRIFTED, 1), View({"sums": "a", "*": "b"}), "one model"),
    (lambda: EarlyStop(DRIFTED, 1), View("teacher", context=Shown((Solution(),))), "own prompts"),
])  # fmt: skip
def test_rules_that_cannot_be_followed(early, view, said):
    with pytest.raises(MethodError, match=said):
        stopping(early(), view)


@pytest.fixture
def early_data(recipe_data):
    method = {"name": "prune_opd", "k": K, "gamma": 0.3, "drop": 0.34, "adapt": False, "stop_every": 3}
    data = recipe_data | {"method": method}
    return changed(data, sampling__max_new_tokens=12, eval__kl_prompts=0, eval__teacher=False)


def test_a_run_stops_responses_counts_them_and_resumes_exactly(early_data, tmp_path):
    whole = run(early_data, train__steps=4, output=str(tmp_path / "whole"))
    rows = metrics(whole)
    assert all(row["count/stopped_early"] > 0 and row["response_length"] < 12 for row in rows)
    run(early_data, train__steps=2, output=str(tmp_path / "part"))
    part = run(early_data, train__steps=4, output=str(tmp_path / "part"), resume=True)
    assert same(weights(whole), weights(part))
    shown = json.loads((whole / "rollouts" / "step-000001.json").read_text())["rollouts"]
    assert "drift" in {r["finish"] for r in shown}


def test_a_rule_that_never_ends_anything_changes_nothing(early_data, tmp_path):
    rare = {"drop": 0.01}
    ours = run(early_data, method=early_data["method"] | rare, train__steps=2, output=str(tmp_path / "a"))
    method = {k: v for k, v in (early_data["method"] | rare).items() if k != "stop_every"}
    plain = run(early_data, method=method, train__steps=2, output=str(tmp_path / "b"))
    a, b = weights(ours), weights(plain)
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 2e-4  # the teacher's states differ in the last digits
    assert [row["count/stopped_early"] for row in metrics(ours)] == [0, 0]
    assert "count/stopped_early" not in metrics(plain)[0]


def test_a_teacher_that_returns_nan_ends_no_response(early_data, monkeypatch):
    real = LanguageModel.run

    def broken(self, **inputs):
        output = real(self, **inputs)
        if self.name == "teacher" and inputs["input_ids"].shape[0] > 1:  # a model that is NaN everywhere does not load
            output.last_hidden_state.fill_(float("nan"))
        return output

    monkeypatch.setattr(LanguageModel, "run", broken)
    with pytest.raises(NonFiniteError, match=r"step 1: model 'teacher' .* returned NaN .*batch saved in"):
        run(early_data)
    saved = json.loads((Path(early_data["output"]) / "nonfinite" / "step-000001" / "policy.json").read_text())
    assert len(saved) == 8 and "drift" not in {r["finish"] for r in saved}
