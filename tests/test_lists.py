"""The `lists` task: draw, target, strict parser, reward, its place among the testbed's tasks and builds."""

import json
from random import Random

import pytest

from opdkit.config import TaskConfig
from opdkit.errors import RecipeError
from opdkit.tasks.load import load_task
from opdkit.tasks.problem import Problem
from opdkit.testbed.build import BUILDS, content_hash, find
from opdkit.testbed.lists import ListsSettings, draw_list, judge, ndcg_at_1, verify_list
from opdkit.testbed.tokenizer import testbed_tokenizer as make_tokenizer

IDS = ("3", "8", "1")
PROBLEM = Problem(id="x", prompt="3:47,8:12,1:90>", domain="lists", metadata={"scores": {"3": 7, "8": 2, "1": 9}})


def objects(*pairs: object) -> str:
    return json.dumps([{"id": name, "score": score} for name, score in pairs])  # type: ignore[misc]


def make(**settings: object):
    config = {"kind": "testbed", "name": "lists", "eval_size": 20, "settings": settings}
    return load_task(TaskConfig.model_validate(config))


def test_a_problem_and_its_target():
    problem = draw_list(ListsSettings(items=3), Random(5))
    ids, digits = zip(*(item.split(":") for item in str(problem.prompt).removesuffix(">").split(",")), strict=True)
    assert len(set(ids)) == 3 and tuple(problem.metadata["scores"]) == ids
    assert [problem.metadata["scores"][name] for name in ids] == [max(map(int, d)) for d in digits]
    written = json.loads(problem.answer or "")
    assert sorted((-o["score"], ids.index(str(o["id"]))) for o in written) == [
        (-o["score"], ids.index(str(o["id"]))) for o in written
    ]


@pytest.mark.parametrize("items", [2, 4, 9])
def test_targets_are_correct_fit_the_tokenizer_and_damaged_ones_are_not(items):
    task, tokenizer = make(items=items), make_tokenizer()
    for problem in task.eval:
        target = problem.answer or ""
        assert verify_list(problem, target).correct and verify_list(problem, target).reward == 1.0
        assert task.verify(problem, f" {target}\n").reward == 1.0
        ids = tokenizer(target)["input_ids"]
        assert tokenizer.decode(ids) == target and len(ids) == 18 * items + items - 1 + 2  # and none unknown
        for wrong in (target[:-1], target[1:], target.replace("}", "", 1), "", "[]"):
            assert verify_list(problem, wrong).reward == 0.0 and not verify_list(problem, wrong).correct


@pytest.mark.parametrize(
    "text",
    [
        objects((1, 9), (3, 7), (8, 2)),
        objects(("1", "9"), ("3", " 7.5 "), ("8", "-2e1")),  # numeric strings
        f"the list: {objects((1, 9), (3, 7), (8, 2))} done",  # outermost block
        '[{"id": 1, "score": 9, "why": "[x]"}, {"id": 3, "score": 0}, {"score": 1.5, "id": 8}]',
    ],
)
def test_the_strict_parser_accepts(text):
    assert judge(text, IDS).kind == "valid" and set(judge(text, IDS).scores) == set(IDS)


@pytest.mark.parametrize(
    ("text", "kind", "wrong"),
    [
        (objects((1, 9), (3, 7)), "missing one", "without 8"),
        (objects((1, 9)), "other", "without 3, 8"),
        ("[]", "other", "without 3, 8, 1"),
        (objects((1, 9), (3, 7), (8, 2), (8, 2)), "other", "id 8 twice"),
        (objects((1, 9), (3, 7), (3, 2)), "other", "id 3 twice"),
        (objects((1, 9), (3, 7), (5, 2)), "other", "id 5 is not in the prompt"),
        (objects((1, 9), (3, 7), (8, 2), (5, 2)), "other", "id 5 is not"),
        (objects((1, 9), (3, 7), (8, True)), "other", "not an object"),
        (objects((1, 9), (3, 7), (8, None)), "other", "not an object"),
        (objects((1, 9), (3, 7), (8, "high")), "other", "not an object"),
        (objects((1, 9), (3, 7), (8, "nan")), "other", "not an object"),
        (objects((1, 9), (3, 7), (8, "1_0")), "other", "not an object"),
        (objects((1, 9), (3, 7), (True, 2)), "other", "not an object"),
        ('[{"id":1,"score":9},{"id":3,"score":NaN},{"id":8,"score":2}]', "other", "not an object"),
        ('[{"id":1,"score":9},{"id":3,"score":1e999},{"id":8,"score":2}]', "other", "not an object"),
        (f'[{{"id":1,"score":1{"0" * 400}}},{{"id":3,"score":1}},{{"id":8,"score":2}}]', "other", "not an object"),
        ('[1, 3, 8]', "other", "not an object"),
        ('{"id":1,"score":9}', "other", "no [...] block"),
        ("] [", "other", "no [...] block"),
        ('[{"id":1,"score":9},{"id":3,"score":7},{"id":8,"score":2}', "other", "no [...] block"),
        ('[{"id":1,"score":9},{"id":3,"score":7},{"id":8,"score":2},]', "other", "not JSON"),
        (f"{objects((1, 9), (3, 7), (8, 2))} and [2]", "other", "not JSON"),
        ("[" * 5000 + "]" * 5000, "other", "not"),
    ],
)  # fmt: skip
def test_everything_else_is_zero_and_says_why(text, kind, wrong):
    judged = judge(text, IDS)
    assert judged.kind == kind and wrong in judged.wrong and not judged.scores
    verdict = verify_list(PROBLEM, text)
    assert verdict.reward == 0.0 and not verdict.correct and verdict.feedback == f"{kind}: {judged.wrong}"


def test_an_accepted_list_earns_its_ndcg_at_1():
    truth = {"3": 7, "8": 2, "1": 9}
    assert verify_list(PROBLEM, objects((3, 5), (1, 4), (8, 0))).reward == pytest.approx(7 / 9)
    assert verify_list(PROBLEM, objects((8, 5), (1, 4), (3, 0))).reward == pytest.approx(2 / 9)
    assert ndcg_at_1({"8": 1.0, "1": 1.0, "3": 0.0}, truth) == pytest.approx(2 / 9)  # a tie: the first written
    assert ndcg_at_1({"3": 1.0, "8": 0.0}, {"3": 0, "8": 0}) == 1.0
    verdict = verify_list(PROBLEM, objects((1, 9), (3, 7), (8, 2)))
    assert (verdict.reward, verdict.correct, verdict.feedback) == (1.0, True, "valid")


def test_settings_and_builds():
    assert [len(p.metadata["scores"]) for p in make(items=2).eval[:3]] == [2, 2, 2]
    with pytest.raises(RecipeError, match=r"task.settings.items = 10: .* less than or equal to 9"):
        make(items=10)
    with pytest.raises(RecipeError, match="'lists' has no setting 'item': did you mean 'items'"):
        make(item=3)
    names = [name for name in BUILDS if BUILDS[name].task["name"] == "lists"]
    assert names == ["lists", "lists-weak", "lists-mid"] and len({content_hash(find(name)) for name in names}) == 3
