"""Contexts: what a view's model reads before the response in place of the student's prompt, as values.

`Shown` shows the problem together with privileged text: a solution of the data set, a successful sibling rollout, the
verifier's feedback. It only rewrites problems; `opdkit.tasks.contexts` renders them. The response's ids never change.

Left out: transcripts of several models, images, and text that a model has to write first.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from opdkit.errors import DataError, MethodError, RecipeError
from opdkit.rollouts.rollout import Rollout
from opdkit.serialise import register
from opdkit.tasks.problem import PROBE, LazySequence, Message, Problem
from opdkit.values import Value

Style = Literal["solution", "attempt", "example"]
STYLES: dict[Style, tuple[str, str]] = {  # heading of a solution, instruction
    "solution": (
        "Here is a reference solution:",
        "After reading it, solve the problem step by step in your own words.",
    ),
    "attempt": ("Here is an earlier attempt at this problem:", "Solve the problem step by step."),
    "example": (
        "Here is an example of a response:",
        "Now write a response of your own, including the thinking process.",
    ),
}
FEEDBACK = "Here is feedback on your earlier attempt:"
JUDGED = "The response that follows is judged: {}"


@dataclass(frozen=True)
class Material:
    """What a context may read beside the rollouts."""

    tokenizer: Any  # the student's: it cuts long texts
    plain: bool = False  # prompts are raw text, without a chat template
    target: Callable[[Problem], str] | None = None  # Task.target: writes a problem's dataset response


@runtime_checkable
class Context(Protocol):
    """Rewrites the problems of rollouts for the model of a view."""

    def needs(self) -> tuple[str, ...]:
        """What it reads: "rollouts.reward", "rollouts.correct" or "rollouts.group"."""
        ...

    def rewrite(self, rollouts: Sequence[Rollout], material: Material) -> list[Problem | None]:
        """Each rollout's problem as the model reads it; None = there is nothing to add, it reads the own prompt."""
        ...

    def check(self, problems: Sequence[Problem], material: Material) -> None:
        """Raise an OpdkitError where the task cannot give what the context shows; called once, at the start."""
        ...


# ---------------------------------------------------------------------------------------------------------------------
# Texts


@dataclass(frozen=True, repr=False)
class Solution(Value):
    """The data set's solution of the problem.

    `of`: response (the dataset response: its column, else what the task writes), answer, metadata.KEY, or auto: the
    response where there is one, else the answer. Of a response with tools the assistant's texts.
    """

    of: str = "auto"

    def __post_init__(self) -> None:
        if self.of not in ("auto", "response", "answer") and not re.fullmatch(r"metadata\..+", self.of):
            raise MethodError(f"{self}: expected auto, response, answer or metadata.KEY")

    def needs(self) -> tuple[str, ...]:
        return ()

    def texts(self, rollouts: Sequence[Rollout], material: Material) -> list[str | None]:
        found: dict[int, str | None] = {}  # the rollouts of a group share their problem
        for rollout in rollouts:
            if id(rollout.problem) not in found:
                found[id(rollout.problem)] = self.text(rollout.problem, material)
        return [found[id(rollout.problem)] for rollout in rollouts]

    def text(self, problem: Problem, material: Material) -> str | None:
        """The problem's solution, or None where it has none."""
        if self.of.startswith("metadata."):
            value = problem.metadata.get(self.of.removeprefix("metadata."))
            return None if value is None else str(value) or None
        response = None if self.of == "answer" else _said(problem.response)
        if response is None and self.of != "answer" and material.target is not None:
            response = material.target(problem)
        return response or (problem.answer if self.of != "response" else None) or None

    def check(self, problems: Sequence[Problem], material: Material) -> None:
        """Raise DataError when no problem has a solution (of generated problems, the first 16)."""
        if not any(self.text(problem, material) for problem in _probe(problems)):
            keys = sorted({key for problem in _probe(problems) for key in problem.metadata})
            raise DataError(
                f"{self}: no problem of the data set has such a text; name its column in task.columns (response or answer), "
                f"or show another one: auto, response, answer{', ' if keys else ''}{', '.join(f'metadata.{k}' for k in keys)}"
            )


@dataclass(frozen=True, repr=False)
class Sibling(Value):
    """A successful response to the same prompt: the first of the group with reward >= threshold that is not itself.

    Its thinking (<think>...</think>) is left out unless `thinking`. SDPO's rule (2601.20802); the rollouts are those that
    the method's prepare steps left.
    """

    threshold: float = 1.0
    thinking: bool = False

    def needs(self) -> tuple[str, ...]:
        return ("rollouts.reward", "rollouts.group")

    def texts(self, rollouts: Sequence[Rollout], material: Material) -> list[str | None]:
        good: dict[int, list[tuple[int, str]]] = {}
        for i, r in enumerate(rollouts):
            if r.reward is not None and r.reward >= self.threshold:
                text = r.text.strip() if self.thinking else without_thinking(r.text)
                if text:
                    good.setdefault(r.group, []).append((i, text))
        return [next((t for j, t in good.get(r.group, ()) if j != i), None) for i, r in enumerate(rollouts)]

    def check(self, problems: Sequence[Problem], material: Material) -> None:
        """Nothing to look at before there are rollouts."""


@dataclass(frozen=True, repr=False)
class Feedback(Value):
    """What the verifier said about this very response (Verdict.feedback), such as the errors of a program."""

    def needs(self) -> tuple[str, ...]:
        return ("rollouts.correct",)

    def texts(self, rollouts: Sequence[Rollout], material: Material) -> list[str | None]:
        return [r.feedback or None for r in rollouts]

    def check(self, problems: Sequence[Problem], material: Material) -> None:
        """Nothing to look at before there are rollouts."""


Text = Solution | Sibling | Feedback


# ---------------------------------------------------------------------------------------------------------------------
# The context


@dataclass(frozen=True, repr=False)
class Shown(Value):
    """The problem with the first of `texts` that a rollout has (`every`: all that it has) in the last user turn.

    The turn is: problem; heading and text; with `assess` a line that says whether THIS rollout's answer is right, in the
    verifier's words where it gives feedback; instruction. `style` chooses heading and instruction, `heading` and
    `instruction` replace them ("" = none). With task.template plain, the texts, `correct` or `incorrect`, and the problem
    stand on lines of their own, the problem last; heading and instruction are an error there. `max_tokens` keeps the
    first tokens of a longer text. A rollout without any of the texts reads its own prompt.
    """

    texts: tuple[Text, ...] = (Solution(),)
    every: bool = False
    assess: bool = False
    style: Style = "solution"
    heading: str | None = None
    instruction: str | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.texts:
            raise MethodError("Shown(texts=()) shows nothing: give it a Solution, a Sibling or Feedback")
        if self.style not in get_args(Style):
            raise MethodError(f"Shown(style={self.style!r}): expected one of {', '.join(get_args(Style))}")
        if self.every and len(self.texts) == 1:
            raise MethodError("Shown(every=True) has no effect with one text; drop it")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise MethodError(f"Shown(max_tokens={self.max_tokens}): expected at least 1 token; None is no limit")

    def needs(self) -> tuple[str, ...]:
        """What the texts and the assessment read of the rollouts."""
        found = [need for text in self.texts for need in text.needs()] + ["rollouts.correct"] * self.assess
        return tuple(dict.fromkeys(found))

    def check(self, problems: Sequence[Problem], material: Material) -> None:
        """Raise DataError for a solution that no problem has, RecipeError for words that plain text does not use."""
        for name in ("heading", "instruction"):
            if material.plain and getattr(self, name) is not None:
                raise RecipeError(
                    f"{name} has no effect with task.template 'plain', which shows the texts and the problem, line by line; "
                    "set task.template: chat, or remove it"
                )
        for text in self.texts:
            text.check(problems, material)

    def rewrite(self, rollouts: Sequence[Rollout], material: Material) -> list[Problem | None]:
        """Each rollout's problem with its texts. Raises DataError for a prompt that does not end with a user's text."""
        columns = [text.texts(rollouts, material) for text in self.texts]
        made: list[Problem | None] = []
        for rollout, *row in zip(rollouts, *columns, strict=True):
            found = [(text, given) for text, given in zip(self.texts, row, strict=True) if given is not None]
            shown = found if self.every else found[:1]
            made.append(self._problem(rollout, shown, material) if shown else None)
        return made

    def _problem(self, rollout: Rollout, shown: list[tuple[Text, str]], material: Material) -> Problem:
        texts = [self._cut(text, material) for _, text in shown]
        verdict = self._verdict(rollout)
        problem = rollout.problem
        if material.plain:
            if not isinstance(problem.prompt, str):
                raise DataError(
                    f"prompt of problem {problem.id} is a list of messages; task.template 'plain' needs a string"
                )
            return replace(problem, prompt="\n".join([*texts, *([verdict] if verdict else []), problem.prompt]))
        heading, instruction = STYLES[self.style]
        heading = heading if self.heading is None else self.heading
        parts = [
            f"{FEEDBACK if isinstance(kind, Feedback) else heading}\n{text}".lstrip("\n")
            for (kind, _), text in zip(shown, texts, strict=True)
        ]
        parts += [JUDGED.format(verdict)] if verdict else []
        parts += [instruction if self.instruction is None else self.instruction]
        return _with_turn(problem, [part for part in parts if part])

    def _verdict(self, rollout: Rollout) -> str | None:
        if not self.assess or rollout.correct is None:
            return None
        return rollout.feedback or ("correct" if rollout.correct else "incorrect")

    def _cut(self, text: str, material: Material) -> str:
        if self.max_tokens is None:
            return text
        ids = material.tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(ids) <= self.max_tokens else material.tokenizer.decode(ids[: self.max_tokens])


def without_thinking(text: str) -> str:
    """A response without its <think>...</think> parts, wherever they begin and whether or not they end."""
    kept = re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL)
    return kept.rpartition("</think>")[2].strip()  # the opening tag may stand in the prompt


def _with_turn(problem: Problem, parts: Sequence[str]) -> Problem:
    """The problem with parts added to its last user message."""
    prompt = problem.prompt
    if isinstance(prompt, str):
        return replace(problem, prompt="\n\n".join([prompt, *parts]))
    last: Message = prompt[-1]
    if last.get("role") != "user" or not isinstance(last.get("content"), str):
        raise DataError(
            f"the messages of problem {problem.id} end with role '{last.get('role')}'; a context is shown in the last "
            "message, which must be a user's text"
        )
    return replace(problem, prompt=(*prompt[:-1], {**last, "content": "\n\n".join([last["content"], *parts])}))


def _said(response: str | tuple[Message, ...] | None) -> str | None:
    if response is None or isinstance(response, str):
        return response
    said = [str(m["content"]) for m in response if m["role"] == "assistant" and m.get("content")]
    return "\n\n".join(said) or None


def _probe(problems: Sequence[Problem]) -> Sequence[Problem]:
    return problems[:PROBE] if isinstance(problems, LazySequence) else problems


register(Shown, Solution, Sibling, Feedback)
