"""Full-vocabulary on-policy distillation: a divergence at every sampled prefix, differentiated (arXiv:2604.13016).

    L = mean_t D(p_t, q_t),     reverse_kl: D = KL(p_t, q_t) = sum_v p_t(v) (log p_t(v) - log q_t(v))

The exact gradient that `opd` and `vopd` estimate from one sampled token: no sampling noise given the prefixes. Nothing
of size tokens x vocabulary is held: teacher rows are formed next to the student's, chunk by chunk.
`kind` takes any divergence of the engine; `mix` (the teacher's share) and `alpha` belong to the kinds that read them.
Default: the reverse KL, the paper's.
Left out: the dependence of later prefixes on earlier tokens, as in all token-level OPD.
"""

from opdkit.divergences import Kind
from opdkit.losses import Divergence
from opdkit.method import Method, Term, View
from opdkit.support import Full


def full_opd(*, teacher: str = "teacher", kind: Kind = "reverse_kl", mix: float = 0.5, alpha: float = 0.5) -> Method:
    return Method(
        name="full_opd",
        views={"teacher": View(teacher, Full())},
        terms=(Term(loss=Divergence(kind, mix, alpha)),),
    )
