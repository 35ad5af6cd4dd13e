"""Evaluation on held-out problems: avg@k with its standard error, and the exact reverse KL to a teacher."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opdkit.config import Recipe, load_recipe
from opdkit.errors import RunError
from opdkit.lora import BASE, LIVE
from opdkit.metrics import averages, avg_at_k, rollout_metrics, sequence_totals, summed, token_mean_with_error
from opdkit.models import LanguageModel
from opdkit.rewards.verify import verify_rollouts
from opdkit.rollouts.flatten import flatten
from opdkit.rollouts.rollout import Rollout
from opdkit.rollouts.sampler import Keep, Sampling, prompt_keys
from opdkit.rollouts.sources import Prompts, on_policy
from opdkit.signals import full_divergence
from opdkit.step import Step
from opdkit.support import Full
from opdkit.train.setup import Setup, derive_seed, set_up
from opdkit.train.sharding import whole
from opdkit.views.local import score


def evaluate(setup: Setup, lm: LanguageModel, step: int) -> dict[str, Any]:
    """One record for evals.jsonl. The same problems and the same random numbers every time, so curves are paired."""
    e = setup.recipe.eval
    how = replace(
        setup.sampling,
        group=e.samples,
        temperature=e.temperature,
        top_p=e.top_p,
        top_k=0,
        max_new_tokens=e.max_new_tokens or setup.sampling.max_new_tokens,
    )
    record: dict[str, Any] = {"step": step, "who": lm.name, "problems": len(setup.eval), "samples": e.samples}
    if setup.task.verify is not None:
        seed = derive_seed(setup.recipe.seed, "eval")
        with whole(lm), setup.autocast():
            rollouts = sample_mine(setup, lm, setup.eval, how, seed)
        rollouts = verify_rollouts(setup.task, rollouts)
        judged: dict[tuple[str, str], list[bool]] = defaultdict(list)
        verdicts = [(r.problem.domain, r.problem.id, bool(r.correct)) for r in rollouts]
        for domain, problem, correct in setup.processes.gather(verdicts):
            judged[domain, problem].append(correct)
        record["accuracy"], record["accuracy_se"] = avg_at_k({f"{d}/{p}": c for (d, p), c in judged.items()})
        domains = sorted({domain for domain, _ in judged})
        for domain in domains if len(domains) > 1 else ():
            own = {problem: correct for (d, problem), correct in judged.items() if d == domain}
            record[f"accuracy/{domain}"], record[f"accuracy_se/{domain}"] = avg_at_k(own)
        if setup.recipe.task.verifier_errors == "incorrect":
            record["verifier_errors"] = int(setup.processes.total([float(sum(r.unjudged for r in rollouts))])[0])
        means = averages(summed(setup.processes.gather([rollout_metrics(rollouts)])))
        record |= {
            k: v for k, v in means.items() if k in ("response_length", "clipped_share") or k.startswith("tools/")
        }
    if lm.name == "student" and e.kl_prompts and setup.teachers:
        record |= held_out_kl(setup, lm)
    return record


@torch.no_grad()
def held_out_kl(setup: Setup, lm: LanguageModel) -> dict[str, float]:
    """Exact full-vocabulary KL(student, teacher) per token on the student's own samples to held-out prompts (nats)."""
    prompts = setup.eval[: setup.recipe.eval.kl_prompts]
    seed = derive_seed(setup.recipe.seed, "kl")
    found: dict[str, float] = {}
    with whole(lm), setup.autocast():
        how = replace(setup.sampling, group=1)
        rollouts = sample_mine(setup, lm, prompts, how, seed, Keep(1, hidden=True))
        step = flatten(rollouts, device=lm.device, head=lm.head()) if rollouts else None
        totals = {
            name: reverse_kl(setup, teacher, rollouts, step) if step is not None else []
            for name, teacher in setup.teachers.items()
            if teacher.path != LIVE  # its own prompt: it is the student
        }
    for name, own in totals.items():
        value, error = token_mean_with_error(setup.processes.gather(own))
        suffix = f"/{name}" if len(setup.teachers) > 1 else ""
        found |= {f"reverse_kl{suffix}": value, f"reverse_kl_se{suffix}": error}
    return found


def sample_mine(
    setup: Setup, lm: LanguageModel, prompts: Prompts, how: Sampling, seed: int, keep: Keep | None = None
) -> list[Rollout]:
    """This process's part of the responses to some prompts, drawn with the random numbers of the whole list."""
    keys = prompt_keys([ids for _, ids in prompts], seed)
    mine = setup.processes.mine
    return on_policy(lm, mine(prompts), how, seed, keep, keys=mine(keys), tools=setup.tools)


def reverse_kl(setup: Setup, teacher: LanguageModel, rollouts: list[Rollout], step: Step) -> list[tuple[float, float]]:
    """(sum of the exact reverse KL, tokens) of every sequence of a step whose student view kept its hidden states."""
    seen = setup.as_read_by(teacher, rollouts)
    t = setup.recipe.train
    scores = score(teacher, seen, step, Full(), budget=t.score_tokens, bad=t.bad_scores)
    both = replace(step, views={**step.views, "teacher": scores})
    value = full_divergence(both, "teacher", "reverse_kl")
    there = slice(None) if scores.bad is None else ~scores.bad
    return sequence_totals(value[there], step.layout.seq[there], step.layout.sequences)


def evaluate_run(target: str, overrides: list[str]) -> str:
    """Evaluate a recipe's student, or a run's newest checkpoint, and its teachers. Returns a text table.

    Raises RunError when the run has no checkpoint, RecipeError for a wrong recipe.
    """
    from opdkit.train.checkpoint import latest_checkpoint, load_checkpoint

    folder = Path(target)
    recipe: Recipe
    newest = None
    if (folder / "recipe.yaml").is_file():
        newest = latest_checkpoint(folder)
        if newest is None:
            raise RunError(f"{target} has no complete checkpoint to evaluate; train it first, or give a recipe")
        untrained = bases(load_recipe(str(folder / "recipe.yaml")))
        recipe = load_recipe(str(folder / "recipe.yaml"), [f"student.path={newest}", *untrained, *overrides])
    elif folder.is_dir():
        raise RunError(f"{target} is not a run (it has no recipe.yaml); give a run folder or a recipe")
    else:
        recipe = load_recipe(target, overrides)
    setup = set_up(recipe)
    if newest is not None and setup.averages.state():
        setup.averages.restore(load_checkpoint(newest))
    models = [setup.student, *(lm for lm in setup.teachers.values() if recipe.eval.teacher and lm.path != LIVE)]
    return "\n".join([f"task {setup.task.name}, {len(setup.eval)} held-out problems, {recipe.eval.samples} samples each"]
                     + [summary(evaluate(setup, lm, 0), lm.path) for lm in models])  # fmt: skip


def bases(recipe: Recipe) -> list[str]:
    """Overrides that keep `student:base` teachers what they were when `student.path` becomes a checkpoint.

    A stored adapter knows its base; whole weights do not, so the teachers get the path that the student had.
    """
    names = [name for name, config in recipe.teachers.items() if config.path == BASE and recipe.lora is None]
    kept = {key: getattr(recipe.student, key) for key in ("path", "dtype", "attn", "quantize")}
    return [f"teachers.{name}.{key}={value}" for name in names for key, value in kept.items()]


def summary(record: dict[str, Any], path: str = "") -> str:
    """One line about an evaluation record."""
    parts = []
    if "accuracy" in record:
        parts.append(f"accuracy {record['accuracy']:.1%} (se {record['accuracy_se']:.1%})")
    parts += [f"{k.replace('_', ' ')} {v:.4f} nats/token" for k, v in record.items() if k.split("/")[0] == "reverse_kl"]
    if "response_length" in record:
        parts.append(f"{record['response_length']:.1f} tokens")
    return f"{record['who']}{f' ({path})' if path else ''}: " + ", ".join(parts)
