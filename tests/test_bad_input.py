"""What a user gets for bad input: exit code 2 (1 for a broken run), one line that says what to do, nothing half-written."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import make_model, make_tokenizer
from typer.testing import CliRunner

from opdkit.cli import app


def opd_train(data: dict, tmp_path: Path, *overrides: str):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(data))
    return CliRunner().invoke(app, ["train", str(recipe), *overrides])


def error_line(result, code: int = 2) -> str:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.replace("\n", " ").split("error: ") if line.strip()]
    return " ".join(lines[-1].split())


def no_run(data: dict) -> bool:
    return not Path(data["output"]).exists()


def test_different_vocabularies(recipe_data, tmp_path):
    other = make_model(tmp_path / "other", 3, tokenizer=make_tokenizer("zyxwvutsrqponmlkjihgfedcba0123456789 +-=.?"))
    recipe_data["teachers"]["teacher"]["path"] = other
    line = error_line(opd_train(recipe_data, tmp_path))
    assert "different vocabularies" in line and "first is id 2" in line and "student's tokenizer" in line
    assert no_run(recipe_data)


def test_no_chat_template(recipe_data, tmp_path):
    recipe_data["student"]["path"] = make_model(tmp_path / "plain", 1, tokenizer=make_tokenizer(template=False))
    line = error_line(opd_train(recipe_data, tmp_path))
    assert "no chat template" in line and "task.template: plain" in line and no_run(recipe_data)
    assert opd_train(recipe_data, tmp_path, "task.template=plain", "train.steps=1").exit_code == 0


def test_a_prompt_longer_than_the_context(recipe_data, tmp_path):
    with open(recipe_data["task"]["path"]) as source:
        rows = source.read() + "\n" + json.dumps({"id": "long", "prompt": "1+" * 100 + "1=", "answer": "101"})
    path = tmp_path / "long.jsonl"
    path.write_text(rows)
    recipe_data["task"] |= {"path": str(path), "eval_size": 4}
    line = error_line(opd_train(recipe_data, tmp_path))
    assert "long" in line and "context of 128" in line and "task.overlong: drop" in line and no_run(recipe_data)
    result = opd_train(recipe_data, tmp_path, "task.max_prompt_tokens=100", "task.overlong=drop", "train.steps=1")
    assert result.exit_code == 0, result.output


def test_an_empty_data_set(recipe_data, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    recipe_data["task"]["path"] = str(path)
    assert "empty" in error_line(opd_train(recipe_data, tmp_path)) and no_run(recipe_data)


def test_a_group_of_one_where_a_baseline_needs_more(recipe_data, tmp_path):
    recipe_data |= {"method": {"name": "grpo"}, "teachers": {}}
    line = error_line(opd_train(recipe_data, tmp_path, "sampling.group=1"))
    assert "group" in line and "set sampling.group to 2 or more" in line and no_run(recipe_data)


def test_a_model_path_that_does_not_exist(recipe_data, tmp_path):
    line = error_line(opd_train(recipe_data, tmp_path, "teachers.teacher.path=./nowhere"))
    assert "teacher" in line and "'./nowhere'" in line and "no such folder" in line and no_run(recipe_data)


def test_a_run_folder_that_holds_another_run(recipe_data, tmp_path):
    assert opd_train(recipe_data, tmp_path, "train.steps=1").exit_code == 0
    before = sorted(p.name for p in Path(recipe_data["output"]).iterdir())
    line = error_line(opd_train(recipe_data, tmp_path, "train.steps=1"), code=1)
    assert "already holds a run" in line and "--resume" in line
    line = error_line(
        CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), "optim.lr=0.5", "--resume"]), code=1
    )
    assert "optim.lr" in line and "0.5" in line
    assert sorted(p.name for p in Path(recipe_data["output"]).iterdir()) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trian": {"steps": 3}}, ["unknown key 'trian'", "did you mean 'train'"]),
        ({"optim": {"lrr": 1}}, ["unknown key 'optim.lrr'", "did you mean 'lr'"]),
        ({"optim": {"lr": -1}}, ["optim.lr", "greater than 0"]),
        ({"sampling": {"temperature": 0}}, ["sampling.temperature"]),
        ({"method": {"name": "vodp"}}, ["unknown method 'vodp'", "did you mean 'vopd'"]),
        ({"method": {"name": "vopd", "kk": 3}}, ["no argument 'kk'", "did you mean 'k'"]),
        ({"method": {"name": "topk_kl", "k": 1000}}, ["top 1000 of a vocabulary of 44"]),
        ({"method": {"name": "grpo_opd", "how": "both"}}, ["how='both': expected 'signal' or 'terms'"]),
        ({"method": {"name": "sod", "cap": "big"}}, ["cap='big': expected float or null"]),
        ({"method": {"name": "sod", "std": "maybe"}}, ["std='maybe': expected bool or 'population'"]),
        ({"method": {"name": "gopd", "lam": float("nan")}}, ["method gopd: lam=nan: expected a number"]),
        ({"tools": "calculator"}, ["'tools' = 'calculator': expected a mapping of settings"]),
        ({"method": {"name": "antisd", "lam": 0.0}}, ["lam = 0.0 must be positive", "take grpo"]),
        (
            {"method": {"name": "antisd", "gate": False, "warmup": 2}},
            ["nor warmup and close without gate; remove them"],
        ),
        (
            {"method": {"name": "compose", "watch": {"loss": "ones()"}}},
            ["watch 'loss' has the name of a number", "another"],
        ),
        ({"method": {"name": "opd", "teacher": "tutor"}}, ["asks for teacher 'tutor'", "add teachers: {tutor:"]),
        ({"teachers": {}}, ["asks for teacher 'teacher'", "add teachers:"]),
        ({"method": {"name": "grpo"}}, ["teacher 'teacher' is not used by method grpo"]),
        ({"method": {"name": "gkd"}, "train": {"prompts_per_step": 1}}, ["leaves no prompt for rollout source"]),
        ({"eval": {"temperature": 0.0, "top_p": 0.9}}, ["eval.top_p = 0.9 has no effect"]),
        ({"student": {"temperature": 2.0}}, ["student.temperature has no effect"]),
        ({"task": {"verifier": "none"}, "method": {"name": "grpo"}, "teachers": {}}, ["has no verifier"]),
        ({"sampling": {"max_new_tokens": 500}}, ["max_new_tokens = 500", "context of 128"]),
    ],
    ids=lambda x: json.dumps(x)[:40] if isinstance(x, dict) else "",
)
def test_wrong_settings(recipe_data, tmp_path, change, words):
    for key, value in change.items():
        merged = (
            {**recipe_data.get(key, {}), **value} if key in ("optim", "sampling", "task", "train", "student") else value
        )
        recipe_data[key] = merged
    line = error_line(opd_train(recipe_data, tmp_path))
    assert all(word in line for word in words), line
    assert no_run(recipe_data)


def test_a_setting_is_the_yaml_value(recipe_data, tmp_path):
    line = error_line(opd_train(recipe_data, tmp_path, "train.steps=many"))
    assert "train.steps" in line and "many" in line
    assert "not of the form" in error_line(opd_train(recipe_data, tmp_path, "train.steps"))
