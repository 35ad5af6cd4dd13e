"""Sequence-level distillation: cross-entropy on responses that the teacher sampled (arXiv:1606.07947).

    L = - mean_t log p(y_t),      y ~ teacher, once per prompt, kept on disk

Under temperature 1 its expected gradient is that of the forward KL between whole responses, at every prefix that the
teacher writes. The paper trains on the teacher's mode, found by beam search; temperature 0 (greedy) is the nearest to
it here. Default 1: the unbiased one.
Left out: beams, several responses per prompt, and choosing the response that is nearest to a given answer.
"""

from opdkit.losses import CrossEntropy
from opdkit.method import Method, Term
from opdkit.sources import TeacherSamples


def seqkd(*, teacher: str = "teacher", temperature: float = 1.0) -> Method:
    if temperature < 0:
        raise ValueError(f"temperature = {temperature}: expected 0 (greedy) or more")
    return Method(
        name="seqkd",
        rollouts={"data": TeacherSamples(teacher=teacher, temperature=temperature)},
        views={},
        terms=(Term(loss=CrossEntropy(), on="data"),),
    )
