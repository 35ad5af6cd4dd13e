"""The prompt, response and tools of one row: types checked, roles checked, a conversation split into what is read and
what is written.

Left out: which column they stand in (`formats`), rendering (`prompts`) and tokens (`turns`).
"""

import json
from collections.abc import Mapping
from typing import Any

from opdkit.errors import DataError
from opdkit.tasks.problem import Message, Problem

_WRITTEN = ("assistant", "tool")  # what may stand after the message that is answered, without a new question


def read_prompt(value: Any, where: str) -> tuple[str | tuple[Message, ...], tuple[Message, ...] | None]:
    """A prompt, and the response where one list of messages holds both: the assistant's turns at its end.

    Raises DataError for another type, an empty prompt, or messages that hold nothing to answer.
    """
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where} is empty; remove the row or give it a prompt")
        return value, None
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} is {show(value)}, expected a string or a list of messages (role, content)")
    messages = _messages(value, where)
    if messages[-1]["role"] != "assistant":
        return messages, None
    start = len(messages)
    while start and messages[start - 1]["role"] in _WRITTEN:
        start -= 1
    while start < len(messages) and messages[start]["role"] == "tool":  # it answers a call of the prompt
        start += 1
    if not start:
        raise DataError(f"{where} ends with an assistant message and has no message before it that the model answers")
    return messages[:start], messages[start:]


def read_response(value: Any, where: str) -> str | tuple[Message, ...] | None:
    """A target: text that the model is to write as it stands, or turns from its first message to its last.

    Raises DataError for another type, or turns that do not begin and end with the assistant.
    """
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} is {show(value)}, expected a string or a list of messages (role, content)")
    messages = _messages(value, where)
    for which, message in (("begins", messages[0]), ("ends", messages[-1])):
        if message["role"] != "assistant":
            raise DataError(
                f"{where} {which} with a message of role '{message['role']}'; a response begins and ends with the assistant"
            )
    return messages


def read_tools(value: Any, where: str) -> tuple[Message, ...] | None:
    """JSON schemas of tools, given as a list or as JSON text; None where there are none. Raises DataError."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not valid JSON ({error.msg} at column {error.colno})") from error
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise DataError(f"{where} is {show(value)}, expected a list of JSON schemas")
    for number, tool in enumerate(value, 1):
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise DataError(
                f"{where}: tool {number} is {show(tool)}, expected a JSON schema of a function with its name"
            )
    return tuple(without_nulls(tool) for tool in value)


def prompt_messages(problem: Problem, system: str | None) -> list[Message]:
    """The messages of a prompt; the system message is their own, else the problem's, else `system`."""
    if isinstance(problem.prompt, str):
        messages: list[Message] = [{"role": "user", "content": problem.prompt}]
    else:
        messages = list(problem.prompt)
    text = problem.system if problem.system is not None else system
    if text is not None and (not messages or messages[0].get("role") != "system"):
        messages.insert(0, {"role": "system", "content": text})
    return messages


def without_nulls(value: Any) -> Any:
    """The same nested value; keys whose value is null are gone.

    Parquet gives every mapping the keys of all of them, and a template would print an absent one as None.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def show(value: Any) -> str:
    """A value with its type for an error message, cut to a line."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _messages(value: list[Any], where: str) -> tuple[Message, ...]:
    found = []
    for number, message in enumerate(value, 1):
        calls = isinstance(message, Mapping) and bool(message.get("tool_calls"))
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or ("content" not in message and not calls)
        ):
            raise DataError(f"{where}: message {number} is {show(message)}, expected a mapping with role and content")
        if message.get("content") is None and not calls:
            raise DataError(f"{where}: message {number} has no content (null); give it a text")
        found.append(
            without_nulls({**message, "content": "" if message.get("content") is None else message["content"]})
        )
    return tuple(found)
