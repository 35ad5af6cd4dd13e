"""`opd convert`: a file of one layout as a file of our columns, or of verl's.

Left out: data sets of the Hub (save them as parquet first), and columns that no layout names.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opdkit.config import TaskConfig, nearest
from opdkit.errors import DataError, RecipeError
from opdkit.tasks.files import read_problems
from opdkit.tasks.formats import LAYOUTS
from opdkit.tasks.messages import prompt_messages
from opdkit.tasks.problem import Problem

Row = dict[str, Any]


def convert(source: Path, target: Path, read_as: str = "columns", write_as: str = "columns") -> str:
    """Read `source` in one layout and write `target` in another; both are .jsonl or .parquet. Returns what was done.

    `target` appears whole or not at all. Raises DataError for a source that cannot be read, a target that exists or rows
    that do not fit its layout, RecipeError for an unknown layout.
    """
    for name, known in ((read_as, list(LAYOUTS)), (write_as, list(_WRITERS))):
        if name not in known:
            raise RecipeError(f"no layout '{name}'{nearest(name, known)}")
    _check_target(target)
    config = TaskConfig.model_validate({"kind": "file", "path": str(source), "format": read_as})
    problems = read_problems(source, config)
    rows = [_WRITERS[write_as](problem) for problem in problems]
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        (_write_jsonl if target.suffix.lower() == ".jsonl" else _write_parquet)(partial, rows)
        _check_target(target)  # again: it may have come into being meanwhile
        os.rename(partial, target)
    except OSError as error:
        raise DataError(f"'{target}' cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return "\n".join(
        [f"{len(rows):,} rows of '{source}' ({read_as}) as '{target}' ({write_as})", *_counts(problems, write_as)]
    )


def to_columns(problem: Problem) -> Row:
    """A problem under our own column names; what it does not have is left out."""
    row = {
        "id": problem.id,
        "prompt": _plain(problem.prompt),
        "answer": problem.answer,
        "response": _plain(problem.response),
        "domain": None if problem.domain == "default" else problem.domain,
        "system": problem.system,
        "tools": None if problem.tools is None else json.dumps(problem.tools, ensure_ascii=False),
    }
    return {name: value for name, value in row.items() if value is not None}


def to_verl(problem: Problem) -> Row:
    """A problem in verl's layout for reinforcement learning. Raises DataError without an answer."""
    if problem.answer is None:
        raise DataError(f"problem {problem.id} has no answer, which verl's reward_model.ground_truth needs")
    return {
        "data_source": problem.domain,
        "prompt": [dict(message) for message in prompt_messages(problem, None)],
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"index": problem.id},
    }


_WRITERS: dict[str, Callable[[Problem], Row]] = {"columns": to_columns, "verl": to_verl}


def _plain(value: Any) -> Any:
    return [dict(message) for message in value] if isinstance(value, tuple) else value


def _check_target(target: Path) -> None:
    if target.suffix.lower() not in (".jsonl", ".parquet"):
        raise DataError(f"'{target}' has suffix '{target.suffix}', expected .jsonl or .parquet")
    if target.exists():
        raise DataError(f"'{target}' exists; nothing is overwritten: give another name")
    if not target.parent.is_dir():
        raise DataError(f"'{target.parent}' is not a folder; create it, or give another place for '{target.name}'")


def _counts(problems: Sequence[Problem], write_as: str) -> list[str]:
    domains = len({problem.domain for problem in problems})
    have = {
        name: sum(getattr(problem, name) is not None for problem in problems)
        for name in ("answer", "response", "tools")
    }
    lines = ["  " + ", ".join([*(f"{name}: {count:,}" for name, count in have.items()), f"domains: {domains:,}"])]
    if write_as == "verl" and (lost := [f"{have[name]:,} {name}" for name in ("response", "tools") if have[name]]):
        lines.append(f"  left out, since verl's layout has no place for them: {', '.join(lost)}")
    return lines


def _write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except TypeError as error:
        raise DataError(f"the rows hold a value that JSON cannot ({error}); write .parquet") from error


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    names = dict.fromkeys(name for row in rows for name in row)
    try:
        table = pyarrow.Table.from_pydict({name: [row.get(name) for row in rows] for name in names})
        pyarrow.parquet.write_table(table, path)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"the rows do not fit into parquet, whose columns have one type each ({error}); write .jsonl"
        ) from error
