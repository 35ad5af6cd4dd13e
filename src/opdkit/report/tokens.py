"""Packs the kept rollouts for the token viewer: texts stored once, numbers rounded, the whole bounded in size.

Left out on purpose: drawing (viewer.js).
"""

from collections.abc import Sequence
from typing import Any

from opdkit.report.read import KeptRollout, KeptStep, Token

MAX_TOKENS = 25_000  # tokens in one report: up to 2.6 MB of the file
MAX_ROLLOUT_TOKENS = 2_000
MAX_PROMPT = 20_000  # characters


class _Texts:
    """Every distinct token text once; tokens refer to it by its index."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}

    def add(self, text: str) -> int:
        return self.index.setdefault(text, len(self.index))


def pack_tokens(kept: Sequence[KeptStep], notes: list[str]) -> dict[str, Any]:
    """The viewer's data: `texts`, `limit` (nats at which the colour saturates) and `steps`.

    A token is [id, text, student, teacher, signal, entropy, student_top, teacher_top]; a top list is text, probability,
    text, probability, ... Appends to `notes` what had to be left out.
    """
    chosen = _choose(kept, notes)
    texts = _Texts()
    signals = [t.signal for k in chosen for r in k.rollouts for t in r.tokens if t.signal is not None]
    steps = [{"step": k.step, "rollouts": [_rollout(r, texts) for r in k.rollouts]} for k in chosen]
    return {"texts": list(texts.index), "limit": colour_limit(signals), "steps": steps}


def colour_limit(signals: Sequence[float]) -> float:
    """The 95th percentile of |signal| in nats, so that a few extreme tokens do not make all others pale."""
    sizes = sorted(abs(signal) for signal in signals)
    if not sizes or sizes[-1] == 0:
        return 1.0
    return sizes[int(0.95 * (len(sizes) - 1))] or sizes[-1]


def sampled_reverse_kl(rollout: KeptRollout) -> float | None:
    """Mean of log p_student - log p_teacher over the rollout's tokens, in nats per token.

    For tokens that the student sampled this is an unbiased estimate of the reverse KL; None without teacher scores.
    """
    gaps = [t.student - t.teacher for t in rollout.tokens if t.student is not None and t.teacher is not None]
    return sum(gaps) / len(gaps) if gaps else None


def _choose(kept: Sequence[KeptStep], notes: list[str]) -> list[KeptStep]:
    """Halve the steps (the first and the last stay), then the rollouts of a step, until the tokens fit."""
    chosen = list(kept)
    while _size(chosen) > MAX_TOKENS and (len(chosen) > 2 or max(len(k.rollouts) for k in chosen) > 1):
        if len(chosen) > 2:
            chosen = [*chosen[:-1:2], chosen[-1]] if len(chosen) > 3 else [chosen[0], chosen[-1]]
        else:
            chosen = [KeptStep(step=k.step, rollouts=k.rollouts[: -(-len(k.rollouts) // 2)]) for k in chosen]
    if _size(chosen) != _size(kept):
        total, shown = sum(len(k.rollouts) for k in kept), sum(len(k.rollouts) for k in chosen)
        notes.append(f"The token viewer holds {shown} of the {total} kept rollouts; all are in the folder rollouts/.")
    if any(len(r.tokens) > MAX_ROLLOUT_TOKENS for k in chosen for r in k.rollouts):
        notes.append(f"The token viewer shows the first {MAX_ROLLOUT_TOKENS:,} tokens of longer rollouts.")
    return chosen


def _size(steps: Sequence[KeptStep]) -> int:
    return sum(min(len(r.tokens), MAX_ROLLOUT_TOKENS) for k in steps for r in k.rollouts)


def _rollout(rollout: KeptRollout, texts: _Texts) -> dict[str, Any]:
    return {
        "prompt": _cut(rollout.prompt),
        "text": "" if rollout.tokens else _cut(rollout.text),
        "reward": rollout.reward,
        "correct": rollout.correct,
        "finish": rollout.finish,
        "source": rollout.source,
        "domain": rollout.domain,
        "length": len(rollout.tokens),
        "reverse_kl": sampled_reverse_kl(rollout),
        "tokens": [_token(token, texts) for token in rollout.tokens[:MAX_ROLLOUT_TOKENS]],
    }


def _token(token: Token, texts: _Texts) -> list[Any]:
    numbers = [None if x is None else round(x, 4) for x in (token.student, token.teacher, token.signal, token.entropy)]
    tops = []
    for top in (token.student_top, token.teacher_top):
        tops.append([part for text, prob in top for part in (texts.add(text), float(f"{prob:.4g}"))])
    return [token.id, texts.add(token.text), *numbers, *tops]


def _cut(text: str) -> str:
    if len(text) <= MAX_PROMPT:
        return text
    half = MAX_PROMPT // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"
