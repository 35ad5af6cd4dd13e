"""Writes docs/performance.md, its plots and a page for each further machine from the benchmarks' committed results.

Run by `make docs`. With --check nothing is written, and the program ends with an error when a file is not what the results
give. Every number stands in benchmarks/results/MACHINE/*.json, as benchmarks/measure.py writes it; a benchmark without a
file is named with the command that makes it. Left out: running the benchmarks (`make benchmarks`).
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "benchmarks")]

from measure import RESULTS, Chart, Table, Target  # noqa: E402
from plots import svg  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"
REFERENCE = "intel-r-xeon-r-processor-avx512-2-cores"  # whose tables the page shows, where it has results
NOTES = ROOT / "docs" / "performance-notes.md"
KEYS = {"name", "command", "date", "minutes", "machine", "tables", "targets", "raw"}
MOST_BARS = 24  # rows of a table that are still drawn


@dataclass(frozen=True)
class Benchmark:
    """What the page says about a benchmark besides its numbers."""

    name: str
    title: str
    about: str
    bound: str
    left: str = "No target was set."  # where a benchmark has no targets


BENCHMARKS = (
    Benchmark(
        "step", "A whole training step",
        "One on-policy step (sample, score, update) against TRL's distillation trainer: same models, prompts, groups, "
        "lengths, threads and dtype, alternating, each run in a process of its own. Both students are evaluated by the "
        "same code afterwards, so that speed which was bought with learning would show. Memory is the most resident "
        "bytes beyond the loaded models.",
        "See [how time and memory grow](#how-time-and-memory-grow) for the share of the arithmetic's bound that a step "
        "reaches.",
    ),
    Benchmark(
        "head", "The vocabulary head",
        "Loss and gradients from last hidden states, without the models: ours against full logits under autograd, against "
        "loops over chunks with checkpointing, and against the peers' own chunked losses. Peak memory is that of an "
        "isolated process; the error is the largest gradient entry's distance from float64.",
        "Three products of size N x V x D (logits, gradient of the hidden states, gradient of the weight), and a fourth "
        "for a teacher's logits. Nothing of size N x V is held: one chunk of logits for the student and one for each "
        "teacher whose whole distribution is compared.",
    ),
    Benchmark(
        "sample", "Sampling",
        "Tokens per second of in-process sampling, which records log-prob, entropy and top-16 of every token, against "
        "transformers' `generate` and continuous batching, and vLLM's CPU build where it is installed.",
        "Every token needs one pass of its row through the layers and one row of logits; each prompt is read once for its "
        "group. Small models spend most of a token's time outside of these products.",
    ),
    Benchmark(
        "scaling", "How time and memory grow",
        "The head alone, and the phases of a step, from a small to a large size in one variable at a time; and the same "
        "step in one process and in two. Random Qwen3 models: the student has 4 layers of 192, the teacher 6 layers of 256.",
        "The FLOPs of the forwards and backwards that are needed (linear layers, causal attention, head; each prompt once "
        "for its group) at the rate of this machine's products of the same shapes, measured in the same process. What is "
        "elementwise is not in it (softmax, norms, drawing, AdamW), nor is Python, so 100% cannot be reached.",
    ),
    Benchmark(
        "early_stop", "Stopping responses early",
        "The same training steps of `prune_opd` with and without a teacher that reads along while the student samples, and "
        "ends a response in which too many events have happened ([prune.md](prune.md)). One teacher has never seen such "
        "lists, so that nearly every response is stopped; the other writes them.",
        "A token that is not drawn is neither read by the teacher nor trained on, so a step needs at least the share of "
        "the tokens that is left of the time without. Where nothing is stopped, reading along replaces the pass that scores, "
        "and 1 would be free of charge: what is above it is the price of reading in small pieces.",
        "A larger `stop_every` reads in larger pieces and stops later. The teacher's passes could run while the student "
        "draws; they do not.",
    ),
    Benchmark(
        "plan", "What `opd plan` predicts",
        "Memory and time of a run as `opd plan` predicts them before it starts, against what the run then takes.",
        "A prediction is an estimate from the configuration; nothing bounds it but the run itself.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A benchmark's file."""

    command: str
    date: str
    minutes: float
    machine: dict[str, Any]
    tables: list[Table]
    targets: list[Target]
    charts: list[Chart]


Results = dict[str, Result | None]  # by benchmark


def machines() -> list[str]:
    """The folders of results, the reference first."""
    found = sorted(path.name for path in RESULTS.glob("*") if path.is_dir())
    return sorted(found, key=lambda name: name != REFERENCE)


def load(machine: str, name: str) -> Result | None:
    """The committed result, or None where there is none in the format of measure.py."""
    path = RESULTS / machine / f"{name}.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    if not content.keys() >= KEYS:
        return None
    return Result(
        content["command"], content["date"], content["minutes"], content["machine"], [Table(**t) for t in content["tables"]],
        [Target(**t) for t in content["targets"]], [Chart(**c) for c in content.get("charts", [])],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The page


def build() -> dict[Path, str]:
    """Every file that the results give: the page, those of further machines, and their plots."""
    found: dict[str, Results] = {m: {b.name: load(m, b.name) for b in BENCHMARKS} for m in machines()}
    files: dict[Path, str] = {}
    sections = [section(b, first(b.name, found), files, PAGE) for b in BENCHMARKS]
    files[PAGE] = "\n\n".join([opening(), summary(found), *sections]) + "\n"
    for name, results in list(found.items())[1:]:
        top = (f"# Performance on {name}\n\n"
               "Generated by `make docs`; what is measured, and the targets: [performance](../performance.md).")  # fmt: skip
        sections = [section(b, results[b.name], files, page_of(name)) for b in BENCHMARKS if results[b.name]]
        files[page_of(name)] = "\n\n".join([top, *sections]) + "\n"
    return files


def first(benchmark: str, found: dict[str, Results]) -> Result | None:
    """The reference's result, or that of the first machine that has one."""
    return next((results[benchmark] for results in found.values() if results[benchmark]), None)


def page_of(machine: str) -> Path:
    return PAGE.with_suffix("") / f"{machine}.md"


def opening() -> str:
    notes = " What was tried, with predictions: [performance-notes.md](performance-notes.md)." if NOTES.exists() else ""
    return (
        "# Performance\n\nGenerated by `make docs` from `benchmarks/results/MACHINE/*.json`; every measurement comes from "
        f"there. `make benchmarks` runs everything, and each benchmark takes `--quick`.{notes} Compare numbers within a "
        "table only: contenders alternate there, while another run, or another machine, is another matter."
    )


def summary(found: dict[str, Results]) -> str:
    """All targets first, on every machine, missed ones in bold, and what has not been measured."""
    lines = ["## Targets", ""]
    rows: dict[tuple[str, str], dict[str, Target]] = {}
    for i, (name, results) in enumerate(found.items()):
        targets = [(b.name, t) for b in BENCHMARKS for t in (results[b.name] or EMPTY).targets]
        for benchmark, target in targets:
            rows.setdefault((benchmark, target.what), {})[name] = target
        link = f"[{name}]({page_of(name).relative_to(PAGE.parent)})"
        where = link if i else f"{name}, whose tables follow where it has any"
        lines.append(f"* {where}: {sum(t.met for _, t in targets)} of {len(targets)} targets are met.")
    if rows:
        lines += ["", f"| benchmark | what | target | {' | '.join(found)} |", f"|{'---|' * (3 + len(found))}"]
    titles = {b.name: b.title for b in BENCHMARKS}
    for (benchmark, what), by in rows.items():
        values = ["-" if t is None else t.value if t.met else f"**{t.value}, missed**" for t in map(by.get, found)]
        lines.append(f"| [{benchmark}](#{anchor(titles[benchmark])}) | {what} | {next(iter(by.values())).target} | "
                     f"{' | '.join(values)} |")  # fmt: skip
    for b in BENCHMARKS:
        if all(results[b.name] is None for results in found.values()):
            lines += ["", f"Not measured: {b.title.lower()}. `python benchmarks/{b.name}.py` does it."]
    return "\n".join(lines)


EMPTY = Result("", "", 0.0, {}, [], [], [])


def section(b: Benchmark, result: Result | None, files: dict[Path, str], page: Path) -> str:
    """One benchmark on a page; its plots are added to `files`."""
    parts = [f"## {b.title}", *([b.about] if page == PAGE else [])]
    if result is None:
        return "\n\n".join([*parts, f"**Bound.** {b.bound}", f"No results yet: `python benchmarks/{b.name}.py` writes "
                            f"`benchmarks/results/MACHINE/{b.name}.json`."])  # fmt: skip
    parts.append(f"**Rerun.** `{result.command}`. {measured_on(result)}")
    if page == PAGE:
        parts.append(f"**Bound.** {b.bound}")
    charts = result.charts or [chart for table in result.tables if (chart := ratio_bars(table))]
    images = []
    for chart in charts:
        path = page.with_suffix("") / f"{b.name}-{anchor(chart.title)}.svg"
        files[path] = svg(chart)
        images.append(f"![{chart.title}]({path.relative_to(page.parent)})")
    parts += [" ".join(pair) for pair in (images[i : i + 2] for i in range(0, len(images), 2))]
    parts += [f"{table.markdown()}\n\n{table.note}".rstrip() for table in result.tables]
    return "\n\n".join([*parts, left(b, result)])


def measured_on(result: Result) -> str:
    m = result.machine
    cores = f"{m['instructions']}, {m['cores']} cores, {m['memory_gib']} GiB, Python {m['python']}, torch {m['torch']}"
    return f"Measured on {result.date} in {result.minutes:g} minutes: {m['processor']}, {cores}."


def left(b: Benchmark, result: Result) -> str:
    """What is left: the targets that were missed, or the benchmark's own words where it has none."""
    missed = [f"* {t.what}: {t.value}, target {t.target}" for t in result.targets if not t.met]
    if not result.targets:
        return f"**Left.** {b.left}"
    return "\n".join(["**Left.** Missed targets:", "", *missed]) if missed else "**Left.** Every target is met."


def ratio_bars(table: Table) -> Chart | None:
    """The table's columns of ratios ("a / b" or "... ratio") as bars, a row each; None where it has none, or many rows."""
    ratios = [i for i, name in enumerate(table.columns) if " / " in name or "ratio" in name]
    first = next((i for i in range(len(table.columns)) if any(isinstance(r[i], float) for r in table.rows)), 0)
    found: dict[str, list[list[Any]]] = {}
    for i in ratios:
        points = [[", ".join(map(str, row[:first])), row[i]] for row in table.rows if isinstance(row[i], float)]
        if points and all(value > 0 for _, value in points):
            found[table.columns[i]] = points
    if not found or not first or len(table.rows) > MOST_BARS:
        return None
    return Chart(table.title, ", ".join(table.columns[:first]), "ratio", found)


def anchor(title: str) -> str:
    """The heading's link, as Markdown makes it."""
    return re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")


def main(check: bool) -> int:
    files = build()
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text() != text]
    spare = [path for path in PAGE.with_suffix("").rglob("*.*") if path not in files]
    if check and (stale or spare):
        print(f"{', '.join(p.name for p in stale + spare)} out of date: run make docs", file=sys.stderr)
        return 1
    if not check:
        for path in stale:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path])
        for path in spare:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
