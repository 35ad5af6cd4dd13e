"""From rows of a file or data set to problems: columns, types, and the split into training and held-out problems.

Left out: reading the rows (`files`, `hub`) and tokens (`prompts`).
"""

import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from opdkit.config import TaskConfig, nearest
from opdkit.errors import DataError, RecipeError
from opdkit.tasks.problem import Message, Problem

COLUMNS = ("prompt", "answer", "response", "domain", "system", "tools", "id")
_OFTEN_PROMPT = ("question", "problem", "messages", "instruction", "query", "input", "text")

Row = tuple[int, Mapping[str, Any]]  # number in its source from 1 (a file's line, where lines exist), and its columns
logger = logging.getLogger("opdkit")


def column_paths(config: TaskConfig) -> dict[str, str]:
    """Our column name -> the source's, for all five. Raises RecipeError for a name that is not ours."""
    for name in config.columns:
        if name not in COLUMNS:
            raise RecipeError(
                f"task.columns: unknown column '{name}'{nearest(name, COLUMNS)} (ours: the source's name)"
            )
    return {name: config.columns.get(name, name) for name in COLUMNS}


def problems_from_rows(rows: Iterable[Row], columns: Sequence[str], config: TaskConfig, where: str) -> list[Problem]:
    """Turn rows into problems. `columns` are the source's column names, `where` its name for messages and ids.

    Raises DataError for no rows, a missing column, a wrong type or an empty prompt; RecipeError for wrong task.columns.
    """
    paths = _known_paths(columns, config, where)
    problems = [_problem(row, paths, f"{where}, row {number}", f"{where}:{number}") for number, row in rows]
    if not problems:
        raise DataError(
            f"{where} has no rows: an empty data set; task needs at least one training and one held-out row"
        )
    return problems


def hold_out(problems: Sequence[Problem], config: TaskConfig, where: str) -> tuple[list[Problem], list[Problem]]:
    """Split off `eval_size` distinct prompts, seeded by task.seed; every row with one of them leaves training.

    Raises DataError when no prompt would be left for training.
    """
    first = {prompt_key(problem): problem for problem in reversed(problems)}  # the first row of each prompt
    distinct = list(dict.fromkeys(prompt_key(problem) for problem in problems))
    if config.eval_size >= len(distinct):
        raise DataError(
            f"{where} has {len(problems)} rows with {len(distinct)} distinct prompts, and task.eval_size = "
            f"{config.eval_size} of them would be held out; lower task.eval_size, or give an evaluation set of its own"
        )
    chosen = set(random.Random(config.seed).sample(distinct, config.eval_size))
    train = [problem for problem in problems if prompt_key(problem) not in chosen]
    return limit(train, config, where), [first[key] for key in distinct if key in chosen]


def separate(
    train: Sequence[Problem], evaluation: Sequence[Problem], config: TaskConfig, where: str, eval_where: str
) -> tuple[list[Problem], list[Problem]]:
    """Two sources: at most `eval_size` evaluation rows (a seeded choice); their prompts leave the training rows.

    Raises DataError when the evaluation source is smaller than an eval_size that was asked for, or nothing is left.
    """
    default = TaskConfig.model_fields["eval_size"].default
    if config.eval_size > len(evaluation) and config.eval_size != default:
        raise DataError(f"task.eval_size = {config.eval_size}, but {eval_where} has {len(evaluation)} rows; lower it")
    kept = _choose(evaluation, min(config.eval_size, len(evaluation)), config.seed)
    # All evaluation prompts leave, not only the chosen ones: another eval_size must not change what was trained on.
    held = {prompt_key(problem) for problem in evaluation}
    left = [problem for problem in train if prompt_key(problem) not in held]
    if len(left) < len(train):
        logger.warning(
            "%d of %d prompts of %s also occur in %s: not trained on",
            len(train) - len(left),
            len(train),
            where,
            eval_where,
        )
    if not left:
        raise DataError(f"every prompt of {where} also occurs in {eval_where}: nothing is left to train on")
    return limit(left, config, where), kept


def limit(problems: Sequence[Problem], config: TaskConfig, where: str) -> list[Problem]:
    """At most train_size training problems, a seeded choice in the source's order. Raises DataError if fewer exist."""
    if config.train_size is None:
        return list(problems)
    if config.train_size > len(problems):
        raise DataError(
            f"task.train_size = {config.train_size}, but {where} has {len(problems)} training rows; lower it"
        )
    return _choose(problems, config.train_size, config.seed)


def prompt_key(problem: Problem) -> str:
    """A key that two problems share exactly when their prompts are identical."""
    return json.dumps(problem.prompt, sort_keys=True, default=dict)


def _choose(problems: Sequence[Problem], size: int, seed: int) -> list[Problem]:
    return [problems[i] for i in sorted(random.Random(seed).sample(range(len(problems)), size))]


def _known_paths(columns: Sequence[str], config: TaskConfig, where: str) -> dict[str, str]:
    paths = column_paths(config)
    known = {name: path for name, path in paths.items() if path in columns or path.split(".")[0] in columns}
    listed = ", ".join(columns) or "none"
    for name in config.columns:
        if name not in known:
            raise DataError(
                f"{where} has no column '{paths[name]}' (task.columns.{name}){nearest(paths[name], columns)}"
            )
    if columns and "prompt" not in known:
        guess = next((column for column in _OFTEN_PROMPT if column in columns), None)
        fix = f"task.columns: {{prompt: {guess or 'NAME'}}}"
        raise DataError(f"{where} has no column 'prompt' (its columns: {listed}); say which one holds it, as in {fix}")
    return known


def _problem(row: Mapping[str, Any], paths: Mapping[str, str], where: str, default_id: str) -> Problem:
    values = {name: _lookup(row, path) for name, path in paths.items()}
    if values["prompt"] is None:
        raise DataError(f"{where}: '{paths['prompt']}' (prompt) is missing; give a string or a list of messages")
    text = {name: _text(values.get(name), f"{where}: '{paths.get(name)}' ({name})") for name in COLUMNS[1:]}
    prompt = _prompt(values["prompt"], f"{where}: '{paths['prompt']}' (prompt)")
    if text["system"] is not None and not isinstance(prompt, str) and prompt[0]["role"] == "system":
        raise DataError(f"{where}: the messages start with a system message and the row has a system column; keep one")
    return Problem(
        id=default_id if text["id"] is None else text["id"],
        prompt=prompt,
        answer=text["answer"],
        domain="default" if text["domain"] is None else text["domain"],
        system=text["system"],
    )


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


def _text(value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):  # answers and ids are often plain numbers
        return str(value)
    raise DataError(f"{where} is {_show(value)}, expected a string or a number")


def _prompt(value: Any, where: str) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where} is empty; remove the row or give it a prompt")
        return value
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} is {_show(value)}, expected a string or a list of messages (role, content)")
    messages = tuple(_messages(value, where))
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where} ends with an assistant message; end it with the message that the model answers")
    return messages


def _messages(value: list[Any], where: str) -> Iterator[Message]:
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"{where}: message {number} is {_show(message)}, expected a mapping with role and content")
        # Parquet gives every message the keys of all of them; a template would print an absent one as None.
        yield {key: item for key, item in message.items() if item is not None or key == "content"}


def _show(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
