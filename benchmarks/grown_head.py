"""The head's objective at a chosen size: seconds of forward and backward, peak extra memory, and the bound.

Axes: N tokens, V vocabulary, D hidden, K candidates. float32, the head is trained. Left out: the peers and the error,
which benchmarks/head.py compares.
"""

from dataclasses import dataclass
from typing import Any

import measure
import torch
from bound import Part, Rates
from torch import Tensor

from opdkit.head import Head, HeadRows, RowTerm, objective
from opdkit.losses import Divergence, PolicyGradient
from opdkit.step import Candidates, Layout, Scores, Step

D = 256
LOSSES = ("sampled", "top-K", "reverse KL")
DEFAULT = f"N = 1,024, V = 16,384, D = {D}, K = 64"


@dataclass(frozen=True)
class HeadSize:
    """One problem."""

    loss: str
    n: int = 1024
    vocab: int = 16384
    k: int = 64


def measured_head(size: HeadSize, rounds: int) -> dict[str, Any]:
    """In a child: seconds (fastest round), the bound's seconds, and the most resident bytes beyond the inputs."""
    hidden, head, term = _problem(size)
    few = torch.arange(8, device=measure.DEVICE)
    _run(hidden[few], head, RowTerm(term.loss, term.step.rows(few), None if term.signal is None else term.signal[few],
                                    term.coef[few]))  # fmt: skip
    before = measure.reset_peak()
    _run(hidden, head, term)
    held = measure.peak() - before
    seconds = []
    for _ in range(rounds):
        start = measure.clock()
        _run(hidden, head, term)
        seconds.append(measure.clock() - start)
    shapes, rows = (((size.vocab, D), 1),), min(size.n, head.chunk())
    product = 2.0 * size.n * size.vocab * D
    parts = [Part(3 * product, shapes, rows, backward=True)]
    if size.loss == "reverse KL":
        parts.append(Part(product, shapes, rows))  # the teacher's logits
    return {
        "seconds": min(seconds),
        "bytes": held,
        "flops": sum(p.flops for p in parts),
        "bound": Rates().seconds(parts),
    }


def _problem(size: HeadSize) -> tuple[Tensor, Head, RowTerm]:
    draw = torch.Generator().manual_seed(0)
    n, vocab, device = size.n, size.vocab, measure.DEVICE

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device)

    hidden, teacher = drawn(n, D), drawn(n, D)
    head = Head(drawn(vocab, D) * (3 / D**0.5))
    signal, coef = drawn(n), torch.rand(n, generator=draw).to(device) / n
    tokens = torch.randint(vocab, (n,), generator=draw).to(device)
    scores, loss = Scores(signal), Divergence("reverse_kl")
    if size.loss == "reverse KL":
        scores = Scores(signal, full=HeadRows(teacher, Head(head.weight.clone())))
    elif size.loss == "top-K":
        scores = Scores(signal, candidates=_candidates(n, size.k, vocab, draw))
    step = Step(Layout(*(torch.arange(n, device=device),) * 3), tokens, {"teacher": scores})
    if size.loss == "sampled":
        return hidden, head, RowTerm(PolicyGradient(), step, signal, coef)
    return hidden, head, RowTerm(loss, step, None, coef)


def _candidates(n: int, k: int, vocab: int, draw: torch.Generator) -> Candidates:
    """Distinct ids for every row, on which the teacher has 0.9 of its mass."""
    first = torch.randint(vocab, (n, 1), generator=draw)
    ids = (first + torch.arange(k) * (vocab // k)) % vocab
    student, theirs = (torch.log_softmax(torch.randn(n, k, generator=draw), -1) - 0.1 for _ in range(2))
    rest = torch.full((n,), 0.1).log()
    device = measure.DEVICE
    valid = torch.ones_like(ids, dtype=torch.bool).to(device)
    return Candidates(ids.to(device), valid, student.to(device), theirs.to(device), None, rest.to(device))


def _run(hidden: Tensor, head: Head, term: RowTerm) -> None:
    """Forward and backward with respect to the hidden states and the weight."""
    states, weight = hidden.detach().requires_grad_(), head.weight.detach().requires_grad_()
    objective(states, Head(weight), [term])[0].backward()
