"""Environments: tools that a model may call while it writes a response, and the way in which they are called safely.

An environment lists its tools as JSON schemas and opens one session per response; a session answers calls. Whatever goes
wrong inside (an exception, a hang, ten megabytes of output) becomes an observation that the model reads, and is counted.
How calls are written in a response and how observations are shown is `rollouts.tools`' business.

A call that takes too long is left alone: Python cannot end a thread. So nothing here keeps hostile code from the machine;
an environment that runs what the model writes needs a process of its own that it can kill (`tasks.python_tool`).
"""

import importlib
import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Any, Protocol, runtime_checkable

from opdkit.config import nearest
from opdkit.errors import OpdkitError, RecipeError
from opdkit.tasks.messages import read_tools
from opdkit.tasks.problem import Message, Problem

ENVIRONMENTS = {
    "calculator": "opdkit.tasks.calculator:Calculator",
    "python": "opdkit.tasks.python_tool:PythonTool",
    "verifiers": "opdkit.tasks.verifiers_env:VerifiersTools",
}
SHOWN = 200  # characters of an exception's text that the model reads


@dataclass(frozen=True)
class Observation:
    """What a tool answers: text that the model reads. `error`: the call did not do what was asked."""

    text: str
    error: bool = False
    timed_out: bool = False  # an error: it took longer than it may


@runtime_checkable
class Session(Protocol):
    """One response's tools; calls of one session come one after the other, those of several at the same time."""

    def call(self, name: str, arguments: Mapping[str, Any]) -> Observation:
        """Run one of the environment's tools. An exception becomes an error observation with its text."""
        ...

    def close(self) -> None:
        """Free what the session holds. Called once; not for a session with a call that never returned."""
        ...


@runtime_checkable
class Environment(Protocol):
    """Tools, and sessions in which they are called. Made once per run from `tools.settings`."""

    @property
    def tools(self) -> tuple[Message, ...]:
        """JSON schemas: {"type": "function", "function": {"name", "description", "parameters"}}."""
        ...

    def start(self, problem: Problem) -> Session:
        """A new session for one response to a problem."""
        ...


def make_environment(name: str, settings: Mapping[str, Any]) -> Environment:
    """The environment of a recipe: a name in ENVIRONMENTS, or `package.module:function` (or class), called with settings.

    Raises RecipeError for an unknown name, settings that it does not take, or a value that is no environment.
    """
    if ":" not in name and name not in ENVIRONMENTS:
        raise RecipeError(f"there is no tool environment '{name}'{nearest(name, list(ENVIRONMENTS))}; your own is given as "
                          "package.module:function")  # fmt: skip
    module, _, inside = ENVIRONMENTS.get(name, name).partition(":")
    try:
        make = getattr(importlib.import_module(module), inside)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"tools.environment = '{name}' cannot be imported: {error}") from error
    try:
        made = make(**settings)
    except (TypeError, ValueError) as error:
        if isinstance(error, OpdkitError):
            raise
        raise RecipeError(
            f"tools.settings = {dict(settings)} do not fit environment '{name}'{_parameters(make)}: {error}"
        ) from error
    if not isinstance(made, Environment):
        raise RecipeError(f"tools.environment = '{name}' gives a {type(made).__name__}, expected an object with `tools` and "
                          "`start(problem)`")  # fmt: skip
    if not read_tools(list(made.tools), f"tools of environment '{name}'"):
        raise RecipeError(f"environment '{name}' has no tools; remove the recipe's section `tools`")
    return made


def _parameters(make: Any) -> str:
    """The settings that an environment takes, as words; nothing where it does not say."""
    try:
        return f", which takes {', '.join(inspect.signature(make).parameters) or 'none'}"
    except (TypeError, ValueError):
        return ""


def function_of(tool: Message) -> Message:
    """The part of a tool's schema with its name and parameters."""
    found: Message = tool.get("function", tool)
    return found


@dataclass(frozen=True)
class Limits:
    """What one call may take: `seconds` of time, `characters` of output; `workers` calls run at the same time."""

    seconds: float = 10.0
    characters: int = 2000
    workers: int = 8


@dataclass
class Call:
    """One call and its session. A session that did not answer in time is `stuck` and gets no more calls."""

    session: "Guarded"
    name: str
    arguments: Mapping[str, Any]
    answer: Observation | None = None

    def run(self) -> None:
        try:
            answer = self.session.opened().call(self.name, self.arguments)
            if not isinstance(answer, Observation):
                raise TypeError(f"the tool returned a {type(answer).__name__}, expected an Observation")
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a tool is the user's code: it may raise anything, and the model reads what
            answer = Observation(f"{type(error).__name__}: {str(error)[:SHOWN]}", error=True)
        self.answer = answer


class Guarded:
    """A session that is opened at its first call, within that call's time limit."""

    def __init__(self, environment: Environment, problem: Problem) -> None:
        self.environment, self.problem = environment, problem
        self.session: Session | None = None
        self.stuck = False

    def opened(self) -> Session:
        if self.session is None:
            self.session = self.environment.start(self.problem)
        return self.session

    def close(self) -> None:
        """Close the session; an exception in it changes nothing, because the response is complete."""
        if self.session is None or self.stuck:
            return
        thread = Thread(target=_silently, args=(self.session,), daemon=True)
        thread.start()
        thread.join(1.0)


def answer(calls: Sequence[Call], limits: Limits) -> list[Observation]:
    """Run calls of different sessions, `limits.workers` at a time. Returns one observation per call, never an exception."""
    found = []
    for start in range(0, len(calls), limits.workers):
        chunk = calls[start : start + limits.workers]
        threads = [None if call.session.stuck else Thread(target=call.run, daemon=True) for call in chunk]
        for thread in threads:
            if thread is not None:
                thread.start()
        deadline = time.monotonic() + limits.seconds
        for call, thread in zip(chunk, threads, strict=True):
            if thread is None:
                found.append(Observation("the tool no longer answers", error=True))
                continue
            thread.join(max(0.0, deadline - time.monotonic()))
            result = call.answer
            call.session.stuck = result is None
            late = Observation(f"no answer within {limits.seconds:g} seconds", error=True, timed_out=True)
            found.append(late if result is None else shortened(result, limits.characters))
    return found


def shortened(observation: Observation, characters: int) -> Observation:
    """The observation with at most `characters` of its text: the middle is left out, and the text says so."""
    text = observation.text
    if len(text) <= characters:
        return observation
    gap = f"\n[... {len(text) - characters} characters left out ...]\n"
    room = max(0, characters - len(gap))
    head = room - room // 2
    cut = (text[:head] + gap + text[len(text) - room // 2 :])[:characters]
    return Observation(cut, observation.error, observation.timed_out)


def _silently(session: Session) -> None:
    try:
        session.close()
    except Exception:  # noqa: BLE001 - the user's code, after the last answer: nothing is left that could be wrong
        return
