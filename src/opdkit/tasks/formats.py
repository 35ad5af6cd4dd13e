"""Known layouts of data sets: which column of theirs holds what of ours, and how its value is read.

A layout is a value. `task.columns` replaces single columns of it; a column given there is read as it stands.

Left out: reading files (`files`, `hub`), types of the values (`rows`, `messages`), and layouts that need more than one
row for a problem.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opdkit.config import TaskConfig, nearest
from opdkit.errors import DataError, RecipeError
from opdkit.tasks.messages import show

COLUMNS = ("prompt", "answer", "response", "domain", "system", "tools", "id")
_OFTEN_PROMPT = ("question", "problem", "messages", "instruction", "query", "input", "text")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Column:
    """Where a value stands (dots reach into nested columns) and how it is read; `read` raises ValueError."""

    path: str
    read: Callable[[Any], Any] | None = None
    required: bool = False

    def value(self, row: Mapping[str, Any], where: str, name: str) -> Any:
        """The value of a row, None where it is absent. Raises DataError where it is required or cannot be read."""
        found = _lookup(row, self.path)
        if found is None:
            if self.required:
                kind = "give a string or a list of messages" if name == "prompt" else "complete the row or remove it"
                raise DataError(f"{where}: '{self.path}' ({name}) is missing; {kind}")
            return None
        try:
            return found if self.read is None else self.read(found)
        except ValueError as error:
            raise DataError(f"{where}: '{self.path}' ({name}) {error}") from error

    def stands_in(self, columns: Sequence[str]) -> bool:
        return self.path in columns or self.path.split(".")[0] in columns


@dataclass(frozen=True)
class Layout:
    """Our column name -> theirs. `metadata` columns are kept with the problem; `distinct`: equal prompts count once."""

    name: str
    columns: Mapping[str, Column]
    metadata: tuple[str, ...] = ()
    distinct: bool = False

    def heads(self, columns: Sequence[str]) -> list[str]:
        """Which of the source's columns have to be read."""
        paths = [*(column.path for column in self.columns.values()), *self.metadata]
        wanted = {*paths, *(path.split(".")[0] for path in paths if path not in columns)}
        return [name for name in columns if name in wanted]

    def present(self, columns: Sequence[str], mapped: Sequence[str], where: str) -> dict[str, Column]:
        """The columns that the source has. Raises DataError for a required one, or one that `mapped` names, without it."""
        known = {name: column for name, column in self.columns.items() if column.stands_in(columns)}
        listed = ", ".join(columns) or "none"
        for name in mapped:
            if name not in known:
                path = self.columns[name].path
                raise DataError(f"{where} has no column '{path}' (task.columns.{name}){nearest(path, columns)}")
        absent = {name: column.path for name, column in self.columns.items() if column.required and name not in known}
        if not columns or not absent:
            return known
        if self.name != "columns":
            raise DataError(
                f"{where} is not in the layout '{self.name}': it has no column {', '.join(map(repr, absent.values()))} "
                f"(its columns: {listed}); set another task.format, or say with task.columns which column holds "
                f"{', '.join(absent)}"
            )
        guess = next((column for column in _OFTEN_PROMPT if column in columns), None)
        fix = f"task.columns: {{prompt: {guess or 'NAME'}}}"
        raise DataError(f"{where} has no column 'prompt' (its columns: {listed}); say which one holds it, as in {fix}")


def layout_of(config: TaskConfig) -> Layout:
    """The layout of task.format with task.columns put in. Raises RecipeError for a column name that is not ours."""
    layout = LAYOUTS[config.format]
    for name in config.columns:
        if name not in COLUMNS:
            raise RecipeError(
                f"task.columns: unknown column '{name}'{nearest(name, COLUMNS)} (ours: the source's name)"
            )
    given = {name: Column(path, required=name == "prompt") for name, path in config.columns.items()}
    return replace(layout, columns={**layout.columns, **given})


def after_hashes(value: Any) -> str:
    """GSM8K's answer: what follows the last `####` of the worked solution, without thousands separators."""
    if not isinstance(value, str) or "####" not in value:
        raise ValueError(f"is {show(value)}, expected a worked solution with '#### ANSWER' at its end")
    return value.rpartition("####")[2].strip().replace(",", "")


def conversation_prompt(value: Any) -> Any:
    """ShareGPT's conversation without its last turn; one question alone is its text."""
    messages = _conversation(value)[:-1]
    return messages[0]["content"] if [message["role"] for message in messages] == ["user"] else messages


def conversation_response(value: Any) -> str:
    """The last turn of a ShareGPT conversation as text: what the model is to write as it stands."""
    return str(_conversation(value)[-1]["content"])


def _conversation(value: Any) -> list[dict[str, str]]:
    wanted = "expected turns {from: human or gpt or system, value: text}"
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f"is {show(value)}, {wanted}, at least two")
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping) or turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
            raise ValueError(f"has turn {number} = {show(turn)}, {wanted}")
    if _ROLES[value[-1]["from"]] != "assistant":
        raise ValueError(f"ends with a turn from '{value[-1]['from']}', expected one from gpt")
    return [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in value]


def _lookup(row: Mapping[str, Any], path: str) -> Any:
    """A column by its name, or by a dotted path into nested ones (`reward_model.ground_truth`)."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


_VERL = {
    "prompt": Column("prompt", required=True),
    "answer": Column("reward_model.ground_truth", required=True),
    "domain": Column("data_source"),
    "id": Column("extra_info.index"),
}
_CONVERSATION = {
    "prompt": Column("conversations", conversation_prompt, required=True),
    "response": Column("conversations", conversation_response, required=True),
    "domain": Column("domain"),
}
_GSM8K = {
    "prompt": Column("question", required=True),
    "answer": Column("answer", after_hashes, required=True),
    "response": Column("answer", required=True),
}
_DEEPMATH = {
    "prompt": Column("question", required=True),
    "answer": Column("final_answer", required=True),
    "domain": Column("topic"),
}
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("columns", {name: Column(name, required=name == "prompt") for name in COLUMNS}),
        Layout("verl", _VERL),
        Layout("dapo", _VERL, distinct=True),  # its rows repeat 17,000 prompts about a hundred times
        Layout("deepmath", _DEEPMATH, metadata=("difficulty",)),
        Layout("openthoughts3", _CONVERSATION, metadata=("difficulty", "source")),
        Layout("gsm8k", _GSM8K),
    )
}
