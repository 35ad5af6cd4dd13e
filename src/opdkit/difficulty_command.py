"""`opd difficulty`: how many of a student's samples to each training prompt are correct, for task.upsample.

Left out: several processes, and the teachers, which are not asked.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from opdkit.config import Recipe
from opdkit.errors import DataError, RecipeError
from opdkit.rewards.verify import verify_rollouts
from opdkit.rollouts.sampler import prompt_keys
from opdkit.rollouts.sources import on_policy
from opdkit.tasks.difficulty import repeats
from opdkit.train.run import write_text
from opdkit.train.setup import Setup, derive_seed, set_up

CHUNK = 64  # prompts that are sampled between two looks at the clock


def difficulty(recipe: Recipe, out: str, *, samples: int = 8, prompts: int | None = None) -> str:
    """Sample `samples` responses to the training prompts (the first `prompts` of them), as the recipe samples, and write
    {id, domain, correct, samples} for each to `out`. Returns the buckets and what each shape would repeat, as text.

    Raises RecipeError where nothing can be measured or the file exists, DataError for problems that share an id.
    """
    if samples < 2:
        raise RecipeError(f"--samples {samples}: a prompt is hard or easy by several responses; give 2 or more")
    if prompts is not None and prompts < 1:
        raise RecipeError(f"--prompts {prompts}: expected 1 or more")
    if Path(out).exists() or not Path(out).parent.is_dir():
        what = (
            "exists; give another file, or remove it" if Path(out).exists() else "lies in a folder that does not exist"
        )
        raise RecipeError(f"--out {out}: it {what}")
    plain = recipe.task.model_copy(update={"upsample": None, "upsample_shape": None})
    setup = set_up(recipe.model_copy(update={"task": plain}))
    if setup.task.verify is None:
        raise RecipeError(f"task '{setup.task.name}' has no verifier; set task.verifier")
    count = len(setup.train) if prompts is None else min(prompts, len(setup.train))
    twice = [name for name, times in Counter(p.id for p in setup.train.problems[:count]).items() if times > 1]
    if twice:
        raise DataError(
            f"{len(twice)} problem ids occur more than once, such as {twice[0]!r}; task.upsample finds problems by their id: "
            "give each row its own"
        )
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    rows = [row for numbers in chunks for row in _rows(setup, numbers, samples)]
    write_text(Path(out), "".join(json.dumps(row) + "\n" for row in rows))
    return describe(Counter(int(str(row["correct"])) for row in rows), samples, out)


def _rows(setup: Setup, numbers: Sequence[int], samples: int) -> list[dict[str, str | int]]:
    """The measurement of some training problems; a problem's responses depend on the run's seed and on nothing else."""
    chosen = [setup.train[i] for i in numbers]
    how = replace(setup.sampling, group=samples)
    seeds = [derive_seed(setup.recipe.seed, "difficulty", problem.id) for problem, _ in chosen]
    keys = [prompt_keys([ids], seed)[0] for (_, ids), seed in zip(chosen, seeds, strict=True)]
    with setup.autocast():
        rollouts = on_policy(setup.student, chosen, how, 0, keys=keys, tools=setup.tools)
    judged = verify_rollouts(setup.task, rollouts)
    groups = [judged[i : i + samples] for i in range(0, len(judged), samples)]
    return [
        {"id": problem.id, "domain": problem.domain, "correct": sum(bool(r.correct) for r in group), "samples": samples}
        for (problem, _), group in zip(chosen, groups, strict=True)
    ]


def describe(buckets: Counter[int], samples: int, out: str) -> str:
    """The histogram, and what task.upsample would make of it."""
    lines = [f"{sum(buckets.values())} training prompts, {samples} samples each; correct: prompts"]
    lines += [f"  {c:>3}: {buckets[c]}" for c in range(samples + 1)]
    for shape, solved in (("u", f"1 to {samples - 1}"), ("j", f"1 to {samples}")):
        extra = sum(repeats(buckets, samples, shape).values())  # type: ignore[arg-type]
        lines.append(f"shape {shape} (repeats {solved}): {extra} more prompts an epoch")
    return "\n".join([*lines, f"written to {out}; use it with task.upsample={out}"])
