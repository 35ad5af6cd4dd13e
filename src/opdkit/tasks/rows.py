"""From rows of a file or data set to problems: types, repeated rows, and the split into training and held-out problems.

Left out: reading the rows (`files`, `hub`), their layouts (`formats`) and tokens (`prompts`).
"""

import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from opdkit.config import TaskConfig
from opdkit.errors import DataError
from opdkit.tasks.formats import Column, layout_of
from opdkit.tasks.messages import read_prompt, read_response, read_tools, show
from opdkit.tasks.problem import Problem

Row = tuple[int, Mapping[str, Any]]  # number in its source from 1 (a file's line, where lines exist), and its columns
logger = logging.getLogger("opdkit")


def problems_from_rows(rows: Iterable[Row], columns: Sequence[str], config: TaskConfig, where: str) -> list[Problem]:
    """Turn rows into problems. `columns` are the source's column names, `where` its name for messages and ids.

    Raises DataError for no rows, a missing column, a wrong type or an empty prompt; RecipeError for wrong task.columns.
    """
    layout = layout_of(config)
    known = layout.present(columns, list(config.columns), where)
    problems: list[Problem] = []
    ids: set[str] = set()
    prompts: set[str] = set()
    repeated = 0
    for number, row in rows:
        problem = _problem(row, known, layout.metadata, f"{where}, row {number}", f"{where}:{number}")
        if layout.distinct:
            if (key := prompt_key(problem)) in prompts:
                repeated += 1
                continue
            prompts.add(key)
        if problem.id in ids:  # evaluation averages over the responses to one id
            problem = replace(problem, id=f"{problem.id}@{number}")
        ids.add(problem.id)
        problems.append(problem)
    if not problems:
        raise DataError(
            f"{where} has no rows: an empty data set; task needs at least one training and one held-out row"
        )
    if repeated:
        logger.warning("%s: %d prompts; %d rows that repeat one are left out", where, len(problems), repeated)
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


def _problem(
    row: Mapping[str, Any], known: Mapping[str, Column], metadata: Sequence[str], where: str, default_id: str
) -> Problem:
    values = {name: column.value(row, where, name) for name, column in known.items()}
    at = {name: f"{where}: '{column.path}' ({name})" for name, column in known.items()}
    text = {name: _text(values.get(name), at.get(name, where)) for name in ("answer", "domain", "system", "id")}
    prompt, written = read_prompt(values["prompt"], at["prompt"])
    response = read_response(values.get("response"), at.get("response", where))
    if written is not None and response is not None:
        raise DataError(f"{at['prompt']} ends with the assistant's turn and the row has a response column; keep one")
    if text["system"] is not None and not isinstance(prompt, str) and prompt[0]["role"] == "system":
        raise DataError(f"{where}: the messages start with a system message and the row has a system column; keep one")
    return Problem(
        id=default_id if text["id"] is None else text["id"],
        prompt=prompt,
        answer=text["answer"],
        domain="default" if text["domain"] is None else text["domain"],
        system=text["system"],
        response=written if written is not None else response,
        tools=read_tools(values.get("tools"), at.get("tools", where)),
        metadata={name: row[name] for name in metadata if row.get(name) is not None},
    )


def _text(value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):  # answers and ids are often plain numbers
        return str(value)
    raise DataError(f"{where} is {show(value)}, expected a string or a number")
