"""Offline difficulty balancing: training prompts that the student solves sometimes come up more often (2605.03677).

A file of `opd difficulty` says of every prompt how many of its k samples were correct: its bucket, from 0 to k. Target
buckets (shape u: 1 to k-1; shape j: 1 to k) are repeated until each is as large as the largest of 1 to k-1. Nothing is
deleted, and a bucket that is larger already stays as it is. The paper gives no multiplicity; this rule is ours.

Left out: measuring (`opdkit.difficulty_command`), and difficulties that change during a run.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from opdkit.config import TaskConfig
from opdkit.errors import DataError
from opdkit.tasks.problem import Problem

Shape = Literal["u", "j"]


def upsampled(problems: Sequence[Problem], config: TaskConfig) -> list[int]:
    """Numbers of the training problems for one epoch: each at least once, in their order, repeated ones side by side.

    A problem that the file does not name comes once. Raises DataError for a file that is wrong, belongs to another task,
    or would change nothing.
    """
    path, shape = Path(str(config.upsample)), config.upsample_shape or "u"
    correct, samples = read_difficulty(path)
    left = set(correct)
    buckets: dict[int, list[int]] = {}
    for number, problem in enumerate(problems):
        if problem.id in correct:
            buckets.setdefault(correct[problem.id], []).append(number)
            left.discard(problem.id)
    if left:
        raise DataError(f"task.upsample: {path} names {len(left)} problems that are not among the training problems, such as "
                        f"{min(left)!r}; measure this task with `opd difficulty`")  # fmt: skip
    extra = repeats({c: len(numbers) for c, numbers in buckets.items()}, samples, shape)
    if not any(extra.values()):
        raise DataError(f"task.upsample: by {path} shape {shape} repeats no prompt ({_sizes(buckets)}): the setting has no "
                        "effect; remove it")  # fmt: skip
    more: dict[int, int] = {}
    for c, count in extra.items():
        whole, rest = divmod(count, len(buckets[c]))
        chosen = random.Random(f"opdkit upsample {config.seed} {c}").sample(buckets[c], rest)
        more |= {number: whole + (number in set(chosen)) for number in buckets[c]}
    return [number for number in range(len(problems)) for _ in range(1 + more.get(number, 0))]


def repeats(sizes: Mapping[int, int], samples: int, shape: Shape) -> dict[int, int]:
    """How many more prompts each bucket needs to be as large as the largest of 1 to samples - 1; only those that need any."""
    target = max((size for c, size in sizes.items() if 0 < c < samples), default=0)
    last = samples - 1 if shape == "u" else samples
    return {c: target - size for c, size in sorted(sizes.items()) if 1 <= c <= last and 0 < size < target}


def read_difficulty(path: Path) -> tuple[dict[str, int], int]:
    """Problem id -> correct responses, and of how many. Raises DataError naming the line that cannot be used."""
    if not path.is_file():
        raise DataError(f"task.upsample: '{path}' does not exist; make it with `opd difficulty RECIPE --out {path}`")
    found: dict[str, int] = {}
    samples: set[int] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = _row(line, where)
        if row["id"] in found:
            raise DataError(f"{where}: a second line for problem {row['id']!r}; every problem has one")
        found[row["id"]] = row["correct"]
        samples.add(row["samples"])
    if len(samples) != 1:
        raise DataError(f"{path}: expected lines with one number of samples, got {sorted(samples) or 'no line'}")
    return found, samples.pop()


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not valid JSON ({error.msg})") from error
    fits = isinstance(row, dict) and isinstance(row.get("id"), str)
    fits = fits and all(isinstance(row.get(name), int) for name in ("correct", "samples"))
    if not fits or not 0 <= row["correct"] <= row["samples"]:
        raise DataError(f"{where}: expected {{id, correct, samples}} with 0 <= correct <= samples, got {line[:80]}")
    return row


def _sizes(buckets: Mapping[int, Sequence[int]]) -> str:
    return "prompts by correct responses: " + (
        ", ".join(f"{c}: {len(buckets[c])}" for c in sorted(buckets)) or "no problem of the task is in it"
    )
