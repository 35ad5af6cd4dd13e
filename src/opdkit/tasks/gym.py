"""Tasks from reasoning-gym, by name, with its own scorer.

Problems are generated when they are read, so ten thousand of them cost nothing up front. Training and evaluation draw
from seed ranges that cannot meet, and a training prompt that is also an evaluation prompt is drawn again.

Left out: `composite` (train one task a recipe) and curricula.
"""

import dataclasses
import re
from typing import Any, Protocol, runtime_checkable

from opdkit.config import TaskConfig, nearest
from opdkit.errors import DataError, RecipeError
from opdkit.rewards.isolated import Isolated
from opdkit.tasks.problem import PROBE, LazySequence, Problem, Task, Verdict, Verifier

TRAIN_SIZE = 10_000
_REDRAWS = 200
_HALF = 2**30  # training seeds start below it, evaluation seeds lie this much higher
_STRIDE = (
    10_000_019  # between the ranges of two task.seed values; a prime, so that ranges of other seeds do not meet soon
)
_ANSWER = re.compile(r"<answer>(?P<tag>.*?)(?:</answer>|\Z)|(?:\*\*)?answer:(?:\*\*)?", re.IGNORECASE | re.DOTALL)


@runtime_checkable
class ProceduralDataset(Protocol):
    """What is used of reasoning-gym's data sets."""

    def __getitem__(self, idx: int) -> dict[str, Any]: ...


def gym_task(config: TaskConfig) -> Task:
    """A reasoning-gym task. Raises RecipeError for an unknown name or setting, DataError when prompts run out."""
    name, size = str(config.name), config.train_size or TRAIN_SIZE
    _check_settings(name, config.settings)
    start = config.seed * _STRIDE % _HALF
    held = _evaluation(name, config, start + _HALF)
    prompts = frozenset(str(problem.prompt) for problem in held)
    # Some data sets make their items at once and know no index beyond their size: ask for the spare ones too.
    spare = max(size, 1000)
    dataset = _create(name, config.settings, start, size + spare)
    train = GeneratedProblems(name, dataset, size, spare, prompts)
    redrawn = sum(train.source(i) != i for i in range(min(PROBE, size)))
    if redrawn > min(PROBE, size) * 3 // 4:  # fail now, not when a redraw runs out in the middle of the run
        raise DataError(
            f"reasoning-gym '{name}': {redrawn} of the first {min(PROBE, size)} training prompts are held out; "
            "lower task.eval_size or make the task more varied with task.settings"
        )
    return Task(name=name, train=train, eval=held, verify=gym_verifier(name, config.settings, start, size + spare))


class GeneratedProblems(LazySequence[Problem]):
    """Problems made on access: item i is always the same, and none has a held-out prompt."""

    def __init__(self, name: str, dataset: ProceduralDataset, size: int, spare: int, held_out: frozenset[str]) -> None:
        self._name, self._dataset, self._size, self._spare, self._held_out = name, dataset, size, spare, held_out

    def __len__(self) -> int:
        return self._size

    def item(self, index: int) -> Problem:
        return _problem(self._name, "train", index, self._draw(index)[1])

    def source(self, item: int) -> int:
        """The data set's index behind item: its own, or a spare one where its prompt is held out."""
        return self._draw(item)[0]

    def _draw(self, item: int) -> tuple[int, dict[str, Any]]:
        candidates = [item, *(self._size + (item * _REDRAWS + k) % self._spare for k in range(_REDRAWS))]
        for index in candidates:
            entry = self._dataset[index]
            if entry["question"] not in self._held_out:
                return index, entry
        raise DataError(
            f"reasoning-gym '{self._name}': {_REDRAWS} draws for training item {item} gave only held-out prompts; "
            "lower task.eval_size or make the task more varied with task.settings"
        )


def gym_verifier(name: str, settings: dict[str, Any], seed: int, size: int) -> Verifier:
    """The task's own scorer on the extracted answer: reward = score, correct = score of exactly 1.

    It runs in a process of its own with a time limit, because several scorers evaluate the answer as an expression: one
    that does not end in time (`9**9**9**9`), or that the scorer cannot read, scores 0.
    """
    scorer = Isolated(("gym", name, {**settings, "seed": seed, "size": size}))

    def verify(problem: Problem, text: str) -> Verdict:
        entry = {"question": problem.prompt, "answer": problem.answer, "metadata": dict(problem.metadata)}
        score = scorer(extract_answer(text), entry)
        reward = 0.0 if score is None else float(score)
        return Verdict(reward=reward, correct=reward >= 1.0)

    return verify


def extract_answer(text: str) -> str:
    """What follows the last `Answer:` or stands in the last `<answer>...</answer>`, else the whole text; stripped.

    Case does not matter; an `<answer>` that is not closed (a stop string may cut the tag) runs to the end of the text.
    """
    found = list(_ANSWER.finditer(text))
    if not found:
        return text.strip()
    last = found[-1]
    return (text[last.end() :] if last["tag"] is None else last["tag"]).strip()


def _check_settings(name: str, settings: dict[str, Any]) -> None:
    from reasoning_gym.factory import DATASETS

    names = sorted(set(DATASETS) - {"composite"})
    if name not in names:
        raise RecipeError(f"reasoning-gym has no task '{name}'{nearest(name, names)}")
    known = [field.name for field in dataclasses.fields(DATASETS[name][1])]
    for key in settings:
        if key in ("seed", "size"):
            raise RecipeError(
                f"task.settings.{key} is set by the recipe: use task.seed, task.train_size and task.eval_size"
            )
        if key not in known:
            rest = [field for field in known if field not in ("seed", "size")]
            raise RecipeError(f"reasoning-gym '{name}' has no setting '{key}'{nearest(key, rest)}")


def _create(name: str, settings: dict[str, Any], seed: int, size: int) -> ProceduralDataset:
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **settings)
    except (AssertionError, TypeError, ValueError) as error:  # what its configurations' validate() raises
        raise RecipeError(f"reasoning-gym '{name}' refuses task.settings {settings}: {error}") from error


def _evaluation(name: str, config: TaskConfig, seed: int) -> list[Problem]:
    draws = 4 * config.eval_size + 100
    dataset = _create(name, config.settings, seed, draws)
    found: dict[str, Problem] = {}
    for index in range(draws):
        entry = dataset[index]
        found.setdefault(entry["question"], _problem(name, "eval", index, entry))
        if len(found) == config.eval_size:
            return list(found.values())
    raise DataError(
        f"reasoning-gym '{name}' gave {len(found)} distinct prompts in {draws} draws, task.eval_size asks for "
        f"{config.eval_size}; lower it or make the task more varied with task.settings"
    )


def _problem(name: str, part: str, index: int, entry: dict[str, Any]) -> Problem:
    return Problem(
        id=f"{name}:{part}:{index}",
        prompt=entry["question"],
        answer=entry["answer"],
        domain=name,
        metadata=entry["metadata"],
    )
