"""Where a run's numbers go: `metrics.jsonl` and `evals.jsonl` always, TensorBoard, wandb and trackio by choice.

The JSONL files are the record that the report and a resume read; the trackers are views of the same numbers.

Left out on purpose: images, histograms, tables, and buffering (a line is in the file before `log` returns).
"""

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from opdkit.errors import RecipeError, RunError

METRICS = "metrics.jsonl"
EVALS = "evals.jsonl"
PROJECT = "opdkit"  # the project name in wandb and trackio

Number = float | int


class Writer(Protocol):
    """One tracker: gets only finite numbers."""

    def log(self, step: int, values: Mapping[str, Number]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """Writes a run's metrics and evaluations to its JSONL files and to the trackers named.

    `names` are those of `log.trackers`; `config` is the recipe as a mapping and is shown by the trackers. In a folder
    that already has metrics the trackers go on after the last step there, so call `truncate_after` before. Unless
    `active` nothing is written: in a job of several processes the main one does.
    Raises RecipeError for an unknown name, and RunError when a tracker cannot start or a file cannot be written.
    """

    def __init__(self, run: Path, names: Sequence[str], config: Mapping[str, Any], active: bool = True) -> None:
        unknown = sorted(set(names) - set(WRITERS))
        if unknown:
            raise RecipeError(f"log.trackers has '{unknown[0]}'; expected some of {', '.join(WRITERS)}")
        self._active, self._closers = active, ExitStack()
        if not active:
            return
        run.mkdir(parents=True, exist_ok=True)
        first_step = _first_step(run)
        with ExitStack() as stack:  # closes what is open when a later tracker cannot start
            self._files = {name: _open(run / name) for name in (METRICS, EVALS)}
            for descriptor in self._files.values():
                stack.callback(os.close, descriptor)
            self._writers: list[Writer] = []
            for name in dict.fromkeys(names):
                writer = WRITERS[name](run, config, first_step)
                stack.callback(writer.close)
                self._writers.append(writer)
            self._closers = stack.pop_all()

    def log(self, step: int, values: Mapping[str, Number]) -> None:
        """Write one optimiser step's metrics; NaN and infinity become null in the file and are left out elsewhere."""
        assert "step" not in values, "the step is an argument, not a metric"
        if not self._active:
            return
        self._write(METRICS, {"step": step, **values})
        self._send(step, values)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Write one evaluation, {"step", "who", "accuracy", ...}; trackers get its numbers as `eval/WHO/...`."""
        if not self._active:
            return
        self._write(EVALS, record)
        values = {key: value for key, value in record.items() if key not in ("step", "who")}
        self._send(record["step"], {f"eval/{record['who']}/{key}": value for key, value in values.items()})

    def close(self) -> None:
        """Flush and close everything. A second call does nothing."""
        try:
            self._closers.close()
        except OSError as error:
            raise RunError(f"cannot write the trackers' last lines: {error}") from error

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return self.close()
        with suppress(RunError):  # a full disk that stopped the run must not hide its own message
            self.close()

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        clean = {key: value if not _is_number(value) or math.isfinite(value) else None for key, value in record.items()}
        line = (json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            while line:
                line = line[os.write(self._files[name], line) :]
        except OSError as error:
            raise RunError(f"cannot write {name} ({error.strerror}); free some space and use --resume") from error

    def _send(self, step: int, values: Mapping[str, Any]) -> None:
        finite = {key: value for key, value in values.items() if _is_number(value) and math.isfinite(value)}
        try:
            for writer in self._writers:
                writer.log(step, finite)
        except OSError as error:
            raise RunError(f"a tracker cannot write ({error}); free some space and use --resume") from error


def truncate_after(run: Path, step: int) -> None:
    """Remove the records of later steps from `metrics.jsonl` and `evals.jsonl`, for a resume after `step`.

    A broken last line, as a killed run leaves it, is removed too. Each file is replaced atomically. Raises RunError
    for a broken line elsewhere.
    """
    for name in (METRICS, EVALS):
        path = run / name
        if not path.exists():
            continue
        kept = b"".join(line + b"\n" for line, record in _records(path) if record["step"] <= step)
        if kept == path.read_bytes():
            continue
        temporary = path.with_name(f"{name}.tmp-{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                file.write(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise RunError(f"cannot rewrite {path}: {error.strerror}; the file is unchanged") from error


def _records(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of a JSONL file with what they say, without a broken last line."""
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append((line, record))
        elif number < len(lines):
            raise RunError(f"{path}:{number} is not a JSON object with a step; repair or remove this line")
    return records


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _first_step(run: Path) -> int | None:
    """The step after the last recorded one; None in a folder that has no records yet."""
    files = [run / name for name in (METRICS, EVALS) if (run / name).exists()]
    if not files:
        return None
    return 1 + max((record["step"] for path in files for _, record in _records(path)), default=-1)


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _open(path: Path) -> int:
    """An append-only descriptor: no buffer, so nothing is lost when the process is killed."""
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise RunError(f"cannot open {path} for writing: {error.strerror}") from error


class TensorBoard:
    """Event files in RUN/tensorboard. After a resume TensorBoard hides what a killed run had logged beyond it."""

    def __init__(self, run: Path, config: Mapping[str, Any], first_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)
        if first_step is None:
            self.writer.add_text("recipe", f"```json\n{json.dumps(config, indent=2, ensure_ascii=False)}\n```")

    def log(self, step: int, values: Mapping[str, Number]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A wandb run in the project `opdkit`; its files lie in RUN/wandb."""

    def __init__(self, run: Path, config: Mapping[str, Any], first_step: int | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        try:
            self.run = wandb.init(
                project=PROJECT, name=run.name, id=_tracker_id(run), dir=str(run), config=dict(config), resume="allow"
            )
        except wandb.Error as error:
            hint = "set WANDB_MODE=offline, or take wandb out of log.trackers"
            raise RunError(f"wandb cannot start ({error}); {hint}") from error
        # wandb's own step never goes back, so a resumed run needs the step as a metric of its own.
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, Number]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A trackio run in the project `opdkit`; its data base lies where trackio keeps it (`TRACKIO_DIR`)."""

    def __init__(self, run: Path, config: Mapping[str, Any], first_step: int | None) -> None:
        try:
            import trackio
        except ImportError as error:
            raise _missing("trackio") from error
        name = f"{run.name}-{_tracker_id(run)}"  # trackio finds a run again by its name
        self.run = trackio.init(project=PROJECT, name=name, config=dict(config), resume="allow", embed=False)

    def log(self, step: int, values: Mapping[str, Number]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


WRITERS: dict[str, type[TensorBoard] | type[Wandb] | type[Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def _missing(package: str) -> RunError:
    return RunError(
        f"log.trackers has '{package}', which is not installed: "
        f"pip install 'opdkit[{package}]', or take it out of log.trackers"
    )


def _tracker_id(run: Path) -> str:
    """The id under which trackers know this run, made at its start and kept in its folder for a resume."""
    path = run / "tracker_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
