"""A plan as text."""

from opdkit.config import Recipe
from opdkit.plan.advice import advise, gib
from opdkit.plan.memory import Model, Part
from opdkit.plan.plan import Plan, plan

SMALL = 2**30 // 20  # bytes: parts below are not shown


def dry_run(recipe: Recipe, gpu: str = "H100-80GB", gpus: int | None = None) -> str:
    """The resolved plan of a recipe as text; nothing is loaded, written or trained. Raises OpdkitError as `plan`."""
    found = plan(recipe, gpu, gpus)
    advice = advise(found)
    lines = [str(found.method), *(_model_line(name, m) for name, m in found.models.items()), *_count_lines(found), ""]
    lines += _memory_lines(found)
    lines += [f"note: {note}" for note in found.notes]
    return "\n".join(lines + ([] if advice is None else [advice]))


def _model_line(name: str, model: Model) -> str:
    a = model.architecture
    adapters = f", {model.trained:,} of them trained (LoRA)" if 0 < model.trained < model.parameters else ""
    quantized = "" if a.settings.quantize == "none" else f", {a.settings.quantize}"
    where = "the student without its adapters" if model.shared else f"{a.settings.path} ({a.source})"
    return (
        f"{name}: {where}, {model.parameters:,} parameters{adapters}, {a.settings.dtype}{quantized}, "
        f"{a.vocab:,} token ids, context {a.context:,}"
    )


def _count_lines(found: Plan) -> list[str]:
    r, c = found.recipe, found.counts
    d = c.data
    if d.train is None:
        data = f"task: {d.name}, not on this machine"
    else:
        data = f"task: {d.name}, {d.train:,} training and {d.held_out:,} held-out problems"
        data += f", {d.dropped} too long ones dropped" if d.dropped else ""
        data += "" if d.encoded else " (not yet read with the student's tokenizer)"
    epochs = "" if c.epochs is None else f", {c.epochs:.2f} epochs"
    rollouts = ", ".join(f"{n} {name}" for name, n in c.rollouts.items()) if len(c.rollouts) > 1 else ""
    return [
        data,
        f"steps: {c.steps} of {c.prompts} prompts ({c.rollouts_per_step} rollouts{': ' if rollouts else ''}{rollouts})"
        f"{epochs}, {c.updates} optimiser updates",
        f"tokens: at most {c.longest:,} a sequence (prompt {c.longest - r.sampling.max_new_tokens:,}, response "
        f"{r.sampling.max_new_tokens:,}), {c.tokens_per_step:,} a step",
        f"sampling: temperature {r.sampling.temperature}, top-p {r.sampling.top_p}; evaluation: "
        f"{r.eval.samples} samples at temperature {r.eval.temperature}, top-p {r.eval.top_p}",
        f"output: {r.output}",
    ]


def _memory_lines(found: Plan) -> list[str]:
    each = "" if found.gpus == 1 else f"each of {found.gpus} "
    lines = [f"memory of {each}{found.gpu.name} at most, in GiB ({gib(found.gpu.usable)} usable):"]
    lines += _part_lines("always", sum(p.bytes for p in found.phases[0].resident), "", found.phases[0].resident)
    for phase in found.phases:
        verdict = "fits" if phase.bytes <= found.gpu.usable else "DOES NOT FIT"
        lines += _part_lines(phase.name, phase.bytes, f"  {verdict}", phase.parts)
    return lines


def _part_lines(name: str, size: int, verdict: str, parts: tuple[Part, ...]) -> list[str]:
    lines = [f"  {name:<10}{gib(size):>7}{verdict}"]
    shown = [p for p in parts if p.bytes >= SMALL]
    return lines + [f"{gib(p.bytes):>28}  {p.what}" + (f" [{p.setting}]" if p.setting else "") for p in shown]
