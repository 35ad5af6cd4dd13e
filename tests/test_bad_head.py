"""The head's chunk and K at the edges: clear errors below the range, defined results at its ends and beyond them."""

import json
from dataclasses import replace
from typing import get_args

import pytest
import torch
from synthetic import identity, logits, make_step, terms_of
from test_bad_input import error_line, no_run, opd_train
from torch import Tensor

from opdkit.catalogue import build_method
from opdkit.errors import ModelError, OpdkitError, RecipeError
from opdkit.head import Head, RowTerm, objective, score_rows
from opdkit.reduction import Reduction
from opdkit.step import Layout
from opdkit.support import TopK
from opdkit.train.processes import Processes
from opdkit.train.update import coefficients, streams

V, N = 9, 5
P, Q = logits(N, V, seed=1), logits(N, V, seed=2)
TOKENS = torch.tensor([0, 8, 3, 3, 5])
METHODS = {
    "opd": {},
    "full_opd": {"kind": "jsd", "mix": 0.3},
    "topk_kl": {"k": 3},
    "topk_opd": {"k": 3, "of": "union"},
    "grpo_opd": {},
}


def terms_on(name: str, rows: slice = slice(None), weight: float = 1.0) -> list[RowTerm]:
    """The terms of a method on some rows of P and Q, all coefficients times `weight`."""
    n = len(TOKENS[rows])
    method, layout = build_method(name, METHODS[name]), Layout(*(torch.arange(n),) * 3)
    reward = (torch.arange(n) % 2).double()
    step = make_step(method, P[rows], Q[rows], TOKENS[rows], top_k=3, layout=layout, reward=reward)
    return [replace(t, coef=t.coef * weight) for t in terms_of(method, step)]


def solved(name: str, rows: slice = slice(None), chunk: int | None = None, weight: float = 1.0) -> tuple[Tensor, ...]:
    """(loss, row losses of the first term, gradient of the logits, gradient of the head)."""
    hidden, weights = P[rows].clone().requires_grad_(), torch.eye(V, dtype=torch.float64).requires_grad_()
    loss, values = objective(hidden, Head(weights), terms_on(name, rows, weight), chunk)
    loss.backward()
    return loss.detach(), values[0], hidden.grad, weights.grad


@pytest.mark.parametrize("name", METHODS)
def test_any_chunk_from_one_row_to_more_than_there_are_gives_the_same(name):
    whole = solved(name)
    for chunk in (1, 2, N, N + 1, 10**9):
        for found, expected in zip(solved(name, chunk=chunk), whole, strict=True):
            assert (found - expected).abs().max() < 1e-15


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_below_one_row(chunk):
    expected = f"chunk = {chunk} rows; expected at least 1, or None for the default"
    with pytest.raises(RecipeError, match=expected):
        objective(P, identity(V), terms_on("opd"), chunk)
    with pytest.raises(RecipeError, match=expected):
        score_rows(identity(V), P, TOKENS, chunk=chunk)


def test_k_outside_the_vocabulary():
    with pytest.raises(RecipeError, match="top_k = 10 exceeds the vocabulary of 9 ids; ask for at most that many"):
        score_rows(identity(V), P, TOKENS, top_k=10)
    with pytest.raises(RecipeError, match="top_k = -1; expected 1 to 9 ids, or 0 for no list"):
        score_rows(identity(V), P, TOKENS, top_k=-1)
    for k in (0, -2):
        with pytest.raises(ValueError, match=rf"TopK\(k={k}\): k must be at least 1"):
            TopK(k)


def test_k_of_the_whole_vocabulary_is_a_sorted_row():
    got, lp = score_rows(identity(V), P, TOKENS, top_k=V), P.log_softmax(-1)
    assert torch.equal(got.top_ids, lp.argsort(-1, descending=True)) and (got.top.exp().sum(-1) - 1).abs().max() < 1e-15


def test_two_vocabularies_are_an_error_of_the_models():
    step = terms_on("full_opd")
    with pytest.raises(
        ModelError, match=r"scores 9 token ids and the student 8; .* both need the same real vocabulary"
    ):
        objective(P, Head(torch.eye(V, dtype=torch.float64), vocab=8), step)
    with pytest.raises(OpdkitError, match="temperature -1"):
        identity(V).at(-1.0)


@pytest.mark.parametrize("name", METHODS)
def test_tokens_without_weight_leave_a_loss_of_zero_and_no_gradient(name):
    for chunk in (None, 2):
        loss, rows, hidden, weight = solved(name, chunk=chunk, weight=0.0)
        assert loss.item() == 0.0 and not hidden.any() and not weight.any()
        assert torch.isfinite(rows).all() and torch.isfinite(hidden).all() and torch.isfinite(weight).all()


@pytest.mark.parametrize("how", get_args(Reduction))
def test_a_mean_over_no_token_is_zero_and_not_a_quotient_by_zero(how):
    method = build_method("opd", {})
    step = make_step(method, P, Q, TOKENS, horizon=4)
    (on,) = {term.on for term in method.terms}
    found = {name: [replace(s, weight=torch.zeros(N)) for s in group]
             for name, group in streams(method, {on: step}).items()}  # fmt: skip
    alone = Processes(0, 1, torch.device("cpu"))
    (coefs,) = coefficients(found, {on: step}, {on: range(N)}, alone, how).values()
    assert [c.tolist() for c in coefs] == [[0.0] * N]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "grpo_opd"])  # its group would be another
def test_one_token_is_its_row_of_the_whole(name):
    whole = solved(name)
    loss, rows, hidden, _ = solved(name, slice(2, 3))  # the mean over one token, not over five
    assert (rows - whole[1][2:3]).abs().max() < 1e-15 and (hidden - whole[2][2:3] * N).abs().max() < 1e-14
    assert loss.item() == pytest.approx(
        sum(t.coef.item() for t in terms_on(name, slice(2, 3))) * rows.item(), abs=1e-15
    )


@pytest.mark.parametrize("name", [name for name in METHODS if name != "grpo_opd"])  # which needs a group
@pytest.mark.parametrize("chunk", [None, 1])
def test_no_token_is_a_loss_of_zero(name, chunk):
    loss, rows, hidden, weight = solved(name, slice(0, 0), chunk)
    assert loss.item() == 0.0 and rows.shape == (0,) and hidden.shape == (0, V) and not weight.any()


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.head_chunk=0", "'train.head_chunk' = 0: Input should be greater than 0"),
        ("train.head_chunk=-4", "'train.head_chunk' = -4: Input should be greater than 0"),
        ("log.top_k=0", "'log.top_k' = 0: Input should be greater than 0"),
        ("method.k=0", "TopK(k=0): k must be at least 1"),
        ("method.k=100", "asks for the top 100 of a vocabulary of 44 ids; lower k, or use full_opd"),
    ],
)
def test_a_recipe_outside_the_range(override, expected, recipe_data, tmp_path):
    recipe_data["method"] = {"name": "topk_kl"}
    assert expected in error_line(opd_train(recipe_data, tmp_path, override)) and no_run(recipe_data)


def test_a_recipe_with_any_chunk_and_one_token_learns_the_same(recipe_data, tmp_path):
    small = [
        "train.steps=1",
        "train.prompts_per_step=1",
        "sampling.group=1",
        "sampling.max_new_tokens=1",
        "task.eval_size=1",
    ]
    losses = []
    for chunk in (1, 10**6):
        recipe_data["output"] = str(tmp_path / str(chunk))
        done = opd_train(
            recipe_data, tmp_path, f"train.head_chunk={chunk}", "method.name=topk_kl", "method.k=44", *small
        )
        assert done.exit_code == 0, done.output
        line = json.loads((tmp_path / str(chunk) / "metrics.jsonl").read_text().splitlines()[0])
        losses.append((line["tokens"], line["grad_norm"]))
    assert losses[0][0] == 1 and losses[0][1] == pytest.approx(losses[1][1], rel=1e-6)
