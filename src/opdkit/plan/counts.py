"""What a recipe does, counted: steps, rollouts, updates and tokens, and the data where it is on this machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opdkit.config import Recipe, TaskConfig
from opdkit.errors import RecipeError
from opdkit.method import Method
from opdkit.plan.architectures import Architecture
from opdkit.plan.texts import Lengths, chance
from opdkit.rollouts.tools import equipped, make_tools
from opdkit.sources import OnPolicy, Replay
from opdkit.tasks.load import check_settings, load_task
from opdkit.tasks.problem import Problem
from opdkit.tasks.prompts import encode_problems
from opdkit.train.checks import split_prompts

PROMPTS = 256  # how many of the task's are read for their lengths


@dataclass(frozen=True)
class Data:
    """The task's problems that were found; None where the data set is not here."""

    name: str
    train: int | None = None
    held_out: int | None = None
    dropped: int = 0  # prompts over the limit
    encoded: bool = False  # whether the prompts were read with the student's tokenizer
    first: Problem | None = None  # of the training problems
    prompts: tuple[int, ...] = ()  # tokens of some of their prompts, evenly spread over them; () where unknown
    problems: Sequence[Problem] = ()  # the training problems whose prompts could be read; () where they could not
    target: Callable[[Problem], str] | None = None  # Task.target


@dataclass(frozen=True)
class Counts:
    """Numbers of the whole run. `lengths` are those of a step's texts, as far as they are known."""

    steps: int
    prompts: int  # of one step
    rollouts: dict[str, int]  # source -> responses of one step
    updates: int
    eval_size: int
    lengths: Lengths
    data: Data

    @property
    def rollouts_per_step(self) -> int:
        return sum(self.rollouts.values())

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest response."""
        return self.lengths.longest + self.lengths.limit

    @property
    def tokens_per_step(self) -> int:
        """Prompts and responses of a step, the prompt with each response."""
        return round(self.rollouts_per_step * (self.lengths.prompt + self.lengths.response))

    @property
    def held_out(self) -> int:
        """Held-out problems: those that were found, else as many as the recipe asks for."""
        return self.eval_size if self.data.held_out is None else self.data.held_out

    @property
    def epochs(self) -> float | None:
        """Passes over the training problems."""
        return None if self.data.train is None else self.steps * self.prompts / self.data.train


def count(recipe: Recipe, method: Method, student: Architecture, context: int, response: float | None = None) -> Counts:
    """Count a recipe; `context` is the shortest context of its models (tokens), `response` the mean length of responses
    that is assumed (None = the limit). Loads data that is here. Raises RecipeError for a mean that no response can have.
    """
    t, s = recipe.train, recipe.sampling
    if response is not None and not 1 <= response <= s.max_new_tokens:
        raise RecipeError(f"--response {response:g}: expected a mean length of 1 to sampling.max_new_tokens = "
                          f"{s.max_new_tokens} tokens")  # fmt: skip
    data = _data(recipe, method, student, context)
    prompts = data.prompts or (max(1, min(recipe.task.max_prompt_tokens, context - s.max_new_tokens)),)
    return Counts(
        steps=t.steps,
        prompts=t.prompts_per_step,
        rollouts={
            name: prompts * (s.group if samples(method, name) else 1)
            for name, prompts in split_prompts(method, t.prompts_per_step).items()
        },
        updates=t.steps * t.minibatches * t.epochs,
        eval_size=recipe.task.eval_size,
        lengths=Lengths(prompts, s.max_new_tokens, 1.0 if response is None else chance(response, s.max_new_tokens)),
        data=data,
    )


def samples(method: Method, source: str) -> bool:
    """Whether the student answers this source's prompts itself, at least in steps with an empty buffer."""
    return isinstance(method.rollouts[source], OnPolicy | Replay)


def _data(recipe: Recipe, method: Method, student: Architecture, context: int) -> Data:
    """Load the problems if they are here. Raises OpdkitError as a run would."""
    config = recipe.task
    check_settings(config)
    if not is_here(config):
        return Data(str(config.path))
    use = make_tools(recipe.tools, config, recipe.sampling)
    task = equipped(load_task(config), use, recipe.tools.show if recipe.tools else "template")
    if method.needs_reward and task.verify is None:
        raise RecipeError(f"method {method.name} learns from rewards, but task '{task.name}' has no verifier; "
                          "give the data an answer column or set task.verifier")  # fmt: skip
    if student.tokenizer is None:
        return Data(task.name, len(task.train), len(task.eval), first=task.train[0])
    new = recipe.sampling.max_new_tokens
    train = encode_problems(task.train, student.tokenizer, config, context, new)
    held_out = encode_problems(task.eval, student.tokenizer, config, context, recipe.eval.max_new_tokens or new)
    read = [len(train[i][1]) for i in range(0, len(train), max(1, len(train) // PROMPTS))]
    return Data(task.name, len(train), len(held_out), train.dropped, True, train.problems[0], tuple(read), train.problems,
                task.target)  # fmt: skip


def is_here(config: TaskConfig) -> bool:
    """Whether the task can be loaded without a network: everything but a Hub id."""
    return config.kind != "dataset" or Path(str(config.path)).exists()
