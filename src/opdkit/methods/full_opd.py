"""Full-vocabulary on-policy distillation: the reverse KL at every sampled prefix, differentiated (arXiv:2604.13016).

    L = mean_t KL(p_t, q_t) = mean_t sum_v p_t(v) (log p_t(v) - log q_t(v))

The exact gradient that `opd` and `vopd` estimate from one sampled token: no sampling noise given the prefixes. Nothing
of size tokens x vocabulary is held: teacher rows are formed next to the student's, chunk by chunk.
Left out: the dependence of later prefixes on earlier tokens, as in all token-level OPD.
"""

from opdkit.losses import Divergence
from opdkit.method import Method, Term, View
from opdkit.support import Full


def full_opd(*, teacher: str = "teacher") -> Method:
    return Method(
        name="full_opd",
        views={"teacher": View(teacher, Full())},
        terms=(Term(loss=Divergence("reverse_kl")),),
    )
