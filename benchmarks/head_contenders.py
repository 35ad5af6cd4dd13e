"""The vocabulary head's contenders: the same loss from hidden states, as a scalar with a graph, by different hands.

Axes: N tokens, V vocabulary, D hidden, K candidates. Every loss is the mean over tokens, because some peers can do
nothing else. The peers:

* naive: full logits under autograd, in float32 after the product, as trainers do.
* checkpoint: the same in chunks of CHECKPOINT_CHUNK rows under torch.utils.checkpoint.
* trl: the kernels of TRL's stable trainers (DistillationTrainer's divergence; for the sampled token GRPOTrainer's
  log-probs), tiles of 4,096 x 32,768 logits that the backward pass forms again.
* liger: Liger-Kernel's LigerFusedLinearJSDLoss, chunks of 1,024 rows, gradients in the forward pass, compiled (its default).

trl and liger take part where they are installed; on a CUDA device also ours with `train.head_kernel: triton`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Literal

import measure
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opdkit.divergences import divergence
from opdkit.head import Head, HeadRows, RowTerm, objective, score_rows
from opdkit.kernels import KINDS
from opdkit.losses import Divergence, PolicyGradient
from opdkit.step import Candidates, Layout, Scores, Step

LOSSES = ("sampled", "top-64", "reverse_kl", "jsd")
FULL = ("reverse_kl", "jsd")
TEACHER_SHARE = {"reverse_kl": 1.0, "jsd": 0.5}  # `beta` of the peers
K, CHECKPOINT_CHUNK = 64, 256


@dataclass(frozen=True)
class Inputs:
    """One problem: student and teacher hidden states and heads, tokens, and the student's candidates."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    teacher_hidden: Tensor
    teacher_weight: Tensor
    tokens: Tensor  # [N]
    signal: Tensor  # [N], float32
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


def make_inputs(vocab: int, hidden: int, n: int, loss: str, dtype: torch.dtype) -> Inputs:
    """Logits with a standard deviation of 3 nats; the teacher's differ from the student's by about 1.5 nats."""
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(n, hidden, generator=draw)
    weight = torch.randn(vocab, hidden, generator=draw).mul_(3 / hidden**0.5).to(dtype)
    teacher = (states + 0.5 * torch.randn(n, hidden, generator=draw)).to(dtype)
    tokens, signal = torch.randint(vocab, (n,), generator=draw), torch.randn(n, generator=draw)
    found = _candidates(weight, states.to(dtype), teacher, tokens) if loss == "top-64" else None
    other = weight.clone() if loss in FULL else weight
    return Inputs(states.to(dtype), weight, teacher, other, tokens, signal, found).map(
        lambda _, t: t.to(measure.DEVICE)
    )


def _candidates(weight: Tensor, hidden: Tensor, teacher: Tensor, tokens: Tensor) -> Candidates:
    student = score_rows(Head(weight), hidden, tokens, top_k=K, entropy=False)
    assert student.top_ids is not None and student.top is not None
    ids, valid = student.top_ids, torch.ones_like(student.top_ids, dtype=torch.bool)
    theirs = score_rows(Head(weight), teacher, tokens, entropy=False, choose=lambda part, _: (ids[part], valid[part]))
    assert theirs.at_ids is not None and theirs.tail is not None
    return Candidates(ids, valid, student.top, theirs.at_ids, None, theirs.tail)


# ---------------------------------------------------------------------------------------------------------------------
# Implementations: inputs, hidden states and weight with gradient, the loss's name, N -> scalar


def dense(x: Inputs, hidden: Tensor, weight: Tensor, loss: str, n: int) -> Tensor:
    """The loss's sum over the rows at hand, divided by n, written on full logits."""
    lp = torch.log_softmax(_wide(hidden @ weight.T), -1)
    if loss == "sampled":
        return -(x.signal * lp.gather(1, x.tokens[:, None])[:, 0]).sum() / n
    if loss == "top-64":
        assert x.candidates is not None
        inside = lp.gather(1, x.candidates.ids)
        rest = 1 - inside.exp().sum(-1, keepdim=True)
        p = torch.cat([inside, rest.clamp(min=torch.finfo(lp.dtype).eps).log()], -1)
        q = torch.cat([x.candidates.teacher, x.candidates.teacher_tail[:, None]], -1)
        return divergence(p, q, "reverse_kl").sum() / n
    with torch.no_grad():
        q = torch.log_softmax(_wide(x.teacher_hidden @ x.teacher_weight.T), -1)
    return divergence(lp, q, loss).sum() / n  # type: ignore[arg-type]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def checkpointed(x: Inputs, hidden: Tensor, weight: Tensor, loss: str, n: int) -> Tensor:
    total, start = torch.zeros((), device=hidden.device), 0
    for part in hidden.split(CHECKPOINT_CHUNK):  # one split node: slices would each make a gradient of size [N, D]
        rows = x.rows(slice(start, start + part.shape[0]))
        total = total + checkpoint(dense, rows, part, weight, loss, n, use_reentrant=False)
        start += part.shape[0]
    return total


def ours(
    x: Inputs, hidden: Tensor, weight: Tensor, loss: str, n: int, kernel: Literal["torch", "triton"] = "torch"
) -> Tensor:
    rows, coef = torch.arange(hidden.shape[0], device=hidden.device), torch.full_like(x.signal, 1 / n)
    full = HeadRows(x.teacher_hidden, Head(x.teacher_weight)) if loss in FULL else None
    step = Step(Layout(rows, rows, rows), x.tokens, {"teacher": Scores(x.signal, full=full, candidates=x.candidates)})
    term = RowTerm(PolicyGradient(), step, x.signal, coef)
    if loss != "sampled":
        term = RowTerm(Divergence("jsd" if loss == "jsd" else "reverse_kl"), step, None, coef)
    return objective(hidden, Head(weight), [term], kernel=kernel)[0]


def trl(x: Inputs, hidden: Tensor, weight: Tensor, loss: str, n: int) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    if loss == "sampled":
        found = ChunkedLogProbFunction.apply(hidden, weight, None, x.tokens, 1.0, 32768, None, 1.0, ())[0]
        return -(x.signal * found).sum() / n
    found = ChunkedDivergenceFunction.apply(
        hidden, weight, None, x.teacher_hidden, x.teacher_weight, None, TEACHER_SHARE[loss]
    )[0]
    return found.sum() / n


def liger(x: Inputs, hidden: Tensor, weight: Tensor, loss: str, n: int) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    found = LigerFusedLinearJSDLoss(0.0, 1.0, TEACHER_SHARE[loss])
    return found(hidden, weight, x.teacher_hidden, x.teacher_weight, x.tokens)


Contender = Callable[[Inputs, Tensor, Tensor, str, int], Tensor]
CONTENDERS: dict[str, Contender] = {
    "ours": ours, "naive": dense, "checkpoint": checkpointed, "trl": trl, "liger": liger,
    "ours, triton": partial(ours, kernel="triton"),
}  # fmt: skip
OURS = ("ours", "ours, triton")


def available(loss: str) -> list[str]:
    """Contenders that are installed and offer a loss."""
    fused = measure.DEVICE == "cuda" and loss in KINDS
    offered = {"trl": loss != "top-64", "liger": loss in FULL, "ours, triton": fused}
    module = {"trl": "trl", "liger": "liger_kernel", "ours, triton": "triton"}
    return [c for c in CONTENDERS if offered.get(c, True) and (c not in module or find_spec(module[c]) is not None)]
