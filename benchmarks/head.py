"""Forward and backward of the head: ours, naive full logits, and a chunk loop with torch.utils.checkpoint.

Axes: N tokens, V vocabulary, D hidden, K candidates. Everything is float32 and the head is trained.

    python benchmarks/head.py [--quick] [--vocab 4096 32000] [--tokens 512] [--threads 2]

Every size and loss runs in processes of its own: one for each implementation to measure memory (the most resident bytes
beyond the inputs), one in which the three alternate to measure time (the fastest round of each). The error is the
largest distance of a gradient's entry from float64 autograd on 64 rows, relative to the largest entry. Prints a table
and writes results/head.json beside this file. Left out: kernels that need a GPU.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads of the parent must not spin beside the child

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opdkit.divergences import divergence
from opdkit.head import Head, HeadRows, RowTerm, objective, score_rows
from opdkit.losses import Divergence, PolicyGradient
from opdkit.step import Candidates, Layout, Scores, Step

D, K, CHECKPOINT_CHUNK, ERROR_ROWS = 256, 64, 256, 64
LOSSES = ("sampled", "top-64", "reverse_kl", "jsd")
NAIVE_BYTES = {"sampled": 16, "top-64": 16, "reverse_kl": 28, "jsd": 56}  # an upper guess, a logit: what fits is run


@dataclass
class Inputs:
    """One problem: student and teacher hidden states and heads, tokens, coefficients, and the student's candidates."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    teacher_hidden: Tensor
    teacher_weight: Tensor
    tokens: Tensor  # [N]
    signal: Tensor  # [N]
    coef: Tensor  # [N]
    candidates: Candidates | None

    def map(self, change: Callable[[str, Tensor], Tensor]) -> "Inputs":
        """The same inputs with every tensor changed; the function is given the tensor's name."""
        new = {name: change(name, value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        found = self.candidates
        if found is not None:
            cut = {name: change(name, value) for name, value in vars(found).items() if isinstance(value, Tensor)}
            found = replace(found, **cut)
        return replace(self, **new, candidates=found)

    def rows(self, part: slice) -> "Inputs":
        return self.map(lambda name, value: value if name.endswith("weight") else value[part])

    def double(self) -> "Inputs":
        return self.map(lambda _, value: value.double() if value.is_floating_point() else value)


def make_inputs(vocab: int, n: int, loss: str) -> Inputs:
    """Logits with a standard deviation of 3 nats; the teacher's differ from the student's by about 1.5 nats."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, D, generator=draw)
    weight = torch.randn(vocab, D, generator=draw) * (3 / D**0.5)
    teacher = hidden + 0.5 * torch.randn(n, D, generator=draw)
    tokens = torch.randint(vocab, (n,), generator=draw)
    found = None
    if loss == "top-64":
        student = score_rows(Head(weight), hidden, tokens, top_k=K, entropy=False)
        assert student.top_ids is not None and student.top is not None
        ids, valid = student.top_ids, torch.ones_like(student.top_ids, dtype=torch.bool)
        theirs = score_rows(
            Head(weight), teacher, tokens, entropy=False, choose=lambda part, _: (ids[part], valid[part])
        )
        assert theirs.at_ids is not None and theirs.tail is not None
        found = Candidates(ids, valid, student.top, theirs.at_ids, None, theirs.tail)
    signal, coef = torch.randn(n, generator=draw), torch.rand(n, generator=draw) / n
    return Inputs(hidden, weight, teacher, weight.clone(), tokens, signal, coef, found)


# ---------------------------------------------------------------------------------------------------------------------
# Three implementations: inputs -> scalar loss with a graph


def dense(x: Inputs, hidden: Tensor, weight: Tensor, loss: str) -> Tensor:
    """The loss written on full logits, as a trainer would."""
    lp = torch.log_softmax(hidden @ weight.T, -1)
    if loss == "sampled":
        return (x.coef * -x.signal * lp.gather(1, x.tokens[:, None])[:, 0]).sum()
    if loss == "top-64":
        assert x.candidates is not None
        inside = lp.gather(1, x.candidates.ids)
        rest = 1 - inside.exp().sum(-1, keepdim=True)
        p = torch.cat([inside, rest.clamp(min=torch.finfo(lp.dtype).eps).log()], -1)
        q = torch.cat([x.candidates.teacher, x.candidates.teacher_tail[:, None]], -1)
        return (x.coef * divergence(p, q, "reverse_kl")).sum()
    with torch.no_grad():
        q = torch.log_softmax(x.teacher_hidden @ x.teacher_weight.T, -1)
    return (x.coef * divergence(lp, q, loss)).sum()  # type: ignore[arg-type]


def naive(x: Inputs, hidden: Tensor, weight: Tensor, loss: str) -> Tensor:
    return dense(x, hidden, weight, loss)


def checkpointed(x: Inputs, hidden: Tensor, weight: Tensor, loss: str) -> Tensor:
    total = hidden.new_zeros(())
    start = 0
    for part in hidden.split(CHECKPOINT_CHUNK):  # one split node: slices would each make a gradient of size [N, D]
        rows = x.rows(slice(start, start + part.shape[0]))
        total = total + checkpoint(dense, rows, part, weight, loss, use_reentrant=False)
        start += part.shape[0]
    return total


def ours(x: Inputs, hidden: Tensor, weight: Tensor, loss: str) -> Tensor:
    n = hidden.shape[0]
    teacher = Scores(x.signal, candidates=x.candidates)
    if loss in ("reverse_kl", "jsd"):
        teacher = Scores(x.signal, full=HeadRows(x.teacher_hidden, Head(x.teacher_weight)))
    step = Step(Layout(*(torch.arange(n),) * 3), x.tokens, {"teacher": teacher})
    if loss == "sampled":
        term = RowTerm(PolicyGradient(), step, x.signal, x.coef)
    else:
        term = RowTerm(Divergence("jsd" if loss == "jsd" else "reverse_kl"), step, None, x.coef)
    return objective(hidden, Head(weight), [term])[0]


IMPLEMENTATIONS: dict[str, Callable[[Inputs, Tensor, Tensor, str], Tensor]] = {
    "naive": naive,
    "checkpoint": checkpointed,
    "ours": ours,
}


def gradients(name: str, x: Inputs, loss: str) -> tuple[Tensor, Tensor]:
    hidden, weight = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()
    IMPLEMENTATIONS[name](x, hidden, weight, loss).backward()
    assert hidden.grad is not None and weight.grad is not None
    return hidden.grad, weight.grad


# ---------------------------------------------------------------------------------------------------------------------
# Measurements, each in a child


def kernel(file: str, field: str) -> int:
    """A number of bytes that Linux reports, such as VmRSS, VmHWM (most since the last reset) or MemAvailable."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"{file} has no {field}; memory can be measured on Linux only")


def measure_memory(name: str, vocab: int, n: int, loss: str) -> int:
    """Most resident bytes during forward and backward beyond what the inputs hold."""
    x = make_inputs(vocab, n, loss)
    gradients(name, x.rows(slice(0, 8)), loss)  # code and buffers of the libraries
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = kernel("/proc/self/status", "VmRSS")
    gradients(name, x, loss)
    return kernel("/proc/self/status", "VmHWM") - before


def measure_time(names: list[str], vocab: int, n: int, loss: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round; the implementations alternate, so that a slow moment of the machine hits all."""
    x = make_inputs(vocab, n, loss)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        gradients(name, x.rows(slice(0, 64)), loss)
    for _ in range(rounds):
        for name in names:
            start = time.perf_counter()
            gradients(name, x, loss)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure_error(vocab: int, loss: str) -> dict[str, float]:
    """Largest distance of a gradient's entry from float64 autograd, relative to the largest entry."""
    x = make_inputs(vocab, ERROR_ROWS, loss)
    exact = gradients("naive", x.double(), loss)
    found = {}
    for name in IMPLEMENTATIONS:
        pairs = zip(gradients(name, x, loss), exact, strict=True)
        found[name] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    return found


def in_child(threads: int, function: Callable, *arguments):  # type: ignore[no-untyped-def,type-arg]
    """Run a function in a forked process and hand back its result; the parent itself never computes."""
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


def measure(vocab: int, n: int, loss: str, threads: int) -> dict[str, Any]:
    """All numbers of one size and loss."""
    fits = NAIVE_BYTES[loss] * n * vocab < 0.8 * kernel("/proc/meminfo", "MemAvailable")
    names = [name for name in IMPLEMENTATIONS if fits or name != "naive"]
    rounds = max(1, min(5, 200_000_000 // (n * vocab)))
    seconds = in_child(threads, measure_time, names, vocab, n, loss, rounds)
    row: dict[str, Any] = {
        "vocab": vocab,
        "tokens": n,
        "loss": loss,
        "rounds": rounds,
        "chunk": Head(torch.empty(vocab, 1)).chunk(),
    }
    row["seconds"] = {name: min(times) for name, times in seconds.items()}
    row["ratio"] = {name: row["seconds"]["ours"] / s for name, s in row["seconds"].items() if name != "ours"}
    row["peak_bytes"] = {name: in_child(threads, measure_memory, name, vocab, n, loss) for name in names}
    row["error"] = in_child(threads, measure_error, vocab, loss)
    return row


def show(row: dict) -> str:
    """One line of the table."""
    cells = [f"{row['vocab']}", f"{row['tokens']}", row["loss"]]
    cells += [f"{row['seconds'][name]:.3f}" if name in row["seconds"] else "-" for name in IMPLEMENTATIONS]
    cells += [f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "-" for name in ("naive", "checkpoint")]
    cells += [
        f"{row['peak_bytes'][name] / 2**20:.0f}" if name in row["peak_bytes"] else "-" for name in IMPLEMENTATIONS
    ]
    cells += [f"{row['error'][name]:.0e}" for name in IMPLEMENTATIONS]
    return "| " + " | ".join(cells) + " |"


COLUMNS = ["V", "N", "loss", *(f"{name} s" for name in IMPLEMENTATIONS), "ours / naive", "ours / checkpoint"]
COLUMNS += [f"{name} {what}" for what in ("MiB", "error") for name in IMPLEMENTATIONS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 tokens and vocabularies up to 32000")
    parser.add_argument("--vocab", type=int, nargs="+", help="vocabulary sizes (default 4096 32000 151936)")
    parser.add_argument("--tokens", type=int, nargs="+", help="numbers of tokens (default 512 2048)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="threads of each child (default: cores)"
    )
    options = parser.parse_args()
    sizes = options.vocab or ([4096, 32000] if options.quick else [4096, 32000, 151936])
    tokens = options.tokens or ([512] if options.quick else [512, 2048])
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    rows = []
    for vocab in sizes:
        for n in tokens:
            for loss in LOSSES:
                rows.append(measure(vocab, n, loss, options.threads))
                print(show(rows[-1]), flush=True)
    machine = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "torch": torch.__version__,
    }
    target = Path(__file__).parent / "results" / "head.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"machine": machine, "hidden": D, "dtype": "float32", "rows": rows}, indent=1) + "\n")
    print(f"written to {target}")


if __name__ == "__main__":
    main()
