"""Two processes give the one-process result: replicated or sharded, with uneven work, and across a resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from test_loop import changed, metrics, run, weights

from opdkit.config import parse_recipe
from opdkit.errors import RecipeError
from opdkit.rollouts.rollout import Rollout
from opdkit.tasks.problem import Problem
from opdkit.train.checkpoint import latest_checkpoint, load_checkpoint
from opdkit.train.checks import check_processes
from opdkit.train.processes import Processes
from opdkit.train.setup import set_up
from opdkit.train.update import parts

PLAIN = dict(method={"name": "opd"}, train__prompts_per_step=5)  # 3 and 2 prompts: uneven work
CLIPPED = {"name": "opd", "low": 0.2, "high": 0.2}
MIXED = dict(method={"name": "gkd"}, train__minibatches=2, train__epochs=2)
ADAPTED = dict(
    method={"name": "minillm"}, lora={"rank": 4, "targets": ["q_proj", "lm_head"]}, train__prompts_per_step=5
)
REPLAYED = dict(method={"name": "distillm", "on_policy_share": 0.5}, train__prompts_per_step=8)
STEPS = 3


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> str:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("untied")
    make_model(folder, seed=1)
    config = Qwen3Config.from_pretrained(folder, tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def launch(tmp_path: Path, entries: list[dict]) -> dict[tuple[int, int], str]:
    """Train the entries' recipes in two processes. Returns the errors by (entry, process)."""
    file = tmp_path / "recipes.json"
    file.write_text(json.dumps(entries))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).parent / "two_processes.py")
    done = subprocess.run([*launcher, script, str(file)], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for path in tmp_path.glob("recipes.json.error-*"):
        number, rank = path.name.rpartition("error-")[2].split("-")
        found[int(number), int(rank)] = path.read_text()
    return found


def assert_same_run(one: Path, two: Path) -> None:
    """Metrics, evaluations and weights agree within the rounding of float32 sums in another order."""
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"peak_memory_mb", "tokens_per_second"}:
            if not key.startswith("seconds/"):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
    ends = [[r for r in metrics(p, "evals.jsonl") if r["step"] in (0, STEPS)] for p in (one, two)]
    for a, b in zip(*ends, strict=True):  # a run that stopped half way was evaluated there too
        assert a.pop("who") == b.pop("who") and a == pytest.approx(b, rel=1e-4, abs=1e-6)
    first, second = (load_file(next(latest_checkpoint(p).glob("*.safetensors"))) for p in (one, two))
    assert first.keys() == second.keys()
    assert max(float((first[k] - second[k]).abs().max()) for k in first) < 2e-5  # learning rate 1e-3


def test_two_processes_equal_one(recipe_data, untied, tmp_path):
    """DDP and FSDP2, tied and untied heads, mini-batches, and runs that change the number of processes half way."""

    def recipe(name: str, **changes) -> dict:
        return changed(recipe_data, output=str(tmp_path / name), **({"train__steps": STEPS} | changes))

    fsdp = {"train__sharding": "fsdp2"}
    one = {name: run(recipe(f"one-{name}", **case)) for name, case in (("plain", PLAIN), ("mixed", MIXED))}
    one["untied"] = run(recipe("one-untied", student={"path": untied}, **PLAIN))
    one["lora"] = run(recipe("one-lora", **ADAPTED))
    one["replay"] = run(recipe("one-replay", **REPLAYED))
    first_half = run(recipe("grows", **PLAIN, train__steps=1))
    entries = [
        {"recipe": recipe("ddp-plain", **PLAIN)},
        {"recipe": recipe("ddp-mixed", **MIXED)},
        {"recipe": recipe("fsdp-plain", **PLAIN, **fsdp)},
        {"recipe": recipe("fsdp-mixed", **MIXED, **fsdp)},
        {"recipe": recipe("fsdp-untied", student={"path": untied}, **PLAIN, **fsdp)},
        {"recipe": recipe("fsdp-lora", **ADAPTED, **fsdp)},
        {"recipe": recipe("ddp-replay", **REPLAYED)},
        {"recipe": recipe("grows", **PLAIN), "resume": True},
        {"recipe": recipe("shrinks", **PLAIN, **fsdp, train__steps=1)},
        {"recipe": recipe("fsdp-resumed", **PLAIN, **fsdp, train__steps=1)},
        {"recipe": recipe("fsdp-resumed", **PLAIN, **fsdp), "resume": True},
    ]
    assert launch(tmp_path, entries) == {}
    for kind in ("ddp", "fsdp"):
        assert_same_run(one["plain"], tmp_path / f"{kind}-plain")
        assert_same_run(one["mixed"], tmp_path / f"{kind}-mixed")
    assert_same_run(one["untied"], tmp_path / "fsdp-untied")
    assert_same_run(one["lora"], tmp_path / "fsdp-lora")
    assert_same_run(one["replay"], tmp_path / "ddp-replay")
    assert_same_run(one["plain"], first_half)  # one process, then two
    assert_same_run(one["plain"], tmp_path / "fsdp-resumed")
    assert_same_run(one["plain"], run(recipe("shrinks", **PLAIN), resume=True))  # two that shared it, then one

    from transformers import AutoModelForCausalLM

    newest = latest_checkpoint(tmp_path / "fsdp-plain")
    assert newest is not None
    model = AutoModelForCausalLM.from_pretrained(newest)
    stored = load_file(newest / "model.safetensors")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in stored.items())


def test_processes_that_were_given_different_things_stop(recipe_data, sums_file, tmp_path):
    rows = [json.loads(line) for line in Path(sums_file).read_text().splitlines()]
    for rank in (0, 1):
        (tmp_path / f"node{rank}").mkdir()
        text = "\n".join(
            map(json.dumps, rows if rank == 0 else [*rows[:-1], {"id": "x", "prompt": "9+9=", "answer": "18"}])
        )
        (tmp_path / f"node{rank}" / "sums.jsonl").write_text(text)
    data = changed(recipe_data, task__path="sums.jsonl", eval__kl_prompts=0)
    nodes = {f"cwd{rank}": str(tmp_path / f"node{rank}") for rank in (0, 1)}
    errors = launch(tmp_path, [{"recipe": data, **nodes}, {"recipe": recipe_data, "rank1": {"seed": 3}}])
    for rank in (0, 1):
        assert "RunError: the processes of this run were given different" in errors[0, rank]
        assert "prompts: processes [0] and [1] do not agree; start all of them with the same recipe" in errors[0, rank]
        assert "given different recipes: processes [0] and [1] do not agree" in errors[1, rank]
    assert not Path(recipe_data["output"]).exists()


def problem(group: int) -> Rollout:
    return Rollout(Problem(str(group), "p"), (1,), (2,), "", group, "stop")


def test_mini_batches_keep_groups_together_and_use_every_rollout_once():
    found = {"policy": [problem(g) for g in range(5) for _ in range(2)], "data": [problem(g) for g in (5, 6)]}
    split = parts(found, 3, 7, seed=1)
    for name, rollouts in found.items():
        assert sorted(s for part in split for s in part[name]) == list(range(len(rollouts)))
    groups = [{found[n][s].group for n in part for s in part[n]} for part in split]
    assert sum(map(len, groups)) == 7 and sorted(map(len, groups)) == [2, 2, 3]
    mine = {"policy": [problem(g) for g in (0, 2, 4) for _ in range(2)], "data": [problem(6)]}
    for whole, own in zip(split, parts(mine, 3, 7, seed=1), strict=True):  # another process agrees on every group
        chosen = {found[n][s].group for n in whole for s in whole[n]}
        assert {mine[n][s].group for n in own for s in own[n]} == chosen & {0, 2, 4, 6}
    assert parts(found, 3, 7, seed=2) != split and parts(found, 1, 7, seed=2)[0] == parts(found, 1, 7, seed=1)[0]


def test_epochs_times_mini_batches_updates_a_step(recipe_data, tmp_path):
    changes = dict(method=CLIPPED, train__steps=2, train__minibatches=2, train__epochs=3, optim__schedule="linear")
    path = run(recipe_data, **changes)
    newest = latest_checkpoint(path)
    assert newest is not None
    state = load_checkpoint(newest)
    assert {float(s["step"]) for s in state["optimizer"]["state"].values()} == {12.0}
    assert [row["lr"] for row in metrics(path)] == pytest.approx([1e-3 * 7 / 12, 1e-3 * 1 / 12])  # of the last update


def test_resume_with_mini_batches_equals_the_uninterrupted_run(recipe_data, tmp_path):
    settings = dict(method=CLIPPED, train__minibatches=2, train__epochs=2)
    whole = run(recipe_data, train__steps=4, output=str(tmp_path / "whole"), **settings)
    run(recipe_data, train__steps=2, output=str(tmp_path / "part"), **settings)
    part = run(recipe_data, train__steps=4, output=str(tmp_path / "part"), resume=True, **settings)
    a, b = weights(whole), weights(part)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("changes", "count", "message"), [
    (dict(train__sharding="fsdp2"), 1, "has no effect with one process"),
    (dict(train__prompts_per_step=3), 4, "gives source 'policy' 3 prompts a step for 4 processes"),
    (dict(train__minibatches=5), 1, "train.minibatches = 5 exceeds train.prompts_per_step = 4"),
    (dict(train__sharding="fsdp2", train__precision="fp16"), 2, "fsdp2 works with neither"),
])  # fmt: skip
def test_settings_that_do_not_fit_the_processes(recipe_data, changes, count, message):
    recipe = parse_recipe(changed(recipe_data, **changes))
    method = set_up(parse_recipe(recipe_data)).method
    with pytest.raises(RecipeError, match=message):
        check_processes(recipe, method, Processes(0, count, torch.device("cpu")))


def test_old_log_probs_matter_from_the_second_update_on(recipe_data, tmp_path):
    """Two epochs with closed clips and with open ones: the first epoch's updates are equal, the second's are not."""
    found = []
    for name, clip in (("closed", 1e-4), ("open", None)):
        method = {"name": "opd", "low": clip or 0.999, "high": clip or 1e4}
        path = run(recipe_data, method=method, train__steps=1, train__epochs=2, output=str(tmp_path / name))
        once = run(recipe_data, method=method, train__steps=1, output=str(tmp_path / f"{name}-once"))
        found.append((weights(path), weights(once)))
    (closed, closed_once), (wide, wide_once) = found
    assert all(torch.equal(closed_once[k], wide_once[k]) for k in wide_once)  # ratio 1: no clip binds
    assert any(not torch.equal(closed[k], wide[k]) for k in wide)


def test_a_policy_gradient_without_a_ratio_takes_one_update_a_batch(recipe_data):
    with pytest.raises(
        RecipeError, match=r"= 2 updates a rollout batch.*method opd has a policy gradient without a ratio"
    ):
        set_up(parse_recipe(changed(recipe_data, train__epochs=2)))
