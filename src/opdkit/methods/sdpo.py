"""SDPO: the student learns from itself, shown a successful response of the same group or feedback (arXiv:2601.20802).

    L = mean_t min(p(y_t) / p_sampler(y_t), importance_cap) JSD(p_t, q_t)     over rollouts that have something to show

p_t and q_t are compared on the student's top-k ids and one bucket for the rest. JSD = mix KL(q, m) + (1 - mix) KL(p, m),
m = mix q + (1 - mix) p: the released alpha is our mix; its ends 0 and 1 are `kind` forward_kl and reverse_kl here.
q is an exponential average of the student (teachers: {teacher: {path: student:ema, ema: 0.05}}; 0.01 with feedback) that reads
the problem with the first other response of the group whose reward reaches `threshold`, without its thinking, and with
`feedback` what the verifier said about this response. It replaces the outcome advantage: nothing is learnt from a group
without success and without feedback. `trust` a takes SDPO's other teacher: q = reference^(1 - a) teacher^a / Z over the whole
vocabulary, for teachers: {teacher: {path: student:live}, reference: {path: student:base}}; both read the same. The released
code has a = 0.05, the paper 0.01. The ratio is that of the policy that sampled, 1 unless top-p or top-k truncates.
Defaults: the released reasoning configuration. With rich feedback: k = 20, kind reverse_kl.
Left out: the ratio between updates of one rollout batch, the clip at 5 of test-time training. Tokens have one weight in the
whole update; the released code weighs by micro-batch.
"""

from typing import Literal

from opdkit.contexts import Feedback, Shown, Sibling
from opdkit.losses import Divergence
from opdkit.method import Method, Term, View
from opdkit.pieces import times
from opdkit.pmi import informed
from opdkit.support import TopK
from opdkit.view import TrustRegion
from opdkit.weights import importance


def sdpo(
    *,
    teacher: str = "teacher",
    k: int = 100,
    kind: Literal["jsd", "forward_kl", "reverse_kl"] = "jsd",
    mix: float = 0.5,
    importance_cap: float = 2.0,
    trust: float | None = None,
    reference: str = "reference",
    threshold: float = 1.0,
    thinking: bool = False,
    feedback: bool = False,
    instruction: str | None = None,
    max_tokens: int | None = None,
) -> Method:
    if trust is None and reference != "reference":
        raise ValueError(
            f"reference = {reference!r} has no effect without trust; set it, such as trust = 0.05, or drop it"
        )
    model = teacher if trust is None else TrustRegion(teacher, reference, trust)
    texts = (Sibling(threshold, thinking),) + (Feedback(),) * feedback
    context = Shown(texts, every=feedback, instruction=instruction, max_tokens=max_tokens)
    return Method(
        name="sdpo",
        views={"teacher": View(model, TopK(k), context)},
        terms=(Term(loss=Divergence(kind, mix), weight=times(importance(cap=importance_cap), informed())),),
    )
