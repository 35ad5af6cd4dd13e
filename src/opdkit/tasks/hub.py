"""Tasks from `datasets`: a Hub id, a folder of data files, or a folder written by `save_to_disk`.

Left out: streaming; prompts are held in memory.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdkit.config import TaskConfig
from opdkit.errors import DataError, RecipeError
from opdkit.tasks.formats import layout_of
from opdkit.tasks.problem import Problem, Task
from opdkit.tasks.rows import hold_out, problems_from_rows, separate

if TYPE_CHECKING:
    import datasets


def dataset_task(config: TaskConfig) -> Task:
    """A task from task.path, task.split and, if given, task.eval_split.

    Raises DataError when the data set, a split or a row cannot be used.
    """
    name = Path(str(config.path)).name
    problems = _read(config, config.split)
    where = f"{name}[{config.split}]"
    if config.eval_split is None:
        train, held = hold_out(problems, config, where)
    else:
        if config.eval_split == config.split:
            raise RecipeError(f"task.eval_split is '{config.split}', the training split; leave it out to hold rows out")
        evaluation = _read(config, config.eval_split)
        train, held = separate(problems, evaluation, config, where, f"{name}[{config.eval_split}]")
    return Task(name=name, train=train, eval=held)


def _read(config: TaskConfig, split: str) -> list[Problem]:
    data = _saved(config, split) if _is_saved(str(config.path)) else _load(config, split)
    columns = list(data.column_names)
    rows: Any = data.select_columns(layout_of(config).heads(columns))  # images and audio stay undecoded
    return problems_from_rows(enumerate(rows, 1), columns, config, f"{Path(str(config.path)).name}[{split}]")


def _is_saved(path: str) -> bool:
    return (Path(path) / "dataset_dict.json").is_file() or (Path(path) / "state.json").is_file()


def _load(config: TaskConfig, split: str) -> "datasets.Dataset":
    import datasets

    try:
        data = datasets.load_dataset(str(config.path), config.name, split=split)
    # OSError: not found, no network. ValueError: unknown split or configuration. DatasetsError: a file that is broken.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data set '{config.path}' (configuration {config.name}, split '{split}') cannot be loaded: {error}"
        ) from error
    if not isinstance(data, datasets.Dataset):
        raise DataError(f"data set '{config.path}' gave {type(data).__name__}; task.split must name one split")
    return data


def _saved(config: TaskConfig, split: str) -> "datasets.Dataset":
    import datasets

    if config.name is not None:
        raise RecipeError(f"task.name '{config.name}' has no effect: '{config.path}' is a saved data set; remove it")
    data = datasets.load_from_disk(str(config.path))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f"saved data set '{config.path}' has no split '{split}'; its splits: {', '.join(data)}")
        return data[split]
    if split != "train":
        raise DataError(
            f"saved data set '{config.path}' is one table without splits; remove task.split and task.eval_split"
        )
    return data
