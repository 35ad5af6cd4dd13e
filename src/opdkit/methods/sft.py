"""Supervised fine-tuning on the task's own responses: cross-entropy of every response token (arXiv:2604.13016).

    L = - mean_t log p(y*_t)

The off-policy cold start of the paper's recipe when the responses come from a teacher. No teacher scores, no samples.
"""

from opdkit.losses import CrossEntropy
from opdkit.method import Method, Term
from opdkit.sources import Dataset


def sft() -> Method:
    return Method(name="sft", rollouts={"data": Dataset()}, views={}, terms=(Term(loss=CrossEntropy(), on="data"),))
