"""Run folders: what may be opened, what is refused, and files that survive a full disk."""

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from opdkit.config import Recipe, load_recipe, parse_recipe
from opdkit.errors import RunError
from opdkit.train.run import Run, recipe_differences, write_json, write_text, writing

BASE = {
    "method": {"name": "opd"},
    "student": {"path": "testbed:small"},
    "teachers": {"teacher": {"path": "testbed:large"}},
    "task": {"kind": "testbed", "name": "sums"},
}


def recipe(**overrides: object) -> Recipe:
    data = json.loads(json.dumps(BASE))
    for key, value in overrides.items():
        *sections, last = key.split("__")
        target = data
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    return parse_recipe(data)


def start(path: Path, step: int = 0, **overrides: object) -> None:
    with Run.open(str(path), recipe(**overrides), resume=False) as run:
        run.update(step=step)


def test_a_new_run_holds_its_recipe_and_what_it_is(tmp_path):
    with Run.open(str(tmp_path / "a" / "b"), recipe(), resume=False) as run:
        assert (run.path, run.resumed) == (tmp_path / "a" / "b", False)
        run.update(status="running", step=3)
    assert load_recipe(str(run.path / "recipe.yaml")) == recipe()
    info = json.loads((run.path / "run.json").read_text())
    assert (info["method"], info["step"], info["steps"], info["status"]) == ("opd", 3, 100, "running")
    assert sorted(os.listdir(run.path)) == ["lock", "recipe.yaml", "run.json"]


def test_an_empty_folder_and_one_that_a_killed_start_left_are_used(tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / ".recipe.yaml.tmp-4242").write_text("metho")
    start(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["lock", "recipe.yaml", "run.json"]


def test_a_folder_that_holds_a_run_is_refused_without_resume(tmp_path):
    start(tmp_path, step=40)
    text = (
        r"already holds a run \(method opd, step 40 of 100\): give another output=..., add --resume to go on, or delete"
    )
    with pytest.raises(RunError, match=text):
        Run.open(str(tmp_path), recipe(), resume=False)


@pytest.mark.parametrize("mark", ["run.json", "recipe.yaml", "checkpoints"])
def test_each_part_of_a_run_marks_the_folder(tmp_path, mark):
    (tmp_path / mark).mkdir() if mark == "checkpoints" else (tmp_path / mark).write_text("")
    with pytest.raises(RunError, match="already holds a run"):
        Run.open(str(tmp_path), recipe(), resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="holds no run to resume" if resume else "folder with other files, not a run"):
        Run.open(str(tmp_path), recipe(), resume=resume)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(RunError, match="is a file, not a run"):
        Run.open(str(tmp_path / "x"), recipe(), resume=False)


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(RunError, match="holds no run to resume"):
        Run.open(str(tmp_path / "none"), recipe(), resume=True)
    assert not (tmp_path / "none").exists()


def test_resume_keeps_what_the_run_recorded(tmp_path):
    start(tmp_path, step=40)
    started = json.loads((tmp_path / "run.json").read_text())["created"]
    with Run.open(str(tmp_path), recipe(), resume=True) as run:
        assert run.resumed
        assert (run.info["step"], run.info["created"]) == (40, started)


def test_a_run_killed_before_run_json_was_written_can_be_resumed(tmp_path):
    start(tmp_path)
    (tmp_path / "run.json").unlink()
    with Run.open(str(tmp_path), recipe(), resume=True) as run:
        assert run.info["step"] == 0


def test_another_recipe_is_refused_key_by_key(tmp_path):
    start(tmp_path)
    other = recipe(optim__lr=1e-3, train__steps=50, method__mix=0.5, seed=1)
    with pytest.raises(RunError) as caught:
        Run.open(str(tmp_path), other, resume=True)
    text = str(caught.value)
    for part in ("optim.lr 1e-05 -> 0.001", "train.steps 100 -> 50 (may only grow)", "seed 0 -> 1"):
        assert part in text
    assert "method.mix '(absent)' -> 0.5" in text
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe()


def test_settings_that_change_no_weight_may_change(tmp_path):
    start(tmp_path)
    other = recipe(
        train__steps=150, train__checkpoint_every=10, train__keep_checkpoints=1, log__top_k=4, eval__every=5, output="x"
    )
    with Run.open(str(tmp_path), other, resume=True) as run:
        assert (run.recipe.train.steps, run.info["steps"]) == (150, 150)
    assert load_recipe(str(tmp_path / "recipe.yaml")) == other


def test_what_the_evaluation_measures_may_not_change(tmp_path):
    start(tmp_path)
    with pytest.raises(RunError, match=r"eval\.samples 1 -> 4"):
        Run.open(str(tmp_path), recipe(eval__samples=4), resume=True)


def test_differences_name_added_and_removed_keys():
    old, new = recipe(task__settings={"terms": 3}), recipe(task__settings={"digits": 2})
    assert recipe_differences(old, new) == {
        "task.settings.terms": (3, "(absent)"),
        "task.settings.digits": ("(absent)", 2),
    }
    assert recipe_differences(old, old) == {}


def test_an_unreadable_recipe_or_run_json_is_one_clear_error(tmp_path):
    start(tmp_path)
    (tmp_path / "run.json").write_text('{"step": ')
    with pytest.raises(RunError, match=r"run\.json cannot be read .* delete that file"):
        Run.open(str(tmp_path), recipe(), resume=True)
    with pytest.raises(RunError, match=r"already holds a run \(its run\.json cannot be read\)"):
        Run.open(str(tmp_path), recipe(), resume=False)
    data = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**data, "from_the_future": 1}))
    with pytest.raises(RunError, match=r"'from_the_future'.*version of opdkit that wrote it"):
        Run.open(str(tmp_path), recipe(), resume=True)
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(RunError, match=r"has no recipe\.yaml"):
        Run.open(str(tmp_path), recipe(), resume=True)


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    start(tmp_path)
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); f.write('process 7 on other\\n')"
    )
    code += "; f.flush(); print('locked', flush=True); sys.stdin.read()"
    (tmp_path / "lock").write_text("")
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"locked\n"
        with pytest.raises(RunError, match=r"in use by another process \(process 7 on other\)"):
            Run.open(str(tmp_path), recipe(), resume=True)
        child.communicate()
    Run.open(str(tmp_path), recipe(), resume=True).close()


def test_the_lock_is_held_until_close_and_given_back_after_a_refusal(tmp_path):
    start(tmp_path)
    run = Run.open(str(tmp_path), recipe(), resume=True)
    with pytest.raises(RunError, match=f"in use by another process .process {os.getpid()} on"):
        Run.open(str(tmp_path), recipe(), resume=True)
    run.close()
    with pytest.raises(RunError, match="another recipe"):
        Run.open(str(tmp_path), recipe(seed=1), resume=True)
    Run.open(str(tmp_path), recipe(), resume=True).close()


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked .* one process"):
        Run.open(str(tmp_path / "x"), recipe(), resume=False).close()


def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path):
    file = tmp_path / "run.json"
    write_json(file, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(RunError, match=r"disk full while writing .*run\.json"):
            write_json(file, {"text": "x" * 10_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads(file.read_text()) == {"step": 1}
    assert os.listdir(tmp_path) == ["run.json"]


def test_dev_full_is_a_full_disk():
    with (
        pytest.raises(RunError, match=r"disk full while writing X .*; step 3 is intact"),
        writing(Path("X"), "step 3 is intact"),
    ):
        Path("/dev/full").write_text("x")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_errors_of_libraries_that_carry_the_code_in_their_text_count_as_well(code):
    with pytest.raises(RunError, match="disk full"), writing(Path("X")):
        raise Exception(f"I/O error: (os error {code})")  # what tokenizers raises
    with pytest.raises(ZeroDivisionError), writing(Path("X")):
        raise ZeroDivisionError


def test_a_folder_that_does_not_exist_is_one_clear_error(tmp_path):
    with pytest.raises(RunError, match=r"cannot write .*No such file or directory.*check that the folder exists"):
        write_text(tmp_path / "gone" / "x", "text")
