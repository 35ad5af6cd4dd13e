"""Reads a run folder and checks what it holds, so that the rest of the report works on plain, typed values.

Left out on purpose: the recipe is not validated again (a report of an older run must still be written), and nothing
here formats or summarises.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from opdkit.errors import RunError

Model = TypeVar("Model", bound="Record")
MAX_ROLLOUT_BYTES = 25_000_000  # of rollout files read for one report, which takes a few seconds


class Record(BaseModel):
    """Base of everything that a run folder stores; keys that the report does not know are left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class ModelInfo(Record):
    """What run.json says about one model."""

    path: str = ""
    parameters: int | None = None
    vocab: int | None = None  # tokens


class RunInfo(Record):
    """run.json: what ran, on what, when. `seconds` and `finished` are None while the run is unfinished."""

    opdkit: str
    method: str
    method_doc: str | None = None
    paper: str | None = None
    created: str | None = None
    finished: str | None = None
    seconds: float | None = None
    student: ModelInfo = ModelInfo()
    teachers: dict[str, ModelInfo] = {}
    device: str | None = None
    threads: int | None = None


class Evaluation(Record):
    """One line of evals.jsonl: shares in [0, 1], reverse KL in nats per token, lengths in tokens.

    With several teachers there is one `reverse_kl/NAME` for each, among the extra fields.
    """

    model_config = ConfigDict(extra="allow")

    step: int
    who: str
    accuracy: float | None = None
    accuracy_se: float | None = None
    problems: int | None = None
    samples: int | None = None
    reverse_kl: float | None = None
    reverse_kl_se: float | None = None
    response_length: float | None = None
    clipped_share: float | None = None

    @property
    def kls(self) -> dict[str, tuple[float, float | None]]:
        """Teacher -> (reverse KL to it, standard error); the name is empty where there is only one teacher."""
        if self.reverse_kl is not None:
            return {"": (self.reverse_kl, self.reverse_kl_se)}
        extra = self.model_extra or {}
        names = [key.removeprefix("reverse_kl/") for key in extra if key.startswith("reverse_kl/")]
        return {name: (extra[f"reverse_kl/{name}"], extra.get(f"reverse_kl_se/{name}")) for name in names}


class Token(Record):
    """One token of a kept rollout: log-probs, signal and entropy in nats, top lists as (text, probability)."""

    id: int
    text: str
    student: float | None = None
    teacher: float | None = None
    signal: float | None = None
    entropy: float | None = None
    student_top: list[tuple[str, float]] = []
    teacher_top: list[tuple[str, float]] = []


class KeptRollout(Record):
    """One rollout of rollouts/step-*.json."""

    prompt: str
    text: str = ""
    reward: float | None = None
    correct: bool | None = None
    finish: str | None = None
    source: str = "policy"
    domain: str = "default"
    tokens: list[Token] = []


class KeptStep(Record):
    """One file of rollouts/: the rollouts that were kept at one optimiser step."""

    step: int
    rollouts: list[KeptRollout]


Metrics = dict[str, int | float | None]


@dataclass(frozen=True)
class RunData:
    """Everything that the report shows, as read. `notes` are sentences for the reader about what was repaired."""

    folder: Path
    info: RunInfo
    recipe: dict[str, Any]
    recipe_text: str
    metrics: list[Metrics]  # one for each step, by step
    evals: list[Evaluation]
    kept: list[KeptStep]  # by step
    notes: list[str]


def read_run(folder: Path) -> RunData:
    """Read a whole run folder.

    Raises RunError when it is not a run folder or when a file in it is broken, naming file and line. A broken last line
    of a .jsonl file (the process was killed while it wrote) is dropped and noted.
    """
    if not folder.is_dir():
        raise RunError(
            f"there is no folder '{folder}'; give the output folder of `opd train`, the one that holds run.json"
        )
    for name in ("run.json", "recipe.yaml"):
        if not (folder / name).is_file():
            raise RunError(f"'{folder}' is not a run folder: it has no {name}; give the output folder of `opd train`")
    notes: list[str] = []
    text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RunError(f"{folder / 'recipe.yaml'} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise RunError(f"{folder / 'recipe.yaml'} holds {type(recipe).__name__}, expected a mapping of sections")
    evals = [_check(Evaluation, row, where) for where, row in _read_lines(folder / "evals.jsonl", notes)]
    kept = [_read_json(KeptStep, path) for path in _spread(sorted((folder / "rollouts").glob("step-*.json")), notes)]
    return RunData(
        folder=folder,
        info=_read_json(RunInfo, folder / "run.json"),
        recipe=recipe,
        recipe_text=text,
        metrics=_read_metrics(folder / "metrics.jsonl", notes),
        evals=sorted(evals, key=lambda e: e.step),
        kept=sorted((k for k in kept if k.rollouts), key=lambda k: k.step),
        notes=notes,
    )


def _read_metrics(path: Path, notes: list[str]) -> list[Metrics]:
    """One dict for each step in order; of two lines with the same step the later one counts."""
    by_step: dict[int, Metrics] = {}
    for where, row in _read_lines(path, notes):
        step = row.get("step")
        if not isinstance(step, int):
            raise RunError(f"{where}: 'step' is {step!r}, expected the number of the optimiser step")
        for key, value in row.items():
            if value is not None and not isinstance(value, int | float):
                raise RunError(f"{where}: '{key}' is {value!r}, expected a number or null")
        by_step[step] = row
    return [by_step[step] for step in sorted(by_step)]


def _spread(paths: list[Path], notes: list[str]) -> list[Path]:
    """Rollout files of at most MAX_ROLLOUT_BYTES in all, evenly spread; the first and the last stay."""
    chosen = paths
    while len(chosen) > 2 and sum(path.stat().st_size for path in chosen) > MAX_ROLLOUT_BYTES:
        chosen = [*chosen[:-1:2], chosen[-1]] if len(chosen) > 3 else [chosen[0], chosen[-1]]
    if len(chosen) < len(paths):
        notes.append(
            f"The token viewer holds {len(chosen)} of the {len(paths)} kept steps; all are in the folder rollouts/."
        )
    return chosen


def _read_lines(path: Path, notes: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file with their `file:line`; a missing file has none."""
    if not path.is_file():
        return []
    numbered = [(i, line) for i, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, line in numbered:
        where = f"{path}:{number}"
        try:
            row = _parse(line)
        except ValueError as error:
            if number == numbered[-1][0]:
                notes.append(
                    f"The last line of {path.name} (line {number}) was cut off, as after a crash; it is left out."
                )
                break
            raise RunError(
                f"{where} is not valid JSON ({error}); remove this line and write the report again"
            ) from error
        if not isinstance(row, dict):
            raise RunError(f"{where} holds {type(row).__name__}, expected an object")
        rows.append((where, row))
    return rows


def _read_json(model: type[Model], path: Path) -> Model:
    try:
        value = _parse(path.read_bytes())
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON ({error}); restore it or, for a rollout file, delete it") from error
    return _check(model, value, str(path))


def _parse(data: bytes) -> Any:
    """JSON with NaN and infinities read as null. Raises ValueError, also for bytes that are not UTF-8."""
    return json.loads(data.decode("utf-8"), parse_constant=lambda name: None)


def _check(model: type[Model], value: Any, where: str) -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RunError(f"{where}: '{key}' is not as expected: {first['msg']}") from None
