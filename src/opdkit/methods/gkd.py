"""Generalised knowledge distillation: a JSD on student samples and on dataset answers (arXiv:2306.13649).

    L = share x mean_policy JSD_mix(p, q) + (1 - share) x mean_data JSD_mix(p, q)
    JSD_mix = mix KL(q, m) + (1 - mix) KL(p, m),   m = mix q + (1 - mix) p

`mix` is the teacher's share of the mixture; 0 is the forward KL and 1 the reverse KL, as in TRL's `beta`.
`on_policy_share` is the share of each step's prompts that the student answers itself (TRL's `lmbda` is a share of
steps); the rest use the data set's answers. Defaults: 0.5 and 0.5, TRL's.
Left out: mixing in a supervised term.
"""

from opdkit.losses import Divergence
from opdkit.method import Method, Term, View
from opdkit.sources import Dataset, OnPolicy
from opdkit.support import Full


def gkd(*, teacher: str = "teacher", mix: float = 0.5, on_policy_share: float = 0.5) -> Method:
    if not 0.0 <= on_policy_share <= 1.0:
        raise ValueError(f"on_policy_share = {on_policy_share} must lie in [0, 1]")
    ends = {0.0: Divergence("forward_kl"), 1.0: Divergence("reverse_kl")}
    loss = ends[mix] if mix in ends else Divergence("jsd", mix=mix)
    sources: dict[str, OnPolicy | Dataset] = {"policy": OnPolicy(on_policy_share), "data": Dataset(1 - on_policy_share)}
    used = {name: source for name, source in sources.items() if source.share > 0}
    return Method(
        name="gkd",
        rollouts=used,
        views={"teacher": View(teacher, Full())},
        terms=tuple(Term(loss=loss, coef=source.share, on=name) for name, source in used.items()),
    )
