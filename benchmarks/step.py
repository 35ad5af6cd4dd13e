"""A whole on-policy step: ours against TRL's DistillationTrainer, same models, prompts, group, lengths and threads.

    python benchmarks/step.py [--quick] [--setting a b] [--threads 2] [--seeds 3] [--device cuda]

Every run is a process of its own and the contenders alternate; what counts is the median over a run's steps after the
first few, and the median of the ratios of neighbouring runs. Both train with the exact reverse KL over the full
vocabulary (TRL: beta = 1), the same prompts in the same order, AdamW at a constant rate, temperature 1, float32.
Afterwards both students are evaluated by the same code: accuracy on held-out problems where the task has answers, and
exact reverse KL on their own samples. Memory is the most resident bytes beyond the loaded models. Settings: settings.py.
Needs trl (pip install 'opdkit[benchmarks]'). On a GPU the share outside forwards and backwards is not measured: waiting for
the device around each would change what is timed. Some settings alone replace theirs in the committed results of the
same machine. Left out: TRL with vLLM.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import torch
from measure import Table, Target
from settings import SETTINGS, Setting
from step_contenders import run_ours, run_trl

from opdkit.config import Recipe

Json = dict[str, Any]
CONTENDERS = ("ours", "trl")
FASTER = {"a": 1.5, "a-natural": 1.5, "b": 3.0, "c": 2.0, "d": 1.3}  # tokens a second, ours / TRL
MEMORY = {"c": 1 / 3}  # bytes above the loaded models, ours / TRL
LEARNED = ("accuracy", "reverse_kl")  # what an evaluation says about a student
OUTSIDE = {"b": 0.1, "c": 0.1, "d": 0.1}  # share of our step outside sampling, forwards and backwards


def child(options: argparse.Namespace) -> None:
    """One run of one contender; writes its numbers and what its student can do."""
    setting, out = SETTINGS[options.setting[0]], Path(options.out)
    torch.set_num_threads(options.threads)
    recipe = prepared(setting, options.steps, options.seed, out / "run")
    run: Callable[[Setting, Recipe, Path], Json] = run_ours if options.child == "ours" else run_trl
    found = run(setting, recipe, out)
    found["student"] = judged(recipe, str(out / "student"))
    if options.child == "ours":  # both start from the same student
        first = json.loads((out / "run" / "evals.jsonl").read_text().splitlines()[0])
        found["before"] = {key: value for key, value in first.items() if key in LEARNED}
    (out / "result.json").write_text(json.dumps(found))


def prepared(setting: Setting, steps: int, seed: int, output: Path) -> Recipe:
    r = setting.recipe()
    return r.model_copy(
        update={"seed": seed, "output": str(output), "train": r.train.model_copy(update={"steps": steps})}
    )


def judged(recipe: Recipe, student: str) -> Json:
    """Accuracy and exact reverse KL of a student, by our evaluation."""
    from opdkit.train.evaluate import evaluate
    from opdkit.train.setup import set_up

    setup = set_up(recipe.model_copy(update={"student": recipe.student.model_copy(update={"path": student})}))
    record = evaluate(setup, setup.student, 0)
    return {key: value for key, value in record.items() if key in LEARNED}


def spawn(who: str, setting: Setting, steps: int, seed: int, threads: int) -> Json:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--child", who, "--setting", setting.name, "--steps", str(steps)]
        command += ["--seed", str(seed), "--threads", str(threads), "--out", out]
        command += ["--device", measure.DEVICE]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        environment.pop("OMP_WAIT_POLICY", None)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        found: Json = json.loads((Path(out) / "result.json").read_text())
        return found


def summary(found: Json, skip: int) -> Json:
    """Medians of a run: seconds per phase and tokens a second, steps before `skip` left out."""
    seconds = {phase: statistics.median(times[skip:]) for phase, times in found["seconds"].items()}
    rates = [n / s for n, s in zip(found["tokens"][skip:], found["seconds"]["step"][skip:], strict=True)]
    outside = None
    if "inside" in found["seconds"]:
        within = sum(found["seconds"]["inside"][skip:]) + sum(found["seconds"]["sample"][skip:])
        outside = 1 - within / sum(found["seconds"]["step"][skip:])
    return {"seconds": seconds, "rate": statistics.median(rates), "outside": outside,
            "mean_rate": sum(found["tokens"][skip:]) / sum(found["seconds"]["step"][skip:]),
            "peak": found["peak"], **found["student"]}  # fmt: skip


def measured(setting: Setting, options: argparse.Namespace) -> list[dict[str, Json]]:
    """Both contenders' summaries, run after run."""
    setting.recipe()  # its models are made before anything is measured
    steps = options.steps or (setting.skip + 5 if options.quick else setting.steps)
    found = []
    for seed in range(1 if options.quick else options.seeds):
        runs = {who: spawn(who, setting, steps, seed, options.threads) for who in CONTENDERS}
        found.append({who: summary(run, setting.skip) for who, run in runs.items()})
        found[-1] |= {"before": runs["ours"]["before"], "steps": steps}
        both = [found[-1][who]["rate"] for who in CONTENDERS]
        print(f"{setting.name}, seed {seed}: {both[0]:,.0f} against {both[1]:,.0f} tokens a second", flush=True)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def middle(runs: Sequence[dict[str, Json]], who: str, *keys: str) -> float | None:
    """Median over the runs of one number of a contender; None where it was not measured."""
    values: list[Any] = [run[who] for run in runs]
    for key in keys:
        values = [None if v is None else v.get(key) for v in values]
    return None if any(v is None for v in values) else statistics.median(values)


def ratios(runs: Sequence[dict[str, Json]], key: str) -> list[float]:
    return [run["ours"][key] / run["trl"][key] for run in runs]


def mean(runs: Sequence[dict[str, Json]], who: str, key: str, scale: float = 1.0) -> str | None:
    """Mean over the seeds and, from two of them, its standard error."""
    values = [run[who][key] * scale for run in runs if key in run[who]]
    if not values:
        return None
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{error}"


def tables(runs: dict[str, list[dict[str, Json]]]) -> list[Table]:
    speed = Table("Tokens a second", ["setting", "ours", "TRL", "ours / TRL", "lowest", "highest", "steps x seeds"])
    phases = Table(
        "Median seconds of a step",
        [
            "setting",
            "sample",
            "score",
            "update",
            "other",
            "step",
            "TRL sample",
            "TRL score and update",
            "TRL step",
            "outside",
        ],
        note="outside: share of our step that is neither sampling nor a forward or backward pass",
    )
    memory = Table("Peak memory above the loaded models, MiB", ["setting", "ours", "TRL", "memory, ours / TRL"])
    learning = Table(
        "After equal steps: mean and standard error over the seeds",
        ["setting", "reverse KL before", "ours", "TRL", "accuracy before, %", "ours ", "TRL "],
        note="reverse KL in nats per token on the student's own samples to held-out prompts",
    )
    for name, found in runs.items():
        about = f"({name}) {SETTINGS[name].about}"
        ratio = measure.spread(ratios(found, "rate"))
        both = [middle(found, who, "rate") for who in CONTENDERS]
        speed.rows.append([about, *both, *ratio, f"{found[0]['steps']} x {len(found)}"])
        ours = [middle(found, "ours", "seconds", k) for k in ("sample", "score", "update", "other", "step")]
        theirs = [middle(found, "trl", "seconds", k) for k in ("sample", "score and update", "step")]
        share = middle(found, "ours", "outside")
        phases.rows.append([f"({name})", *ours, *theirs, None if share is None else f"{share:.1%}"])
        peaks = [(middle(found, who, "peak") or 0.0) / 2**20 for who in CONTENDERS]
        memory.rows.append([f"({name})", *map(round, peaks), statistics.median(ratios(found, "peak"))])
        learned = [mean(found, who, "reverse_kl") for who in ("before", *CONTENDERS)]
        right = [mean(found, who, "accuracy", 100.0) for who in ("before", *CONTENDERS)]
        learning.rows.append([f"({name})", *learned, *right])
    return [speed, phases, memory, learning]


def targets(runs: dict[str, list[dict[str, Json]]]) -> list[Target]:
    found = []
    for name, done in runs.items():
        speed, peak = (statistics.median(ratios(done, key)) for key in ("rate", "peak"))
        goal = FASTER[name]
        found.append(Target(f"({name}) tokens a second, ours / TRL", f">= {goal:g}", f"{speed:.2f}", speed >= goal))
        if name in MEMORY:
            text = f"<= {MEMORY[name]:.2f}"
            found.append(Target(f"({name}) memory, ours / TRL", text, f"{peak:.2f}", peak <= MEMORY[name]))
        if name in OUTSIDE:
            share = middle(done, "ours", "outside") or 0.0
            what = f"({name}) share outside sampling, forwards and backwards"
            found.append(Target(what, f"< {OUTSIDE[name]:.0%}", f"{share:.1%}", share < OUTSIDE[name]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument(
        "--quick", action="store_true", help="one seed and few steps of settings a and c; writes nothing"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    measure.add_device(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of each setting's own number")
    for name in ("--child", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    measure.use(options.device)
    if options.child:
        return child(options)
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("the peer is not installed: pip install 'opdkit[benchmarks]'")
    chosen = ["a", "c"] if options.quick else options.setting
    runs = {name: measured(SETTINGS[name], options) for name in chosen}
    for table in tables(runs):
        print(f"\n{table.markdown()}")
    for goal in targets(runs):
        print(f"{'met   ' if goal.met else 'missed'} {goal.what}: {goal.value} (target {goal.target})")
    whole = (measure.known("step") or {}) | runs
    if not options.quick:
        whole = {name: whole[name] for name in SETTINGS if name in whole}
        print(f"written to {measure.write('step', 'python benchmarks/step.py', tables(whole), targets(whole), whole)}")


if __name__ == "__main__":
    main()
