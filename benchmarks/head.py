"""Forward and backward of the vocabulary head: ours against full logits, TRL, Liger-Kernel and a checkpointed loop.

    python benchmarks/head.py [--quick] [--vocab 4096 32000] [--hidden 256] [--tokens 512] [--losses sampled jsd]
                              [--dtype float32] [--threads 2] [--minutes 25] [--device cuda]

Axes: N tokens, V vocabulary, D hidden, C rows of our chunk. The head is trained. Every measurement is a child process of
its own: inputs, a small problem to load code, then the whole problem. The contenders alternate round by round, and what
counts is the median over rounds. A child runs it twice and reports seconds of the second forward and backward (the first one's
also load or make kernels for its sizes, and a run has many steps), the most resident bytes beyond its inputs in the first, and
the bytes that autograd keeps between the two passes (saved tensors, inputs not counted). Another child compares
all contenders' gradients with float64 autograd on a few rows: |a - b| / |b|, the worse of hidden states and weight.

Without sizes the committed grid is run: the axes around a middle point rather than their product, which would take
hours. --minutes stops before a cell that is not expected to end in time. Contenders: head_contenders.py. With --device
cuda the clock waits for the GPU, memory is torch's, and ours takes part with its Triton kernel too.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import measure
import torch
from head_contenders import CONTENDERS, FULL, LOSSES, OURS, Inputs, available, make_inputs
from measure import Table, Target
from torch import Tensor

from opdkit.head import Head

Json = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRODUCTS = {"sampled": 4, "top-64": 4, "reverse_kl": 5, "jsd": 6}  # of a contender on average, for the same plan
NAIVE_BYTES = {"sampled": 16, "top-64": 16, "reverse_kl": 28, "jsd": 56}  # an upper guess, a logit: what fits is run
LUCK = 0.1  # two roundings of one sum differ by so much


@dataclass(frozen=True)
class Cell:
    """One problem, and who takes part."""

    vocab: int
    hidden: int
    tokens: int
    loss: str
    dtype: str = "float32"
    only: tuple[str, ...] = tuple(CONTENDERS)

    @property
    def flops(self) -> float:
        """Of one product."""
        return 2.0 * self.vocab * self.hidden * self.tokens

    def who(self) -> list[str]:
        """The contenders that are installed, offer this loss, and fit into memory."""
        fits = NAIVE_BYTES[self.loss] * self.tokens * self.vocab < 0.7 * measure.free()
        return [name for name in available(self.loss) if name in self.only and (fits or name != "naive")]

    def rounds(self) -> int:
        return 1 if self.flops > 1e11 or self.dtype == "bfloat16" else 3

    def seconds(self, threads: int) -> float:
        """A guess of the whole cell's."""
        slow = self.dtype == "bfloat16" and set(self.who()) - {"ours", "trl"}  # those two widen before they multiply
        work = self.flops * PRODUCTS[self.loss] * len(self.who()) * (self.rounds() + 0.2)
        rate = 2e12 if measure.DEVICE == "cuda" else (2e9 if slow else 60e9) * threads
        return work / rate + 2 * len(self.who()) * self.rounds()

    def gradients(self) -> int:
        """Bytes of the gradients: of weight (a float32 sum, and its own dtype where that differs) and hidden states."""
        size = DTYPES[self.dtype].itemsize
        return self.vocab * self.hidden * (4 if size == 4 else 4 + size) + self.tokens * self.hidden * size


# ---------------------------------------------------------------------------------------------------------------------
# In a child


def gradients(name: str, x: Inputs, loss: str) -> tuple[Tensor, Tensor]:
    hidden, weight = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()
    CONTENDERS[name](x, hidden, weight, loss, hidden.shape[0]).backward()
    assert hidden.grad is not None and weight.grad is not None
    return hidden.grad, weight.grad


def run(name: str, cell: Cell) -> Json:
    """Seconds, peak bytes beyond the inputs, and bytes kept for the backward pass."""
    x = make_inputs(cell.vocab, cell.hidden, cell.tokens, cell.loss, DTYPES[cell.dtype])
    warm = min(cell.tokens, 1024) if name == "liger" else 64  # its chunk: another size would be compiled again
    gradients(name, x.rows(slice(0, warm)), cell.loss)
    hidden, weight = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()
    before, kept = measure.reset_peak(), {}
    inputs = {t.untyped_storage().data_ptr() for t in (*vars(x).values(), hidden, weight) if isinstance(t, Tensor)}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved)
    with nullcontext() if name == "liger" else hooks:  # what it compiles refuses hooks
        loss = CONTENDERS[name](x, hidden, weight, cell.loss, cell.tokens)
    loss.backward()
    peak = measure.peak() - before
    del loss
    hidden.grad = weight.grad = None
    start = measure.clock()
    CONTENDERS[name](x, hidden, weight, cell.loss, cell.tokens).backward()
    return {
        "seconds": measure.clock() - start,
        "peak": peak,
        "kept": None if name == "liger" else sum(kept.values()),
    }


def errors(cell: Cell, names: list[str]) -> dict[str, float]:
    """Every contender's distance from float64 autograd on the same (rounded) inputs."""
    rows = max(64, min(512, cell.tokens, 2**22 // cell.vocab))
    x = make_inputs(cell.vocab, cell.hidden, rows, cell.loss, DTYPES[cell.dtype])
    exact = gradients("naive", x.double(), cell.loss)
    found = {}
    for name in names:
        pairs = zip(gradients(name, x, cell.loss), exact, strict=True)
        found[name] = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The parent


def measured(cell: Cell, threads: int) -> Json:
    """All numbers of one cell."""
    names = cell.who()
    runs: dict[str, list[Json]] = {name: [] for name in names}
    for _ in range(cell.rounds()):
        for name in names:
            runs[name].append(measure.in_child(threads, run, name, cell))
    row: Json = asdict(cell) | {"chunk": Head(torch.empty(cell.vocab, 1)).chunk(), "gradients": cell.gradients()}
    for key in ("seconds", "peak", "kept"):
        known = {name: [r[key] for r in found] for name, found in runs.items() if found[0][key] is not None}
        row[key] = {name: statistics.median(values) for name, values in known.items()}
    row["error"] = measure.in_child(threads, errors, cell, names)
    row["of_bound"] = (row["peak"]["ours"] - row["gradients"]) / (8 * row["chunk"] * cell.vocab)
    return row


SIZES = ["V", "D", "N", "loss", "dtype"]


def size_of(row: Json) -> list[str | int | float | None]:
    return [row[key] for key in ("vocab", "hidden", "tokens", "loss", "dtype")]


def tables(rows: list[Json]) -> list[Table]:
    names = [name for name in CONTENDERS if any(name in row["seconds"] for row in rows)]
    chunked = [name for name in names if name not in OURS and name != "naive"]
    time_ = Table("Seconds of forward and backward", [*SIZES, *names, *(f"ours / {n}" for n in names if n != "ours")])
    memory = Table(
        "Memory: most MiB beyond the inputs, and MiB kept from forward to backward",
        [*SIZES, "gradients", *names, "ours of 8 C V", *(f"{n} keeps" for n in names)],
        note="'ours of 8 C V' is the share of 8 bytes x chunk x V that ours needs beside the gradients",
    )
    error = Table("Distance of the gradients from float64", [*SIZES, *names], note=f"chunked: {', '.join(chunked)}")
    for row in rows:
        seconds, mib = row["seconds"], {k: {n: b / 2**20 for n, b in row[k].items()} for k in ("peak", "kept")}
        ratios = [seconds["ours"] / seconds[n] if n in seconds else None for n in names if n != "ours"]
        time_.rows.append([*size_of(row), *(seconds.get(n) for n in names), *ratios])
        memory.rows.append([*size_of(row), row["gradients"] / 2**20, *(mib["peak"].get(n) for n in names),
                            row["of_bound"], *(mib["kept"].get(n) for n in names)])  # fmt: skip
        error.rows.append([*size_of(row), *(f"{row['error'][n]:.1e}" if n in row["error"] else None for n in names)])
    return [time_, memory, error]


def targets(rows: list[Json]) -> list[Target]:
    """The goals, each judged by its worst cell; a goal that no cell can judge is left out."""

    def against(key: str, peers: Sequence[str]) -> Callable[[Json], float | None]:
        def ratio(row: Json) -> float | None:
            best = [row[key][name] for name in peers if name in row[key]]
            return row[key]["ours"] / min(best) if best else None

        return ratio

    chunked = [name for name in CONTENDERS if name not in OURS and name != "naive"]
    goals: list[tuple[str, float, Callable[[Json], float | None]]] = [
        ("peak memory beside the gradients / (8 bytes x chunk x V)", 1.0, lambda row: row["of_bound"]),
        ("growth of that ratio from the smallest to the largest N", 0.05, lambda row: growth(row, rows)),
        ("seconds / those of full logits, where they fit", 1.15, against("seconds", ["naive"])),
        ("seconds / those of the fastest chunked peer", 1.0, against("seconds", chunked)),
        ("error / that of the most exact peer", 1.0 + LUCK, against("error", ["naive", *chunked])),
    ]
    found = []
    for what, limit, ratio in goals:
        values = [(value, " ".join(map(str, size_of(row)))) for row in rows if (value := ratio(row)) is not None]
        if values:
            worst, where = max(values)
            middle = statistics.median(value for value, _ in values)
            found.append(Target(what, f"<= {limit:g}", f"{worst:.2f} ({where}), median {middle:.2f}", worst <= limit))
    return found


def growth(row: Json, rows: list[Json]) -> float | None:
    """How much more of 8 C V the largest N needs than the smallest that fills a chunk; None where there is but one N."""
    like = [r for r in rows if all(r[k] == row[k] for k in ("vocab", "hidden", "loss", "dtype"))]
    full = sorted((r for r in like if r["tokens"] >= r["chunk"]), key=lambda r: r["tokens"])
    return abs(full[-1]["of_bound"] - full[0]["of_bound"]) if len(full) > 1 else None


def committed() -> list[Cell]:
    """Every axis around a middle, float32 and bfloat16, and one loss at the far corner with the fastest chunked peer."""
    sizes = [(v, 256, 512) for v in (4096, 32000, 151936)] + [(32000, 256, 2048), (4096, 896, 512)]
    sizes += [(32000, 896, 2048), (32000, 256, 8192), (151936, 896, 512)]
    cells = [Cell(*size, loss) for size in sizes for loss in LOSSES]
    cells += [Cell(4096, 256, 512, loss, "bfloat16") for loss in LOSSES]
    cells += [Cell(32000, 256, 512, loss, "bfloat16") for loss in ("sampled", "reverse_kl")]
    cells += [Cell(151936, 896, 512, "reverse_kl", "bfloat16", ("ours", "trl"))]
    peer = "liger" if "liger" in available("reverse_kl") else "trl"
    return [*cells, Cell(151936, 896, 8192, "reverse_kl", only=("ours", peer))]


def chosen(options: argparse.Namespace) -> list[Cell]:
    if options.quick:
        cells = [Cell(v, 256, 512, loss) for v in (4096, 32000) for loss in LOSSES]
        return [*cells, Cell(4096, 256, 512, "reverse_kl", "bfloat16")]
    if not any((options.vocab, options.hidden, options.tokens, options.losses, options.dtype)):
        return committed()
    axes = (options.vocab or [32000], options.hidden or [256], options.tokens or [512], options.losses or LOSSES)
    return [Cell(*size) for size in product(*axes, options.dtype or ["float32"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 tokens and vocabularies up to 32,000")
    for name in ("vocab", "hidden", "tokens"):
        parser.add_argument(f"--{name}", type=int, nargs="+", help="sizes instead of the committed grid")
    parser.add_argument("--losses", nargs="+", choices=LOSSES)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each child (default: cores)")
    measure.add_device(parser)
    parser.add_argument("--minutes", type=float, default=30.0, help="leave out a cell that would end later")
    options = parser.parse_args()
    measure.use(options.device)
    for name in ("trl", "liger"):
        if name not in available(FULL[0]):
            print(f"{name} is not installed and takes no part")
    start, rows = time.monotonic(), []
    cells = chosen(options)
    for cell in cells:
        if time.monotonic() - start + cell.seconds(options.threads) > 60 * options.minutes:
            print(f"left out, it would end after {options.minutes:g} minutes: {cell}", flush=True)
            continue
        rows.append(measured(cell, options.threads))
        print(*size_of(rows[-1]), {n: round(s, 3) for n, s in rows[-1]["seconds"].items()},
              f"{rows[-1]['of_bound']:.2f} of 8 C V", flush=True)  # fmt: skip
    found, goals = tables(rows), targets(rows)
    print("\n\n".join(t.markdown() for t in found), *goals, f"{(time.monotonic() - start) / 60:.1f} minutes", sep="\n")
    if cells == committed():
        command = f"python benchmarks/head.py --minutes {options.minutes:g}"
        print("written to", measure.write("head", command, found, goals, rows))


if __name__ == "__main__":
    main()
