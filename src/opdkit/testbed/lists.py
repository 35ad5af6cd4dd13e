"""The `lists` task: score some items and write them down as a JSON list, best first, that a strict parser accepts.

A prompt gives K items, an id and two digits each; the score of an item is the larger digit. For `3:47,8:12,1:90>` the
target is `[{"id":1,"score":9},{"id":3,"score":7},{"id":8,"score":2}]`: sorted by score, ties as in the prompt. The order
makes the format hard where lists of a fixed order would not: at every object the model must know which ids are left.

Left out: repairing outputs that do not parse, and lists of objects with more than a score.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from random import Random
from typing import Any, Literal

from pydantic import Field

from opdkit.config import Section
from opdkit.tasks.problem import Problem, Verdict

Kind = Literal["valid", "missing one", "other"]
_NUMBER = re.compile(r"\s*[-+]?\d+(\.\d+)?([eE][-+]?\d+)?\s*", re.ASCII)


class ListsSettings(Section):
    """Settings of `lists`."""

    items: int = Field(4, ge=2, le=9, description="objects of a list, K; ids are single digits")


@dataclass(frozen=True)
class Judged:
    """What the strict parser found: the scores by id in the order written (valid lists only), or what is wrong.

    "missing one" is a well-formed list of K - 1 distinct input ids, the paper's format-manifold collapse.
    """

    kind: Kind
    scores: Mapping[str, float]
    wrong: str = ""


def draw_list(settings: ListsSettings, random: Random) -> Problem:
    """A problem; `metadata` holds the true scores by id, in the order of the prompt."""
    ids = random.sample("0123456789", settings.items)
    items = {name: f"{random.randrange(100):02d}" for name in ids}
    truth = {name: int(max(digits)) for name, digits in items.items()}
    prompt = ",".join(f"{name}:{digits}" for name, digits in items.items()) + ">"
    best_first = sorted(truth, key=lambda name: -truth[name])  # sorted() keeps the prompt's order in ties
    objects = ",".join(f'{{"id":{name},"score":{truth[name]}}}' for name in best_first)
    return Problem(id="", prompt=prompt, answer=f"[{objects}]", domain="lists", metadata={"scores": truth})


def verify_list(problem: Problem, text: str) -> Verdict:
    """Correct = the strict parser accepts the list, right or wrong scores; reward = NDCG@1 of an accepted list, else 0."""
    truth = problem.metadata["scores"]
    judged = judge(text, tuple(truth))
    valid = judged.kind == "valid"
    return Verdict(
        ndcg_at_1(judged.scores, truth) if valid else 0.0, valid, f"{judged.kind}: {judged.wrong}".rstrip(": ")
    )


def judge(text: str, ids: tuple[str, ...]) -> Judged:
    """The strict parser of 2605.08737: the outermost [...] block, exactly K objects, each with a distinct input id and
    a numeric score (a number, or a string that is one). Anything else is no list."""
    begin, end = text.find("["), text.rfind("]")
    if begin < 0 or end < begin:
        return Judged("other", {}, "no [...] block")
    try:
        found = json.loads(text[begin : end + 1])
    except (ValueError, RecursionError):
        return Judged("other", {}, "not JSON")
    scores: dict[str, float] = {}
    for entry in found:
        name, score = _object(entry)
        if name is None or score is None:
            return Judged("other", {}, f"not an object with an id and a numeric score: {json.dumps(entry)[:40]}")
        if name not in ids or name in scores:
            return Judged("other", {}, f"id {name[:20]} {'twice' if name in scores else 'is not in the prompt'}")
        scores[name] = score
    if len(scores) == len(ids):
        return Judged("valid", scores)
    missing = ", ".join(name for name in ids if name not in scores)
    return Judged("missing one" if len(scores) == len(ids) - 1 else "other", {}, f"without {missing}")


def _object(entry: Any) -> tuple[str | None, float | None]:
    """(id as text, score) of a list's entry; None for what it lacks."""
    if not isinstance(entry, dict):
        return None, None
    name, score = entry.get("id"), entry.get("score")
    if isinstance(name, bool) or not isinstance(name, int | str):
        name = None
    return None if name is None else str(name), _number(score)


def _number(value: Any) -> float | None:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if isfinite(value) else None
    except OverflowError:  # an integer beyond a float's range
        return None


def ndcg_at_1(scores: Mapping[str, float], truth: Mapping[str, int]) -> float:
    """True score of the item that is scored highest (ties: the first written), over the best true score; 1 if that is 0."""
    best = max(truth.values())
    return truth[max(scores, key=lambda name: scores[name])] / best if best else 1.0
