"""Differentiated reverse KL on a top-k support, with the rest of the vocabulary as one bucket (arXiv:2604.13016).

    L = mean_t KL(p~, q~)     p~, q~: masses of the k candidates and, with tail="bucket", of everything else

`tail="renormalise"` is the paper's Eq. 5: both sides renormalised over the candidates, the mass outside forgotten; at
k = 1 it is identically 0. The bucket keeps the mass in view: a lower bound of the full KL whose gradient vanishes at
student = teacher and which pulls mass that leaked out of the support back.
Both are biased for k < V; both equal `full_opd` at k = V. Defaults: k = 16 of the student (released script).
"""

from typing import Literal

from opdkit.losses import Divergence
from opdkit.method import Method, Term, View
from opdkit.support import Of, TopK


def topk_kl(
    *, teacher: str = "teacher", k: int = 16, of: Of = "student", tail: Literal["bucket", "renormalise"] = "bucket"
) -> Method:
    return Method(
        name="topk_kl",
        views={"teacher": View(teacher, TopK(k, of))},
        terms=(Term(loss=Divergence("reverse_kl", tail=tail)),),
    )
