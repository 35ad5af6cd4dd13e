"""Local views: a model's scores of a step's tokens against dense log-softmax, and the way from rollouts to a step."""

from dataclasses import replace

import pytest
import torch

from opdkit.config import ModelConfig
from opdkit.errors import DataError, NonFiniteError
from opdkit.head import HeadRows
from opdkit.models import LanguageModel, load_model
from opdkit.rollouts.flatten import flatten
from opdkit.rollouts.rollout import Rollout
from opdkit.rollouts.sampler import Keep, Sampling
from opdkit.rollouts.sources import on_policy
from opdkit.support import Full, Sampled, TopK
from opdkit.tasks.problem import Problem
from opdkit.views.batches import flat_index, micro_batches, pad, trained_rows
from opdkit.views.local import score

BUDGETS = [1, 24, 10_000]


@pytest.fixture(scope="module")
def student(student_path) -> LanguageModel:
    return load_model(ModelConfig(path=student_path), "student")


@pytest.fixture(scope="module")
def teacher(teacher_path) -> LanguageModel:
    return load_model(ModelConfig(path=teacher_path, temperature=1.5), "teacher")


@pytest.fixture(scope="module")
def sampled(student) -> list[Rollout]:
    prompts = [(Problem(str(i), "p"), tuple(ids)) for i, ids in enumerate([[5, 9, 30], [7], [12, 3, 8, 20, 4]])]
    how = Sampling(2, 9, eos_ids=(1, 3, 10, 12, 17, 28, 40))
    return on_policy(student, prompts, how, 3, Keep(top_k=8, hidden=True))


def by_hand(*trained: str, turns: str | None = None) -> list[Rollout]:
    """Rollouts with fixed ids; a string such as 110 says which response tokens are trained."""
    found = []
    for i, marks in enumerate(trained):
        ids = tuple((7 * i + 3 * j) % 44 for j in range(len(marks)))
        mask = None if "0" not in marks else tuple(m == "1" for m in marks)
        which = None if turns is None else tuple(int(t) for t in turns)
        found.append(Rollout(Problem(str(i), "p"), (2 + i,) * (1 + i), ids, "", i // 2, "stop", "data", mask, which))
    return found


def dense(lm, rollouts) -> torch.Tensor:
    """Log-probs [N, V] of every trained token's position, from one plain forward per rollout."""
    rows = []
    for r in rollouts:
        with torch.no_grad():
            logits = lm.model(torch.tensor([r.prompt_ids + r.response_ids])).logits[0, :, : lm.vocab].double()
        rows += [logits[len(r.prompt_ids) + i - 1] / lm.temperature for i in r.trained_index]
    return torch.stack(rows).log_softmax(-1)


def close(a, b) -> bool:
    return bool((a.double() - b.double()).abs().max() <= 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("budget", BUDGETS)
def test_scores_equal_dense_log_softmax(student, teacher, sampled, budget):
    step = flatten(sampled)
    truth = dense(teacher, sampled)
    got = score(teacher, sampled, step, Sampled(), budget=budget, top_k=5)
    assert close(got.sampled, truth.gather(1, step.tokens[:, None]).squeeze(1))
    assert close(got.entropy, -(truth.exp() * truth).sum(-1))
    assert close(got.top, truth.topk(5).values)
    assert close(truth.gather(1, got.top_ids), truth.topk(5).values)
    assert (got.candidates, got.full) == (None, None)


def test_the_captured_student_equals_a_scored_one(student, sampled):
    step = flatten(sampled, head=student.head())
    again = score(student, sampled, step, Full(), budget=30, top_k=8)
    captured = step.views["student"]
    for name in ("sampled", "entropy", "top"):
        assert close(getattr(captured, name), getattr(again, name))
    assert torch.equal(captured.top_ids, again.top_ids)
    assert close(captured.full.hidden, again.full.hidden)
    assert torch.equal(step.views["behaviour"].sampled, captured.sampled)


@pytest.mark.parametrize("budget", BUDGETS)
def test_only_trained_tokens_of_several_turns_are_scored(teacher, budget):
    rollouts = by_hand("110011", "101101", "000111", turns="001122")
    step = flatten(rollouts)
    assert step.tokens.tolist() == [r.response_ids[i] for r in rollouts for i in r.trained_index]
    assert step.layout.seq.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert step.layout.turn.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 5, 6, 6]
    assert step.layout.group.tolist() == [0, 0, 1]
    got = score(teacher, rollouts, step, Sampled(), budget=budget)
    assert close(got.sampled, dense(teacher, rollouts).gather(1, step.tokens[:, None]).squeeze(1))


@pytest.mark.parametrize("of", ["student", "teacher", "union", "intersection", "difference"])
@pytest.mark.parametrize("budget", [24, 10_000])
def test_candidates_equal_brute_force(student, teacher, sampled, of, budget):
    k = 5
    step = flatten(sampled, head=student.head())
    p, q = dense(student, sampled), dense(teacher, sampled)
    found = score(teacher, sampled, step, TopK(k, of), budget=budget, top_k=3).candidates
    for n in range(step.tokens.shape[0]):
        ours, theirs = set(p[n].topk(k).indices.tolist()), set(q[n].topk(k).indices.tolist())
        expected = {"student": ours, "teacher": theirs, "union": ours | theirs, "intersection": ours & theirs,
                    "difference": ours ^ theirs}[of]  # fmt: skip
        valid = found.valid[n]
        ids = found.ids[n][valid]
        assert sorted(ids.tolist()) == sorted(expected)  # each id once
        assert close(found.teacher[n][valid], q[n][ids]) or not expected
        assert close(found.student[n][valid], p[n][ids]) or not expected
        outside = [v for v in range(student.vocab) if v not in expected]
        assert close(found.teacher_tail[n], q[n][outside].logsumexp(0))
        if of in ("student", "intersection"):  # the student's head is not applied again for these
            assert found.student_tail is None
        else:
            assert close(found.student_tail[n], p[n][outside].logsumexp(0))


@pytest.mark.parametrize("budget", BUDGETS)
def test_full_support_keeps_hidden_states_only(teacher, sampled, budget):
    step = flatten(sampled)
    full = score(teacher, sampled, step, Full(), budget=budget).full
    assert isinstance(full, HeadRows)
    assert full.hidden.shape == (step.tokens.shape[0], 32)
    truth = dense(teacher, sampled)
    assert close(full.log_probs(slice(None)), truth)
    index = torch.tensor([4, 0, 7])
    assert close(full.take(index).log_probs(slice(0, 2)), truth[index[:2]])


def test_the_head_sees_trained_positions_only(teacher, sampled, monkeypatch):
    from opdkit.head import Head

    rows = []
    logits = Head.logits
    monkeypatch.setattr(
        Head, "logits", lambda head, hidden, *out: rows.append(hidden.shape[0]) or logits(head, hidden, *out)
    )
    step = flatten(sampled)
    score(teacher, sampled, step, Sampled(), budget=30)
    assert sum(rows) == step.tokens.shape[0]


def test_a_teacher_that_returns_nan_is_named_with_its_sequences(teacher):
    rollouts = by_hand("1111", "1111", "1111")
    embedding = teacher.model.get_input_embeddings().weight.data
    kept = embedding.clone()
    teacher.model.get_output_embeddings().weight = torch.nn.Parameter(kept)  # untied: NaN comes from reading the token
    embedding[10] = torch.nan  # the second token of the second response
    try:
        with pytest.raises(NonFiniteError) as error:
            score(teacher, rollouts, flatten(rollouts), Sampled(), budget=10_000)
    finally:
        embedding.copy_(kept)
        teacher.model.tie_weights()
    assert f"model 'teacher' ({teacher.path}) returned NaN or infinite log-probs for" in str(error.value)
    assert "in sequences [1] of the step" in str(error.value)


def test_an_infinite_log_prob_among_the_candidates_is_refused(student, teacher_path, sampled):
    teacher = load_model(ModelConfig(path=teacher_path), "teacher")
    never = next(i for i in flatten(sampled).views["student"].top_ids[0].tolist() if i != sampled[0].response_ids[0])
    rollouts = [r for r in sampled if never not in r.response_ids]
    step = flatten(rollouts)
    head = torch.nn.Linear(32, 48)
    head.bias.data[never] = -torch.inf
    teacher.model.lm_head = head
    assert torch.isfinite(score(teacher, rollouts, step, Sampled(), budget=10_000).sampled).all()
    with pytest.raises(NonFiniteError, match="infinite log-probs for"):
        score(teacher, rollouts, step, TopK(8, "student"), budget=10_000)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("budget", [1, 7, 20, 64, 10_000])
def test_micro_batches_cover_everything_within_the_budget(budget):
    lengths = torch.randint(1, 20, (50,), generator=torch.Generator().manual_seed(budget)).tolist()
    batches = micro_batches(lengths, budget)
    assert sorted(i for b in batches for i in b) == list(range(50))
    for b in batches:
        assert len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget


def test_micro_batches_by_hand():
    assert micro_batches([3, 9, 4, 4, 1], 12) == [[1], [2, 3, 0], [4]]
    assert micro_batches([], 12) == []


def test_padding_and_positions():
    rollouts = by_hand("11", "0101")
    assert pad(rollouts, torch.device("cpu")).tolist() == [[2, 0, 0, 0, 0], [3, 3, 7, 10, 13]]
    rows, positions = trained_rows(rollouts)
    assert (rows.tolist(), positions.tolist()) == ([0, 0, 1, 1], [0, 1, 2, 4])
    assert flat_index(flatten(rollouts), [1, 0]).tolist() == [2, 3, 0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Flatten


def test_flatten_numbers_groups_and_carries_rewards(sampled):
    rollouts = [replace(r, group=r.group * 10 + 5, reward=float(i), correct=i % 2 == 0) for i, r in enumerate(sampled)]
    step = flatten(rollouts, horizon=9, progress=0.5, state={"gate": 1})
    assert step.layout.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert step.reward.tolist() == [0, 1, 2, 3, 4, 5]
    assert step.correct.tolist() == [True, False] * 3
    assert (step.horizon, step.progress, step.state, step.domain) == (9, 0.5, {"gate": 1}, None)
    assert step.layout.seq_len().tolist() == [len(r.response_ids) for r in rollouts]
    assert step.views["student"].full is None  # no head was given
    assert flatten([*rollouts[:5], sampled[5]]).reward is None  # one of them has none


def test_flatten_numbers_domains():
    rollouts = [replace(r, problem=replace(r.problem, domain=d)) for r, d in zip(by_hand("1", "1"), "ba", strict=True)]
    assert flatten(rollouts, domains=("a", "b")).domain.tolist() == [1, 0]


def test_flatten_without_captures_has_no_student_view(sampled):
    assert flatten(by_hand("11", "1")).views == {}
    assert flatten([*sampled, *by_hand("11")]).views == {}


def test_flatten_refuses_a_step_without_trained_tokens():
    with pytest.raises(DataError, match="none of the step's rollouts has a trained token"):
        flatten(by_hand("00", "0"))
    with pytest.raises(DataError, match="none of the step's rollouts has a trained token"):
        flatten([])
