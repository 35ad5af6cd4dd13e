"""How far a plan is from the run: memory and seconds of each phase, planned for this machine and measured on it.

`python benchmarks/plan.py [--quick] [--threads N]`. Each setting is run whole (`opdkit.train.loop.train`) in a child
process, and planned in another one that is told the mean length of the run's responses, which no plan can know. Memory
is the most resident bytes above those after loading: a run of two prompts comes first, so that libraries' memory does
not count. Seconds are the medians of metrics.jsonl, and those of evaluations and of the whole run, loading included.
Left out: GPUs, of which none was at hand.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from typing import Any

import measure
import settings

from opdkit.config import Recipe, load_recipe, parse_recipe
from opdkit.plan import plan

STEP = ("sample", "score", "update", "step")
CASES = {  # setting -> steps of a full and of a quick run
    "cpu/demo": (40, 10), "a": (40, 10), "b": (4, 2), "c": (4, 0), "cpu/smollm2": (4, 0), "checkpointing": (3, 0),
}  # fmt: skip
ABOUT = {
    "cpu/demo": "natural lengths, the teacher is evaluated too",
    "cpu/smollm2": "SmolLM2-135M and a student cut from it",
    "checkpointing": "setting b with gradient checkpointing and micro-batches of 4,096 tokens",
}
PEAK, TIME = 1.2, 1.5  # targets: factors between planned and measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three settings of few steps; nothing is written")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    both = ["planned", "measured", "planned / measured"]
    memory = measure.Table("Most memory of a process above its loaded models", ["setting", *both])
    seconds = measure.Table("Seconds", ["setting", "phase", *both])
    memory.note = seconds.note = "; ".join(f"{name}: {about(name)}" for name in CASES)
    raw = {}
    for name, (full, quick) in CASES.items():
        if not (steps := quick if given.quick else full):
            continue
        found = measure.in_child(given.threads, run, name, steps)
        planned = measure.in_child(given.threads, planned_for, name, steps, found["response"])
        raw[name] = {"planned": planned, "measured": found}
        memory.rows.append([name, mib(planned["peak"]), mib(found["peak"]), planned["peak"] / found["peak"]])
        print(memory.line(memory.rows[-1]), flush=True)
        for phase, took in found["seconds"].items():
            expected = planned["seconds"][phase]
            seconds.rows.append([name, phase, expected, took, expected / took])
            print(seconds.line(seconds.rows[-1]), flush=True)
    if not given.quick:
        command = f"python benchmarks/plan.py --threads {given.threads}"
        print(measure.write("plan", command, [memory, seconds], targets(memory, seconds), raw))


def targets(memory: measure.Table, seconds: measure.Table) -> list[measure.Target]:
    """Peaks within 20 %; steps and runs within a factor of 1.5."""
    found = []
    steps = [row for row in seconds.rows if row[1] in ("step", "run")]
    for what, rows, most in (("peak memory", memory.rows, PEAK), ("seconds of a step and of the run", steps, TIME)):
        ratios = [float(row[-1]) for row in rows]  # type: ignore[arg-type]
        value = f"{min(ratios):.2f} to {max(ratios):.2f}"
        met = all(1 / most <= ratio <= most for ratio in ratios)
        found.append(measure.Target(f"{what}, planned / measured", f"within a factor of {most}", value, met))
    return found


def recipe_of(name: str, steps: int) -> Recipe:
    """The recipe of a case; without trackers, whose libraries take memory when they are first used."""
    if name.startswith("cpu/"):
        data = load_recipe(name).model_dump()
    else:
        data = settings.SETTINGS["b" if name == "checkpointing" else name].recipe().model_dump()
    data["train"] |= {"steps": steps, "checkpoint_every": None}
    data["eval"]["every"] = None
    data["log"]["trackers"] = []
    if name == "checkpointing":
        data["train"] |= {"gradient_checkpointing": True, "microbatch_tokens": 4096}
    return parse_recipe(data)


def about(name: str) -> str:
    return ABOUT.get(name) or settings.SETTINGS[name].about


def run(name: str, steps: int) -> dict[str, Any]:
    """In a child: train, and return peak bytes, seconds and the mean length of responses."""
    from opdkit.train import loop

    warnings.simplefilter("ignore")
    base: list[int] = []
    evaluations: list[float] = []
    set_up, evaluate = loop.set_up, loop.evaluate

    def loaded(recipe: Recipe) -> Any:
        setup = set_up(recipe)
        base.append(measure.reset_peak())
        return setup

    def watched(setup: Any, lm: Any, step: int) -> Any:
        start = time.perf_counter()
        record = evaluate(setup, lm, step)
        if lm.name == "student":
            evaluations.append(time.perf_counter() - start)
        return record

    with tempfile.TemporaryDirectory() as folder:
        first = ["train.steps=1", "train.prompts_per_step=2", "task.eval_size=2", "log.trackers=[]"]
        loop.train(load_recipe("cpu/demo", [*first, f"output={folder}/first"]))
        loop.set_up, loop.evaluate = loaded, watched  # type: ignore[assignment]
        recipe = recipe_of(name, steps).model_copy(update={"output": f"{folder}/run"})
        start = time.perf_counter()
        out = loop.train(recipe)
        whole, most = time.perf_counter() - start, measure.peak() - base[0]
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    later = rows[1:] or rows
    seconds = {phase: statistics.median(row[f"seconds/{phase}"] for row in later) for phase in STEP}
    seconds |= {"evaluate": statistics.mean(evaluations), "run": whole}
    return {"peak": most, "seconds": seconds, "response": statistics.mean(row["response_length"] for row in rows)}


def planned_for(name: str, steps: int, response: float) -> dict[str, Any]:
    """In a child: the plan's peak above the models' weights, and its seconds."""
    warnings.simplefilter("ignore")
    recipe = recipe_of(name, steps)
    start = time.perf_counter()
    found = plan(recipe, None, response=min(response, recipe.sampling.max_new_tokens))
    took = time.perf_counter() - start
    seconds = {t.phase: t.seconds for t in found.times} | {"step": found.step_seconds, "run": found.seconds}
    weights = sum(model.bytes for model in found.models.values())
    peak = max(phase.bytes for phase in found.phases) - weights
    return {"peak": peak, "seconds": seconds, "took": took}


def mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


if __name__ == "__main__":
    main()
