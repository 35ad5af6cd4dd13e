"""A plan as text and as JSON."""

import json
from dataclasses import asdict

from opdkit.config import Recipe
from opdkit.lora import EMA, LIVE
from opdkit.plan.advice import advise, in_bytes
from opdkit.plan.hints import hints
from opdkit.plan.memory import Model, Part
from opdkit.plan.plan import Plan, plan

SHARED = {LIVE: "the student itself", EMA: "the student itself, with an average of its adapters"}
SMALL = 2**30 // 20  # bytes: parts below are not shown, but the largest of each phase is


def dry_run(recipe: Recipe, gpu: str = "H100-80GB", gpus: int | None = None) -> str:
    """The resolved plan of a recipe on named GPUs as text. Raises OpdkitError as `plan`."""
    return as_text(plan(recipe, gpu, gpus))


def as_text(found: Plan) -> str:
    """A plan as lines: what is run, memory and time of every phase, notes, and what would help."""
    lines = [str(found.method), *(_model_line(name, m) for name, m in found.models.items()), *_count_lines(found), ""]
    lines += [*_memory_lines(found), *_time_lines(found)]
    lines += [f"note: {note}" for note in found.notes]
    advice = advise(found)
    return "\n".join(lines + ([] if advice is None else [advice]) + hints(found))


def as_json(found: Plan) -> str:
    """A plan as JSON: bytes, seconds, tokens and FLOPs."""
    lengths = found.counts.lengths
    return json.dumps({
        "method": found.method.name,
        "place": {"name": found.place.name, "count": found.gpus, "usable_bytes": found.place.usable},
        "models": {name: {"path": m.architecture.settings.path, "parameters": m.parameters, "trained": m.trained,
                          "bytes": m.bytes, "packed": m.packs} for name, m in found.models.items()},
        "steps": found.counts.steps, "rollouts_per_step": found.counts.rollouts_per_step,
        "tokens": {"longest_prompt": lengths.longest, "prompt": lengths.prompt, "response_limit": lengths.limit,
                   "response": lengths.response, "step": found.counts.tokens_per_step},
        "memory": {p.name: {"bytes": p.bytes, "fits": p.bytes <= found.place.usable,
                            "parts": [asdict(part) for part in (*p.resident, *p.parts)]} for p in found.phases},
        "time": {"measured": bool(found.times) and not found.place.cuda, "run_seconds": found.seconds if found.times else None,
                 "step_seconds": found.step_seconds if found.times else None,
                 "phases": [asdict(t) | {"total": t.total} for t in found.times]},
        "notes": list(found.notes), "advice": advise(found), "hints": hints(found),
    }, indent=1)  # fmt: skip


def _model_line(name: str, model: Model) -> str:
    a = model.architecture
    adapters = f", {model.trained:,} of them trained (LoRA)" if 0 < model.trained < model.parameters else ""
    quantized = "" if a.settings.quantize == "none" else f", {a.settings.quantize}"
    where = f"{a.settings.path} ({a.source})"
    if model.shared:
        where = SHARED.get(a.settings.path, "the student without its adapters")
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
        f"tokens: at most {c.longest:,} a sequence (prompt {c.lengths.longest:,}, response {c.lengths.limit:,}), "
        f"{c.tokens_per_step:,} a step{_assumed(found)}",
        f"sampling: temperature {r.sampling.temperature}, top-p {r.sampling.top_p}; evaluation: "
        f"{r.eval.samples} samples at temperature {r.eval.temperature}, top-p {r.eval.top_p}",
        f"output: {r.output}",
    ]


def _assumed(found: Plan) -> str:
    c = found.counts.lengths
    if found.response is None:
        return f" if every response has {c.limit:,} tokens (--response says otherwise)"
    return f" if responses have {c.response:.4g} tokens on average"


def _memory_lines(found: Plan) -> list[str]:
    each = "" if found.gpus == 1 else f"each of {found.gpus} "
    usable = "usable" if found.place.cuda else "free now"
    lines = [f"memory of {each}{found.place.name} at most ({in_bytes(found.place.usable)} {usable}):"]
    lines += _part_lines("always", sum(p.bytes for p in found.phases[0].resident), "", found.phases[0].resident)
    for phase in found.phases:
        verdict = "fits" if phase.bytes <= found.place.usable else "DOES NOT FIT"
        lines += _part_lines(phase.name, phase.bytes, f"  {verdict}", phase.parts)
    return lines


def _time_lines(found: Plan) -> list[str]:
    if not found.times:
        return []
    how = "estimated from its data sheet, never checked" if found.place.cuda else "measured with random weights"
    total = found.seconds
    lines = [f"time on {found.place.name}, {how}: {duration(total)}, {duration(found.step_seconds)} a step"]
    for t in found.times:
        often = f"x {t.times:,}" if t.times > 1 else "once"
        rate = f", {t.flops / t.seconds / 1e9:,.0f} GFLOP/s" if t.flops else ""
        lines.append(
            f"  {t.phase:<18}{duration(t.seconds):>9} {often:<8}{duration(t.total):>9}{t.total / total:>6.0%}{rate}"
        )
    return lines


def duration(seconds: float) -> str:
    """Seconds in a unit that reads well."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 1.5 * size or (unit == "s" and seconds >= 1):
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"


def _part_lines(name: str, size: int, verdict: str, parts: tuple[Part, ...]) -> list[str]:
    lines = [f"  {name:<10}{in_bytes(size):>11}{verdict}"]
    most = max((p.bytes for p in parts), default=0)
    large = [p for p in parts if p.bytes >= SMALL or p.bytes == most]
    return lines + [f"{in_bytes(p.bytes):>32}  {p.what}" + (f" [{p.setting}]" if p.setting else "") for p in large]
