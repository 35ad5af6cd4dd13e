"""Which phase of a run takes most of its time, and settings that would shorten it, with what each saves.

Only what follows from the plan's own seconds is said: the saving is that of phases that would not happen, of FLOPs that
would not be repeated, or of another plan. Left out: on this machine, settings that would have to be measured again.
"""

from collections.abc import Iterator
from dataclasses import replace

from opdkit.plan.passes import updating_flops
from opdkit.plan.plan import Plan, plan
from opdkit.plan.timing import Timing

WORTH = 0.05  # share of the run that a change must save to be mentioned


def hints(found: Plan) -> list[str]:
    """Lines about a plan's time; none where no times are known."""
    if not found.times:
        return []
    times = {t.phase: t for t in found.times}
    most = max(found.times, key=lambda t: t.total)
    lines = [f"most of the time: {most.phase}, {most.total / found.seconds:.0%} of the run"]
    for change, saved in savings(found, times).items():
        if saved >= WORTH * found.seconds:
            lines.append(f"{change} would save about {saved / found.seconds:.0%} of the run")
    return lines


def savings(found: Plan, times: dict[str, Timing]) -> dict[str, float]:
    """Override -> seconds of the run that it saves."""
    saved = {"eval.teacher=false": sum((t.total for name, t in times.items() if name.startswith("evaluate ")), 0.0)}
    own = times.get("evaluate")
    if own is not None and own.times > 2:
        saved["eval.every=null"] = (own.times - 2) * own.seconds
    rows = found.recipe.sampling.max_rows
    wider = max(_wider(found), key=lambda tried: found.seconds - tried.seconds, default=found)
    if wider is not found:
        saved[f"sampling.max_rows={wider.recipe.sampling.max_rows} in place of {rows}"] = found.seconds - wider.seconds
    train, update = found.recipe.train, times.get("update")
    if train.gradient_checkpointing and update is not None:
        kept = train.model_copy(update={"gradient_checkpointing": False})
        job = replace(found.job, recipe=found.recipe.model_copy(update={"train": kept}))
        part = 1 - updating_flops(job) / updating_flops(found.job)
        saved["train.gradient_checkpointing=false (more memory: plan it first)"] = part * update.total
    return saved


def _wider(found: Plan) -> Iterator[Plan]:
    """Plans that fit, with more rows that decode together on a GPU, as long as there are more to decode."""
    rows, most = found.recipe.sampling.max_rows, found.job.rows()
    while found.place.cuda and found.times and rows < most:
        rows *= 2
        sampling = found.recipe.sampling.model_copy(update={"max_rows": rows})
        recipe = found.recipe.model_copy(update={"sampling": sampling})
        tried = plan(recipe, found.place.name, found.gpus, found.response)
        if tried.too_large:
            return
        yield tried
