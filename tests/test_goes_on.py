"""A run that dies inside a step, in the middle of the life of whatever it remembers, goes on as if nothing had been.

Every case dies after an update whose step was not saved: weights, optimiser and random numbers have moved on and must be
forgotten. Compared bit for bit: weights, everything that is logged but times, and the whole state of the last checkpoint.
"""

import json

import pytest
import torch
from test_loop import changed, metrics, run, same, weights
from tiny_run import identical

from opdkit.catalogue import build_method
from opdkit.config import load_recipe
from opdkit.metrics import LOGGED
from opdkit.tasks.problem import Problem, Verdict
from opdkit.train import loop
from opdkit.train.checkpoint import latest_checkpoint, load_checkpoint

TIMES = ("seconds/", "tokens_per_second", "peak_memory_mb", "jump/seconds")
EVENT = "low_overlap(k=4, below=0.5)"


def half_right(problem: Problem, text: str) -> Verdict:
    """About half of the random students' answers are right, and which ones depends on the text alone."""
    correct = sum(map(ord, text)) % 2 == 0
    return Verdict(float(correct), correct)


class DiedError(Exception):
    """What ends the run."""


SELF = {"teachers__teacher__path": "student:live"}
EMA = {"teachers__teacher": {"path": "student:ema", "ema": 0.3}}
TWO = {"teachers": {"adder": {"path": "student:ema", "ema": 0.3}, "speller": {"path": "student:base"}}}
CASES = {
    "length control": ({"name": "prune_opd", "k": 8, "gamma": 0.3, "drop": 0.34, "start": 5, "least": 3, "step": 1,
                        "margin": 1, "hits": 1.0, "patience": 3}, {}),
    "gate in its warm-up": ({"name": "antisd", "warmup": 4}, SELF),
    "gate after its warm-up": ({"name": "antisd", "warmup": 1, "close": 0.999}, SELF),
    "averaged teacher": ({"name": "sdpo", "k": 8}, EMA),
    "jumps": ({"name": "effopd", "problems": 8, "accept": "no_worse", "tries": 2, "stride": 0.5}, {}),
    "balance": ({"name": "uni_opd"}, {"sampling__group": 4}),
    "lam and learning rate over the run": ({"name": "gopd", "lam": 0.5, "lam_end": 1.5, "until": 0.8},
                                           {"teachers__reference": {"path": "student:base"}, "optim__schedule": "cosine"}),
    "replay": ({"name": "distillm", "on_policy_share": 0.5, "replay_share": 0.5}, {"sampling__group": 1}),
    "mini-batches": ({"name": "grpo_opd"}, {"train__minibatches": 2, "train__epochs": 2}),
    "gate, limit, average and jumps": (
        {"name": "compose", "views": {"teacher": "View('teacher', context=Shown((Sibling(), Solution()), assess=True))"},
         "terms": ["Term(loss=ClippedPolicyGradient(), signal=outcome() - 0.5 * gated(of=phi(of=log_ratio()))"
                   f" * reliability(event={EVENT}, drop=0.5, base=0.1))"],
         "controllers": ["EntropyGate(warmup=2)",
                         f"LengthControl(reliable(event={EVENT}, drop=0.5), start=6, least=3, step=1, margin=1)"],
         "prepare": ["Balance()"], "after_update": ["EffOPD(problems=4, tries=1, accept='no_worse')"]},
        {**EMA, "sampling__group": 4}),
    "cpu/vopd_sod_grpo": (None, {}),
    "cpu/prune_antisd": (None, SELF),
    "cpu/uni_prune": (None, {**TWO, "sampling__group": 4}),
}  # fmt: skip


def recipe_of(case: str, data: dict, tmp_path) -> dict:
    """The case's recipe; for a shipped one its method, with the tiny models and data."""
    method, settings = CASES[case]
    if method is None:
        made = load_recipe(case).method
        method = {"name": made.name, **made.arguments}
        method = json.loads(json.dumps(method).replace("start=24, least=20, step=2", "start=6, least=3, step=1"))
    rows = [{"id": f"{a}+{b}", "prompt": f"{a}+{b}=", "answer": str(a + b), "domain": ("sums", "gym")[a % 2]}
            for a in range(6) for b in range(6)]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return changed(data, method=method, task__path=str(path), task__template="plain", eval__kl_prompts=0,
                   eval__teacher=False, train__steps=5, train__checkpoint_every=2, optim__lr=5e-3, **settings)  # fmt: skip


def numbers(path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in metrics(path)]


@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_as_if_it_had_not_died(recipe_data, tmp_path, monkeypatch, case):
    monkeypatch.setattr("opdkit.rewards.answers.verify_exact", half_right)
    data = recipe_of(case, recipe_data, tmp_path)
    whole = run(data, output=str(tmp_path / "whole"))
    real, done = loop.update, []

    def dying(*arguments):
        found = real(*arguments)
        done.append(found)
        if len(done) == 4:  # steps 3 and 4 are lost: the newest checkpoint is that of step 2
            raise DiedError
        return found

    with monkeypatch.context() as patch, pytest.raises(DiedError):
        patch.setattr(loop, "update", dying)
        run(data, output=str(tmp_path / "part"))
    middle = load_checkpoint(latest_checkpoint(tmp_path / "part"))
    part = run(data, output=str(tmp_path / "part"), resume=True)
    assert same(weights(whole), weights(part))
    assert json.dumps(numbers(whole)) == json.dumps(numbers(part))
    ends = [load_checkpoint(latest_checkpoint(path)) for path in (whole, part)]
    for end in ends:  # of the global generators, a run sets and uses torch's only
        end["rng"] = end["rng"]["torch"]
    assert [key for key in ends[0] if not identical(ends[0][key], ends[1].get(key))] == []
    made = build_method(data["method"]["name"], {k: v for k, v in data["method"].items() if k != "name"})
    named = {label.split("/")[0] for label in made.watch} | {
        part.name for part in (*made.controllers, *made.after_update)
    }
    assert {
        key.split("/")[0] for row in metrics(whole) for key in row
    } <= LOGGED | named  # no watch may take such a name
    in_the_middle(case, numbers(whole), middle, ends[0])


def in_the_middle(case: str, rows: list[dict], middle: dict, end: dict) -> None:
    """That what a case is about was under way where the run died, and went on moving."""
    if case == "length control":
        assert middle["method"]["length"]["misses"] == 2 and [row["length/limit"] for row in rows[:3]] == [5, 5, 4]
    if "limit" in case or case == "cpu/uni_prune":
        assert len({row["length/limit"] for row in rows}) > 1
    if case == "gate in its warm-up":
        assert len(middle["method"]["gate"]["warmup"]) == 2 and "gate/level" in rows[4]
    if case == "gate after its warm-up":
        assert len(middle["method"]["gate"]["warmup"]) == 1 and "gate/level" in rows[0]
    if "average" in case or case == "cpu/uni_prune":
        for before, after in zip(*(next(iter(x["averages"].values())) for x in (middle, end)), strict=True):
            assert not torch.equal(before, after)
    if "jumps" in case:
        assert [row["step"] for row in rows if "jump/accepted" in row] == [1, 2, 4] and middle["method"]["jump"]
        assert any(row.get("jump/accepted", 0) > 0 for row in rows)
    if case in ("balance", "cpu/uni_prune"):
        assert sum(row["count/dropped_rollouts"] for row in rows[2:]) > 0
    if case == "replay":
        assert 0 < len(middle["replay"]["replay"]["rollouts"]) < len(end["replay"]["replay"]["rollouts"])
