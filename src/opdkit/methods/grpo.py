"""GRPO: group-relative policy optimisation on the verifier's reward, without a teacher (arXiv:2402.03300).

    A = (R - mean_group R) / (std_group R + eps),     L = - mean_t A log p(y_t)

`std=False` is Dr. GRPO's advantage (2503.20783). Defaults: std on and token mean, as in the core paper's teacher
recipe (2604.13016 section e: no KL to a reference, no entropy bonus).
Left out: the PPO clip, inert with one update per rollout batch.
"""

from opdkit.method import Method, Term
from opdkit.signals import outcome


def grpo(*, std: bool = True, eps: float = 1e-6) -> Method:
    return Method(name="grpo", views={}, terms=(Term(signal=outcome(std=std, eps=eps)),))
