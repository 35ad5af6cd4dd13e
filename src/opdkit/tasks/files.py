"""Tasks from JSONL and parquet files.

Left out: CSV and plain JSON (convert them, or use kind `dataset`), and files that do not fit in memory.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from opdkit.config import TaskConfig
from opdkit.errors import DataError
from opdkit.tasks.formats import layout_of
from opdkit.tasks.problem import Problem, Task
from opdkit.tasks.rows import Row, hold_out, problems_from_rows, separate


def file_task(config: TaskConfig) -> Task:
    """A task from task.path and, if given, task.eval_path. Raises DataError for a file or row that cannot be used."""
    path = Path(str(config.path))
    problems = read_problems(path, config)
    if config.eval_path is None:
        train, held = hold_out(problems, config, path.name)
    else:
        eval_path = Path(config.eval_path)
        train, held = separate(problems, read_problems(eval_path, config), config, path.name, eval_path.name)
    return Task(name=path.stem, train=train, eval=held)


def read_problems(path: Path, config: TaskConfig) -> list[Problem]:
    """All rows of one file as problems. Raises DataError naming the file and the row."""
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"'{path}' has suffix '{path.suffix}', expected .jsonl (one JSON object a line) or .parquet")
    if not path.is_file():
        what = "is a folder (kind: dataset reads folders)" if path.is_dir() else "does not exist"
        raise DataError(f"'{path}' {what}; give the path of a .jsonl or .parquet file")
    rows: Iterable[Row]
    rows, columns = readers[path.suffix.lower()](path, config)
    return problems_from_rows(rows, columns, config, path.name)


def _read_jsonl(path: Path, config: TaskConfig) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    columns: dict[str, None] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number} is not valid JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number} holds {type(row).__name__}, expected one JSON object a line")
        columns.update(dict.fromkeys(row))
        rows.append((number, row))
    return rows, list(columns)


def _read_parquet(path: Path, config: TaskConfig) -> tuple[Iterator[Row], list[str]]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = list(file.schema_arrow.names)
    except (pyarrow.lib.ArrowInvalid, OSError) as error:
        raise DataError(f"'{path}' cannot be read as parquet: {error}") from error
    return enumerate(_parquet_rows(path, layout_of(config).heads(columns)), 1), columns


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows one batch after the other: a million of them as Python objects would not fit beside a model."""
    import pyarrow.lib
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.lib.ArrowInvalid, OSError) as error:
        raise DataError(f"'{path}' cannot be read as parquet: {error}") from error
