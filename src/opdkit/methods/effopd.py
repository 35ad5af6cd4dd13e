"""EffOPD: on-policy distillation that jumps ahead along its own way at steps 1, 2, 4, 8, ... (arXiv:2605.11739).

The updates of distillation settle early on a direction. After step t = 2^n, with R where the weights stood after the
last such step, candidates further along are scored on `problems` training problems while they do not hurt:

    W_k = W + stride k (W - R),   k = 1, ..., tries;     kept: the last accepted, else W itself, bit for bit

Between the jumps it is `opd`; with tries 0 always. Optimiser moments are left as they are. Each jump costs up to
(1 + tries) x problems responses, logged as effopd/responses and effopd/seconds. accept: better (the released code),
no_worse (the paper's text) or always (no scoring). The hook is `opdkit.extrapolate.EffOPD`, which `compose` adds to any
other method. Defaults: the released code's. Left out: its truncated importance weight, which is 1 where the sampler and
the student are one model, and resampling the problems, which it does not do either.
"""

from opdkit.extrapolate import Accept, EffOPD, Moved, Reference
from opdkit.method import Method, Term, View
from opdkit.signals import log_ratio


def effopd(
    *,
    teacher: str = "teacher",
    problems: int = 50,
    tries: int = 5,
    stride: float = 2.0,
    accept: Accept = "better",
    moved: Moved = "blocks",
    reference: Reference = "accepted",
) -> Method:
    jump = EffOPD(problems, tries, stride, accept, moved, reference)
    return Method(
        name="effopd", views={"teacher": View(teacher)}, terms=(Term(signal=log_ratio()),), after_update=(jump,)
    )
