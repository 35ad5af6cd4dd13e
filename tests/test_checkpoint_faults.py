"""Checkpoints under damage, pickled files, full disks and kill -9 inside a save."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_run import RECIPE, same, save, tiny

from opdkit.errors import RunError
from opdkit.train import checkpoint as module
from opdkit.train.checkpoint import checkpoint_step, latest_checkpoint, load_checkpoint, load_weights
from opdkit.train.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run.open(str(tmp_path / "run"), RECIPE, resume=False) as opened:
        yield opened


@pytest.mark.parametrize(
    "victim", ["model.safetensors", "trainer/tensors.safetensors", "trainer/state.json", "config.json"]
)
@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_checkpoint_is_refused_and_the_one_to_use_is_named(run, victim, damage):
    model = tiny(0)
    save(run, 1, model)
    path = save(run, 2, model)
    size = (path / victim).stat().st_size
    os.truncate(path / victim, size - 40) if damage == "truncate" else (path / victim).unlink()
    text = rf"step-000002 cannot be used: {victim} .*move that folder away and --resume goes on from step-000001"
    for load in (lambda: load_checkpoint(path), lambda: load_weights(model, path)):
        with pytest.raises(RunError, match=text):
            load()
    shutil.rmtree(run.path / "checkpoints" / "step-000001")
    with pytest.raises(RunError, match="no other checkpoint of this run can be used"):
        load_checkpoint(path)


def test_a_damaged_header_of_the_right_size_and_a_newer_format_are_refused(run):
    path = save(run, 1, tiny(0))
    for name, load in (
        ("trainer/tensors.safetensors", load_checkpoint),
        ("model.safetensors", lambda p: load_weights(tiny(0), p)),
    ):
        content = (path / name).read_bytes()
        (path / name).write_bytes(b"\0" * 16 + content[16:])
        with pytest.raises(RunError, match="cannot be used"):
            load(path)
    state = json.loads((path / "trainer/state.json").read_text())
    (path / "trainer/state.json").write_text(json.dumps(state | {"format": 2}))
    with pytest.raises(RunError, match="has format 2, this version of opdkit reads format 1"):
        load_checkpoint(path)
    with pytest.raises(RunError, match="not a checkpoint folder"):
        load_checkpoint(run.path / "none")


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_a_pickled_file_is_never_loaded(run, tmp_path):
    model, mark = tiny(0), tmp_path / "executed"
    path = save(run, 1, model)
    for name in ("pytorch_model.bin", "model.bin", "trainer/tensors.pt", "trainer/optimizer.bin", "trainer/state.pkl"):
        (path / name).write_bytes(pickle.dumps(Bomb(mark)))
    load_weights(model, path)
    assert load_checkpoint(path)["step"] == 1
    for name in ("model.safetensors", "trainer/tensors.safetensors"):
        (path / name).write_bytes(pickle.dumps(Bomb(mark)).ljust((path / name).stat().st_size, b"\0"))
    for load in (load_checkpoint, lambda p: load_weights(model, p)):
        with pytest.raises(RunError, match="cannot be used"):
            load(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"model\.safetensors is missing"):
        load_weights(model, path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))  # the bomb does work
    assert mark.exists()


@contextmanager
def file_size_limit(_: Path, free: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def filled_tmpfs(folder: Path, free: int) -> Iterator[None]:
    filler = folder.parent / "filler"
    left = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    filler.write_bytes(b"\0" * max(0, left - free))
    try:
        yield
    finally:
        filler.unlink()


def mounted(folder: Path) -> bool:
    return (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode == 0
    )


def test_a_disk_that_fills_up_anywhere_in_a_save_costs_nothing_but_that_save(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    real = mounted(disk)  # a real small disk where we may mount one; otherwise the system limits the size of a file
    shortage = filled_tmpfs if real else file_size_limit
    try:
        with Run.open(str(disk / "run"), RECIPE, resume=False) as run:
            first, second, reached = tiny(0), tiny(1), set()
            with (
                shortage(run.path, 0),
                pytest.raises(RunError, match="there is no earlier checkpoint; free some space"),
            ):
                save(run, 1, first)
            save(run, 1, first)
            for free in (0, 4096, 40_000, 90_000, 110_000, 130_000) if real else (0, 4096, 40_000):
                with shortage(run.path, free), pytest.raises(RunError) as caught:
                    save(run, 2, second)
                text = str(caught.value)
                assert text.startswith(f"disk full while writing {run.path / 'checkpoints' / 'step-000002'}")
                assert (
                    "the previous checkpoint (step-000001) is intact; free some space and run again with --resume"
                    in text
                )
                assert os.listdir(run.path / "checkpoints") == ["step-000001"]
                reached.add(str(caught.value.__cause__)[:40])
            assert len(reached) >= 2  # it filled up in different places
            assert run.info["step"] == 1
            load_weights(second, latest_checkpoint(run.path))
            assert same(first, second)
            save(run, 2, second)
            assert latest_checkpoint(run.path).name == "step-000002"
    finally:
        if real:
            subprocess.run(["umount", disk], check=True)


def hang(folder: Path) -> None:
    (folder / "hangs").touch()
    time.sleep(600)


def half_a_file(folder: Path) -> None:
    def write(tensors: object, path: Path) -> None:
        path.write_bytes(b"x" * 1000)
        hang(folder)

    module.save_file = write


def before_rename(folder: Path) -> None:
    os.rename = lambda *_: hang(folder)


def inside_delete(folder: Path) -> None:
    rmtree = shutil.rmtree

    def half(path: Path, **options: bool) -> None:
        if path.exists() and "step-000001" in path.name:
            next(path.rglob("*.safetensors")).unlink()
            hang(folder)
        rmtree(path, **options)

    shutil.rmtree = half


def hanging_save(folder: Path, point: Callable[[Path], None]) -> int:
    """Fork a process that saves step 1, and then step 2 until `point`, where it hangs; its id."""
    pid = os.fork()
    if pid:
        return pid
    try:  # the child: nothing may return into pytest
        torch.set_num_threads(1)  # threads do not survive a fork
        run = Run.open(str(folder / "run"), RECIPE, resume=False)
        save(run, 1, tiny(1), keep=1)
        point(folder)
        save(run, 2, tiny(2), keep=1)
    finally:
        os._exit(1)


@pytest.mark.parametrize(("point", "survivor"), [(half_a_file, 1), (before_rename, 1), (inside_delete, 2)])
def test_kill_9_inside_a_save_leaves_a_checkpoint_that_loads(tmp_path, point, survivor):
    pid = hanging_save(tmp_path, point)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "hangs").exists():
            assert time.monotonic() < deadline and os.waitpid(pid, os.WNOHANG) == (0, 0)
            time.sleep(0.01)
        with pytest.raises(RunError, match=f"in use by another process .process {pid} "):
            Run.open(str(tmp_path / "run"), RECIPE, resume=True)
    finally:
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    with Run.open(str(tmp_path / "run"), RECIPE, resume=True) as run:
        assert any(".tmp-" in name for name in os.listdir(run.path / "checkpoints"))
        path = latest_checkpoint(run.path)
        model = tiny(0)
        load_weights(model, path)
        assert same(model, tiny(survivor))
        assert load_checkpoint(path)["step"] == checkpoint_step(path) == survivor
        save(run, 3, model, keep=1)
        assert os.listdir(run.path / "checkpoints") == ["step-000003"]
