"""Views of models in this process: score every trained token of a step under a token budget.

Axes: N trained tokens of the step, n rows of one forward, K support size, D hidden, V vocabulary.

The head is applied to trained positions only, and only as far as the view's support needs it. Left out: servers.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opdkit.config import BadScores
from opdkit.errors import NonFiniteError
from opdkit.head import Head, HeadRows, RowScores, score_rows
from opdkit.models import LanguageModel
from opdkit.rollouts.rollout import Rollout
from opdkit.step import Candidates, Scores, Step
from opdkit.support import Full, Support, TopK, candidates
from opdkit.views.bad import neutral
from opdkit.views.batches import batches, flat_index


def hidden_rows(
    lm: LanguageModel, rollouts: Sequence[Rollout], step: Step, budget: int, at: Sequence[int] | None = None,
    view: str = "",
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "n D"]]]:  # fmt: skip
    """Yield (flat index, last hidden states that predict these tokens) batch by batch, without gradient.

    Where the model read along for this view while the rollouts were sampled, its states are there already.
    """
    if rollouts and all(view in r.states for r in rollouts):
        yield flat_index(step, at or range(len(rollouts))), torch.cat([r.states[view] for r in rollouts])
        return
    for batch in batches(lm, rollouts, budget):
        with torch.no_grad():
            hidden = batch.states(lm, rollouts)
        yield flat_index(step, batch.index if at is None else [at[i] for i in batch.index]), hidden


def score(
    lm: LanguageModel, rollouts: Sequence[Rollout], step: Step, support: Support, *, budget: int, top_k: int = 0,
    at: Sequence[int] | None = None, bad: BadScores = "stop", view: str = "",
) -> Scores:  # fmt: skip
    """Score a step's tokens with a model. `top_k` asks for the model's own list beside what the support needs.

    `view` is the name under which the rollouts may hold the model's states (`rollouts.early`).
    `rollouts` are the step's sequences `at` (None = all of them); the scores are those of their tokens. The candidates of
    TopK also need `step.views["student"]`. A model that returns NaN or inf: with `bad` stop NonFiniteError, with mask
    these tokens are marked in `Scores.bad` and given neutral numbers (`views.bad`).
    """
    parts = [
        (index, score_batch(lm.head(), hidden, step.rows(index), support, top_k))
        for index, hidden in hidden_rows(lm, rollouts, step, budget, at, view)
    ]
    index = torch.cat([index for index, _ in parts])
    back = torch.argsort(index)
    scores = _join([s for _, s in parts], back)
    wrong = ~torch.isfinite(scores.sampled)
    if scores.candidates is not None:
        wrong |= ~torch.isfinite(scores.candidates.teacher).all(-1)
    if not bool(wrong.any()):
        return scores
    if bad == "mask":
        return neutral(scores, wrong, step.rows(index[back]).views.get("student"))
    sequences = step.layout.seq[index[back]][wrong].unique().tolist()
    raise NonFiniteError(
        f"model '{lm.name}' ({lm.path}) returned NaN or infinite log-probs for {int(wrong.sum())} of {wrong.numel()} "
        f"tokens, in sequences {sequences[:5]} of the step; check its weights and dtype, or leave such tokens out with "
        "train.bad_scores: mask"
    )


def score_batch(head: Head, hidden: Float[Tensor, "n D"], rows: Step, support: Support, top_k: int) -> Scores:
    """Scores of some rows of a step from the hidden states that predict them."""
    k = support.k if isinstance(support, TopK) else 0
    own = support.of not in ("student", "intersection") if isinstance(support, TopK) else False
    wanted = min(max(top_k, k if isinstance(support, TopK) and support.of != "student" else 0), head.size)
    student = rows.views.get("student")

    def choose(part: slice, top_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        assert isinstance(support, TopK) and student is not None
        ours = None if student.top_ids is None else student.top_ids[part, :k]
        theirs = None if support.of == "student" or top_ids is None else top_ids[:, :k]
        first = theirs if ours is None else ours
        second = ours if theirs is None else theirs
        assert first is not None and second is not None
        return candidates(support.of, first, second)

    got = score_rows(head, hidden, rows.tokens, top_k=wanted, choose=choose if k else None)
    full = HeadRows(hidden, head) if isinstance(support, Full) else None
    found = _candidates(got, rows, own, k) if k else None
    return Scores(got.sampled, got.entropy, got.top_ids, got.top, found, full)


def _candidates(got: RowScores, rows: Step, own: bool, k: int) -> Candidates:
    """Both sides on the chosen ids; the student's log-probs come from its capture where it holds them."""
    student = rows.views["student"]
    assert got.ids is not None and got.valid is not None and got.at_ids is not None and got.tail is not None
    if not own:
        assert student.top is not None
        return Candidates(got.ids, got.valid, student.top[:, :k], got.at_ids, None, got.tail)
    assert isinstance(student.full, HeadRows)
    again = score_rows(student.full.head, student.full.hidden, rows.tokens, entropy=False,
                       choose=lambda part, _: (got.ids[part], got.valid[part]))  # type: ignore[index]  # fmt: skip
    assert again.at_ids is not None
    return Candidates(got.ids, got.valid, again.at_ids, got.at_ids, again.tail, got.tail)


def _join(parts: Sequence[Scores], back: Int[Tensor, " N"]) -> Scores:
    """Concatenate the scores of several batches and put them back into the step's order."""

    def cat(values: list[Tensor | None]) -> Tensor | None:
        return None if values[0] is None else torch.cat([v for v in values if v is not None])[back]

    def each(name: str) -> Tensor | None:
        return cat([getattr(p, name) for p in parts])

    found = [p.candidates for p in parts if p.candidates is not None]
    joined = None
    if found:
        names = ("ids", "valid", "student", "teacher", "student_tail", "teacher_tail")
        joined = Candidates(*(cat([getattr(c, name) for c in found]) for name in names))  # type: ignore[arg-type]
    rows = [p.full for p in parts if isinstance(p.full, HeadRows)]
    full = HeadRows(torch.cat([r.hidden for r in rows])[back], rows[0].head) if rows else None
    sampled = each("sampled")
    assert sampled is not None
    return Scores(sampled, each("entropy"), each("top_ids"), each("top"), joined, full)
