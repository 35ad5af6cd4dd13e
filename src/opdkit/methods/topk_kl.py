"""Differentiated reverse KL on a top-k support, with the rest of the vocabulary as one bucket (arXiv:2604.13016).

    L = mean_t KL(p~, q~)     p~, q~: masses of the k candidates and, with tail="bucket", of everything else

`tail="renormalise"` is the paper's Eq. 5: both sides renormalised over the candidates, the mass outside forgotten; at
k = 1 it is identically 0. The bucket keeps the mass in view: a lower bound of the full KL whose gradient vanishes at
student = teacher and which pulls mass that leaked out of the support back. `tail="raw"` adds up the candidates' summands
and nothing else (verl): it moves a student that equals its teacher.
All are biased for k < V; all equal `full_opd` at k = V. `kind` takes any divergence; `mix` is the teacher's share where
it is read. `row_max` (nats) cuts a token's loss, and its gradient, as verl's loss_max_clamp does.
Defaults: k = 16 of the student (released script), reverse KL.
"""

from opdkit.divergences import Kind
from opdkit.losses import Divergence, Tail
from opdkit.method import Method, Term, View
from opdkit.support import Of, TopK


def topk_kl(
    *,
    teacher: str = "teacher",
    k: int = 16,
    of: Of = "student",
    kind: Kind = "reverse_kl",
    mix: float = 0.5,
    alpha: float = 0.5,
    tail: Tail = "bucket",
    row_max: float | None = None,
) -> Method:
    return Method(
        name="topk_kl",
        views={"teacher": View(teacher, TopK(k, of))},
        terms=(Term(loss=Divergence(kind, mix, alpha, tail=tail, row_max=row_max)),),
    )
