"""Whole runs on what goes wrong outside the engine: they go on or stop as documented, and what was left out is counted.

A teacher's NaN under every method that reads one differently, batches in which nobody is right, tools that hang or raise.
Verifiers that raise are in `test_left_out`, domains without a teacher in `test_routing`.
"""

import json
import time
from math import isfinite

import pytest
import test_tools
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file
from test_goes_on import half_right
from test_loop import changed, metrics, run, same, weights

from opdkit.errors import NonFiniteError
from opdkit.models import LanguageModel
from opdkit.rollouts.calls import TextCalls
from opdkit.tasks.environments import Observation
from opdkit.tasks.problem import Verdict
from opdkit.views.batches import Batch

PRUNE = {"name": "prune_opd", "k": 8, "gamma": 0.3, "drop": 0.34, "start": 6, "least": 3, "step": 1, "margin": 1}
LIVE = {"path": "student:live"}
NAN = {
    "sod": ({"name": "sod"}, None),
    "sod, terms": ({"name": "sod", "how": "terms"}, None),
    "prune_opd": (PRUNE, None),
    "prune_opd, accept": ({"name": "prune_opd", "k": 8, "event": "accept", "accept": 0.5, "drop": 0.34, "adapt": False}, None),
    "prune_opd, early stop": (PRUNE | {"stop_every": 2}, None),
    "uni_opd": ({"name": "uni_opd"}, None),
    "uni_opd, mask": ({"name": "uni_opd", "margin": "mask", "mode": "minmax", "scope": "batch"}, None),
    "antisd": ({"name": "antisd", "warmup": 1}, LIVE),
    "opsd": ({"name": "opsd"}, LIVE),
    "sdpo": ({"name": "sdpo", "k": 8}, {"path": "student:ema"}),
    "effopd": ({"name": "effopd", "problems": 4}, None),
    "grpo_opd": ({"name": "grpo_opd"}, None),
}  # fmt: skip


def poisoned(monkeypatch, share: float) -> None:
    """The teacher gives NaN in the first rows of every batch that it reads (a model that is NaN everywhere does not load)."""
    real, run = Batch.states, LanguageModel.run

    def states(self, lm, rollouts):
        found = real(self, lm, rollouts)
        if lm.name == "teacher" and len(self.index) > 1:
            bad = sum(len(rollouts[i].trained_index) for i in self.index[: max(1, int(len(self.index) * share))])
            found[:bad] = float("nan")
        return found

    def reads_along(self, **inputs):
        output = run(self, **inputs)
        rows = inputs["input_ids"].shape[0]
        if self.name == "teacher" and rows > 1:
            output.last_hidden_state[: max(1, int(rows * share))] = float("nan")
        return output

    monkeypatch.setattr(Batch, "states", states)
    monkeypatch.setattr(LanguageModel, "run", reads_along)


def data_of(recipe_data: dict, case: str) -> dict:
    method, teacher = NAN[case]
    own = {"teachers__teacher": teacher} if teacher else {}
    return changed(recipe_data, method=method, sampling__group=4, train__packing=False, train__steps=3, eval__teacher=False,
                   eval__kl_prompts=0, task__template="plain", **own)  # fmt: skip


@pytest.mark.parametrize("case", NAN)
def test_a_teachers_nan_stop_the_run_or_are_left_out_and_counted(recipe_data, monkeypatch, case):
    monkeypatch.setattr("opdkit.rewards.answers.verify_exact", half_right)
    data = data_of(recipe_data, case)
    poisoned(monkeypatch, 0.3)
    with pytest.raises(
        NonFiniteError, match=r"step 1: model 'teacher' .*NaN.*out with train\.bad_scores: mask.*batch saved in"
    ):
        run(data)
    path = run(data, train__bad_scores="mask", output=recipe_data["output"] + "-mask")
    for row in metrics(path):
        assert 0 < row["count/bad_scores"] < row["tokens"] and row["grad_norm"] > 0
        assert all(isfinite(value) for value in row.values())
    assert all(torch.isfinite(p).all() for p in weights(path).values())


@pytest.mark.parametrize("case", ["sod", "prune_opd", "antisd", "opsd"])
def test_a_teacher_that_gives_nothing_but_nan_moves_nothing_of_its_own(recipe_data, monkeypatch, case):
    """Every token is left out: no gradient but the outcome's, whose term reads the teacher too and is left out with it."""
    monkeypatch.setattr("opdkit.rewards.answers.verify_exact", half_right)
    poisoned(monkeypatch, 1.0)
    path = run(data_of(recipe_data, case), train__bad_scores="mask")
    for row in metrics(path):
        assert row["count/bad_scores"] == row["tokens"] and (row["loss"], row["grad_norm"]) == (0.0, 0.0)
    assert same(weights(path), load_file(f"{recipe_data['student']['path']}/model.safetensors"))


NOBODY = {
    "grpo": ({"name": "grpo"}, None, True),
    "grpo, leave one out": ({"name": "grpo", "baseline": "leave_one_out", "std": False}, None, True),
    "grpo, all terms": ({"name": "grpo", "entropy_coef": 0.01}, None, False),
    "sod": ({"name": "sod"}, "own", False),
    "uni_opd": ({"name": "uni_opd"}, "own", False),
    "uni_opd, only correct": ({"name": "uni_opd", "balance": float("inf")}, "own", True),
    "sdpo": ({"name": "sdpo", "k": 8}, "student:ema", True),
    "antisd, siblings only, gate closed": ({"name": "antisd", "solution": None}, "student:live", True),
    "antisd": ({"name": "antisd", "warmup": 1}, "student:live", None),
}


@pytest.mark.parametrize("case", NOBODY)
def test_groups_without_a_correct_answer(recipe_data, monkeypatch, case):
    """Said in the log; outcomes teach nothing there, and what else a method has goes on."""
    method, teacher, still = NOBODY[case]
    monkeypatch.setattr("opdkit.rewards.answers.verify_exact", lambda problem, text: Verdict(0.0, False))
    data = changed(recipe_data, method=method, sampling__group=4, train__steps=2, eval__teacher=False, eval__kl_prompts=0,
                   task__template="plain")  # fmt: skip
    if teacher is None:
        data["teachers"] = {}
    elif teacher != "own":
        data["teachers"]["teacher"] = {"path": teacher}
    rows = metrics(run(data))
    assert all(row["groups_all_wrong"] == 1.0 and row["groups_mixed"] == row["accuracy"] == 0.0 for row in rows)
    assert all(isfinite(value) for row in rows for value in row.values())
    moved = [row["grad_norm"] > 0 for row in rows]
    if still is None:  # the first step is the gate's warm-up; from the second on the bonus is the teacher's
        assert moved == [False, True]
    else:
        assert moved == [not still] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Tools


class Moody:
    """A tool whose calls hang, raise or answer, by the first character of what it is asked."""

    tools = test_tools.RudeWorld.tools

    def start(self, problem):
        return self

    def call(self, name, arguments):
        first = sum(map(ord, arguments["what"])) % 3
        if first == 0:
            time.sleep(30)
        if first == 1:
            raise OSError("the tool is broken")
        return Observation("fine")

    def close(self):
        raise RuntimeError("even closing fails")


def test_a_run_goes_on_with_tools_that_hang_and_raise(tmp_path, monkeypatch):
    letters = "?= \n12+ERORfine"
    paths = [make_model(tmp_path / str(s), s, tokenizer=make_tokenizer("".join(dict.fromkeys(letters))), rows=32)
             for s in (1, 2)]  # fmt: skip
    monkeypatch.setattr(
        "opdkit.rollouts.tools.TextCalls", lambda tool, argument: TextCalls(tool, argument, word="")
    )  # every line of the random student is a call
    data = {
        "method": {"name": "sod"},
        "student": {"path": paths[0]},
        "teachers": {"teacher": {"path": paths[1]}},
        "task": {"kind": "testbed", "name": "calculator", "eval_size": 2},
        "tools": {"environment": "test_bad_runs:Moody", "calls": "text", "turns": 3, "seconds": 0.2},
        "sampling": {"group": 2, "max_new_tokens": 90},
        "train": {"steps": 2, "prompts_per_step": 4, "microbatch_tokens": 256},
        "eval": {"kl_prompts": 0, "teacher": False},
        "log": {"top_k": 4, "trackers": [], "rollouts_every": 1, "rollouts": 8},
        "output": str(tmp_path / "run"),
    }
    began = time.monotonic()
    path = run(data)
    assert time.monotonic() - began < 25  # nobody waits for a call that hangs
    for row in metrics(path):
        assert (
            row["tools/timeouts"] > 0
            and 0 < row["tools/error_share"] <= 1
            and row["tools/calls"] > row["tools/timeouts"]
        )
    kept = json.loads((path / "rollouts" / "step-000001.json").read_text())["rollouts"]
    text = "".join(r["text"] for r in kept)
    assert "ERROR no answer within 0.2 seconds" in text or "ERROR" in text
