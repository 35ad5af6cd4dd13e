"""Settings that make a recipe fit, each tried with a plan of its own before it is suggested."""

from collections.abc import Iterator
from typing import Any

from opdkit.config import Recipe, parse_recipe
from opdkit.plan.memory import Phase
from opdkit.plan.plan import Plan, plan

OWN = {  # the setting that each phase can be made smaller with
    "sample": "sampling.max_rows",
    "score": "train.score_tokens",
    "update": "train.microbatch_tokens",
    "hooks": "sampling.max_rows",
    "evaluate": "sampling.max_rows",
}
ROUNDS = 3  # a smaller setting of one phase can show that another one is too large


def advise(found: Plan) -> str | None:
    """Overrides with which every phase fits, the mildest first; None when all fit. Says so when none was found."""
    if not found.too_large:
        return None
    for changes, gpus in _candidates(found):
        for _ in range(ROUNDS):
            tried = _again(found, changes, gpus)
            if not tried.too_large:
                return _sentence(found, tried, changes)
            smaller = _smaller(tried)
            if smaller is None:
                break
            changes = changes | smaller
    where, other = (f"a {found.place.name}", "larger") if found.place.cuda else (found.place.name, "named")
    return (
        f"no setting was found that fits {where}: use a smaller model, shorter responses, fewer prompts a step, or a {other} "
        "GPU (--gpu)"
    )


def _again(found: Plan, changes: dict[str, Any], gpus: int) -> Plan:
    """The same plan, of memory only, with some settings changed."""
    recipe = _changed(found.recipe, changes)
    if not found.place.cuda:
        return plan(recipe, None, response=found.response, timed=False)
    return plan(recipe, found.place.name, gpus, found.response, timed=False)


def _candidates(found: Plan) -> Iterator[tuple[dict[str, Any], int]]:
    """(overrides, GPUs) to start from, from mild to drastic."""
    yield {}, found.gpus
    checkpointing: dict[str, Any] = {}
    if not found.recipe.train.gradient_checkpointing:
        checkpointing = {"train.gradient_checkpointing": True}
        yield checkpointing, found.gpus
    if found.place.cuda and found.recipe.lora is None and found.recipe.train.precision != "fp16":
        for gpus in (2, 4, 8):
            if gpus > found.gpus or (gpus == found.gpus and found.recipe.train.sharding == "none"):
                yield checkpointing | {"train.sharding": "fsdp2"}, gpus
    if found.recipe.lora is None and found.recipe.train.sharding == "none":
        yield checkpointing | {"lora": {}}, found.gpus
    if found.place.cuda and found.recipe.lora is not None and found.recipe.student.quantize == "none":
        yield checkpointing | {"student.quantize": "nf4"}, found.gpus


def _smaller(tried: Plan) -> dict[str, Any] | None:
    """Each phase that is too large with its own setting lowered until it fits; None where that cannot be enough."""
    changes: dict[str, int] = {}
    for phase in tried.too_large:
        setting = OWN[phase.name]
        shrinks = sum(part.bytes for part in phase.parts if part.setting == setting)
        room = tried.place.usable - (phase.bytes - shrinks)
        section, _, name = setting.partition(".")
        now = int(getattr(getattr(tried.recipe, section), name))
        unit = 1 if setting == "sampling.max_rows" else tried.counts.longest
        rows = _rows(tried, phase, now, unit)
        fit = int(rows * room / shrinks) if shrinks and room > 0 else 0
        fit = fit if fit < rows else rows - 1
        if fit < 1:
            return None
        changes[setting] = min(fit * unit, changes.get(setting, fit * unit))
    return changes


def _rows(tried: Plan, phase: Phase, now: int, unit: int) -> int:
    """Sequences that a phase works on together."""
    if phase.name == "sample":
        return min(now, tried.job.rows())
    if phase.name == "hooks":
        return min(now, max((work.problems for work in tried.job.works.values()), default=1))
    if phase.name == "evaluate":
        return min(now, tried.recipe.task.eval_size * tried.recipe.eval.samples)
    return max(1, min(now // unit, tried.job.rows()))


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    data = recipe.model_dump()
    for key, value in changes.items():
        section, dot, name = key.partition(".")
        if dot:
            data[section][name] = value
        else:
            data[section] = value
    return parse_recipe(data)


def _sentence(found: Plan, tried: Plan, changes: dict[str, Any]) -> str:
    shown = " ".join(f"{key}={_yaml(value)}" for key, value in changes.items())
    where = f" on {tried.gpus} GPUs (--gpus {tried.gpus})" if tried.gpus != found.gpus else ""
    return f"fits with {shown}{where}: then at most {in_bytes(max(tried.phases, key=lambda p: p.bytes).bytes)}"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "'{}'" if value == {} else str(value)


def in_bytes(size: int) -> str:
    """Bytes in GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
