"""Offline difficulty: what is measured, which prompts are repeated, and that a run with it resumes exactly."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from test_loop import changed, metrics, run, same, weights
from typer.testing import CliRunner

from opdkit.cli import app
from opdkit.config import TaskConfig, parse_recipe
from opdkit.difficulty_command import difficulty
from opdkit.errors import DataError, RecipeError, RunError
from opdkit.tasks.difficulty import read_difficulty, repeats, upsampled
from opdkit.tasks.problem import Problem
from opdkit.train.setup import set_up

PROBLEMS = [Problem(str(i), f"{i}=") for i in range(20)]
# bucket 0: 6 prompts, 1: 2, 2: 5, 3: 1, 4: 4 (of 4 samples); problems 18 and 19 were not measured
BUCKETS = [0] * 6 + [1] * 2 + [2] * 5 + [3] + [4] * 4


def write(path, buckets=BUCKETS, samples=4) -> str:
    rows = [{"id": str(i), "domain": "d", "correct": c, "samples": samples} for i, c in enumerate(buckets)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def config(path: str, **more) -> TaskConfig:
    return TaskConfig(kind="file", path="x", upsample=path, **more)


def test_smaller_target_buckets_grow_to_the_largest_that_is_not_extreme():
    sizes = Counter(BUCKETS)
    assert repeats(sizes, 4, "u") == {1: 3, 3: 4}
    assert repeats(sizes, 4, "j") == {1: 3, 3: 4, 4: 1}
    assert repeats({0: 9, 1: 3, 2: 2, 4: 7}, 4, "j") == {2: 1}  # bucket 4 is larger already and stays
    assert repeats({0: 9, 4: 7}, 4, "u") == {}


@pytest.mark.parametrize(("shape", "sizes"), [("u", [6, 5, 5, 5, 4]), ("j", [6, 5, 5, 5, 5])])
def test_the_prompts_of_an_epoch(tmp_path, shape, sizes):
    path = write(tmp_path / "d.jsonl")
    pool = upsampled(PROBLEMS, config(path, upsample_shape=shape))
    assert pool == sorted(pool) and set(pool) == set(range(20))  # nothing is deleted
    times = Counter(pool)
    assert [sum(times[i] for i, c in enumerate(BUCKETS) if c == bucket) for bucket in range(5)] == sizes
    assert times[18] == times[19] == 1 and times[13] == 5  # the only prompt of bucket 3
    assert {times[6], times[7]} == {2, 3}  # 3 more for two prompts
    assert pool == upsampled(PROBLEMS, config(path, upsample_shape=shape))
    drawn = {tuple(upsampled(PROBLEMS, config(path, upsample_shape=shape, seed=s))) for s in range(8)}
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r":1 is not valid JSON"),
        ('{"id": "a"}', r"expected {id, correct, samples}"),
        ('{"id": "a", "correct": 5, "samples": 4}', "0 <= correct <= samples"),
        ('{"id": "a", "correct": 1, "samples": 4}\n{"id": "a", "correct": 1, "samples": 4}', ":2: a second line"),
        ('{"id": "a", "correct": 1, "samples": 4}\n{"id": "b", "correct": 1, "samples": 8}', r"got \[4, 8\]"),
        ("", "got no line"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, text, said):
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        read_difficulty(tmp_path / "d.jsonl")


def test_files_that_do_not_fit_the_task(tmp_path):
    with pytest.raises(DataError, match="opd difficulty RECIPE --out"):
        upsampled(PROBLEMS, config(str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match="names 1 problems that are not among the training problems, such as '17'"):
        upsampled(PROBLEMS[:17], config(write(tmp_path / "a.jsonl")))
    with pytest.raises(DataError, match=r"shape u repeats no prompt \(prompts by correct responses: 0: 2, 4: 2\)"):
        upsampled(PROBLEMS, config(write(tmp_path / "b.jsonl", [0, 0, 4, 4])))


def measured(recipe_data, tmp_path, name: str = "d.jsonl", **more) -> list[dict]:
    difficulty(parse_recipe(changed(recipe_data, sampling__max_new_tokens=2)), str(tmp_path / name), **more)
    return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]


def with_a_problem_twice(recipe):
    """As a task of the user's own may give them: rows of files get ids of their own."""
    setup = set_up(recipe)
    setup.train = replace(setup.train, problems=[*setup.train.problems, setup.train.problems[0]])
    return setup


def test_measuring(recipe_data, tmp_path, monkeypatch):
    rows = measured(recipe_data, tmp_path, samples=8)
    assert len(rows) == 28 and all(row["samples"] == 8 and 0 <= row["correct"] <= 8 for row in rows)
    monkeypatch.setattr("opdkit.difficulty_command.CHUNK", 5)
    assert measured(recipe_data, tmp_path, "again.jsonl", samples=8) == rows
    assert measured(recipe_data, tmp_path, "some.jsonl", samples=8, prompts=7) == rows[:7]
    with pytest.raises(RecipeError, match="exists"):
        measured(recipe_data, tmp_path)
    with pytest.raises(RecipeError, match="lies in a folder that does not exist"):
        measured(recipe_data, tmp_path, "nowhere/d.jsonl")
    with monkeypatch.context() as patch, pytest.raises(DataError, match="1 problem ids occur more than once"):
        patch.setattr("opdkit.difficulty_command.set_up", with_a_problem_twice)
        patch.setattr("opdkit.difficulty_command.on_policy", lambda *a, **k: pytest.fail("sampled before the check"))
        measured(recipe_data, tmp_path, "y.jsonl", samples=2)
    with pytest.raises(RecipeError, match="no verifier"):
        difficulty(parse_recipe(changed(recipe_data, task__verifier="none")), str(tmp_path / "x.jsonl"))
    with pytest.raises(RecipeError, match="2 or more"):
        difficulty(parse_recipe(recipe_data), str(tmp_path / "x.jsonl"), samples=1)


def test_the_command(recipe_data, tmp_path):
    import yaml

    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_data))
    arguments = [
        "difficulty",
        str(tmp_path / "r.yaml"),
        "--samples",
        "2",
        "--prompts",
        "3",
        "--out",
        str(tmp_path / "o"),
    ]
    found = CliRunner().invoke(app, arguments)
    assert (
        found.exit_code == 0
        and "3 training prompts, 2 samples each" in found.output
        and "task.upsample=" in found.output
    )


def test_a_run_with_it_repeats_prompts_and_resumes_exactly(recipe_data, tmp_path):
    ids = [row["id"] for row in measured(recipe_data, tmp_path, samples=2)]
    buckets = {name: (2 if i < 12 else 1) for i, name in enumerate(ids[:-1])} | {ids[-1]: 3}
    rows = [{"id": name, "correct": c, "samples": 4} for name, c in buckets.items()]
    (tmp_path / "made.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = changed(recipe_data, task__upsample=str(tmp_path / "made.jsonl"), train__steps=4, eval__kl_prompts=0)
    pool = set_up(parse_recipe(data)).pool
    assert len(pool) == 15 + 15 + 15 and Counter(pool)[27] == 15
    whole = run(data, output=str(tmp_path / "whole"))
    part = run(data, train__steps=2, output=str(tmp_path / "part"))
    run(data, output=str(tmp_path / "part"), resume=True)
    assert same(weights(whole), weights(part)) and metrics(whole)[-1]["loss"] == metrics(part)[-1]["loss"]
    last, least = rows[-1]["id"], rows[0]["id"]
    swapped = [{**r, "id": {last: least, least: last}.get(r["id"], r["id"])} for r in rows]
    (tmp_path / "made.jsonl").write_text("\n".join(map(json.dumps, swapped)))
    with pytest.raises(RunError, match=r"task\.upsample is not the file"):
        run(data, train__steps=6, output=str(tmp_path / "part"), resume=True)


def test_a_shape_without_a_file_has_no_effect(recipe_data):
    with pytest.raises(RecipeError, match=r"has no effect without task\.upsample"):
        run(changed(recipe_data, task__upsample_shape="j"))
