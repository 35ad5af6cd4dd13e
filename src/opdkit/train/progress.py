"""What a person sees while a run goes on: a live bar on a terminal, plain lines in a file or a pipe.

Both go to stderr, so that stdout holds only a command's result. Left out on purpose: colours by value, history.
"""

import sys
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

SPEED_WINDOW = 300.0  # seconds over which steps/s and the ETA are estimated; a step may take minutes
LINE_EVERY = 5.0  # seconds between plain lines ...
LINE_SHARE = 0.1  # ... or this share of the run, whichever comes first

# Metric, its label and format; one of several teachers has its name behind the metric (`reverse_kl/teacher_b`).
SHOWN = (
    ("reverse_kl", "reverse_kl", ".4f"),
    ("overlap_ratio", "overlap_ratio", ".3f"),
    ("accuracy", "accuracy", ".3f"),
    ("reward", "reward", ".3f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("grad_norm", "grad_norm", ".3g"),
)


class Progress:
    """Shows a run of `total` steps, of which `start` were done before, unless it is not `active`; a context manager."""

    def __init__(self, total: int, start: int = 0, console: Console | None = None, active: bool = True) -> None:
        self.console = console or Console(stderr=True, highlight=False, quiet=not active)
        self.live = self.console.is_interactive
        self._bar = _Bar(self.console, shown=self.live)
        self._task = self._bar.add_task("train", total=total, completed=start)
        self._printed: tuple[float, int] | None = None  # time and step of the last plain line

    def update(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Show that `step` optimiser steps are done, with the last one's metrics."""
        self._bar.update(self._task, completed=step)
        self._bar.numbers = describe(metrics)
        task = self._bar.tasks[0]
        if self.live or not self._line_due(step, int(task.total or 0)):
            return
        self._printed = (self._bar.get_time(), step)
        self.say("  ".join([f"step {step}/{int(task.total or 0)}", *self._bar.numbers, *_pace(task)]))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(Text(text), soft_wrap=True)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def _line_due(self, step: int, total: int) -> bool:
        if self._printed is None or step >= total:
            return True
        seconds, printed = self._printed
        return self._bar.get_time() - seconds >= LINE_EVERY or step - printed >= LINE_SHARE * total


def describe(metrics: Mapping[str, float | int]) -> list[str]:
    """The numbers that matter as `label value`; the training reward only where there is no accuracy."""
    found = []
    for name, label, form in SHOWN:
        if name == "reward" and "accuracy" in metrics:
            continue
        keys = [name] if name in metrics else [key for key in metrics if key.startswith(f"{name}/")]
        found += [f"{label}{key.removeprefix(name)} {format(float(metrics[key]), form)}" for key in keys]
    return found


class _Bar(RichProgress):
    """A bar with the numbers under it, because both do not fit into one line of 80 columns."""

    def __init__(self, console: Console, shown: bool) -> None:
        self.numbers: list[str] = []
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Speed(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
            speed_estimate_period=SPEED_WINDOW,
            redirect_stdout=sys.stdout.isatty(),  # a pipe gets what is printed, not the bar's stderr
            disable=not shown,
        )

    def get_renderables(self) -> list[RenderableType]:
        numbers = [number.replace(" ", "\N{NO-BREAK SPACE}") for number in self.numbers]  # a value stays with its label
        return [self.make_tasks_table(self.tasks), Text("  ".join(numbers))]


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_speed(task) or "-- steps/s")


def _speed(task: Task) -> str | None:
    if not task.speed:
        return None
    return f"{task.speed:.3g} steps/s" if task.speed >= 1 else f"{1 / task.speed:.3g} s/step"


def _pace(task: Task) -> list[str]:
    """Rate and remaining time of a plain line, as far as they are known."""
    speed = _speed(task)
    if speed is None or not task.remaining:
        return [speed] if speed else []
    return [speed, f"eta {TimeRemainingColumn().render(task)}"]
