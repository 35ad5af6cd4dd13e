"""Trackers and progress: what is in the files, what a resume keeps, what a person reads."""

import importlib.util
import io
import json
import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opdkit.errors import RecipeError, RunError
from opdkit.train.progress import Progress, describe
from opdkit.train.trackers import Trackers, truncate_after

EVAL = {"step": 0, "who": "student", "accuracy": 0.25, "reverse_kl": math.nan, "problems": 200}


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars(name)]


def test_every_line_is_on_disk_before_log_returns(tmp_path: Path) -> None:
    with Trackers(tmp_path, [], {}) as trackers:
        trackers.log(1, {"loss": 0.5, "tokens": 7, "gap": math.nan, "peak": math.inf})
        assert (
            tmp_path / "metrics.jsonl"
        ).read_text() == '{"step": 1, "loss": 0.5, "tokens": 7, "gap": null, "peak": null}\n'
        trackers.evaluation(EVAL)
        assert lines(tmp_path / "evals.jsonl") == [EVAL | {"reverse_kl": None}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evals.jsonl", "metrics.jsonl"]
    trackers.close()  # a second close does nothing


def test_tensorboard_has_the_metrics_the_evaluations_and_the_recipe(tmp_path: Path) -> None:
    with Trackers(tmp_path, ["tensorboard"], {"train": {"steps": 2}}) as trackers:
        trackers.evaluation(EVAL)
        trackers.log(1, {"loss": 0.5, "reverse_kl": math.nan})
        trackers.log(2, {"loss": 0.25, "reverse_kl": 0.125})
    assert scalars(tmp_path, "loss") == [(1, 0.5), (2, 0.25)]
    assert scalars(tmp_path, "reverse_kl") == [(2, 0.125)]
    assert scalars(tmp_path, "eval/student/accuracy") == [(0, 0.25)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert b'"steps": 2' in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]


def test_a_resume_keeps_each_step_once(tmp_path: Path) -> None:
    with Trackers(tmp_path, ["tensorboard"], {}) as trackers:
        trackers.evaluation(EVAL)
        for step in range(1, 6):
            trackers.log(step, {"loss": 1.0})
    truncate_after(tmp_path, 3)
    with Trackers(tmp_path, ["tensorboard"], {}) as trackers:
        for step in range(4, 7):
            trackers.log(step, {"loss": 2.0})
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert [(line["step"], line["loss"]) for line in lines(tmp_path / "metrics.jsonl")] == expected
    assert scalars(tmp_path, "loss") == expected
    assert lines(tmp_path / "evals.jsonl") == [EVAL | {"reverse_kl": None}]


def test_truncate_drops_a_broken_last_line_and_only_that(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2, "text": "a\\u2028b"}\n{"step": 3, "lo')
    truncate_after(tmp_path, 9)
    assert metrics.read_text() == '{"step": 1}\n{"step": 2, "text": "a\\u2028b"}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    metrics.write_text('{"step": 1}\n{"loss": 2}\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2 is not a JSON object with a step"):
        truncate_after(tmp_path, 9)
    assert metrics.read_text() == '{"step": 1}\n{"loss": 2}\n{"step": 3}\n'


def test_truncate_completes_a_last_line_without_newline(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    truncate_after(tmp_path, 2)
    with Trackers(tmp_path, [], {}) as trackers:
        trackers.log(3, {})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@contextmanager
def full_disk() -> Iterator[None]:
    """Inside the block no file of this process can grow beyond 8 KiB. Not a fixture: pytest's own output is a file too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("names", [[], ["tensorboard"]])
def test_a_full_disk_is_one_clear_error(names: list[str], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' * 700)
    with (
        pytest.raises(RunError, match=r"cannot write metrics\.jsonl \(File too large\)"),
        Trackers(tmp_path, names, {}) as trackers,
        full_disk(),
    ):
        for step in range(1, 100):
            trackers.log(step, {f"loss/{i}": 0.5 for i in range(100)})
    truncate_after(tmp_path, 0)
    assert {line["step"] for line in lines(tmp_path / "metrics.jsonl")} == {0}


def test_an_unknown_tracker_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'mlflow'; expected some of tensorboard, wandb, trackio"):
        Trackers(tmp_path / "run", ["mlflow"], {})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_names_its_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RunError, match=rf"pip install 'opdkit\[{name}\]'"):
        Trackers(tmp_path, ["tensorboard", name], {})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_package_where_it_is_installed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    if importlib.util.find_spec(name) is None:
        with pytest.raises(RunError, match="not installed"):
            Trackers(tmp_path, [name], {})
        return
    for step in (1, 2):  # the second time is a resume
        with Trackers(tmp_path, [name], {"train": {"steps": 2}}) as trackers:
            trackers.log(step, {"loss": 0.5})
            trackers.evaluation(EVAL | {"step": step})
    identity = (tmp_path / "tracker_id").read_text()
    found = [path.name for path in tmp_path.rglob("*")]
    assert any(identity in file for file in found) if name == "wandb" else "opdkit.db" in found


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_run(seconds: float, total: int, start: int = 0) -> list[str]:
    """The plain lines of a run with so many seconds per step."""
    clock, out = Clock(), io.StringIO()
    with Progress(total, start, Console(file=out, get_time=clock)) as progress:
        for step in range(start + 1, total + 1):
            clock.now += seconds
            progress.update(step, {"reverse_kl": 1 / step, "loss": 3.0})
    return out.getvalue().splitlines()


def test_plain_lines_of_a_fast_run_come_at_every_tenth() -> None:
    shown = [line.split("  ")[0] for line in plain_run(0.01, 40)]
    assert shown == [f"step {step}/40" for step in (1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 40)]


def test_plain_lines_of_a_slow_run_come_every_five_seconds() -> None:
    shown = plain_run(2.0, 1000)
    assert [line.split("  ")[0] for line in shown[:3]] == ["step 1/1000", "step 4/1000", "step 7/1000"]
    assert shown[0] == "step 1/1000  reverse_kl 1.0000"
    assert shown[1] == "step 4/1000  reverse_kl 0.2500  2 s/step  eta 0:33:12"
    assert shown[-1] == "step 1000/1000  reverse_kl 0.0010  2 s/step"


def test_a_resumed_run_starts_at_its_step_and_its_rate_counts_new_steps_only() -> None:
    shown = plain_run(0.5, 100, start=90)
    assert shown[0] == "step 91/100  reverse_kl 0.0110"
    assert shown[-1] == "step 100/100  reverse_kl 0.0100  2 steps/s"


def test_on_a_terminal_there_is_a_bar_with_the_numbers_and_said_lines_stay_above() -> None:
    out = io.StringIO()
    with Progress(4, 0, Console(file=out, force_terminal=True, width=80, color_system=None)) as progress:
        progress.update(1, {"reverse_kl": 0.5, "grad_norm": 2.0})
        progress.say("teacher accuracy [0.99]")
    shown = out.getvalue().replace("\N{NO-BREAK SPACE}", " ")
    assert "teacher accuracy [0.99]\n" in shown
    assert "1/4" in shown and "reverse_kl 0.5000  grad_norm 2" in shown
    assert "step 1/4" not in shown


def test_describe_shows_accuracy_before_reward_and_each_teacher() -> None:
    both = {"reward": 0.5, "accuracy": 0.25, "tokens_per_second": 12345.6, "accuracy/easy": 0.9}
    assert describe(both) == ["accuracy 0.250", "tokens/s 12,346"]
    assert describe({"reward": 0.5}) == ["reward 0.500"]
    assert describe({"reverse_kl/a": 0.5, "reverse_kl/b": math.nan}) == ["reverse_kl/a 0.5000", "reverse_kl/b nan"]
