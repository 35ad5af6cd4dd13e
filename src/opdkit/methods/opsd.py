"""OPSD: the student learns on its own attempts from itself, shown the reference solution (arXiv:2601.18734).

    L = mean_t sum_v min( q_t(v) (log q_t(v) - log p_t(v)), entry_max )     on the student's own samples

q is the teacher: the model before training (teachers: {teacher: {path: student:base}}, with LoRA its adapters off), which
reads problem, reference solution and an instruction to solve it in its own words. `student:live` and `student:ema` are the
paper's other choices. With a thinking teacher and a student that does not think, set teachers.teacher.template: own and its
template_args. A rollout whose problem has no solution is left out of the mean.

`kind` jsd with `mix` 0.5 is the scripts' divergence; `k` compares the teacher's top-k only, renormalised (the scripts' option,
50). Defaults: forward KL, full vocabulary, the paper's main runs. They cap every entry, but the paper prints no number and
says it was not tuned: entry_max = None is no cap.
Left out: the scripts' student prompt without a chat template; student and teacher read the same template here.
"""

from opdkit.contexts import Shown, Solution
from opdkit.divergences import Kind
from opdkit.losses import Divergence
from opdkit.method import Method, Term, View
from opdkit.pmi import informed
from opdkit.support import Full, TopK


def opsd(
    *,
    teacher: str = "teacher",
    kind: Kind = "forward_kl",
    mix: float = 0.5,
    entry_max: float | None = None,
    k: int | None = None,
    solution: str = "auto",
    heading: str | None = None,
    instruction: str | None = None,
    max_tokens: int | None = None,
) -> Method:
    context = Shown((Solution(solution),), heading=heading, instruction=instruction, max_tokens=max_tokens)
    support, tail = (Full(), "bucket") if k is None else (TopK(k, of="teacher"), "renormalise")
    loss = Divergence(kind, mix, tail=tail, entry_max=entry_max)  # type: ignore[arg-type]
    return Method(
        name="opsd",
        views={"teacher": View(teacher, support, context)},
        terms=(Term(loss=loss, weight=informed()),),
    )
