"""How calls of tools stand in a response, and how their answers are shown.

`TemplateCalls`, for chat models: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` in a turn that ends with the
template's end token; answers are messages of role `tool`, in the template's own text. `TextCalls`, for models without a
template: a line `CALL ...`; the answer is a line `= ...` or `ERROR ...`. Left out: the formats of other model families.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from opdkit.config import TaskConfig
from opdkit.errors import DataError, ModelError, RecipeError
from opdkit.models import LanguageModel
from opdkit.rollouts.segments import Draft
from opdkit.tasks.environments import Environment, Observation, function_of
from opdkit.tasks.messages import prompt_messages
from opdkit.tasks.problem import Message, Problem
from opdkit.tasks.prompts import render, token_ids
from opdkit.tasks.turns import Transcript

LINE = "\n"
SHOWN = 80  # characters of a bad call in its answer
_BLOCK = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|$)", re.DOTALL)


@dataclass(frozen=True)
class Asked:
    """One call as the model wrote it; `wrong`: why it cannot be run."""

    name: str
    arguments: Mapping[str, Any]
    wrong: str = ""


@runtime_checkable
class Calls(Protocol):
    """How calls stand in a response."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a piece of the response."""
        ...

    def check(self, problem: Problem, lm: LanguageModel) -> None:
        """Raise OpdkitError for a model that cannot read or write such calls."""
        ...

    def read(self, draft: Draft, lm: LanguageModel) -> list[Asked] | Literal["go on", "done"]:
        """The calls with which a draft's newest piece ends; or that it goes on behind a stop string, or is done."""
        ...

    def ids(self, draft: Draft, asked: Sequence[Asked], answers: Sequence[Observation], lm: LanguageModel) -> list[int]:
        """The tokens that the model reads between these calls and its next turn."""
        ...


def without_specials(tokenizer: Any, text: str) -> str:
    """The text with a space inside everything that the tokenizer would read as a special token: a tool's answer must not
    end its own message or speak as another role."""
    for special in sorted(tokenizer.get_added_vocab(), key=len, reverse=True):
        if len(special) > 1 and not special.isspace():
            text = text.replace(special, f"{special[0]} {special[1:]}")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Calls as lines of text


@dataclass(frozen=True)
class TextCalls:
    """A line `CALL text` is a call of the only tool with its only argument; other lines are the model's own."""

    tool: str
    argument: str
    stop: tuple[str, ...] = (LINE,)
    word: str = "CALL "

    def check(self, problem: Problem, lm: LanguageModel) -> None:
        text = f"{self.word}= ERROR{LINE}"
        if lm.tokenizer.decode(token_ids(lm.tokenizer, text)).strip(" ") != text:
            raise ModelError(f"the tokenizer of '{lm.name}' cannot write {text!r}, so it cannot call tools in text")

    def read(self, draft: Draft, lm: LanguageModel) -> list[Asked] | Literal["go on", "done"]:
        line = draft.written(lm.tokenizer)
        if draft.finish != "stop_string" or not draft.newest(lm.tokenizer).startswith(line + LINE):
            return "done"  # EOS, the length limit, or one of the recipe's own stop strings
        return (
            [Asked(self.tool, {self.argument: line[len(self.word) :].strip()})]
            if line.startswith(self.word)
            else "go on"
        )

    def ids(self, draft: Draft, asked: Sequence[Asked], answers: Sequence[Observation], lm: LanguageModel) -> list[int]:
        return token_ids(lm.tokenizer, "".join(f"{'ERROR' if a.error else '='} {a.text}{LINE}" for a in answers))


def only_argument(environment: Environment, name: str) -> tuple[str, str]:
    """The names of an environment's only tool and of its only argument. Raises RecipeError where there are more."""
    tools = [function_of(tool) for tool in environment.tools]
    arguments = [*(tools[0].get("parameters") or {}).get("properties", {})]
    if len(tools) != 1 or len(arguments) != 1:
        raise RecipeError(
            f"tools.calls 'text' needs an environment with one tool of one argument; '{name}' has {len(tools)} tools, the "
            f"first with {len(arguments)} arguments; set tools.calls: template"
        )
    return str(tools[0]["name"]), str(arguments[0])


# ---------------------------------------------------------------------------------------------------------------------
# Calls through a chat template


@dataclass(frozen=True)
class TemplateCalls:
    """`<tool_call>` blocks with one JSON call or a list of them; a turn may have several."""

    tools: tuple[Message, ...]
    config: TaskConfig
    eos_ids: tuple[int, ...] = ()  # empty = the model's own
    stop: tuple[str, ...] = ()

    @property
    def _names(self) -> list[str]:
        return [str(function_of(tool)["name"]) for tool in self.tools]

    def check(self, problem: Problem, lm: LanguageModel) -> None:
        probe = "observed 123"
        if probe not in self.between(problem, [(self._names[0], probe)], lm)[1]:
            raise DataError(
                f"the chat template of '{lm.tokenizer.name_or_path}' does not show what a tool answers; use a model whose "
                "template has messages of role 'tool', or set tools.calls: text"
            )

    def read(self, draft: Draft, lm: LanguageModel) -> list[Asked] | Literal["go on", "done"]:
        if draft.finish != "stop":
            return "done"
        *said, last = draft.ids[draft.since :]
        end, _ = self.between(draft.problem, [(self._names[0], "")], lm)
        if lm.tokenizer.decode([last], skip_special_tokens=False) != end:
            return "done"  # another EOS token than the template's: the response is over, whatever it says
        text = str(lm.tokenizer.decode(said, skip_special_tokens=False)).rpartition("</think>")[2]
        return [one for block in _BLOCK.finditer(text) for one in read_block(*block.groups())] or "done"

    def ids(self, draft: Draft, asked: Sequence[Asked], answers: Sequence[Observation], lm: LanguageModel) -> list[int]:
        names = self._names
        read = [
            (one.name if one.name in names else names[0], answer.text)
            for one, answer in zip(asked, answers, strict=True)
        ]
        text = Transcript(draft.problem, "", (), list(draft.ids[-1:]))  # the end token, across which nothing is joined
        text.end_turn(lm.tokenizer)
        text.add(lm.tokenizer, self.between(draft.problem, read, lm)[1], False, draft.turn)
        return text.ids[1:]

    def between(self, problem: Problem, answers: Sequence[tuple[str, str]], lm: LanguageModel) -> tuple[str, str]:
        """(end token of a turn with calls, the template's text from there to the next turn) for answers (tool, text).

        They are read off a rendered turn that stands for the model's: templates may change a turn (drop its thinking), but
        what they write behind it does not depend on it. Raises DataError for a template that shows no turn or no end.
        """
        shown, mark = prompt_messages(problem, self.config.system), "standing-in"
        while mark in str([shown, answers]):
            mark += "-x"
        calls = []
        for n, (name, _) in enumerate(answers):  # templates read a call's name behind `function`, or directly
            one = {"name": name, "arguments": {"text": mark}}
            calls.append({"id": _id(n), "type": "function", "function": one, **one})
        turn = {"role": "assistant", "content": mark, "tool_calls": calls}
        told = [{"role": "tool", "name": name, "tool_call_id": _id(n), "content": text}
                for n, (name, text) in enumerate(answers)]  # fmt: skip
        text = render(lm.tokenizer, problem, [*shown, turn, *told], self.config.template_args, generation=True)
        _, found, behind = text.rpartition(mark)
        ends = [str(lm.tokenizer.decode([i], skip_special_tokens=False)) for i in self.eos_ids or lm.eos_ids]
        places = {behind.find(end): end for end in ends if end and end in behind}
        if not found or not places:
            raise DataError(
                f"the chat template of '{lm.tokenizer.name_or_path}' does not show a turn with a call that ends with one of "
                f"the end tokens {', '.join(ends)}; use a model whose template has tools, or set tools.calls: text"
            )
        end = places[min(places)]
        return end, behind[min(places) + len(end) :]


def read_block(body: str, closing: str) -> list[Asked]:
    """The calls of one `<tool_call>` block. What is wrong with it is said in `Asked.wrong`."""
    if closing != "</tool_call>":
        return [Asked("", {}, "the tool call has no closing </tool_call>")]
    try:
        value = json.loads(body)
    except (json.JSONDecodeError, RecursionError) as error:
        where = (
            f"{error.msg} at character {error.pos + 1}"
            if isinstance(error, json.JSONDecodeError)
            else "nested too deeply"
        )
        return [Asked("", {}, f"the tool call is not valid JSON ({where}): {body.strip()[:SHOWN]}")]
    calls = value if isinstance(value, list) else [value]
    return [_asked(call) for call in calls] or [Asked("", {}, "the tool call is an empty list")]


def _asked(call: Any) -> Asked:
    shape = 'a tool call is {"name": TOOL, "arguments": {...}}'
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return Asked("", {}, f"{shape}; this one has no name")
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, dict):
        return Asked(call["name"], {}, f"{shape}; these arguments are a {type(arguments).__name__}")
    return Asked(call["name"], arguments)


def _id(number: int) -> str:
    """Nine letters and digits: what the strictest templates take for the id of a call."""
    return f"call{number:05d}"
