"""SDFT: the student learns on its own attempts from itself, shown an expert demonstration (arXiv:2601.19897).

    L = mean_t min(p(y_t) / p_sampler(y_t), importance_cap) JSD(p_t, q_t)     over rollouts with a demonstration

Supervised data learnt on-policy: the demonstration (the dataset response) is only read by the teacher, which forgets less than
training on it would. q is the model before training (teachers: {teacher: {path: student:base}}); `student:live` and
`student:ema` are options. p_t and q_t are compared on the student's top-k ids and one bucket for the rest; `mix` is the
teacher's share of the mixture. No verifier is needed.
Defaults: TRL's trainer (k 100, mix 0.5, cap 2, frozen teacher); its own repository could not be read.
Left out: the ratio between updates of one rollout batch.
"""

from typing import Literal

from opdkit.contexts import Shown, Solution
from opdkit.losses import Divergence
from opdkit.method import Method, Term, View
from opdkit.pieces import times
from opdkit.pmi import informed
from opdkit.support import TopK
from opdkit.weights import importance


def sdft(
    *,
    teacher: str = "teacher",
    k: int = 100,
    kind: Literal["jsd", "forward_kl", "reverse_kl"] = "jsd",
    mix: float = 0.5,
    importance_cap: float = 2.0,
    demonstration: str = "response",
    heading: str | None = None,
    instruction: str | None = None,
    max_tokens: int | None = None,
) -> Method:
    context = Shown(
        (Solution(demonstration),), style="example", heading=heading, instruction=instruction, max_tokens=max_tokens
    )
    return Method(
        name="sdft",
        views={"teacher": View(teacher, TopK(k), context)},
        terms=(Term(loss=Divergence(kind, mix), weight=times(importance(cap=importance_cap), informed())),),
    )
