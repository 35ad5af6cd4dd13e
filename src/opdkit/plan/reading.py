"""What the teachers of views read before a response where it is not the student's prompt: that of a context, or of a chat
template of their own.

Where data and tokenizers are here, some of the task's problems are rewritten by the context itself, among made-up rollouts:
once with correct ones, whose texts are as long as responses are assumed to be, and once with incorrect ones; the longer
prompt counts. Elsewhere a sibling counts its tokens, and any other text the `max_tokens` of the context, or nothing.
Left out: what a verifier says.

Units: tokens.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil
from typing import Any

from opdkit.config import ModelConfig, Recipe
from opdkit.contexts import Context, Feedback, Material, Shown, Sibling
from opdkit.method import Method
from opdkit.models import LanguageModel
from opdkit.plan.counts import Counts
from opdkit.rollouts.rollout import Rollout
from opdkit.tasks.contexts import check_told
from opdkit.tasks.problem import PROBE, Problem
from opdkit.tasks.prompts import encode_prompt

ASKED = 64  # problems that are rewritten
OWN = ""  # in place of a view: where a teacher reads the plain problem, through a template of its own


@dataclass(frozen=True)
class Reading:
    """The prompts of a step as one teacher reads them; `apart`: the runs of equal prompts in a group of responses."""

    prompts: tuple[int, ...]
    longest: int
    apart: int = 1

    def reread(self, texts: Sequence[Rollout], *, longest: bool = False) -> list[Rollout]:
        """The same responses behind these prompts: the shortest of them where the shortest one was."""
        sizes: dict[int, int] = {}
        members = Counter(text.group for text in texts)
        for text in texts:
            sizes.setdefault(text.group, len(text.prompt_ids))
        ranked, read = sorted(sizes, key=sizes.__getitem__), sorted(self.prompts)
        now = {
            group: self.longest if longest else read[int((place + 0.5) / len(ranked) * len(read))]
            for place, group in enumerate(ranked)
        }
        made: dict[tuple[int, int], tuple[int, ...]] = {}  # texts of one prompt share its memory
        seen: Counter[int] = Counter()
        found = []
        for text in texts:
            run = seen[text.group] * self.apart // members[text.group]
            seen[text.group] += 1
            key = (text.group % 2 * self.apart + run, now[text.group])  # neighbours differ
            prompt = made.setdefault(key, (key[0], *(0,) * (key[1] - 1)))
            found.append(replace(text, prompt_ids=prompt))
        return found

    def shrunk(self, factor: float) -> "Reading":
        """Of shorter texts (texts.Lengths.shrunk)."""
        smaller = tuple(max(min(p, 4), round(p * factor)) for p in self.prompts)
        return Reading(smaller, max(smaller), self.apart)


Readings = Mapping[tuple[str, str], Reading]  # (view, or OWN, and teacher) -> what it reads


def find_readings(
    recipe: Recipe, method: Method, models: Mapping[str, LanguageModel], counts: Counts
) -> tuple[Readings, list[str]]:
    """Who reads something else than the student's prompts, and notes that say so. Raises OpdkitError as a run would."""
    found: dict[tuple[str, str], Reading] = {}
    notes = []
    asked = [(name, view.context, teacher) for name, view in method.views.items() for teacher in view.models]
    asked += [(OWN, "own", teacher) for teacher in recipe.teachers]
    for view, context, teacher in asked:
        config, told = recipe.teachers[teacher], None if context == "own" else context
        if told is None and config.template == "student":
            continue
        reader = _Reader(recipe, models["student"], models[teacher], config, told, counts)
        found[view, teacher] = reading = reader.reading()
        if view:
            notes.append(_note(view, teacher, reading, told, counts))
            notes += _too_long(view, reading, models[teacher], counts.lengths.limit)
    return found, notes


@dataclass(frozen=True)
class _Reader:
    recipe: Recipe
    student: LanguageModel
    teacher: LanguageModel
    config: ModelConfig
    context: Context | None
    counts: Counts

    def reading(self) -> Reading:
        lengths, own = self.counts.lengths, self.config.template == "own"
        if not self.counts.data.problems or self.student.tokenizer is None or (own and self.teacher.tokenizer is None):
            more = [_assumed(self.context, round(tokens)) for tokens in (lengths.response, lengths.limit)]
            return Reading(tuple(p + more[0] for p in lengths.prompts), lengths.longest + more[1])
        problems = self.counts.data.problems
        if self.context is not None:
            check_told(self.teacher, self.config, self.context, problems[:PROBE], self.recipe.task, self._material,
                       lengths.limit)  # fmt: skip
        chosen = problems[:: max(1, len(problems) // ASKED)]
        prompts = self._prompts(chosen, round(lengths.response))
        longest = prompts if lengths.response == lengths.limit else self._prompts(chosen, lengths.limit)
        return Reading(tuple(prompts), max(longest), self._runs(chosen[0]))

    @property
    def _material(self) -> Material:
        return Material(self.student.tokenizer, self.recipe.task.template == "plain", self.counts.data.target)

    def _prompts(self, problems: Sequence[Problem], tokens: int) -> list[int]:
        """The longest prompt of each problem, with correct siblings and without."""
        found = [0] * len(problems)
        for good in (True, False):
            rollouts = [
                self._made_up(problem, i, j, good, tokens)
                for i, problem in enumerate(problems)
                for j in range(min(2, self.recipe.sampling.group))
            ]
            for rollout, told in zip(rollouts, self._told(rollouts), strict=True):
                found[rollout.group] = max(found[rollout.group], self._size(told or rollout.problem))
        return found

    def _runs(self, problem: Problem) -> int:
        """Runs of equal prompts in a group, every other response of which is correct."""
        rollouts = [self._made_up(problem, 0, j, j % 2 == 0, 8) for j in range(self.recipe.sampling.group)]
        told = [None if more is None else str(more.prompt) for more in self._told(rollouts)]
        return len(list(groupby(told)))

    def _told(self, rollouts: Sequence[Rollout]) -> list[Problem | None]:
        if self.context is None:
            return [None] * len(rollouts)
        return self.context.rewrite(rollouts, self._material)

    def _size(self, problem: Problem) -> int:
        task = self.recipe.task
        if self.config.template == "own":
            return len(encode_prompt(self.teacher.tokenizer, problem, "chat", task.system, self.config.template_args))
        return len(encode_prompt(self.student.tokenizer, problem, task.template, task.system, task.template_args))

    def _made_up(self, problem: Problem, group: int, number: int, good: bool, tokens: int) -> Rollout:
        text = filler(self.student.tokenizer, str(problem.prompt), tokens) + str(number)
        return Rollout(problem, (), (), text, group, "length", reward=float(good), correct=good)


def filler(tokenizer: Any, words: str, tokens: int) -> str:
    """A text of about so many tokens, made of a text's words."""
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode((ids * ceil(tokens / len(ids)))[:tokens], skip_special_tokens=True))


def _assumed(context: Context | None, response: int) -> int:
    """What a context adds where no text can be looked at."""
    if not isinstance(context, Shown):
        return 0
    most = context.max_tokens
    found = [min(response, most or response) if isinstance(text, Sibling) else most or 0 for text in context.texts]
    return sum(found) if context.every else max(found)


def _note(view: str, teacher: str, reading: Reading, context: Context | None, counts: Counts) -> str:
    lengths, mean = counts.lengths, sum(reading.prompts) / len(reading.prompts)
    note = (f"view '{view}': {teacher} reads prompts of {mean:.4g} tokens on average, at most {reading.longest:,} "
            f"(the student {lengths.prompt:.4g}, at most {lengths.longest:,})")  # fmt: skip
    if context is None:
        return note
    if {"rollouts.reward", "rollouts.group"} & set(context.needs()):
        note += f", where a successful response of {lengths.response:.4g} tokens is shown to each"
    if not counts.data.problems:
        note += "; texts of the data set are not here and count nothing, or max_tokens where the method has it"
    if isinstance(context, Shown) and any(isinstance(text, Feedback) for text in context.texts):
        note += "; what the verifier says is not counted"
    return note


def _too_long(view: str, reading: Reading, lm: LanguageModel, limit: int) -> list[str]:
    room = lm.context_length - limit
    if reading.longest <= room:
        return []
    return [f"view '{view}': a prompt of {reading.longest:,} tokens leaves no room for a response in {lm.name}'s context, and "
            "a run would stop there; set the method's max_tokens, or a lower sampling.max_new_tokens"]  # fmt: skip
