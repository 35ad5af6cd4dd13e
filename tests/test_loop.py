"""The training loop end to end on tiny random models: every method, exact resume, kills, signals, bad numbers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opdkit.config import parse_recipe
from opdkit.errors import NonFiniteError, RunError
from opdkit.metrics import LOGGED
from opdkit.train.checkpoint import latest_checkpoint
from opdkit.train.loop import train

EVERY_STEP = {"loss", "grad_norm", "lr", "response_length", "clipped_share", "tokens", "tokens_per_second",
              "peak_memory_mb", *(f"seconds/{p}" for p in ("sample", "score", "update", "other", "step"))}  # fmt: skip
WITH_TEACHER = {"reverse_kl", "entropy_student", "entropy_teacher", "entropy_gap", "overlap_ratio", "overlap_chance",
                "overlap_token_advantage", "overlap_mass_student", "overlap_mass_teacher", "reward", "accuracy"}  # fmt: skip


def run(data: dict, *, resume: bool = False, **changes) -> Path:
    """Train a recipe given as a mapping with dotted changes."""
    return train(parse_recipe(changed(data, **changes)), resume=resume)


def changed(data: dict, **changes) -> dict:
    data = json.loads(json.dumps(data))
    for key, value in changes.items():
        *sections, last = key.split("__")
        part = data
        for section in sections:
            part = part.setdefault(section, {})
        part[last] = value
    return data


def metrics(path: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    newest = latest_checkpoint(path)
    assert newest is not None
    return load_file(newest / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


METHODS = [
    {"name": "opd"},
    {"name": "vopd"},
    {"name": "vopd", "k": 8},
    {"name": "full_opd"},
    {"name": "gkd"},
    *({"name": "topk_opd", "k": 4, "of": of} for of in ("student", "teacher", "union", "intersection", "difference")),
    {"name": "topk_kl", "k": 4},
    {"name": "topk_kl", "k": 4, "of": "union"},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, m.values())))
def test_every_method_trains_and_logs_everything(recipe_data, method):
    path = run(recipe_data, method=method, train__steps=2)
    rows = metrics(path)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0].keys() >= EVERY_STEP | WITH_TEACHER
    assert {key.split("/")[0] for row in rows for key in row} <= LOGGED
    evals = metrics(path, "evals.jsonl")
    assert [(e["step"], e["who"]) for e in evals] == [(0, "student"), (0, "teacher"), (2, "student")]
    assert all(e["reverse_kl"] > 0 and e["reverse_kl_se"] > 0 for e in evals if e["who"] == "student")
    shown = json.loads((path / "rollouts" / "step-000002.json").read_text())["rollouts"]
    assert len(shown) == 4 and all(t["student_top"] and t["teacher_top"] for r in shown for t in r["tokens"])


@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_methods_without_a_teacher(recipe_data, name):
    group = 1 if name == "sft" else 4
    path = run(recipe_data, method={"name": name}, teachers={}, train__steps=2, sampling__group=group)
    assert metrics(path)[0].keys() >= EVERY_STEP


def test_training_reduces_the_exact_reverse_kl(recipe_data):
    path = run(recipe_data, method={"name": "full_opd"}, train__steps=30, train__prompts_per_step=8)
    before, after = (e["reverse_kl"] for e in metrics(path, "evals.jsonl") if e["who"] == "student")
    assert after < 0.5 * before


SOME = [{"name": "opd"}, {"name": "vopd"}, {"name": "gkd"}, {"name": "topk_opd", "of": "union", "k": 4}]


@pytest.mark.parametrize("method", SOME, ids=lambda m: m["name"])
def test_micro_batches_do_not_change_the_update(recipe_data, method, tmp_path):
    small = run(recipe_data, method=method, train__steps=1, train__microbatch_tokens=16, output=str(tmp_path / "a"))
    large = run(recipe_data, method=method, train__steps=1, train__microbatch_tokens=4096, output=str(tmp_path / "b"))
    first, second = metrics(small)[0], metrics(large)[0]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5, abs=1e-7)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-5)


def test_resume_equals_the_uninterrupted_run(recipe_data, tmp_path):
    whole = run(recipe_data, train__steps=6, output=str(tmp_path / "whole"))
    part = run(recipe_data, train__steps=3, output=str(tmp_path / "part"))
    assert run(recipe_data, train__steps=6, output=str(tmp_path / "part"), resume=True) == part
    assert same(weights(whole), weights(part))
    keys = {"loss", "grad_norm", "reverse_kl", "overlap_ratio", "reward"}
    assert [{k: row[k] for k in keys} for row in metrics(whole)] == [{k: row[k] for k in keys} for row in metrics(part)]
    assert metrics(whole, "evals.jsonl")[-1] == metrics(part, "evals.jsonl")[-1]


CHILD = """
import json, os, sys, time
from opdkit.config import parse_recipe
from opdkit.train import checkpoint, loop
import safetensors.torch, transformers

where, data = sys.argv[1], json.loads(sys.argv[2])
updates = 0

def hang():
    print("here", flush=True)
    time.sleep(600)

if where == "step":
    real = loop.update
    def update(*args):
        global updates
        updates += 1
        numbers = real(*args)
        if updates == 5:
            hang()
        return numbers
    loop.update = update
else:
    real_save = transformers.PreTrainedModel.save_pretrained
    saves = 0
    def save_pretrained(self, *args, **kwargs):
        global saves
        saves += 1
        real_save(self, *args, **kwargs)
        if saves == 2:
            hang()
    transformers.PreTrainedModel.save_pretrained = save_pretrained
loop.train(parse_recipe(data))
"""


@pytest.mark.parametrize("where", ["step", "save"])
def test_kill_nine_then_resume_equals_the_uninterrupted_run(recipe_data, tmp_path, where):
    settings = {"train__steps": 6, "train__checkpoint_every": 2}
    whole = run(recipe_data, output=str(tmp_path / "whole"), **settings)
    data = changed(recipe_data, output=str(tmp_path / "killed"), **settings)
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, where, json.dumps(data)], stdout=subprocess.PIPE, text=True, env=env
    )
    assert child.stdout is not None
    while (line := child.stdout.readline()) and line.strip() != "here":
        pass
    assert line.strip() == "here", "the child ended before it reached the place where it is killed"
    child.kill()
    child.communicate()
    killed = tmp_path / "killed"
    newest = latest_checkpoint(killed)
    assert newest is not None and newest.name == ("step-000004" if where == "step" else "step-000002")
    train(parse_recipe(data), resume=True)
    assert same(weights(whole), weights(killed))
    assert [row["step"] for row in metrics(killed)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(recipe_data, number, tmp_path):
    data = changed(recipe_data, train__steps=10_000)
    code = (
        "import json, sys; from opdkit.config import parse_recipe; from opdkit.train.loop import train\n"
        "train(parse_recipe(json.loads(sys.argv[1])))"
    )
    child = subprocess.Popen([sys.executable, "-c", code, json.dumps(data)], stderr=subprocess.PIPE, text=True)
    log, deadline = Path(data["output"]) / "metrics.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.05)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    steps = [row["step"] for row in metrics(Path(data["output"]))]
    newest = latest_checkpoint(Path(data["output"]))
    assert newest is not None and newest.name == f"step-{steps[-1]:06d}" and steps == list(range(1, len(steps) + 1))
    assert "--resume" in errors


def test_a_teacher_that_returns_nan_stops_with_the_batch_saved(recipe_data, monkeypatch):
    from opdkit.views.batches import Batch

    real = Batch.states

    def states(self, lm, rollouts):  # NaN on real batches only: a model that is NaN everywhere does not load
        return real(self, lm, rollouts).masked_fill(torch.tensor(lm.name == "teacher"), float("nan"))

    monkeypatch.setattr(Batch, "states", states)
    with pytest.raises(NonFiniteError, match=r"step 1: model 'teacher' .* returned NaN .*batch saved in"):
        run(recipe_data, eval__kl_prompts=0, eval__teacher=False)
    saved = json.loads((Path(recipe_data["output"]) / "nonfinite" / "step-000001" / "policy.json").read_text())
    assert len(saved) == 8 and all(r["response_ids"] for r in saved)


def test_an_infinite_loss_leaves_the_weights_untouched(recipe_data, monkeypatch):
    from dataclasses import replace

    from opdkit.pieces import _FUNCTIONS

    def exploding(step, **arguments):
        return torch.full_like(step.views["student"].sampled, float("inf"))

    monkeypatch.setitem(_FUNCTIONS, "log_ratio", replace(_FUNCTIONS["log_ratio"], call=exploding))
    with pytest.raises(NonFiniteError, match=r"weights are unchanged.*batch saved"):
        run(recipe_data)
    folder = Path(recipe_data["output"]) / "nonfinite" / "step-000001"
    assert {"student.sampled", "teacher.sampled", "tokens", "seq"} <= load_file(folder / "policy.safetensors").keys()


def test_rescoring_logs_the_gap_and_changes_nothing_else(recipe_data, tmp_path):
    plain = metrics(run(recipe_data, output=str(tmp_path / "plain"), train__steps=1))[0]
    again = metrics(run(recipe_data, output=str(tmp_path / "again"), train__steps=1, sampling__rescore=True))[0]
    assert "sampler_gap" not in plain and 0 < again["sampler_gap"] < 1e-5
    assert again["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


def test_a_run_folder_that_holds_another_run(recipe_data):
    run(recipe_data, train__steps=1)
    with pytest.raises(RunError, match="already holds a run"):
        run(recipe_data, train__steps=1)


def test_hooks_keep_their_state_in_the_checkpoint(recipe_data, tmp_path, monkeypatch):
    from dataclasses import dataclass, replace

    from opdkit import serialise
    from opdkit.train import setup

    @dataclass(frozen=True)
    class Counter:
        name: str = "counter"

        def needs(self):
            return ()

        def init(self, now):
            assert now.step == 0 and now.problems == 28
            return {"updates": 0, "loss": torch.zeros(())}

        def update(self, state, now):
            assert now.step == state["updates"] + 1 and "model.norm.weight" in now.parameters
            loss = state["loss"] + now.metrics["loss"]
            return {"updates": now.step, "loss": loss}, {"loss": float(loss)}

    real = setup.build_method
    monkeypatch.setattr(setup, "build_method", lambda *a: replace(real(*a), after_update=(Counter(),)))
    monkeypatch.setitem(serialise._TYPES, "Counter", Counter)
    seen = []
    real_step = __import__("opdkit.train.loop", fromlist=["make_step"]).make_step
    monkeypatch.setattr(
        "opdkit.train.loop.make_step", lambda *a: seen.append(a[-1]["counter"]["updates"]) or real_step(*a)
    )
    path = run(recipe_data, train__steps=2)
    run(recipe_data, train__steps=4, resume=True)
    assert seen == [0, 1, 2, 3] and path == Path(recipe_data["output"])
    rows = metrics(path)
    assert rows[-1]["counter/loss"] == pytest.approx(sum(row["loss"] for row in rows), rel=1e-6)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_controller_limits_the_next_rollouts_and_is_resumed(recipe_data, monkeypatch, when):
    from dataclasses import dataclass, replace

    from opdkit import serialise
    from opdkit.train import setup

    @dataclass(frozen=True)
    class Shorter:
        when: str
        name: str = "shorter"
        on: str = "policy"

        def needs(self):
            return ("teacher.sampled",)

        def init(self):
            return {"limit": 5, "seen": 0}

        def measure(self, step):
            assert step.state["shorter"]["limit"] == 5 - step.state["shorter"]["seen"]
            return step.layout.seq_len().float()

        def update(self, state, values):
            assert values.max() <= state["limit"] and values.shape == (8,)
            return {"limit": state["limit"] - 1, "seen": state["seen"] + 1}

        def check(self, window):
            assert window == recipe_data["sampling"]["max_new_tokens"]

        def shortest(self, window):
            return 1

        def response_limit(self, state):
            return state["limit"]

        def metrics(self, state):
            return {"limit": float(state["limit"])}

    real = setup.build_method
    monkeypatch.setattr(setup, "build_method", lambda *a: replace(real(*a), controllers=(Shorter(when),)))
    monkeypatch.setitem(serialise._TYPES, "Shorter", Shorter)
    run(recipe_data, train__steps=2)
    path = run(recipe_data, train__steps=3, resume=True)
    logged = metrics(path)
    assert [m["shorter/limit"] for m in logged] == [4.0, 3.0, 2.0]
    assert all(m["response_length"] <= most for m, most in zip(logged, (5, 4, 3), strict=True))


def test_prepare_steps_see_verified_rollouts_and_may_drop_some(recipe_data, monkeypatch):
    from dataclasses import dataclass, replace

    from opdkit.train import setup

    @dataclass(frozen=True)
    class FirstOfEachGroup:
        def needs(self):
            return ("rollouts.reward",)

        def check(self, shortest):
            assert shortest == recipe_data["sampling"]["max_new_tokens"]

        def __call__(self, rollouts, batch):
            assert all(r.reward is not None for r in rollouts)
            assert batch.limit == recipe_data["sampling"]["max_new_tokens"]
            return rollouts[::2]

    real = setup.build_method
    monkeypatch.setattr(setup, "build_method", lambda *a: replace(real(*a), prepare=(FirstOfEachGroup(),)))
    monkeypatch.setattr("opdkit.train.loop.run_information", lambda s: {})
    path = run(recipe_data, train__steps=1)
    shown = json.loads((path / "rollouts" / "step-000001.json").read_text())["rollouts"]
    assert len({r["prompt"] for r in shown}) == 4 == recipe_data["train"]["prompts_per_step"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_float32(recipe_data, tmp_path, precision):
    """One step on the same samples: the half-precision gradient is near the float32 one, and fp16 scales its loss."""
    settings = dict(train__steps=1, method={"name": "sft"}, teachers={}, sampling__group=1)
    full = metrics(run(recipe_data, output=str(tmp_path / "full"), **settings))[0]
    half = metrics(run(recipe_data, output=str(tmp_path / "half"), train__precision=precision, **settings))[0]
    assert half["loss"] == pytest.approx(full["loss"], rel=2e-2) and half["loss"] != full["loss"]
    assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=5e-2)
    assert ("loss_scale" in half) == (precision == "fp16")


def test_an_infinite_fp16_gradient_skips_the_update_and_lowers_the_scale(recipe_data, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: real(device, enabled=enabled, init_scale=2.0**60)
    )
    path = run(recipe_data, train__steps=2, train__precision="fp16")
    first, second = metrics(path)
    assert first["grad_norm"] is None  # how the file says infinity
    assert second["loss_scale"] <= first["loss_scale"] == 2.0**59


def test_a_teacher_with_its_own_template_reads_another_prompt(recipe_data, tmp_path):
    """A template that writes `=` first changes what the teacher says and nothing else about the first step."""
    from conftest import make_model, make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = "={% for m in messages %}{{ m['content'] }}{% endfor %}"
    other = make_model(tmp_path / "other", seed=2, layers=3, tokenizer=tokenizer)
    rows = []
    for template in ("student", "own"):
        teachers = {"teacher": {"path": other, "template": template}}
        path = run(recipe_data, teachers=teachers, train__steps=1, output=str(tmp_path / template))
        rows.append(metrics(path)[0])
    assert rows[0]["response_length"] == rows[1]["response_length"] and rows[0]["accuracy"] == rows[1]["accuracy"]
    assert rows[0]["reverse_kl"] != pytest.approx(rows[1]["reverse_kl"], abs=1e-5)


def test_dropped_prompts_and_other_prompts_of_a_teacher_are_said(recipe_data, capsys, tmp_path):
    from conftest import make_model, make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = "={% for m in messages %}{{ m['content'] }}{% endfor %}"
    other = make_model(tmp_path / "other", seed=2, tokenizer=tokenizer)
    rows = [json.loads(line) for line in Path(recipe_data["task"]["path"]).read_text().splitlines()]
    longer = tmp_path / "longer.jsonl"
    longer.write_text("\n".join(map(json.dumps, [*rows, {"id": "long", "prompt": "1+1+1+1+1=", "answer": "5"}])))
    run(recipe_data, train__steps=1, task__path=str(longer), task__max_prompt_tokens=6, task__overlong="drop",
        teachers={"teacher": {"path": other, "template": "own"}})  # fmt: skip
    said = capsys.readouterr().err
    assert "1 training prompts over task.max_prompt_tokens are dropped" in said
    assert re.search(r"^\+=\d\+\d=", said, re.MULTILINE)
