"""Checkpoints: a folder that transformers or peft can load, plus everything that a run needs to go on bit for bit.

A checkpoint is complete or not there: all files go to a temporary folder that is renamed once they are on the disk.
State is JSON and safetensors; nothing is ever unpickled. docs/checkpoints.md shows the layout.

Left out: what belongs into the state (the loop decides) and sharded saving of models that no single process holds.
"""

import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from opdkit import __version__
from opdkit.errors import RunError
from opdkit.lora import ADAPTER_CONFIG, adapter_weights, save_adapters
from opdkit.train.run import Run, sync, writing
from opdkit.train.state import pack, rng_state, set_rng_state, unpack

__all__ = [
    "checkpoint_step",
    "checkpoints",
    "latest_checkpoint",
    "load_checkpoint",
    "load_weights",
    "pack",
    "rng_state",
    "save_checkpoint",
    "set_rng_state",
    "unpack",
]

Model = Any  # a PreTrainedModel, or a peft.PeftModel: only its adapters are stored. peft takes seconds to import
FORMAT = 1
STATE, TENSORS = "trainer/state.json", "trainer/tensors.safetensors"
NAME = re.compile(r"step-(\d{6,})(\.old)?")  # .old: the folder that a second save of the same step replaces


def save_checkpoint(
    run: Run,
    step: int,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trainer_state: dict[str, Any],
    *,
    keep: int,
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write run/checkpoints/step-NNNNNN, delete all but the `keep` newest, and return the new folder.

    Stored in the dtype that they have; of a peft.PeftModel only the adapters. `weights`: the whole ones of a sharded model.
    Raises RunError when the disk is full or `pack` refuses `trainer_state`; earlier checkpoints are then untouched.
    """
    assert keep >= 1, keep
    folder = run.path / "checkpoints"
    final = folder / f"step-{step:06d}"
    temporary = folder / f"{final.name}.tmp-{os.getpid()}"
    state, tensors = pack(trainer_state)  # first: a state that cannot be stored costs no disk access
    previous = latest_checkpoint(run.path)
    intact = f"the previous checkpoint ({previous.name}) is intact" if previous else "there is no earlier checkpoint"
    with writing(final, intact):
        folder.mkdir(exist_ok=True)
        for stale in folder.glob("*.tmp-*"):  # the run is locked, so nobody writes them any more
            shutil.rmtree(stale)
        try:
            with _no_progress_bars():
                if isinstance(model, PreTrainedModel):
                    model.save_pretrained(temporary, state_dict=weights)
                else:
                    save_adapters(model, temporary, weights)
                tokenizer.save_pretrained(temporary)
            _write_state(temporary, step, state, tensors)
            _move_into_place(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _delete_old(folder, final, keep)
    run.update(step=step)
    return final


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The newest complete checkpoint of a run folder; half-written ones do not count."""
    return next(iter(checkpoints(run_folder)), None)


def checkpoints(run_folder: Path) -> list[Path]:
    """The complete checkpoints of a run folder, newest first."""
    return _checkpoints(run_folder / "checkpoints")


def checkpoint_step(path: Path) -> int:
    """Optimiser steps behind the checkpoint at `path`. Raises RunError when it is not a checkpoint."""
    return int(_read_state(path)["step"])


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The trainer state that `save_checkpoint` was given, tensors on the CPU.

    Raises RunError when a file is missing or damaged, naming the newest other checkpoint that can be used.
    """
    stored = _read_state(path)
    try:
        return unpack(stored["state"], load_tensors(path / TENSORS))
    except (SafetensorError, OSError, KeyError) as error:
        raise _damaged(path, f"{TENSORS}: {error}") from error


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own: a mapped file cannot be deleted everywhere."""
    with safe_open(file, framework="pt") as stored:
        return {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118, not a mapping


def load_weights(model: Model, path: Path) -> None:
    """Put the weights of a checkpoint into a model (or its adapters) of the same class, shapes and dtypes, bit for bit.

    Raises RunError when the checkpoint is damaged, or when a name, shape or dtype differs.
    """
    stored = _stored_weights(model, path)
    targets = model.state_dict() if isinstance(model, PreTrainedModel) else adapter_weights(model)
    if isinstance(model, PreTrainedModel) and not stored.keys() <= targets.keys():
        stored = _renamed(model, path, {value.dtype for value in stored.values()})
    for name, value in stored.items():
        if name not in targets or targets[name].shape != value.shape:
            raise _refused(path, f"{name} {list(value.shape)} does not fit the student; use the student of this run")
        if targets[name].dtype != value.dtype:
            raise _refused(path, f"{name} is {value.dtype}, the student's is {targets[name].dtype}; set student.dtype")
        targets[name].copy_(value)
    filled = {targets[name].data_ptr() for name in stored}
    missing = [name for name, target in targets.items() if name not in stored and target.data_ptr() not in filled]
    if missing:
        raise _refused(path, f"it has no weights for {', '.join(missing[:5])}; use the student of this run")


# ---------------------------------------------------------------------------------------------------------------------
# writing


def _write_state(folder: Path, step: int, state: Any, tensors: dict[str, Tensor]) -> None:
    """Add the trainer's files; state.json lists the size of all others, so that a damaged checkpoint is recognised."""
    (folder / "trainer").mkdir()
    save_file(tensors, folder / TENSORS)
    files = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    versions = {
        "opdkit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    content = {"format": FORMAT, "step": step, "versions": versions, "files": files, "state": state}
    (folder / STATE).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")


def _move_into_place(temporary: Path, final: Path) -> None:
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    if final.exists():
        shutil.rmtree(_old(final), ignore_errors=True)
        os.rename(final, _old(final))  # found by latest_checkpoint until the new one is in place
    os.rename(temporary, final)
    sync(final.parent)
    sync(final.parent.parent)


def _delete_old(folder: Path, final: Path, keep: int) -> None:
    """Delete all but `keep` checkpoints, the new one among those that stay even when others have higher numbers."""
    others = [path for path in _checkpoints(folder) if path not in (final, _old(final))]
    doomed = others[keep - 1 :] + ([_old(final)] if _old(final).exists() else [])
    for path in doomed:
        away = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        os.rename(path, away)  # first: a half-deleted folder must not look like a checkpoint
        shutil.rmtree(away)


def _old(final: Path) -> Path:
    return final.with_name(f"{final.name}.old")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------------------------------
# reading


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = NAME.fullmatch(path.name)
        if match and (path / STATE).is_file():
            found.append((int(match[1]), match[2] is None, path))
    return [path for *_, path in sorted(found, reverse=True)]


def _problem(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, judged by their sizes; None when nothing is."""
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        files = content["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE} cannot be read ({error})"
    if content.get("format") != FORMAT:
        return f"it has format {content.get('format')}, this version of opdkit reads format {FORMAT}"
    for name, size in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes, expected {size}"
    return None


def _read_state(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise RunError(f"{path} is not a checkpoint folder; expected something like runs/x/checkpoints/step-000100")
    problem = _problem(path)
    if problem:
        raise _damaged(path, problem)
    content: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    return content


def _damaged(path: Path, problem: str) -> RunError:
    others = [other for other in _checkpoints(path.parent) if other != path and _problem(other) is None]
    way_out = (
        f"move that folder away and --resume goes on from {others[0].name}"
        if others
        else "no other checkpoint of this run can be used; start a new run with another output=..."
    )
    return RunError(f"checkpoint {path} cannot be used: {problem}; {way_out}")


def _stored_weights(model: Model, path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by their stored names, mapped and not yet read; the class of `model` is checked."""
    _read_state(path)
    adapter = (path / ADAPTER_CONFIG).is_file()
    if adapter is isinstance(model, PreTrainedModel):
        held, has = ("an adapter", "none") if adapter else ("a whole model", "an adapter")
        raise _refused(path, f"it holds {held}, the student has {has}; use the `lora` of this run")
    stored: dict[str, Tensor] = {}
    try:
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as weights:
                stored |= {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118, not a mapping
        config = {} if adapter else json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not adapter and type(model).__name__ not in config["architectures"]:
        raise _refused(path, f"it holds a {config['architectures'][0]}, the student is a {type(model).__name__}")
    return stored


def _refused(path: Path, problem: str) -> RunError:
    return RunError(f"the weights of {path} cannot be loaded: {problem}")


def _renamed(model: PreTrainedModel, path: Path, stored: set[torch.dtype]) -> dict[str, Tensor]:
    """Weights by the model's own names, for models that transformers stores under other ones (experts, vision towers).

    transformers casts what it loads to one dtype. The widest of the model loses nothing, and each weight is cast back.
    """
    targets = model.state_dict()
    dtypes = {value.dtype for value in targets.values()}
    if dtypes != stored:
        raise _refused(path, f"it holds {stored}, the student {dtypes}; set student.dtype")
    widest = reduce(torch.promote_types, {dtype for dtype in dtypes if dtype.is_floating_point})
    with _no_progress_bars():
        loaded: Any = type(model).from_pretrained(
            path, dtype=widest, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    twin, info = loaded
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if wrong:
        raise _refused(path, f"{', '.join(wrong[:5])} do not fit the student; use the student of this run")
    return {
        name: value.to(targets[name].dtype) if name in targets else value for name, value in twin.state_dict().items()
    }
