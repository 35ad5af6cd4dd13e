"""Sources whose responses stand after what a context shows: a student that learns to read what its teacher will be shown."""

import json
from dataclasses import replace

import pytest
from test_loop import changed, metrics, run

from opdkit.config import parse_recipe
from opdkit.contexts import Shown, Sibling, Solution
from opdkit.errors import DataError, MethodError, RecipeError
from opdkit.expressions import read
from opdkit.losses import CrossEntropy
from opdkit.method import Method, Term
from opdkit.plan.plan import plan
from opdkit.rollouts.rollout import Rollout
from opdkit.sources import Dataset, OnPolicy, TeacherSamples, context_of
from opdkit.tasks.problem import Problem
from opdkit.testbed.build import BUILDS, _recipe, find
from opdkit.train.rolling import Rolling
from opdkit.train.setup import set_up
from opdkit.view import View

READ = {
    "name": "compose",
    "rollouts": {
        "plain": "Dataset(share=0.25)",
        "told": "Dataset(share=0.5, context=Shown())",
        "judged": "TeacherSamples(share=0.25, context=Shown(assess=True))",
    },
    "terms": [f"Term(loss=CrossEntropy(), on='{name}')" for name in ("plain", "told", "judged")],
}


@pytest.fixture
def read_data(recipe_data, monkeypatch, tmp_path):
    """Sums as plain text whose solution is their answer."""
    monkeypatch.setenv("OPDKIT_CACHE", str(tmp_path / "cache"))
    task = recipe_data["task"] | {"template": "plain"}
    return recipe_data | {"method": READ, "task": task, "sampling": {"max_new_tokens": 8}}


def rolled(data):
    setup = set_up(parse_recipe(data))
    return setup, Rolling(setup).step(1)


def prompts(setup, rollouts):
    return [setup.student.tokenizer.decode(r.prompt_ids) for r in rollouts]


def test_the_student_reads_the_very_prompts_of_a_self_teacher(read_data):
    """Prompts of the source are those that the view of `opsd` gives its teacher, token by token."""
    setup, found = rolled(read_data)
    assert [len(found[name]) for name in ("plain", "told", "judged")] == [1, 2, 1]
    assert prompts(setup, found["plain"]) == [r.problem.prompt for r in found["plain"]]
    own = [replace(r, prompt_ids=(0,)) for r in found["told"]]
    as_shown = setup.as_read_by(setup.teachers["teacher"], own, setup.told(View("teacher", context=Shown()), own))
    assert [r.prompt_ids for r in found["told"]] == [r.prompt_ids for r in as_shown]
    for r, text in zip(found["told"], prompts(setup, found["told"]), strict=True):
        assert text.replace("?", "\n") == f"{r.problem.answer}\n{r.problem.prompt}"  # this tokenizer has no line end
        assert r.text == r.problem.answer


def test_a_judged_response_stands_under_its_own_verdict(read_data):
    data = changed(read_data, train__prompts_per_step=16)
    setup, found = rolled(data)
    for r in found["judged"]:
        assert r.correct is (r.text.strip() == r.problem.answer) and not r.correct
    right = [replace(r, text=r.problem.answer, reward=None, correct=None) for r in found["judged"]]
    source = setup.method.rollouts["judged"]
    told = prompts(setup, setup.shown(source, [*right, *found["judged"]]))
    n = len(right)
    assert n == 4 and all("?correct?" in text for text in told[:n]) and all("?incorrect?" in text for text in told[n:])


def test_what_cannot_be_shown_leaves_the_prompt(read_data):
    setup, _ = rolled(read_data)
    bare = Rollout(Problem("b", "1+1=", answer="2"), (5, 6), (7,), "2", 0, "stop", source="data")
    assert setup.shown(Dataset(context=Shown((Solution("metadata.hint"),))), [bare]) == [bare]
    assert setup.shown(Dataset(), [bare]) == [bare] and setup.shown(OnPolicy(), [bare]) == [bare]
    assert context_of(OnPolicy()) == "own" and context_of(TeacherSamples(context=Shown())) == Shown()


def test_it_trains_and_is_counted_as_unplanned(read_data):
    rows = metrics(run(read_data, train__steps=2))
    assert all(row["loss"] > 0 for row in rows)
    notes = plan(parse_recipe(read_data), timed=False).notes
    assert sum("what its context adds is not counted" in note for note in notes) == 2


def test_it_is_a_value_that_reads_back():
    source = TeacherSamples(0.5, context=Shown((Solution("answer"),), assess=True))
    assert read(repr(source), "source", "here") == source
    method = Method(name="m", rollouts={"d": Dataset(context=Shown(assess=True))}, views={},
                    terms=(Term(loss=CrossEntropy(), on="d"),))  # fmt: skip
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method and method.needs_reward


def test_what_has_no_sense_is_refused(read_data):
    with pytest.raises(
        MethodError, match="its context shows a sibling, but these sources have one response to a prompt"
    ):
        Dataset(context=Shown((Sibling(), Solution())))
    told = {"name": "compose", "rollouts": {"told": "Dataset(context=Shown((Solution('metadata.proof'),)))"},
            "terms": ["Term(loss=CrossEntropy(), on='told')"]}  # fmt: skip
    with pytest.raises(DataError, match="no problem of the data set has such a text"):
        set_up(parse_recipe(changed(read_data, method=told, teachers={})))
    with pytest.raises(RecipeError, match=r"learns from rewards, but task .* has no verifier"):
        set_up(parse_recipe(changed(read_data, task__verifier="none")))
    told["rollouts"]["told"] = "Dataset(context=Shown())"
    with pytest.raises(
        DataError, match=r"the student reads .* prompt tokens with its context.*over its context of 128"
    ):
        set_up(parse_recipe(changed(read_data, method=told, teachers={}, sampling__max_new_tokens=124)))
    setup, _ = rolled(read_data)
    talk = Problem("t", "q", response=({"role": "assistant", "content": "a"},))
    with pytest.raises(DataError, match="the response of problem t is a conversation; a rollout source with a context"):
        setup.shown(Dataset(context=Shown()), [Rollout(talk, (4,), (5,), "a", 0, "stop")])


# ---------------------------------------------------------------------------------------------------------------------
# The testbed's reader


def test_the_reader_is_shown_what_the_recipes_show():
    """The forms that the build trains on are those of the views of opsd, sdft and antisd in its task."""
    build = find("reader")
    method = build.method
    assert method["name"] == "compose" and build.task["template"] == "plain" and build.start in BUILDS
    recipe = parse_recipe(_recipe(build, "x", "y"))
    texts = method["rollouts"].values()
    contexts = [context_of(read(text, "source", "reader")) for text in texts]
    assert contexts == ["own", Shown(), Shown(assess=True), Shown(assess=True)]
    assert recipe.teachers["teacher"].path == "student:base"
