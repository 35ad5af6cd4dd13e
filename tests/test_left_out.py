"""What a run may leave out and count instead of stopping: a teacher's NaN log-probs, and a verifier that raises."""

import json
from dataclasses import replace

import pytest
import torch
from synthetic import identity
from test_loop import changed, metrics, run

from opdkit.config import ModelConfig, TaskConfig, parse_recipe
from opdkit.errors import DataError, NonFiniteError, RecipeError
from opdkit.head import HeadRows
from opdkit.losses import CrossEntropy
from opdkit.method import Method, Term, View
from opdkit.models import load_model
from opdkit.rewards.verify import verify_rollouts
from opdkit.rollouts.flatten import flatten
from opdkit.rollouts.rollout import Rollout
from opdkit.signals import log_ratio
from opdkit.step import Layout, Scores, Step
from opdkit.support import Full, Sampled, TopK
from opdkit.tasks.problem import Problem, Task, Verdict
from opdkit.train.processes import Processes
from opdkit.train.update import coefficients, streams
from opdkit.views.bad import neutral
from opdkit.views.batches import Batch
from opdkit.views.local import score


def with_bad(bad: list[bool]) -> Step:
    n = len(bad)
    views = {"student": Scores(torch.full((n,), -1.0)), "teacher": Scores(torch.full((n,), -2.0), bad=torch.tensor(bad)),
             "other": Scores(torch.full((n,), -3.0))}  # fmt: skip
    seq = torch.tensor([0] * 2 + [1] * (n - 2))
    return Step(Layout(seq, seq, torch.arange(2)), seq, views)


def test_terms_leave_out_the_tokens_of_the_views_that_they_read():
    method = Method(
        name="m",
        views={"teacher": View("teacher"), "other": View("other")},
        terms=(Term(signal=log_ratio()), Term(signal=log_ratio(num="other")), Term(loss=CrossEntropy())),
    )
    steps = {"policy": with_bad([True, False, False, True, False])}
    found = streams(method, steps)["policy"]
    assert [s.weight.tolist() for s in found] == [[0, 1, 1, 0, 1], [1] * 5, [1] * 5]
    coefs = coefficients({"policy": found}, steps, {"policy": range(2)}, Processes(0, 1, torch.device("cpu")))
    assert coefs["policy"][0].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 0, 1 / 3])


def test_dropped_responses_have_weight_0_in_every_term():
    step = replace(with_bad([False, True, False, False]), dropped=torch.tensor([False, True]))
    assert step.usable({"student"}).tolist() == [True, True, False, False]
    assert step.usable({"student", "teacher"}).tolist() == [True, False, False, False]
    assert replace(step, dropped=None).usable({"student"}) is None


def test_neutral_numbers_give_a_log_ratio_of_0_and_no_nan():
    nan = float("nan")
    student = Scores(
        torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 0.6]), torch.tensor([[1, 2], [3, 4]]), torch.zeros(2, 2)
    )
    full = HeadRows(torch.tensor([[nan, 0.0], [1.0, 0.0]], dtype=torch.float64), identity(2))
    given = Scores(torch.tensor([nan, -5.0]), torch.tensor([nan, 1.0]), torch.tensor([[0, 0], [7, 8]]),
                   torch.tensor([[nan, nan], [-1.0, -2.0]]), None, full)  # fmt: skip
    found = neutral(given, torch.tensor([True, False]), student)
    assert found.sampled.tolist() == [-1.0, -5.0] and found.entropy.tolist() == [0.5, 1.0]
    assert found.top_ids.tolist() == [[1, 2], [7, 8]] and torch.isfinite(found.top).all()
    assert found.full.log_probs(slice(0, 1)).exp().tolist() == [[0.5, 0.5]]
    assert neutral(given, torch.tensor([True, False]), None).sampled.tolist() == [0.0, -5.0]


@pytest.fixture
def broken(teacher_path):
    """A teacher that returns NaN on texts with the letter 'i': its embedding is NaN there, and attention spreads it."""
    lm = load_model(ModelConfig(path=teacher_path), "teacher")
    embedding = lm.model.get_input_embeddings().weight.data
    lm.model.get_output_embeddings().weight = torch.nn.Parameter(embedding.clone(), requires_grad=False)
    embedding[10] = torch.nan
    return lm


@pytest.mark.parametrize("support", [Sampled(), TopK(4), TopK(4, "union"), Full()], ids=repr)
def test_a_teachers_nan_stop_or_are_marked(broken, lm, support):
    from opdkit.rollouts.sampler import Keep, Sampling, sample

    prompt = (4, 12, 5)
    drawn = sample(lm, [prompt] * 4, Sampling(2, 8, 1.0, 1.0, 0, (), lm.eos_ids, 64), 3, Keep(8, hidden=True))
    rollouts = [Rollout(Problem("p", "?"), prompt, s.ids, s.text, g, s.finish, capture=s.capture)
                for g, group in enumerate(drawn) for s in group]  # fmt: skip
    rollouts[0] = replace(rollouts[0], response_ids=(10, *rollouts[0].response_ids[1:]))
    step = flatten(rollouts, head=lm.head())
    with pytest.raises(NonFiniteError, match=r"train\.bad_scores: mask"):
        score(broken, rollouts, step, support, budget=50, top_k=4)
    found = score(broken, rollouts, step, support, budget=50, top_k=4, bad="mask")
    expected = torch.tensor([10 in r.response_ids[:-1] for r in rollouts])[step.layout.seq]
    assert torch.equal(found.bad, expected) and 0 < int(expected.sum()) < expected.numel()
    assert torch.equal(found.sampled[expected], step.views["student"].sampled[expected])
    shown = [found.entropy, found.top, *([] if found.candidates is None else [found.candidates.teacher])]
    assert all(torch.isfinite(t).all() for t in shown)
    clean = [r for r in rollouts if 10 not in r.response_ids[:-1]]
    alone = score(broken, clean, flatten(clean, head=lm.head()), support, budget=50, top_k=4)
    assert torch.allclose(found.sampled[~expected], alone.sampled, atol=1e-5)
    if found.full is not None:
        assert torch.isfinite(found.full.log_probs(slice(None))).all()


METHODS = [{"name": "opd"}, {"name": "vopd", "k": 4}, {"name": "full_opd"}, {"name": "topk_kl", "k": 4, "of": "union"}]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["name"])
def test_a_run_leaves_them_out_and_counts_them(recipe_data, monkeypatch, method):
    """NaN at every third token of the teacher's passes."""
    real = Batch.states

    def states(self, lm, rollouts):
        found = real(self, lm, rollouts)
        if lm.name == "teacher" and len(self.index) > 1:
            found[::3] = float("nan")
        return found

    monkeypatch.setattr(Batch, "states", states)
    data = changed(recipe_data, method=method, eval__teacher=False, train__packing=False, train__steps=2)
    with pytest.raises(NonFiniteError, match="batch saved in"):
        run(data, eval__kl_prompts=0)
    path = run(data, train__bad_scores="mask", output=recipe_data["output"] + "-mask")
    for row in metrics(path):
        assert 0 < row["count/bad_scores"] < row["tokens"]
        assert all(v == v and abs(v) < float("inf") for v in row.values() if isinstance(v, float))
    assert all(e["reverse_kl"] > 0 for e in metrics(path, "evals.jsonl"))


# ---------------------------------------------------------------------------------------------------------------------
# A verifier that raises


def failing(problem: Problem, text: str) -> Verdict:
    if text == "boom":
        raise ZeroDivisionError("no")
    return Verdict(1.0, True)


def judged(errors: str) -> list[Rollout]:
    task = Task("t", (), (), failing, config=TaskConfig(kind="file", path="x", verifier_errors=errors))
    return verify_rollouts(task, [Rollout(Problem("p", "?"), (1,), (1,), text, 0, "stop") for text in ("fine", "boom")])


def test_a_verifier_that_raises_stops_or_counts_as_incorrect():
    with pytest.raises(DataError, match="failed on problem p: ZeroDivisionError"):
        judged("stop")
    assert [(r.reward, r.correct, r.unjudged) for r in judged("incorrect")] == [(1.0, True, False), (0.0, False, True)]


@pytest.mark.parametrize(("given", "said"), [
    (Verdict(float("nan"), True), "ValueError: its reward is nan, expected a finite number"),
    (Verdict(float("inf"), True), "its reward is inf"), (1.0, "TypeError: it returned a float, expected a Verdict"),
    (None, "it returned a NoneType"),
])  # fmt: skip
def test_a_verdict_from_which_nothing_can_be_learnt_is_a_verifiers_error(given, said):
    for errors in ("stop", "incorrect"):
        config = TaskConfig(kind="file", path="x", verifier_errors=errors)
        task = Task("t", (), (), lambda problem, text: given, config=config)
        rollouts = [Rollout(Problem("p", "?"), (1,), (1,), "", 0, "stop")]
        if errors == "stop":
            with pytest.raises(DataError, match=f"failed on problem p: .*{said}"):
                verify_rollouts(task, rollouts)
        else:
            assert [(r.reward, r.correct, r.unjudged) for r in verify_rollouts(task, rollouts)] == [(0.0, False, True)]


def test_the_engines_own_errors_stop_in_any_case():
    def wrong(problem: Problem, text: str) -> Verdict:
        raise DataError("the answer of the problem cannot be read")

    task = Task("t", (), (), wrong, config=TaskConfig(kind="file", path="x", verifier_errors="incorrect"))
    with pytest.raises(DataError, match="cannot be read"):
        verify_rollouts(task, [Rollout(Problem("p", "?"), (1,), (1,), "", 0, "stop")])


def test_a_run_counts_the_verifiers_errors(recipe_data, monkeypatch):
    calls = []

    def verify(problem: Problem, text: str) -> Verdict:
        calls.append(text)
        if len(calls) % 2:
            raise ValueError("cannot read this")
        return Verdict(1.0, True)

    monkeypatch.setattr("opdkit.rewards.answers.verify_exact", verify)
    path = run(
        changed(recipe_data, method={"name": "grpo"}, teachers={}, task__verifier_errors="incorrect", train__steps=2)
    )
    assert [(row["count/verifier_errors"], row["accuracy"]) for row in metrics(path)] == [(4, 0.5), (4, 0.5)]
    assert metrics(path, "evals.jsonl")[0]["verifier_errors"] == 4


def test_the_setting_needs_a_verifier(recipe_data):
    with pytest.raises(RecipeError, match="has no verifier"):
        run(changed(recipe_data, task__verifier="none", task__verifier_errors="incorrect"))
    assert json.dumps(parse_recipe(recipe_data).model_dump(mode="json"))
