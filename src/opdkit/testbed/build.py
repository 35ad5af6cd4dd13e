"""Builds the testbed's models from scratch through the engine itself, once, into the user's cache folder.

`testbed:NAME` in a recipe means one of BUILDS (`testbed:NAME@SEED`: with another seed). Each is a recipe (supervised, or
GRPO on the verifier) that starts from a new model or from another build. The folder's name carries a hash of all that
decides its content: the recipe, the parent, and the code of tokenizer, tasks, grammar and shapes, and of contexts where the
model learns to read them.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from opdkit.config import nearest, parse_recipe
from opdkit.errors import ModelError

Json = dict[str, Any]
SFT: Json = {"name": "sft"}
GRPO: Json = {"name": "grpo"}


@dataclass(frozen=True)
class Build:
    """How one model comes to be: its start (a shape, or another build) and the recipe's sections."""

    about: str
    start: str  # "new:SHAPE" or the name of a build
    task: Json
    method: Json = field(default_factory=lambda: SFT)
    train: Json = field(default_factory=dict)
    optim: Json = field(default_factory=dict)
    sampling: Json = field(default_factory=dict)
    tools: Json = field(default_factory=dict)
    teachers: Json = field(default_factory=dict)
    seed: int = 0


def supervised(steps: int, schedule: str = "cosine", *, lr: float = 2e-3) -> dict[str, Any]:
    """Sections of a supervised build: batches of 64, AdamW with warm-up."""
    return {
        "train": {"steps": steps, "prompts_per_step": 64},
        "optim": {"lr": lr, "schedule": schedule, "warmup_steps": 50, "betas": [0.9, 0.99]},
        "sampling": {"max_new_tokens": 24},
    }


def listing(steps: int, schedule: str, lr: float) -> dict[str, Any]:
    """Sections of a supervised build on lists, whose responses are four times as long: batches of 32."""
    longer = {"train": {"steps": steps, "prompts_per_step": 32}, "sampling": {"max_new_tokens": 96}}
    return supervised(steps, schedule, lr=lr) | longer


def reading(steps: int, lr: float, plain: float, told: float, right: float) -> dict[str, Any]:
    """Sections of a supervised build that learns to read what self-distillation shows (`opdkit.contexts`).

    Of the tokens, a share `plain` stands under the prompt alone and `told` under the written solution. The others stand under
    the solution and a line that says whether they are correct, as `antisd` shows it: the solution itself, a share `right`, and
    answers of the model that it starts from.
    """
    sources = {
        "plain": (plain, "Dataset(share={})"),
        "told": (told, "Dataset(share={}, context=Shown())"),
        "right": (right, "Dataset(share={}, context=Shown(assess=True))"),
        "judged": (round(1 - plain - told - right, 6), "TeacherSamples(share={}, context=Shown(assess=True))"),
    }
    method = {
        "name": "compose",
        "rollouts": {name: text.format(share) for name, (share, text) in sources.items()},
        "terms": [f"Term(loss=CrossEntropy(), on='{name}', coef={share})" for name, (share, _) in sources.items()],
    }
    return supervised(steps, lr=lr) | {"method": method, "teachers": {"teacher": {"path": "student:base"}}}


def calling(steps: int, schedule: str, lr: float, *, tokens: int = 64, turns: int | None = None) -> dict[str, Any]:
    """Sections of a supervised build on calls of a tool, whose output is not trained on."""
    tools: Json = {"environment": "calculator", "settings": {"operations": 1}, "calls": "text"}
    tools |= {} if turns is None else {"turns": turns}
    return supervised(steps, schedule, lr=lr) | {"sampling": {"max_new_tokens": tokens}, "tools": tools}


SUMS_A: Json = {"name": "sums", "settings": {"format": "a"}}
SUMS_LINES: Json = SUMS_A | {"template": "plain"}  # as the recipes of self-distillation read them
SUMS_B: Json = {"name": "sums", "settings": {"format": "b"}}
MIX: Json = {"name": "mix"}
LISTS: Json = {"name": "lists"}
CALLS: Json = {"name": "calculator"}
SLIPS: Json = {"name": "calculator", "settings": {"slips": 0.4}}
RL: Json = {
    "method": GRPO,
    "train": {"steps": 200, "prompts_per_step": 16},
    "optim": {"lr": 1e-4, "warmup_steps": 10, "betas": [0.9, 0.99]},
    "sampling": {"group": 8, "max_new_tokens": 24},
}

CLUMSY = calling(80, "constant", 2e-3, tokens=256, turns=8)

# Modules of one task alone; what `slips` makes of a call is answered by the calculator.
OWN = {"lists": ("testbed/lists",), "calculator": ("testbed/expressions", "tasks/calculator")}

BUILDS: dict[str, Build] = {
    "student": Build("0.23M parameters, stopped before it can add", "new:xs", SUMS_A, **supervised(350, "constant")),
    "sft": Build("0.58M, sums in format a", "new:m", SUMS_A, **supervised(700, lr=3e-3)),
    "sft-b": Build("0.58M, sums in format b", "new:m", SUMS_B, **supervised(700)),
    "sft-l": Build("1.17M, sums in format a", "new:l", SUMS_A, **supervised(700)),
    "base": Build("0.34M, the task mix: sums in both formats, reasoning-gym", "new:s", MIX, **supervised(800)),
    "base-m": Build("0.58M, the task mix", "new:m", MIX, **supervised(800)),
    "mid": Build("0.58M, sums in format a, stopped half way", "new:m", SUMS_A, **supervised(400, "constant")),
    "lists": Build("0.23M, JSON lists", "new:xs", LISTS, **listing(800, "cosine", 4e-3)),
    "lists-weak": Build("0.23M, JSON lists, stopped early", "new:xs", LISTS, **listing(300, "constant", 3e-3)),
    "caller": Build("0.58M, calls of the calculator", "new:m", CALLS, **calling(400, "cosine", 3e-3)),
    "caller-weak": Build("0.23M, calls, stopped early", "new:xs", CALLS, **calling(110, "constant", 3e-3)),
    "caller-clumsy": Build("0.23M, caller-weak after malformed calls", "caller-weak", SLIPS, **CLUMSY),
    "lists-mid": Build("0.23M, JSON lists, stopped half way", "new:xs", LISTS, **listing(500, "constant", 3e-3)),
    "reader": Build("0.58M, mid after reading solutions", "mid", SUMS_LINES, **reading(450, 3e-3, 0.15, 0.4, 0.2)),
    "rl": Build("0.58M, mid after GRPO on the verifier of sums", "mid", SUMS_A, **RL),
}


def resolve(name: str, cache: Path) -> Path:
    """The folder of a testbed model, built when it is not in the cache. Raises ModelError for an unknown name."""
    build = find(name)
    folder = cache / "testbed" / f"{name.partition('@')[0]}-{content_hash(build)}"
    if not (folder / "config.json").is_file():
        with building(folder):
            if not (folder / "config.json").is_file():  # another process may have been faster
                _build(name, build, folder, cache)
    return folder


def find(name: str) -> Build:
    """The build of a name, or of `NAME@SEED`. Raises ModelError for a name that is not in BUILDS."""
    plain, at, seed = name.partition("@")
    if plain not in BUILDS or (at and not seed.isdigit()):
        raise ModelError(f"there is no testbed model '{name}'{nearest(plain, list(BUILDS))}")
    build = BUILDS[plain]
    if not at:
        return build
    parent = build.start if build.start.startswith("new:") else f"{build.start}@{seed}"
    return replace(build, seed=int(seed), start=parent)


def content_hash(build: Build) -> str:
    """Twelve hex digits over everything that decides a build's content."""
    parent = build.start if build.start.startswith("new:") else content_hash(find(build.start))
    shared = [f"testbed/{module}" for module in ("tokenizer", "tasks", "grammar", "shapes")]
    modules = [*shared, *OWN.get(build.task["name"], ())]
    if any("context=" in text for text in build.method.get("rollouts", {}).values()):
        modules.append("contexts")
    code = [(resources.files("opdkit") / f"{m}.py").read_text() for m in modules]
    parts = [parent, json.dumps(_recipe(build, "", ""), sort_keys=True), *code]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _recipe(build: Build, student: str, output: str) -> Json:
    return {
        "method": build.method,
        "student": {"path": student},
        "task": {"kind": "testbed", "eval_size": 200, **build.task},
        "sampling": build.sampling,
        **({"tools": build.tools} if build.tools else {}),
        **({"teachers": build.teachers} if build.teachers else {}),
        "optim": build.optim,
        "train": {"keep_checkpoints": 1, **build.train},
        "eval": {"kl_prompts": 0, "teacher": False},
        "log": {"trackers": [], "rollouts_every": 10**9},
        "seed": build.seed,
        "output": output,
    }


def _build(name: str, build: Build, folder: Path, cache: Path) -> None:
    from opdkit.testbed.shapes import new_model
    from opdkit.testbed.tokenizer import testbed_tokenizer
    from opdkit.train.checkpoint import latest_checkpoint
    from opdkit.train.loop import train

    work = folder.with_name(f".{folder.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    kind, _, shape = build.start.partition(":")
    if kind == "new":
        start = work / "new"
        new_model(shape, build.seed).save_pretrained(start)
        testbed_tokenizer().save_pretrained(start)
    else:
        start = resolve(build.start, cache)
    print(f"building testbed:{name} ({build.about}), once", file=sys.stderr, flush=True)
    run = train(parse_recipe(_recipe(build, str(start), str(work / "run"))))
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    shutil.rmtree(checkpoint / "trainer")
    shutil.copy(run / "evals.jsonl", checkpoint / "evals.jsonl")
    os.replace(checkpoint, folder)
    shutil.rmtree(work)


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Hold a lock beside the folder, so that two processes do not build the same model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
