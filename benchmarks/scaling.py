"""How time and memory of the head and of a whole step grow, and which share of the bound they reach.

    python benchmarks/scaling.py [--quick] [--threads 2] [--only head step processes] [--device cuda]

The head alone grows in N (tokens), V (vocabulary) and K (candidates); a step, phase by phase, in prompts, group, response
length, V and K. Every size runs in a process of its own; the fastest of a few rounds counts. Exponents are slopes of
log time over log size by least squares, with a standard error, without the smallest third of the sizes, where constant
parts weigh (Python, kernel calls, less than a chunk of logits); the goal is the exponent of the FLOPs that are needed.
That of an update's memory leaves out sizes of less than two micro-batches, too, which need not fill the larger one.
The bound is bound.py's. At the end the same step runs in one process and in two (replicated and sharded), alternating.
About 12 minutes; --quick takes 2 and judges nothing. --device cuda computes on a GPU; two processes want two of them.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
from grown_head import DEFAULT, LOSSES, HeadSize, measured_head
from measure import Chart, Table, Target
from sized import PHASES, UPDATE_TOKENS, Size, measured, worker

Json = dict[str, Any]
MIB = 2**20
SLACK = 0.1  # an exponent may exceed its goal by this much
HEAD_SWEEPS: dict[str, tuple[int, ...]] = {
    "n": (256, 512, 1024, 2048, 4096, 8192),
    "vocab": (4096, 8192, 16384, 32768, 65536, 131072),
    "k": (1, 4, 16, 64, 256, 1024),
}
STEP_SWEEPS: dict[str, tuple[Size, tuple[int, ...]]] = {
    "prompts": (Size(), (1, 2, 4, 8, 16, 32)),
    "group": (Size(prompts=4, prompt=256), (1, 2, 4, 8, 16, 32)),
    "new": (Size(prompts=4), (16, 32, 64, 128, 256, 512)),
    "vocab": (Size(group=1, new=32), (4096, 8192, 16384, 32768, 65536, 131072)),
    "k": (Size(new=32, k=1), (1, 4, 16, 64, 256, 1024)),
}
UNITS = {"n": "tokens", "vocab": "ids", "k": "ids", "group": "responses", "new": "tokens"}
NAMES = {"n": "N", "vocab": "V", "k": "K", "prompts": "prompts", "group": "group", "new": "response length"}
CONTENDERS = {  # name -> (processes, threads of each, sharding)
    "one process, 1 thread": (1, 1, "none"),
    "one process, 2 threads": (1, 2, "none"),
    "two processes (DDP), 1 thread each": (2, 1, "none"),
    "two processes (FSDP2), 1 thread each": (2, 1, "fsdp2"),
}
SHARED, FEW = Size(new=32, vocab=65536), Size(prompts=4, new=16)
QUICK = 3  # sizes of a sweep
FIXED = ("prompts", "group")  # what a micro-batch does not grow with


def exponent(sizes: Sequence[float], values: Sequence[float], least: int = 0) -> tuple[float, float, int]:
    """(slope of log value over log size, its standard error, points) without the smallest third of more than QUICK sizes,
    and without the first `least` of them.

    Raises ValueError for fewer than three points that are left, or a value that is not positive.
    """
    skip = max(least, len(sizes) // 3) if len(sizes) > QUICK else 0
    x, y = [math.log(s) for s in sizes[skip:]], [math.log(v) for v in values[skip:]]
    if len(x) < 3:
        raise ValueError(f"{len(sizes)} sizes leave {len(x)} points; a slope with an error needs 3")
    line = statistics.linear_regression(x, y)
    left = sum((b - line.slope * a - line.intercept) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    return line.slope, math.sqrt(left / (len(x) - 2) / spread), len(x)


def shown(fit: tuple[float, float, int]) -> str:
    return f"{fit[0]:.2f} ± {fit[1]:.2f}"


class Report:
    """Collects tables, targets and charts."""

    def __init__(self) -> None:
        self.growth = Table("Exponents", ["what", "in", "sizes", "points", "time", "FLOPs", "peak memory"])
        self.growth.note = "Slope of log value over log size ± standard error."
        self.tables: list[Table] = [self.growth]
        self.targets: list[Target] = []
        self.charts: list[Chart] = []
        self.raw: Json = {}

    def fits(
        self, what: str, variable: str, sizes: Sequence[int], rows: Sequence[Json], part_full: int = 0
    ) -> tuple[float, float, float]:
        """Add a line of exponents; returns those of time, FLOPs and memory, this without the first `part_full` sizes."""
        found = [exponent(sizes, [row[key] for row in rows]) for key in ("seconds", "flops")]
        found.append(exponent(sizes, [row["bytes"] for row in rows], part_full))
        used = sizes[-found[0][2] :]
        memory = shown(found[2]) if found[2][2] == found[0][2] else f"{shown(found[2])} from {sizes[-found[2][2]]:,} on"
        self.growth.rows.append([
            what, NAMES[variable], f"{used[0]:,} to {used[-1]:,}", found[0][2], *map(shown, found[:2]), memory,
        ])  # fmt: skip
        print(self.growth.line(self.growth.rows[-1]), flush=True)
        return found[0][0], found[1][0], found[2][0]

    def aim(self, what: str, goal: str, most: float, value: float) -> None:
        """A target: the exponent is at most `most` + SLACK."""
        self.targets.append(Target(what, f"at most {goal} + {SLACK}", f"{value:.2f}", value <= most + SLACK))

    def chart(self, title: str, variable: str, unit: str, sizes: Sequence[int], lines: dict[str, list[float]]) -> None:
        points = {name: [list(pair) for pair in zip(sizes, ys, strict=True)] for name, ys in lines.items()}
        axis = f"{NAMES[variable]} ({UNITS[variable]})" if variable in UNITS else NAMES[variable]
        self.charts.append(Chart(title, axis, unit, points))


# ---------------------------------------------------------------------------------------------------------------------
# The head, and a step


def grow_head(report: Report, quick: bool, threads: int) -> None:
    """The head's sweeps; a row holds the numbers of one loss at one size."""
    for variable, every in HEAD_SWEEPS.items():
        sizes = every[:QUICK] if quick else every
        losses = ("top-K",) if variable == "k" else LOSSES
        table = Table(f"Head, growing {NAMES[variable]}", [NAMES[variable]], note=f"Else {DEFAULT}.")
        table.columns += [f"{loss} {what}" for loss in losses for what in ("s", "of the bound", "MiB")]
        rows: dict[str, list[Json]] = {loss: [] for loss in losses}
        for size in sizes:
            for loss in losses:
                wanted = replace(HeadSize(loss=loss), **{variable: size})
                rows[loss].append(measure.in_child(threads, measured_head, wanted, 1 if quick else 3))
            table.rows.append([size, *(cell for loss in losses for cell in cells(rows[loss][-1]))])
        report.tables.append(table)
        report.raw[f"head/{variable}"] = {"sizes": sizes, "rows": rows}
        for loss in losses:
            time, flops, memory = report.fits(f"head, {loss}", variable, sizes, rows[loss])
            if variable == "n":
                report.aim(f"head, {loss}: exponent of peak memory in N", "0", 0.0, memory)
            what = f"head, {loss}: exponent of time in {NAMES[variable]}"
            report.aim(what, f"the FLOPs' {flops:.2f}", flops, time)
        chart_both(report, "Head", variable, sizes, rows)


def cells(row: Json) -> list[float | str]:
    return [row["seconds"], f"{row['bound'] / row['seconds']:.0%}", row["bytes"] / MIB]


def chart_both(report: Report, what: str, variable: str, sizes: Sequence[int], rows: dict[str, list[Json]]) -> None:
    """Time with its bound, and memory."""
    times = {name: [row["seconds"] for row in column] for name, column in rows.items()}
    least = {f"{name}, bound": [row["bound"] for row in column] for name, column in rows.items()}
    held = {name: [row["bytes"] / MIB for row in column] for name, column in rows.items()}
    report.chart(f"{what}: time over {NAMES[variable]}", variable, "seconds", sizes, times | least)
    report.chart(f"{what}: peak extra memory over {NAMES[variable]}", variable, "MiB", sizes, held)


def grow_step(report: Report, quick: bool, threads: int) -> None:
    """The step's sweeps; a row holds the numbers of one phase at one size."""
    for variable, (base, every) in STEP_SWEEPS.items():
        if quick and variable in ("group", "k"):
            continue
        sizes = every[:QUICK] if quick else every
        table = Table(
            f"Step, growing {NAMES[variable]}", [NAMES[variable], "tokens"], note=f"Else {base.about(variable)}."
        )
        table.columns += [f"{phase} {what}" for phase in PHASES for what in ("s", "of the bound", "MiB")]
        rows: dict[str, list[Json]] = {phase: [] for phase in PHASES}
        for size in sizes:
            found = measure.in_child(threads, measured, replace(base, **{variable: size}), 1 if quick else 3)
            for phase in PHASES:
                rows[phase].append({key: found[key][phase] for key in ("seconds", "flops", "bound", "bytes")})
            table.rows.append([size, found["tokens"], *(cell for phase in PHASES for cell in cells(rows[phase][-1]))])
        report.tables.append(table)
        report.raw[f"step/{variable}"] = {"sizes": sizes, "rows": rows}
        part_full = sum(replace(base, **{variable: size}).read < 2 * UPDATE_TOKENS for size in sizes)
        for phase in PHASES:
            least = part_full if phase == "update" and variable in FIXED else 0
            time, flops, memory = report.fits(phase, variable, sizes, rows[phase], least)
            if phase == "step":
                report.aim(f"step: exponent of time in {NAMES[variable]}", f"the FLOPs' {flops:.2f}", flops, time)
            if phase == "update" and variable in FIXED:
                what = f"update: exponent of peak memory in {NAMES[variable]}, micro-batches fixed"
                report.aim(what, "0", 0.0, memory)
        chart_both(report, "Step", variable, sizes, rows)


# ---------------------------------------------------------------------------------------------------------------------
# One process and two


def run_processes(name: str, size: Size, rounds: int) -> list[Json]:
    """Every process's numbers for a contender."""
    count, threads, sharding = CONTENDERS[name]
    with tempfile.TemporaryDirectory() as folder:
        recipe = measure.in_child(1, size.recipe, Path(folder), sharding)
        (Path(folder) / "recipe.json").write_text(recipe.model_dump_json(exclude_unset=True))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command = [*(command if count > 1 else [sys.executable]), __file__, "--worker", folder, "--rounds", str(rounds)]
        command += ["--device", measure.DEVICE]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("result-*.json"))]


def compare_processes(report: Report, quick: bool) -> None:
    """Tokens per second and memory per process of the contenders; they alternate, the fastest step of each counts."""
    columns = ["", "tokens/s", "/ one process, 2 threads", "MiB at rest", "MiB at the peak"]
    size = FEW if quick else SHARED
    table = Table("One process and two, the same step", columns)
    table.note = (
        f"{size.about()}. Memory of the larger process beyond the libraries; at rest: models, gradients, moments."
    )
    runs: dict[str, list[Json]] = {name: [] for name in CONTENDERS}
    for _ in range(1 if quick else 2):
        for name in CONTENDERS:
            runs[name] += run_processes(name, size, 1 if quick else 3)
    rates = {name: max(run["tokens"] / min(run["seconds"]) for run in found) for name, found in runs.items()}
    base = rates["one process, 2 threads"]
    for name, found in runs.items():
        held = [max(run[key] for run in found) / MIB for key in ("rest", "peak")]
        table.rows.append([name, rates[name], rates[name] / base, *held])
        print(table.line(table.rows[-1]), flush=True)
    ratio = rates["two processes (DDP), 1 thread each"] / base
    what = "two processes with a thread each: tokens/s over one process with two threads"
    report.targets.append(Target(what, ">= 0.9", f"{ratio:.2f}", ratio >= 0.9))
    sharded, replicated = (
        max(run["rest"] for run in runs[f"two processes ({how}), 1 thread each"]) for how in ("FSDP2", "DDP")
    )
    what = "FSDP2: memory at rest of a process over DDP's"
    report.targets.append(Target(what, "< 1", f"{sharded / replicated:.2f}", sharded < replicated))
    report.tables.append(table)
    report.raw["processes"] = runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("head", "step", "processes")
    parser.add_argument("--quick", action="store_true", help="three small sizes, one round; nothing is written")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="nothing is written unless all are run")
    measure.add_device(parser)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    measure.use(options.device)
    if options.worker:
        return worker(Path(options.worker), options.rounds)
    report = Report()
    print(report.growth.header(), flush=True)
    if "head" in options.only:
        grow_head(report, options.quick, options.threads)
    if "step" in options.only:
        grow_step(report, options.quick, options.threads)
    if "processes" in options.only:
        compare_processes(report, options.quick)
    for table in report.tables[1:]:
        print(f"\n{table.markdown()}\n{table.note}")
    if options.quick:
        return
    for target in report.targets:
        print(f"{'met   ' if target.met else 'MISSED'} {target.what}: {target.value} ({target.target})")
    if set(options.only) == set(parts):
        command = f"python benchmarks/scaling.py --threads {options.threads}"
        print(measure.write("scaling", command, report.tables, report.targets, report.raw, report.charts))


if __name__ == "__main__":
    main()
