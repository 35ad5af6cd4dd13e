"""DistiLLM: a skewed KL on fresh student samples, replayed ones and the data's responses (arXiv:2402.03898).

    skew_forward_kl: KL(q, skew q + (1 - skew) p)        skew_reverse_kl: KL(p, skew p + (1 - skew) q)
    L = sum over sources of share x mean_source D(p_t, q_t)

`skew`, the paper's alpha, is the share of the divergence's first argument: bounded gradients where the other side has
no mass. The student answers `on_policy_share` of each step's prompts itself, its newest `capacity` responses answer
`replay_share` of them again without sampling, and the data's responses the rest.
Defaults: skew 0.1, skewed forward KL and capacity 1000, as released (distillation alone, no cross-entropy).
The shares are ours: the paper adapts them. Its chance of student samples starts at 0 and rises when the validation loss
does, and the part of them that is replayed grows over the run, in whole batches and only from a full buffer.
Left out: that scheduler, and the language-modelling loss on a pre-training corpus.
"""

from typing import Literal

from opdkit.losses import Divergence
from opdkit.method import Method, Term, View
from opdkit.sources import Dataset, OnPolicy, Replay, Source
from opdkit.support import Full


def distillm(
    *,
    teacher: str = "teacher",
    kind: Literal["skew_forward_kl", "skew_reverse_kl"] = "skew_forward_kl",
    skew: float = 0.1,
    on_policy_share: float = 0.25,
    replay_share: float = 0.25,
    capacity: int = 1000,
) -> Method:
    if not 0.0 < skew < 1.0:
        raise ValueError(f"skew = {skew} must lie strictly between 0 and 1; without a skew take gkd")
    data_share = 1.0 - on_policy_share - replay_share
    if min(on_policy_share, replay_share) < 0 or data_share < -1e-9:
        raise ValueError(f"on_policy_share = {on_policy_share} and replay_share = {replay_share} must not be negative and "
                         "add up to at most 1; the rest are the data's responses")  # fmt: skip
    if not replay_share and capacity != 1000:
        raise ValueError(f"capacity = {capacity} has no effect with replay_share = 0; set it or drop capacity")
    sources: dict[str, Source] = {"policy": OnPolicy(on_policy_share), "data": Dataset(data_share)}
    if replay_share:
        sources["replay"] = Replay(replay_share, capacity)
    used = {name: source for name, source in sources.items() if source.share > 1e-9}
    loss = Divergence(kind, mix=skew if kind == "skew_forward_kl" else 1 - skew)
    return Method(
        name="distillm",
        rollouts=used,
        views={"teacher": View(teacher, Full())},
        terms=tuple(Term(loss=loss, coef=source.share, on=name) for name, source in used.items()),
    )
