"""What the benchmarks share: measuring in a child process, peak memory, the machine, and results that docs are made from.

A result is a JSON file under results/MACHINE/: tables (title, columns, rows of text or numbers, note) and targets (what,
target, value, met), which scripts/performance.py turns into docs/performance.md, and `raw` numbers for whoever wants to
redo the sums. MACHINE is the processor with its instructions and cores, for which torch and the engine choose other
code. Memory can be measured on Linux only. On a CUDA device (`use`) clocks wait for it, memory is what torch has
allocated there, and results are written to NAME-cuda.json, which no page is made from.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from opdkit import products, scratch

RESULTS = Path(__file__).parent / "results"
STARTED = time.monotonic()
DEVICE = "cpu"  # where this process and its children compute


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default cpu)")


def use(device: str) -> None:
    """Compute on a device from now on; on "cpu" a GPU is hidden. To be called before torch has looked for one."""
    global DEVICE
    DEVICE = device
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not in_child(1, torch.cuda.is_available):  # not here: children are forked, and CUDA does not survive that
        raise SystemExit("--device cuda: torch finds no CUDA device; check nvidia-smi and that torch is a CUDA build")


def clock() -> float:
    """Seconds, after all that was launched on the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Table:
    """A table of a result; cells are shown as they are, floats with three significant digits."""

    title: str
    columns: list[str]
    rows: list[list[str | int | float | None]] = field(default_factory=list)
    note: str = ""

    def header(self) -> str:
        return f"| {' | '.join(self.columns)} |\n|{'---|' * len(self.columns)}"

    def line(self, row: Sequence[str | int | float | None]) -> str:
        return f"| {' | '.join(map(shown, row))} |"

    def markdown(self) -> str:
        return "\n".join([f"**{self.title}**\n", self.header(), *map(self.line, self.rows)])


@dataclass
class Target:
    """A number that was set as a goal, and what was measured."""

    what: str
    target: str
    value: str
    met: bool


@dataclass
class Chart:
    """Lines over sizes, both axes logarithmic, or horizontal bars where the points' x are text. Points are [x, y > 0].

    A line whose name ends in ", bound" is dashed. Without charts of its own a result gets bars of its tables' ratios.
    """

    title: str
    x: str
    y: str
    lines: dict[str, list[list[Any]]]


def shown(value: str | int | float | None) -> str:
    """One cell: "-" for nothing measured, three significant digits for a float, separators for an integer."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def write(
    name: str, command: str, tables: Sequence[Table], targets: Sequence[Target], raw: Any, charts: Sequence[Chart] = ()
) -> Path:
    """Write results/MACHINE/NAME.json and return its path; `command` reruns it. What it took is counted since the import."""
    path = results_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = command if DEVICE == "cpu" else f"{command} --device {DEVICE}"
    content = {
        "name": name, "command": command, "date": datetime.now(UTC).date().isoformat(),
        "minutes": round((time.monotonic() - STARTED) / 60, 1), "machine": machine(),
        "tables": [asdict(t) for t in tables], "targets": [asdict(t) for t in targets],
        "charts": [asdict(c) for c in charts], "raw": raw,
    }  # fmt: skip
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def results_file(name: str) -> Path:
    m = machine()
    folder = re.sub(r"[^a-z0-9]+", "-", f"{m['processor']} {m['instructions']} {m['cores']} cores".lower())
    return RESULTS / folder / (f"{name}.json" if DEVICE == "cpu" else f"{name}-{DEVICE}.json")


def known(name: str) -> Any:
    """The raw numbers that were written before, on this machine with these versions; None where there are none."""
    path = results_file(name)
    written = json.loads(path.read_text()) if path.is_file() else {}
    return written["raw"] if written.get("machine") == machine() else None


def machine() -> dict[str, Any]:
    """Processor, cores and versions: what a reader needs to compare numbers."""
    gpu = {} if DEVICE == "cpu" else {"gpu": in_child(1, torch.cuda.get_device_name), "cuda": torch.version.cuda}
    family = "" if products.FAMILY is None else f" family {products.FAMILY}"  # which the engine asks for, too
    return gpu | {
        "processor": field_of("/proc/cpuinfo", "model name") + family,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(kernel("/proc/meminfo", "MemTotal") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def field_of(file: str, name: str) -> str:
    """The value of a line `name : value` in a file under /proc. Raises SystemExit when there is none."""
    for line in Path(file).read_text().splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    raise SystemExit(f"{file} has no '{name}'; the benchmarks run on Linux")


def kernel(file: str, name: str) -> int:
    """A number of bytes that Linux reports, such as VmRSS, VmHWM (most since the last reset) or MemAvailable."""
    return int(field_of(file, name).split()[0]) * 1024


def reset_peak() -> int:
    """Give freed memory back, start a new VmHWM, and return the resident bytes of now; on a GPU the allocated ones."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    scratch.release()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return kernel("/proc/self/status", "VmRSS")


def peak() -> int:
    """The most resident bytes since `reset_peak`; on a GPU the most that were allocated."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return kernel("/proc/self/status", "VmHWM")


def free() -> int:
    """Bytes that a child could still get."""
    if DEVICE == "cuda":
        return int(in_child(1, torch.cuda.mem_get_info)[0])
    return kernel("/proc/meminfo", "MemAvailable")


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, smallest, largest)."""
    return statistics.median(values), min(values), max(values)


def in_child(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a forked process and hand back its result; the parent itself must never have computed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(threads)
        sender.send(function(*arguments))

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(
            f"{function.__name__}{arguments} died (exit code {process.exitcode}); is memory short?"
        ) from None
    finally:
        process.join()
