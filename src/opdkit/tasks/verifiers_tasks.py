"""Tasksets of the `verifiers` library from version 0.4 on (`verifiers.v1`): their tasks, rewards and tools, in this process.

A task is a problem; its rewards judge a trace of its prompt and one message of the assistant, the last turn's text. The
tools of a toolset are registered as the library registers them, and called here: no server is started.

Left out: tasks and rewards that need a runtime (containers, `setup` on files), tools with a state or of one task only,
servers elsewhere, and what harnesses bring along.
"""

import asyncio
import importlib
import inspect
from collections.abc import Coroutine, Mapping
from functools import cache
from itertools import islice
from threading import Thread
from typing import Any

from opdkit.config import TaskConfig
from opdkit.errors import DataError, RecipeError
from opdkit.tasks.environments import Observation
from opdkit.tasks.messages import prompt_messages, read_prompt
from opdkit.tasks.problem import Message, Problem, Task, Verdict
from opdkit.tasks.rows import hold_out

V1, MCP = "verifiers.v1", "mcp.server.mcpserver"


def wait_for(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine on one event loop for the whole process: clients that a reward keeps belong to a loop."""
    return asyncio.run_coroutine_threadsafe(coroutine, _loop()).result()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, daemon=True, name="verifiers").start()
    return loop


# ---------------------------------------------------------------------------------------------------------------------
# Tasks and rewards


def is_taskset(made: Any) -> bool:
    """Whether this is a taskset, by the library's own methods of one."""
    return all(hasattr(made, name) for name in ("load", "task_type", "toolsets"))


def taskset_task(taskset: Any, config: TaskConfig) -> Task:
    """The task of a taskset. An answer with reward 1 or more is correct.

    Raises RecipeError for an endless taskset without task.train_size and for tasks or rewards that need a runtime.
    """
    where = str(config.path)
    if not taskset.bounded and config.train_size is None:
        raise RecipeError(f"taskset '{where}' never ends; set task.train_size")
    most = None if taskset.bounded else (config.train_size or 0) + config.eval_size
    tasks = {f"task:{n}": task for n, task in enumerate(islice(taskset, most))}
    if not tasks:
        raise DataError(f"taskset '{where}' is empty")
    check_task(next(iter(tasks.values())), where)
    train, held = hold_out([_problem(task, name) for name, task in tasks.items()], config, where)

    def verify(problem: Problem, text: str) -> Verdict:
        task = tasks[problem.id]
        found = trace(task, problem, text)
        wait_for(task.score(found))
        return Verdict(float(found.reward), found.reward >= 1.0)

    return Task(where, train, held, verify)


def check_task(task: Any, where: str) -> None:
    """Raise RecipeError for a task that cannot be judged by its answer alone: the library would count 0 without a word."""
    rewards, judges = task.hooks("reward"), task.plugged_judges()
    if not rewards and not judges:
        raise RecipeError(
            f"the tasks of '{where}' have no rewards; set task.verifier: none is of no use: give them one"
        )
    asked = [(f.__name__, f) for f in rewards] + [(judge.reward_name, judge.score) for judge in judges]
    for name, function in asked:
        needed = inspect.signature(function).parameters.get("runtime")
        if needed is not None and needed.default is inspect.Parameter.empty:
            raise RecipeError(f"reward '{name}' of '{where}' needs a runtime, which there is none of here; use tasks whose "
                              "rewards read the trace alone")  # fmt: skip
    base = importlib.import_module(V1).Task
    if task.NEEDS_CONTAINER or any(getattr(type(task), n) is not getattr(base, n) for n in ("setup", "finalize")):
        raise RecipeError(f"the tasks of '{where}' prepare a runtime or need a container, which there is none of here")


def trace(task: Any, problem: Problem, text: str) -> Any:
    """A trace in which the model has answered a problem's prompt with a text, and nothing else has happened."""
    v1, state = importlib.import_module(V1), importlib.import_module(f"{V1}.state")
    messages = [*prompt_messages(problem, None), {"role": "assistant", "content": text}]
    nodes = [
        v1.MessageNode.model_validate({"message": dict(m), "parent": i - 1 if i else None, "sampled": i + 1 == len(messages)})
        for i, m in enumerate(messages)
    ]  # fmt: skip
    return v1.Trace(
        task=v1.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
        agent=v1.AgentInfo(config=v1.AgentConfig()), state=state.state_cls(type(task))(), nodes=nodes, is_completed=True,
        ok=True,
    )  # fmt: skip


def _problem(task: Any, name: str) -> Problem:
    data = task.data
    if data.prompt is None:
        raise DataError(f"{name}: the task has no prompt, since its user opens the conversation; that is not supported")
    raw = data.prompt if isinstance(data.prompt, str) else [m.model_dump(exclude_none=True) for m in data.prompt]
    prompt, written = read_prompt(raw, name)
    if written is not None:
        raise DataError(f"{name}: the prompt of the task ends with the assistant's turn; it is not supported")
    answer = getattr(data, "answer", None)
    return Problem(name, prompt, None if answer is None else str(answer), system=data.system_prompt)


# ---------------------------------------------------------------------------------------------------------------------
# Tools


class TasksetTools:
    """The tools of a taskset's toolsets, named as the library's servers advertise them: server_tool."""

    def __init__(self, taskset: Any, where: str) -> None:
        self._servers: dict[str, tuple[Any, str]] = {}
        found: list[Message] = []
        for toolset in (*taskset.toolsets(taskset.config), *taskset.task_type().toolsets(taskset.config.task)):
            _check_toolset(toolset, where)
            server = _registered(toolset)
            for tool in wait_for(server.list_tools()):
                name = "_".join(filter(None, (toolset.server_name, tool.name)))
                self._servers[name] = (server, tool.name)
                function = {"name": name, "description": tool.description or "", "parameters": tool.input_schema}
                found.append({"type": "function", "function": function})
        self.tools = tuple(found)

    def call(self, name: str, arguments: Mapping[str, Any]) -> Observation:
        """What the tool returns; its exceptions are the caller's business. In a loop of its own: a tool that never
        returns keeps nothing else waiting."""
        server, inside = self._servers[name]
        result = asyncio.run(server.call_tool(inside, dict(arguments)))
        return Observation(
            "\n".join(getattr(block, "text", "") for block in result.content), error=bool(result.is_error)
        )


def _check_toolset(toolset: Any, where: str) -> None:
    v1, state = importlib.import_module(V1), importlib.import_module(f"{V1}.state")
    name = type(toolset).__name__
    if state.state_cls(type(toolset)) is not v1.State:
        raise RecipeError(f"toolset {name} of '{where}' has the state of a rollout, which is not supported; use tools that "
                          "take the model's arguments only")  # fmt: skip
    if type(toolset).setup_task is not v1.Toolset.setup_task:
        raise RecipeError(f"toolset {name} of '{where}' is set up for each task, which is not supported")
    if toolset.config.url is not None:
        raise RecipeError(f"toolset {name} of '{where}' is served at {toolset.config.url}; only tools of this process are "
                          "supported")  # fmt: skip


def _registered(toolset: Any) -> Any:
    try:
        server = importlib.import_module(MCP).MCPServer(type(toolset).__name__)
    except ImportError as error:
        raise RecipeError(f"the tools of a taskset need verifiers 0.4 or newer: {error}") from error
    wait_for(toolset.setup())
    toolset.register(server)
    return server
