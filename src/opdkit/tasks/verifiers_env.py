"""Environments written for the `verifiers` library (its ToolEnv and SingleTurnEnv) as tasks and as tools.

Nothing of the library is imported: an environment is used through what its documentation promises, `get_dataset()`,
`get_eval_dataset()`, `rubric.score_rollout(state)`, and for tools `tool_defs` (or `oai_tools`) and
`call_tool(name, arguments, id)`. It is given as `package.module:load_environment`. The rubric sees the prompt's messages and
one message of the assistant: the text of the last turn.

Left out: environments that answer by themselves (`env_response` of games), tools that are given the state of a rollout
(StatefulToolEnv), rubrics that compare a group, and those that count tool calls (`CallBonus` does that here).
"""

import asyncio
import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from opdkit.config import TaskConfig
from opdkit.errors import DataError, RecipeError
from opdkit.tasks.environments import Observation
from opdkit.tasks.messages import read_prompt
from opdkit.tasks.problem import Message, Problem, Task, Verdict
from opdkit.tasks.rows import hold_out, limit


def load(path: str, arguments: Mapping[str, Any]) -> Any:
    """Call `package.module:function` with arguments; once per process for equal ones. Raises RecipeError."""
    return _loaded(path, json.dumps(arguments, sort_keys=True, default=str))


@cache
def _loaded(path: str, arguments: str) -> Any:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name or "load_environment")
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"verifiers environment '{path}' cannot be imported: {error}") from error
    made = found(**json.loads(arguments))
    if missing := [need for need in ("get_dataset", "get_eval_dataset", "rubric") if not hasattr(made, need)]:
        raise RecipeError(
            f"'{path}' gives a {type(made).__name__} without {missing[0]}; expected a verifiers environment"
        )
    return made


def verifiers_task(config: TaskConfig) -> Task:
    """The task of an environment: its data sets, and its rubric as verifier. An answer with reward 1 or more is correct."""
    environment = load(str(config.path), config.settings)
    train = [_problem(row, f"train:{n}") for n, row in enumerate(environment.get_dataset())]
    held: list[Problem] = []
    if getattr(environment, "eval_dataset", None) is not None:
        held = [_problem(row, f"eval:{n}") for n, row in enumerate(environment.get_eval_dataset())][: config.eval_size]
        prompts = {str(problem.prompt) for problem in held}
        train = limit([p for p in train if str(p.prompt) not in prompts], config, str(config.path))
    else:
        train, held = hold_out(train, config, str(config.path))

    def verify(problem: Problem, text: str) -> Verdict:
        row = problem.metadata["row"]
        state = {**row, "input": row, "completion": [{"role": "assistant", "content": text}], "trajectory": []}
        asyncio.run(environment.rubric.score_rollout(state))
        reward = float(state["reward"])
        return Verdict(reward, reward >= 1.0)

    return Task(str(config.path), train, held, verify)


def _problem(row: Mapping[str, Any], name: str) -> Problem:
    prompt, written = read_prompt(row["prompt"], name)
    if written is not None:
        raise DataError(
            f"{name}: the prompt of a verifiers environment ends with the assistant's turn; it is not supported"
        )
    answer = row.get("answer")
    kept = {"answer": "", "info": {}, "task": "", **row}
    return Problem(name, prompt, None if answer is None else str(answer), metadata={"row": kept})


@dataclass(frozen=True)
class VerifiersTools:
    """The tools of an environment; every session of it is the environment itself, whose tools remember nothing."""

    path: str
    arguments: Mapping[str, Any]

    def __init__(self, path: str, **arguments: Any) -> None:
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "arguments", arguments)
        if not hasattr(load(path, arguments), "call_tool"):
            raise RecipeError(f"verifiers environment '{path}' has no tools; remove the recipe's section `tools`")
        if hasattr(load(path, arguments), "update_tool_args"):
            raise RecipeError(f"the tools of verifiers environment '{path}' are given the state of a rollout, which is not "
                              "supported; use an environment whose tools take the model's arguments only")  # fmt: skip

    @property
    def tools(self) -> tuple[Message, ...]:
        environment = load(self.path, self.arguments)
        return tuple(
            map(_schema, getattr(environment, "tool_defs", None) or getattr(environment, "oai_tools", None) or ())
        )

    def start(self, problem: Problem) -> "VerifiersTools":
        return self

    def call(self, name: str, arguments: Mapping[str, Any]) -> Observation:
        """What the tool returns; its exceptions are the caller's business."""
        found = load(self.path, self.arguments).call_tool(name, dict(arguments), "call00000")
        message = asyncio.run(found) if inspect.iscoroutine(found) else found
        content = message["content"] if isinstance(message, Mapping) else message.content
        return Observation(content if isinstance(content, str) else json.dumps(content, default=str))

    def close(self) -> None:
        """Nothing to free."""


def _schema(tool: Any) -> Message:
    if isinstance(tool, Mapping):
        return tool
    function = {name: getattr(tool, name) for name in ("name", "description", "parameters")}
    return {"type": "function", "function": function}
