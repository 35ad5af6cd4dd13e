"""Responses with tools: the model writes a call, the tool's answer is put behind it, the model goes on.

What a tool answers is in the context and is never trained on; it belongs to the turn that asked. Bad calls (no JSON, an
unknown tool, missing arguments) get an answer that says so. How calls are written: `calls`. Left out: answers with images,
and text by the environment before the first turn.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from opdkit.config import SamplingConfig, TaskConfig, ToolsConfig
from opdkit.errors import DataError, RecipeError
from opdkit.models import LanguageModel
from opdkit.rollouts.calls import LINE, SHOWN, Asked, Calls, TemplateCalls, TextCalls, only_argument, without_specials
from opdkit.rollouts.rollout import Rollout
from opdkit.rollouts.sampler import Keep, Mixture, Sampling
from opdkit.rollouts.segments import Draft, begin, grow
from opdkit.tasks.environments import (
    Call,
    Environment,
    Guarded,
    Limits,
    Observation,
    answer,
    function_of,
    make_environment,
    shortened,
)
from opdkit.tasks.messages import prompt_messages
from opdkit.tasks.problem import LazySequence, Message, Problem, Task


@dataclass(frozen=True)
class ToolUse:
    """What a run's tools are, how calls are written, and how much of them a response may have."""

    environment: Environment
    calls: Calls
    turns: int
    limits: Limits

    def respond(
        self, lm: LanguageModel, prompts: Sequence[tuple[Problem, tuple[int, ...]]], how: Sampling, keys: Sequence[str],
        keep: Keep | None = None, mixture: Mixture | None = None, version: int = 0,
    ) -> list[Rollout]:  # fmt: skip
        """Sampled responses with their tool calls, the group of one prompt side by side.

        `how.max_new_tokens` is the limit for all tokens of a response, those of tools included. `Rollout.finish` may also
        be "turns": the last turn that is allowed ends with a call, which is not run.
        """
        how = replace(how, stop=(*how.stop, *self.calls.stop))
        drafts = begin(prompts, how, keys)
        sessions = {(d.group, d.response): Guarded(self.environment, d.problem) for d in drafts}
        outcomes: dict[tuple[int, int], list[Observation]] = {at: [] for at in sessions}

        def look(going: list[Draft]) -> list[Draft]:
            return self._answered(lm, going, sessions, outcomes)

        done = grow(lm, drafts, how, look, None, keep, mixture)
        for session in sessions.values():
            session.close()
        return [
            replace(
                draft.rollout(lm.tokenizer, version),
                final=draft.last_turn(lm.tokenizer) if draft.turn else None,
                calls=tuple(outcome(o) for o in outcomes[draft.group, draft.response]),
            )
            for draft in done
        ]

    def _answered(
        self, lm: LanguageModel, drafts: list[Draft], sessions: Mapping[tuple[int, int], Guarded],
        outcomes: Mapping[tuple[int, int], list[Observation]],
    ) -> list[Draft]:  # fmt: skip
        """The drafts with the answers to the calls that they end with."""
        new, asked = list(drafts), {}
        for i, draft in enumerate(drafts):
            found = self.calls.read(draft, lm)
            if found == "go on":
                new[i] = draft.reopened() if draft.room else replace(draft, finish="length")
            elif found != "done" and draft.turn + 1 >= self.turns:
                new[i] = replace(draft, finish="turns")
            elif found != "done":
                asked[i] = found
        at = {i: (drafts[i].group, drafts[i].response) for i in asked}
        answers = self._run({i: (sessions[at[i]], calls) for i, calls in asked.items()})
        for i, calls in asked.items():
            outcomes[at[i]].extend(answers[i])
            clean = [replace(o, text=without_specials(lm.tokenizer, o.text)) for o in answers[i]]
            ids = self.calls.ids(drafts[i], calls, clean, lm)
            # An answer that leaves no room for the model's next turn would only be read.
            new[i] = drafts[i].heard(ids) if len(ids) < drafts[i].room else replace(drafts[i], finish="length")
        return new

    def _run(self, asked: Mapping[int, tuple[Guarded, list[Asked]]]) -> dict[int, list[Observation]]:
        """The answers to every draft's calls: those of one session in order, those of different ones together."""
        known = {str(function_of(tool)["name"]): function_of(tool) for tool in self.environment.tools}
        found: dict[int, list[Observation]] = {i: [] for i in asked}
        for together in zip_longest(*([(i, session, one) for one in calls] for i, (session, calls) in asked.items())):
            run = []
            for i, session, one in filter(None, together):
                if wrong := one.wrong or refusal(one, known):
                    found[i].append(shortened(Observation(wrong, error=True), self.limits.characters))
                else:
                    run.append((i, Call(session, one.name, one.arguments)))
            for (i, _), observation in zip(run, answer([call for _, call in run], self.limits), strict=True):
                found[i].append(observation)
        return found


def make_tools(config: ToolsConfig | None, task: TaskConfig, sampling: SamplingConfig) -> ToolUse | None:
    """The tools of a recipe; None where it has none. Raises RecipeError for settings that do not fit."""
    if config is None:
        return None
    environment = make_environment(config.environment, config.settings)
    limits = Limits(config.seconds, config.characters, config.workers)
    if config.calls == "text" and config.show == "system":
        raise RecipeError("tools.show = 'system' has no effect with tools.calls 'text'; remove it")
    if config.calls == "template":
        if task.template != "chat":
            raise RecipeError(
                "tools.calls 'template' needs task.template 'chat'; set tools.calls: text for plain prompts"
            )
        calls = TemplateCalls(environment.tools, task, tuple(sampling.eos_ids or ()))
        return ToolUse(environment, calls, config.turns, limits)
    if LINE in "".join(sampling.stop):
        raise RecipeError(
            "sampling.stop contains a line end, which tools.calls 'text' reads as the end of a call; remove it"
        )
    return ToolUse(environment, TextCalls(*only_argument(environment, config.environment)), config.turns, limits)


def refusal(asked: Asked, known: Mapping[str, Message]) -> str:
    """Why a call cannot be run, in words for the model; empty when it can."""
    if asked.name not in known:
        return f"there is no tool '{asked.name[:SHOWN]}'; the tools are: {', '.join(known)}"
    parameters = known[asked.name].get("parameters") or {}
    names = list(parameters.get("properties") or {})
    if missing := [name for name in parameters.get("required") or [] if name not in asked.arguments]:
        return f"{asked.name}: the argument '{missing[0]}' is missing; the arguments are: {', '.join(names)}"
    if names and (extra := [name for name in asked.arguments if name not in names]):
        return f"{asked.name} has no argument '{extra[0][:SHOWN]}'; the arguments are: {', '.join(names)}"
    return ""


def outcome(observation: Observation) -> str:
    """How a call went: "ok", "error" or "timeout"."""
    return "timeout" if observation.timed_out else "error" if observation.error else "ok"


@dataclass(frozen=True)
class Equipped(LazySequence[Problem]):
    """Problems that are made when they are read, with the tools of an environment."""

    problems: Sequence[Problem]
    calls: TemplateCalls
    show: str

    def __len__(self) -> int:
        return len(self.problems)

    def item(self, index: int) -> Problem:
        return _equipped(self.problems[index], self.calls, self.show)


def equipped(task: Task, use: ToolUse | None, show: str) -> Task:
    """The task whose prompts tell a chat model of an environment's tools: through the template, or in the system prompt.

    Raises DataError for a problem with tools of its own.
    """
    if use is None or not isinstance(use.calls, TemplateCalls):
        return task
    calls, parts = use.calls, []
    for problems in (task.train, task.eval):
        listed = isinstance(problems, list | tuple)
        parts.append([_equipped(p, calls, show) for p in problems] if listed else Equipped(problems, calls, show))
    return replace(task, train=parts[0], eval=parts[1])


def _equipped(problem: Problem, calls: TemplateCalls, show: str) -> Problem:
    if problem.tools is not None:
        raise DataError(f"problem {problem.id} has tools of its own, and the recipe's section `tools` gives others; leave the "
                        "column out, or remove the section")  # fmt: skip
    if show == "template":
        return replace(problem, tools=calls.tools)
    asked = prompt_messages(problem, calls.config.system)
    first = str(asked[0]["content"]) if asked[0]["role"] == "system" else ""
    text = f"{first}\n\n{introduction(calls.tools)}".strip()
    rest = asked[1:] if first else asked
    return replace(problem, prompt=({"role": "system", "content": text}, *rest), system=None)


def introduction(tools: Sequence[Message]) -> str:
    """The system prompt that tells of tools where the template does not."""
    schemas = "\n".join(json.dumps(tool) for tool in tools)
    return (
        f"You may call these tools:\n<tools>\n{schemas}\n</tools>\n"
        'To call one, write <tool_call>{"name": NAME, "arguments": {...}}</tool_call> and end your turn. '
        "Its answer comes next; then go on."
    )
