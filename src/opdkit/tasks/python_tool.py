"""The tool `python`: the model writes code, which runs in a sandboxed process, and reads what it printed.

Like a notebook's cell, a call shows what the code prints and the value of its last expression; an error shows the code's
own lines of the traceback. Each call starts anew; with `persistent`, the calls of one response share their variables.

Left out: files, pictures and input for the code.
"""

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from opdkit.config import nearest
from opdkit.errors import RecipeError
from opdkit.tasks.environments import Observation
from opdkit.tasks.problem import Message, Problem
from opdkit.tasks.sandbox import NEEDED, Sandbox
from opdkit.tasks.sandbox_process import Limits

logger = logging.getLogger("opdkit")
_ONCE = "Every call starts anew: variables of earlier calls are gone."
_KEPT = "Variables of earlier calls are kept."


class PythonTool:
    """Environment with one tool, `python(code)`; `limits` are fields of `sandbox_process.Limits`, the rest as for Sandbox.

    Raises RecipeError for a wrong setting, OpdkitError on a machine that cannot shield itself from the code.
    """

    def __init__(self, *, limits: Any = None, persistent: Any = False, packages: Any = False,
                 allow_weaker: Any = False) -> None:  # fmt: skip
        for name, value in (("persistent", persistent), ("packages", packages), ("allow_weaker", allow_weaker)):
            if not isinstance(value, bool):  # "no" in quotes would count as true
                raise RecipeError(f"the Python tool has {name} = {value!r}, expected true or false")
        self._limits = _read_limits({} if limits is None else limits)
        self._persistent, self._packages, self._allow_weaker = persistent, packages, allow_weaker
        self.tools: tuple[Message, ...] = (_schema(self._limits, persistent, packages),)
        report = self._sandbox().protections()  # a machine that cannot do it says so now, not to the model
        if missing := [name for name in NEEDED if report[name] is not None]:
            logger.warning("the Python tool runs without: %s (allow_weaker is set)", ", ".join(missing))

    def start(self, problem: Problem) -> "PythonSession":
        """A session of its own for one response."""
        return PythonSession(self._sandbox())

    def _sandbox(self) -> Sandbox:
        return Sandbox(
            self._limits, persistent=self._persistent, packages=self._packages, allow_weaker=self._allow_weaker
        )


class PythonSession:
    """The calls of one response."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def call(self, name: str, arguments: Mapping[str, Any]) -> Observation:
        """Run `arguments["code"]`. A wrong call is an error observation that says what was expected."""
        code = arguments.get("code")
        if name != "python" or not isinstance(code, str) or len(arguments) != 1:
            given = f"{name}({', '.join(map(str, arguments))})"
            return Observation(f"expected python(code) with a string of Python code, not {given[:200]}", error=True)
        result = self._sandbox.run(code)
        return Observation(result.text, error=result.raised, timed_out=result.timed_out)

    def close(self) -> None:
        """End the process that a persistent session keeps."""
        self._sandbox.close()


def _read_limits(given: Any) -> Limits:
    known = [field.name for field in fields(Limits)]
    if not isinstance(given, Mapping):
        raise RecipeError(
            f"the Python sandbox has limits = {given!r}, expected a mapping of {', '.join(known)} to numbers"
        )
    for name, value in given.items():
        if name not in known:
            raise RecipeError(f"the Python sandbox has no limit '{name}'{nearest(name, known)}")
        whole = name != "seconds"
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise RecipeError(
                f"the Python sandbox has {name} = {value!r}, expected {'an integer' if whole else 'a number'}"
            )
    values: dict[str, Any] = {name: float(value) if name == "seconds" else value for name, value in given.items()}
    return Limits(**values)


def _schema(limits: Limits, persistent: bool, packages: bool) -> Message:
    about = (f"Run Python code and read what it prints, the value of its last expression and errors. "
             f"{_KEPT if persistent else _ONCE} At most {limits.seconds:g} seconds; no network, no other programs; "
             f"{'installed packages' if packages else 'the standard library only'}.")  # fmt: skip
    code = {"type": "string", "description": "Python code"}
    parameters = {"type": "object", "properties": {"code": code}, "required": ["code"]}
    return {"type": "function", "function": {"name": "python", "description": about, "parameters": parameters}}
