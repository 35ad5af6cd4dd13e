"""A run folder: who may write in it, which recipe made it, and small files that are never half written.

Left out: metrics, rollouts and the report, which other modules append to the folder, and checkpoints (`checkpoint.py`).
In a job of several processes the main one opens the run and the others follow it.
"""

import errno
import fcntl
import json
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TextIO

from opdkit import __version__
from opdkit.config import Recipe, dump_recipe, load_recipe
from opdkit.errors import OpdkitError, RecipeError, RunError
from opdkit.train.trackers import truncate_after

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)  # network file systems that cannot fsync a folder
MARKS = ("run.json", "recipe.yaml", "checkpoints")  # any of them makes a folder a run
TEMPORARY = re.compile(r"\..*\.tmp-\d+")

# What a resumed run may do differently without changing the steps that remain (but for rounding, where it is shared).
MAY_CHANGE = (
    "log.",
    "eval.every",
    "eval.teacher",
    "eval.kl_prompts",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.sharding",
    "output",
)


class Run:
    """One run folder, locked against other processes until `close` or the end of the process.

    `path` is the folder, `recipe` what runs in it, `resumed` whether it held a run before, `info` the content of
    run.json. A context manager.
    """

    def __init__(self, path: Path, recipe: Recipe, lock: TextIO | None, resumed: bool, info: dict[str, Any]) -> None:
        self.path, self.recipe, self.resumed, self.info = path, recipe, resumed, info
        self._lock = lock

    @classmethod
    def open(cls, output: str, recipe: Recipe, *, resume: bool) -> "Run":
        """Create the run folder `output`, or take up the run that it holds when `resume` is set.

        Raises RunError when the folder holds another run or other files, when there is nothing to resume, when a
        resumed run's recipe differs in a setting that would change its result, when another process trains in the
        folder, and when it cannot be written.
        """
        path = Path(output).expanduser()
        _check_content(path, resume)
        with ExitStack() as stack:
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(path / "lock", "a+", encoding="utf-8"))
            _acquire(lock, path)
            _check_content(path, resume)  # again: another process may have been faster
            info = _take_up(path, recipe) if resume else {}
            for stale in path.glob(".*.tmp-*"):
                stale.unlink()
            write_text(path / "recipe.yaml", dump_recipe(recipe))
            run = cls(path, recipe, lock, resume, info)
            started = {} if info else {"step": 0, "created": datetime.now(UTC).isoformat(timespec="seconds")}
            run.update(method=recipe.method.name, steps=recipe.train.steps, opdkit=__version__, **started)
            stack.pop_all()
        return run

    @classmethod
    def follow(cls, output: str, recipe: Recipe, info: dict[str, Any]) -> "Run":
        """The run as the other processes of a job see it once the main one has opened it: they write nothing."""
        return cls(Path(output).expanduser(), recipe, None, bool(info.get("step")), info)

    def begin(self, step: int, **fields: Any) -> None:
        """Go on after `step`: forget the records of later steps, and merge fields into run.json."""
        if self._lock is not None:
            truncate_after(self.path, step)
        self.update(**fields)

    def update(self, **fields: Any) -> None:
        """Merge fields into run.json, atomically. Raises RunError when the disk is full."""
        self.info = {**self.info, **fields}
        if self._lock is not None:
            write_json(self.path / "run.json", self.info)

    def close(self) -> None:
        """Let other processes open the folder."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextmanager
def writing(path: Path, intact: str = "") -> Iterator[None]:
    """Turn a full disk or any other operating-system error of the block into one RunError about `path`.

    `intact` says what the user still has.
    """
    try:
        yield
    except OpdkitError:
        raise
    except Exception as error:
        # safetensors and tokenizers raise their own classes, or plain Exception, with the code in the text
        code = error.errno if isinstance(error, OSError) else _code_in_text(error)
        if code is None:
            raise
        after = f"; {intact}" if intact else ""
        if code in DISK_FULL:
            fix = "free some space and run again with --resume" if intact else "free some space"
            raise RunError(f"disk full while writing {path} ({os.strerror(code)}){after}; {fix}") from error
        fix = "check that the folder exists and that you may write there"
        raise RunError(f"cannot write {path} ({os.strerror(code)}){after}; {fix}") from error


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a crash, sees the old content or the new one and nothing between.

    Raises RunError when it cannot be written; the old file is then unchanged and no temporary file stays.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with writing(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, obj: Any) -> None:
    """`write_text` of an object as indented JSON."""
    write_text(path, json.dumps(obj, indent=2) + "\n")


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_FOLDER_SYNC):
            raise
    finally:
        os.close(handle)


def recipe_differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value) of every setting that differs; an absent key has the value "(absent)"."""
    before, after = dict(_flat(old.model_dump(mode="json"))), dict(_flat(new.model_dump(mode="json")))
    keys = [*before, *(key for key in after if key not in before)]
    pairs = {key: (before.get(key, "(absent)"), after.get(key, "(absent)")) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _content(path: Path) -> Literal["nothing", "run", "other"]:
    if not path.exists():
        return "nothing"
    names = {child.name for child in path.iterdir()} if path.is_dir() else {path.name}
    if path.is_dir() and names & set(MARKS):
        return "run"
    # a process that was killed while it created the folder leaves these
    return "other" if any(name != "lock" and not TEMPORARY.fullmatch(name) for name in names) else "nothing"


def _check_content(path: Path, resume: bool) -> None:
    with writing(path):
        content = _content(path)
    if resume and content != "run":
        raise RunError(f"{path} holds no run to resume; check output=..., or leave out --resume to start one")
    if content == "other":
        kind = "a folder with other files" if path.is_dir() else "a file"
        raise RunError(f"{path} is {kind}, not a run; give another output=... or remove it")
    if content == "run" and not resume:
        raise RunError(
            f"{path} already holds a run ({_describe(path)}): "
            "give another output=..., add --resume to go on, or delete it"
        )


def _describe(path: Path) -> str:
    try:
        info = _read_info(path)
    except RunError:
        return "its run.json cannot be read"
    if not {"method", "step", "steps"} <= info.keys():
        return "stopped before its run.json was written"
    name = str(info["method"]).partition(":")[0]  # its first line is "NAME:"
    return f"method {name}, step {info['step']} of {info['steps']}"


def _read_info(path: Path) -> dict[str, Any]:
    file = path / "run.json"
    if not file.exists():  # killed before it was written: recipe.yaml comes first
        return {}
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({error}); delete that file to resume") from error
    if not isinstance(info, dict):
        raise RunError(f"{file} holds a {type(info).__name__}, expected a mapping; delete that file to resume")
    return info


def _take_up(path: Path, recipe: Recipe) -> dict[str, Any]:
    """The run.json of an existing run whose recipe allows going on with `recipe`; RunError otherwise."""
    file = path / "recipe.yaml"
    if not file.is_file():
        raise RunError(f"{path} has no recipe.yaml, so it cannot be resumed; start a new run with another output=...")
    try:
        old = load_recipe(str(file))
    except (RecipeError, OSError, UnicodeDecodeError) as error:
        raise RunError(f"{file} cannot be read ({error}); resume with the version of opdkit that wrote it") from error
    refused = []
    for key, (before, after) in recipe_differences(old, recipe).items():
        if (key == "train.steps" and after > before) or key.startswith(MAY_CHANGE):
            continue
        note = " (may only grow)" if key == "train.steps" else ""
        refused.append(f"{key} {before!r} -> {after!r}{note}")
    if refused:
        raise RunError(
            f"{path} was started with another recipe: {'; '.join(refused)}; "
            "resume with the old values, or start a new run with another output=..."
        )
    return _read_info(path)


def _acquire(lock: TextIO, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        raise RunError(
            f"{path} is in use by another process ({owner}); wait until it ends, stop it, or give another output=..."
        ) from None
    except OSError as error:  # some cluster file systems have no locks; refusing to train there would help nobody
        warnings.warn(
            f"{path} cannot be locked ({error.strerror}): see to it that one process trains there", stacklevel=3
        )
    with writing(path / "lock"):
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()


def _code_in_text(error: Exception) -> int | None:
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
