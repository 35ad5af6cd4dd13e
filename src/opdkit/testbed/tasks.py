"""The testbed's tasks for models of 0.2M parameters and up: `sums`, `gym` (from reasoning-gym), `mix` (both), `lists`, and
`calculator`, which needs a tool.

Every prompt belongs to the training or to the evaluation half by its hash, whatever the seed: no model of the testbed
has been trained on an evaluation prompt of any other. Problems are drawn when they are read.

Left out: building models on these tasks (`build`), all other reasoning-gym tasks (`opdkit.tasks.gym`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any, Literal, TypeVar
from zlib import crc32

from pydantic import Field, ValidationError, model_validator

from opdkit.config import Section, TaskConfig, nearest
from opdkit.errors import DataError, RecipeError
from opdkit.tasks.problem import LazySequence, Problem, Task, Verdict, Verifier
from opdkit.testbed import grammar
from opdkit.testbed.expressions import CalculatorSettings, draw_expression, solution, verify_expression
from opdkit.testbed.lists import ListsSettings, draw_list, verify_list

TRAIN_SIZE = 10_000
GYM_TASK = "spell_backward"
Part = Literal["train", "eval"]
Draw = Callable[[Random], Problem]
Settings = TypeVar("Settings", bound=Section)
_HELD_OUT = 10  # one prompt in so many belongs to the evaluation half
_DRAWS = 1000  # for one problem, before the task counts as too narrow


class SumsSettings(Section):
    """Settings of `sums`."""

    terms: int = Field(3, ge=2, le=6, description="numbers in a sum")
    digits: int = Field(2, ge=1, le=3, description="digits of every number")
    format: Literal["a", "b", "mix"] = Field("a", description="scratchpad of the targets; mix = drawn for each problem")


class GymSettings(Section):
    """Settings of `gym`, by reasoning-gym's names."""

    min_word_len: int = Field(3, ge=3, le=10, description="characters")
    max_word_len: int = Field(5, ge=3, le=10, description="characters")

    @model_validator(mode="after")
    def _check_order(self) -> "GymSettings":
        if self.max_word_len < self.min_word_len:
            raise ValueError(f"max_word_len {self.max_word_len} is below min_word_len {self.min_word_len}")
        return self


class MixSettings(GymSettings, SumsSettings):
    """Settings of `mix`: those of both tasks and the share of `gym`."""

    format: Literal["a", "b", "mix"] = Field("mix", description="scratchpad of the targets of the sums")
    gym_share: float = Field(0.25, gt=0, lt=1, description="share of the problems that come from `gym`")


def testbed_task(config: TaskConfig) -> Task:
    """The testbed task of a recipe; `Task.target` writes the solution with its scratchpad or its calls of the tool.

    Raises RecipeError for an unknown name or setting, DataError when the settings leave too few different prompts.
    """
    makers = {"sums": _sums, "gym": _gym, "mix": _mix, "lists": _lists, "calculator": _calculator}
    name = str(config.name)
    if name not in makers:
        raise RecipeError(f"the testbed has no task '{name}'{nearest(name, list(makers))}")
    draw, verify = makers[name](config.settings)
    return Task(
        name=name,
        train=DrawnProblems(name, draw, config.seed, config.train_size or TRAIN_SIZE),
        eval=_held_out(name, draw, config.seed, config.eval_size),
        verify=verify,
        target=target,
    )


def target(problem: Problem) -> str:
    """The response to imitate: the scratchpad of a sum in the problem's format, the bare answer otherwise."""
    if problem.domain == "calculator":
        return solution(problem)
    if problem.domain == "sums":
        return grammar.solution(grammar.parse(str(problem.prompt)), problem.metadata["format"])
    return str(problem.answer)


def verify_sum(problem: Problem, text: str) -> Verdict:
    """Judge what stands after the last `=` and nothing before it: reward 1 for the exact number, else 0."""
    correct = grammar.final_answer(text) == problem.answer
    return Verdict(reward=float(correct), correct=correct)


def part_of(prompt: str) -> Part:
    """The half that a prompt belongs to, for every seed and every task."""
    return "eval" if crc32(prompt.encode()) % _HELD_OUT == 0 else "train"


@dataclass(frozen=True)
class DrawnProblems(LazySequence[Problem]):
    """Training problems made on access: item i of a seed is always the same. A prompt may come up again."""

    name: str
    draw: Draw
    seed: int
    size: int

    def __len__(self) -> int:
        return self.size

    def item(self, index: int) -> Problem:
        return _drawn(self.name, self.draw, self.seed, "train", index)


def _drawn(name: str, draw: Draw, seed: int, part: Part, index: int) -> Problem:
    random = Random(f"{seed}:{part}:{index}")
    for _ in range(_DRAWS):
        problem = draw(random)
        if part_of(str(problem.prompt)) == part:
            return replace(problem, id=f"{name}:{part}:{index}")
    raise DataError(f"testbed task '{name}': {_DRAWS} draws gave no {part} prompt; widen it with task.settings")


def _held_out(name: str, draw: Draw, seed: int, size: int) -> list[Problem]:
    """`size` different evaluation problems."""
    found: dict[str, Problem] = {}
    for index in range(4 * size + 100):
        problem = _drawn(name, draw, seed, "eval", index)
        found.setdefault(str(problem.prompt), problem)
        if len(found) == size:
            return list(found.values())
    raise DataError(
        f"testbed task '{name}' has only about {len(found)} different evaluation prompts with these settings, "
        f"task.eval_size asks for {size}; lower it or widen the task with task.settings"
    )


def _sums(given: dict[str, Any]) -> tuple[Draw, Verifier]:
    settings = _settings("sums", SumsSettings, given)
    return partial(_draw_sum, settings), verify_sum


def _draw_sum(settings: SumsSettings, random: Random) -> Problem:
    chain = grammar.draw(random, settings.terms, settings.digits)
    # The format is drawn in any case, so that a seed gives the same sums whatever the format.
    drawn = random.choice(grammar.FORMATS)
    layout = drawn if settings.format == "mix" else settings.format
    return Problem(id="", prompt=chain.prompt, answer=chain.answer, domain="sums", metadata={"format": layout})


def _gym(given: dict[str, Any]) -> tuple[Draw, Verifier]:
    return _gym_task(_settings("gym", GymSettings, given))


def _gym_task(settings: GymSettings) -> tuple[Draw, Verifier]:
    import reasoning_gym

    lengths = {"min_word_len": settings.min_word_len, "max_word_len": settings.max_word_len}
    dataset = reasoning_gym.create_dataset(GYM_TASK, seed=0, size=2**32, **lengths)

    def draw(random: Random) -> Problem:
        entry = dataset[random.getrandbits(32)]
        metadata = entry["metadata"]
        return Problem(id="", prompt=entry["question"], answer=entry["answer"], domain="gym", metadata=metadata)

    def verify(problem: Problem, text: str) -> Verdict:
        entry = {"question": problem.prompt, "answer": problem.answer, "metadata": problem.metadata}
        reward = float(dataset.score_answer(text.strip(), entry))
        return Verdict(reward=reward, correct=reward == 1.0)

    return draw, verify


def _mix(given: dict[str, Any]) -> tuple[Draw, Verifier]:
    settings = _settings("mix", MixSettings, given)
    draw_gym, verify_gym = _gym_task(settings)

    def draw(random: Random) -> Problem:
        return draw_gym(random) if random.random() < settings.gym_share else _draw_sum(settings, random)

    def verify(problem: Problem, text: str) -> Verdict:
        return verify_sum(problem, text) if problem.domain == "sums" else verify_gym(problem, text)

    return draw, verify


def _lists(given: dict[str, Any]) -> tuple[Draw, Verifier]:
    return partial(draw_list, _settings("lists", ListsSettings, given)), verify_list


def _calculator(given: dict[str, Any]) -> tuple[Draw, Verifier]:
    return partial(draw_expression, _settings("calculator", CalculatorSettings, given)), verify_expression


def _settings(name: str, kind: type[Settings], given: dict[str, Any]) -> Settings:
    for key in given:
        if key not in kind.model_fields:
            raise RecipeError(f"testbed task '{name}' has no setting '{key}'{nearest(key, list(kind.model_fields))}")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(["task.settings", *map(str, found["loc"])])
        raise RecipeError(f"{where} = {found['input']!r}: {found['msg'].removeprefix('Value error, ')}") from None
