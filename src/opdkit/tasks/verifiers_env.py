"""Environments written for the `verifiers` library as tasks and as tools: its ToolEnv and SingleTurnEnv (up to version 0.3),
and its tasksets (0.4, `tasks.verifiers_tasks`).

An environment is used through what its documentation promises: `get_dataset()`, `get_eval_dataset()`,
`rubric.score_rollout(state)`, and for tools `tool_defs` (or `oai_tools`) and `call_tool(name, arguments, id)`. It is given
as `package.module:load_environment`. The rubric sees the prompt's messages and one message of the assistant, the text of
the last turn, in the library's own types. A reward function that raises is an error here; the library logs it and counts 0.

Left out: environments that answer by themselves (`env_response` of games), tools that are given the state of a rollout
(StatefulToolEnv), rubrics that compare a group, and those that count tool calls (`CallBonus` does that here).
"""

import asyncio
import copy
import importlib
import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from opdkit.config import TaskConfig
from opdkit.errors import DataError, RecipeError
from opdkit.tasks.environments import Observation
from opdkit.tasks.messages import prompt_messages, read_prompt
from opdkit.tasks.problem import Message, Problem, Task, Verdict
from opdkit.tasks.rows import hold_out, separate
from opdkit.tasks.verifiers_tasks import TasksetTools, is_taskset, taskset_task, wait_for

NEEDED = ("get_dataset", "get_eval_dataset", "rubric")


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
    taskset = getattr(made, "taskset", made)
    if is_taskset(taskset):
        return taskset
    if missing := [need for need in NEEDED if not hasattr(made, need)]:
        raise RecipeError(f"'{path}' gives a {type(made).__name__} without {missing[0]}; expected a verifiers environment or "
                          "taskset")  # fmt: skip
    if getattr(made, "max_turns", 1) != 1 and not hasattr(made, "call_tool"):
        raise RecipeError(f"'{path}' gives a {type(made).__name__}, which answers the model by itself; expected a "
                          "SingleTurnEnv or a ToolEnv")  # fmt: skip
    if getattr(made.rubric, "has_group_rewards", False):
        raise RecipeError(f"the rubric of '{path}' compares the answers of a group, which is not supported; use rewards of "
                          "one answer each")  # fmt: skip
    return made


def verifiers_task(config: TaskConfig) -> Task:
    """The task of an environment: its data sets, and its rubric as verifier. An answer with reward 1 or more is correct."""
    environment, where = load(str(config.path), config.settings), str(config.path)
    if is_taskset(environment):
        return taskset_task(environment, config)
    try:
        rows = environment.get_dataset()
    except ValueError as error:
        raise DataError(f"verifiers environment '{where}' gives no training data: {error}") from error
    train = [_problem(row, f"train:{n}") for n, row in enumerate(rows)]
    # What makes an evaluation set may be given instead of one, and is called when it is asked for.
    if any(getattr(environment, name, None) is not None for name in ("eval_dataset", "eval_dataset_source")):
        held = [_problem(row, f"eval:{n}") for n, row in enumerate(environment.get_eval_dataset())]
        train, held = separate(train, held, config, where, f"the evaluation set of {where}")
    else:
        train, held = hold_out(train, config, where)

    def verify(problem: Problem, text: str) -> Verdict:
        state = rollout_state(problem, text)
        failures = _Failures()
        logger = logging.getLogger("verifiers")
        logger.addHandler(failures)
        try:
            wait_for(environment.rubric.score_rollout(state))
        finally:
            logger.removeHandler(failures)
        if failures.messages:
            raise RuntimeError(failures.messages[0])
        reward = float(state["reward"])
        return Verdict(reward, reward >= 1.0)

    return Task(where, train, held, verify)


def rollout_state(problem: Problem, text: str) -> dict[str, Any]:
    """A rollout's state as the library makes it, in which the model has answered with a text."""
    row = copy.deepcopy(dict(problem.metadata["row"]))
    if isinstance(row["info"], str):
        row["info"] = json.loads(row["info"] or "{}")
    state = {
        "task": row, **row, "input": row, "trajectory": [], "reward": None, "metrics": None, "error": None,
        "is_completed": True, "is_truncated": False,
    }  # fmt: skip
    state["prompt"] = _typed([dict(message) for message in prompt_messages(problem, None)])
    state["completion"] = _typed([{"role": "assistant", "content": text}])
    return state


class _Failures(logging.Handler):
    """Keeps what a rubric only logs when a reward function raises."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _typed(messages: list[dict[str, Any]]) -> Any:
    """Messages in the library's types, which have attributes as well as keys; mappings where it has none."""
    try:
        normalize = importlib.import_module("verifiers.utils.message_utils").normalize_messages
    except (ImportError, AttributeError):
        return messages
    return normalize(messages)


def _problem(row: Mapping[str, Any], name: str) -> Problem:
    prompt, written = read_prompt(row["prompt"], name)
    if written is not None:
        raise DataError(
            f"{name}: the prompt of a verifiers environment ends with the assistant's turn; it is not supported"
        )
    answer = row.get("answer")
    kept = {"answer": "", "info": {}, **row}
    return Problem(name, prompt, None if answer is None else str(answer), metadata={"row": kept})


@dataclass(frozen=True)
class VerifiersTools:
    """The tools of an environment; every session of it is the environment itself, whose tools remember nothing."""

    path: str
    arguments: Mapping[str, Any]

    def __init__(self, path: str, **arguments: Any) -> None:
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "arguments", arguments)
        environment = load(path, arguments)
        if is_taskset(environment):
            return
        if not hasattr(environment, "call_tool"):
            raise RecipeError(f"verifiers environment '{path}' has no tools; remove the recipe's section `tools`")
        if hasattr(environment, "update_tool_args"):
            raise RecipeError(f"the tools of verifiers environment '{path}' are given the state of a rollout, which is not "
                              "supported; use an environment whose tools take the model's arguments only")  # fmt: skip

    @property
    def _served(self) -> TasksetTools | None:
        """The tools of a taskset, registered once per process."""
        made = load(self.path, self.arguments)
        return _taskset_tools(made, self.path) if is_taskset(made) else None

    @property
    def tools(self) -> tuple[Message, ...]:
        if self._served is not None:
            return self._served.tools
        environment = load(self.path, self.arguments)
        return tuple(
            map(_schema, getattr(environment, "tool_defs", None) or getattr(environment, "oai_tools", None) or ())
        )

    def start(self, problem: Problem) -> "VerifiersTools":
        return self

    def call(self, name: str, arguments: Mapping[str, Any]) -> Observation:
        """What the tool returns; its exceptions are the caller's business."""
        if self._served is not None:
            return self._served.call(name, arguments)
        found = load(self.path, self.arguments).call_tool(name, dict(arguments), "call00000")
        message = asyncio.run(found) if inspect.iscoroutine(found) else found
        content = message["content"] if isinstance(message, Mapping) else message.content
        return Observation(_text(content))

    def close(self) -> None:
        """Nothing to free."""


@cache
def _taskset_tools(taskset: Any, path: str) -> TasksetTools:
    return TasksetTools(taskset, path)


def _text(content: Any) -> str:
    """A tool message's content: text, or parts of which the texts are read and pictures are named."""
    if isinstance(content, str):
        return content
    parts = [dict(part) for part in content]
    return "\n".join(str(part["text"]) if part.get("type") == "text" else f"[{part.get('type')}]" for part in parts)


def _schema(tool: Any) -> Message:
    if isinstance(tool, Mapping):
        return tool
    function = {name: getattr(tool, name) for name in ("name", "description", "parameters")}
    return {"type": "function", "function": function}
