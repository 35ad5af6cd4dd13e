"""Sampling responses in process with transformers, recording what the training step needs.

Axes: P prompts, R rows (sequences that decode together), V real vocabulary, D hidden.

A prompt is prefilled once for its whole group; prompt positions never reach the vocabulary head; finished rows leave
the batch. The log-prob, entropy and top-k of every sampled position are kept, so the student is not scored again.
The uniform number that draws token t of row r depends on (seed, r, t) only, so results do not depend on how rows are
batched. Left out: paged caches and speculative decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opdkit.head import Head
from opdkit.losses import NO_MASS
from opdkit.models import LanguageModel
from opdkit.rollouts.rollout import Capture


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy: captured log-probs then belong to temperature 1."""

    group: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    eos_ids: tuple[int, ...] = ()
    max_rows: int = 256


@dataclass(frozen=True)
class Keep:
    """What is recorded at every sampled position besides its log-prob and entropy."""

    top_k: int = 1
    hidden: bool = False


@dataclass(frozen=True)
class Sample:
    """One sampled response."""

    ids: tuple[int, ...]
    finish: str  # "stop", "stop_string" or "length"
    text: str
    capture: Capture


@torch.no_grad()
def sample(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], how: Sampling, seed: int, keep: Keep | None = None
) -> list[list[Sample]]:
    """Sample `how.group` responses to every prompt. Returns one list of samples per prompt, in the order given.

    Deterministic in (weights, prompts, how, seed). Raises ValueError when a top-k exceeds the vocabulary.
    """
    keep = keep or Keep()
    head = lm.head().at(how.temperature or 1.0)
    if max(keep.top_k, how.top_k) > head.size:
        raise ValueError(
            f"top-k of {max(keep.top_k, how.top_k)} exceeds the vocabulary of {head.size} ids; ask for less"
        )
    noise = _noise(len(prompts) * how.group, how.max_new_tokens, seed).to(lm.device)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = max(1, how.max_rows // how.group)
    found: dict[int, list[Sample]] = {}
    for start in range(0, len(order), size):
        wave = order[start : start + size]
        rows = [i * how.group + j for i in wave for j in range(how.group)]
        samples = _decode(lm, head, [prompts[i] for i in wave], how, keep, noise[rows])
        for n, i in enumerate(wave):
            found[i] = samples[n * how.group : (n + 1) * how.group]
    return [found[i] for i in range(len(prompts))]


def _noise(rows: int, length: int, seed: int) -> Float[Tensor, "R T"]:
    """Uniform numbers in [0, 1): float64, so that inverse-CDF sampling resolves rare tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, length, generator=generator, dtype=torch.float64)


def prefill(lm: LanguageModel, prompts: Sequence[Sequence[int]]):  # type: ignore[no-untyped-def]
    """Run left-padded prompts once. Returns (cache, last hidden state [P, D], attention mask [P, T] or None)."""
    from transformers import DynamicCache

    width = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    padded = bool((mask == 0).any())
    cache = DynamicCache(config=lm.model.config)
    output = lm.model.base_model(
        input_ids=ids,
        attention_mask=mask if padded else None,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0) if padded else None,
        past_key_values=cache,
        use_cache=True,
    )
    return cache, output.last_hidden_state[:, -1], mask if padded else None


class _Recorder:
    """Collects the rows of every decoding step and hands them back per sequence."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, ...]] = []

    def add(self, rows: Int[Tensor, " r"], *values: Tensor) -> None:
        self.steps.append((rows, *values))

    def per_row(self, count: int) -> list[tuple[Tensor, ...]]:
        rows, *values = (torch.cat(column) for column in zip(*self.steps, strict=True))
        order = torch.argsort(rows, stable=True)  # steps are in time order, so positions stay in order
        lengths = torch.bincount(rows, minlength=count).tolist()
        return list(zip(*(value[order].split(lengths) for value in values), strict=True))


def _decode(
    lm: LanguageModel,
    head: Head,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    keep: Keep,
    noise: Float[Tensor, "R T"],
) -> list[Sample]:
    cache, hidden, mask = prefill(lm, prompts)
    total = len(prompts) * how.group
    if how.group > 1:
        cache.batch_repeat_interleave(how.group)
        hidden = hidden.repeat_interleave(how.group, 0)
        mask = None if mask is None else mask.repeat_interleave(how.group, 0)
    lengths = torch.tensor([len(p) for p in prompts], device=lm.device).repeat_interleave(how.group)
    live = torch.arange(total, device=lm.device)
    finish = ["length"] * total
    texts: list[str | None] = [None] * total
    record = _Recorder()
    so_far: list[list[int]] = [[] for _ in range(total)]
    eos = torch.tensor(how.eos_ids or lm.eos_ids, device=lm.device)
    for t in range(how.max_new_tokens):
        tokens, seen = draw(head, hidden, noise[live, t], how, keep)
        record.add(live, tokens, *seen, *([hidden] if keep.hidden else []))
        done = torch.isin(tokens, eos)
        for row in live[done].tolist():
            finish[row] = "stop"
        if how.stop:
            done |= _stopped(lm, how.stop, live, tokens, done, so_far, texts, finish)
        if t + 1 == how.max_new_tokens or bool(done.all()):
            break
        if bool(done.any()):
            stay = torch.nonzero(~done).squeeze(1)
            cache.batch_select_indices(stay)
            live, tokens = live[stay], tokens[stay]
            mask = None if mask is None else mask[stay]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
        hidden = lm.model.base_model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=(lengths[live] + t)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
    return [_finish(lm, row, finish[i], texts[i], keep) for i, row in enumerate(record.per_row(total))]


def _finish(lm: LanguageModel, row: tuple[Tensor, ...], finish: str, text: str | None, keep: Keep) -> Sample:
    ids, logp, behaviour, entropy, top_ids, top, *hidden = row
    if text is None:
        text = lm.tokenizer.decode(ids, skip_special_tokens=True)
    capture = Capture(logp, behaviour, entropy, top_ids, top, hidden[0] if keep.hidden else None)
    return Sample(tuple(ids.tolist()), finish, text, capture)


def _stopped(
    lm: LanguageModel, stop: Sequence[str], live: Int[Tensor, " r"], tokens: Int[Tensor, " r"], done: Bool[Tensor, " r"],
    so_far: list[list[int]], texts: list[str | None], finish: list[str],
) -> Bool[Tensor, " r"]:  # fmt: skip
    """Which live rows have just completed a stop string; their text is cut where it begins."""
    hit = torch.zeros_like(done)
    for n, (row, token) in enumerate(zip(live.tolist(), tokens.tolist(), strict=True)):
        so_far[row].append(token)
        text = lm.tokenizer.decode(so_far[row], skip_special_tokens=True)
        starts = [text.find(s) for s in stop if s in text]
        if starts and not bool(done[n]):
            hit[n], texts[row], finish[row] = True, text[: min(starts)], "stop_string"
    return hit


def draw(
    head: Head, hidden: Float[Tensor, "r D"], uniform: Float[Tensor, " r"], how: Sampling, keep: Keep
) -> tuple[Int[Tensor, " r"], tuple[Tensor, ...]]:
    """Draw one token per row by inverse CDF. Returns (tokens, (logp, behaviour, entropy, top_ids, top)).

    `logp` belongs to the temperature-scaled distribution over the whole vocabulary, `behaviour` to the truncated and
    renormalised one that was drawn from.
    """
    full = head.logits(hidden).log_softmax(-1)
    probs = full.exp()
    entropy = -torch.linalg.vecdot(probs, full)
    top = torch.topk(full, keep.top_k, dim=-1)
    if how.temperature == 0:
        tokens = full.argmax(-1)
        logp = full.gather(1, tokens[:, None]).squeeze(1)
        return tokens, (logp, torch.zeros_like(logp), entropy, top.indices, top.values)
    kept, drawn = full, probs
    if how.top_k or how.top_p < 1.0:
        kept = truncate(full, how.top_k, how.top_p)
        drawn = kept.exp()
    cdf = drawn.cumsum(-1, dtype=torch.float64)
    target = uniform * cdf[:, -1]
    tokens = torch.searchsorted(cdf, target[:, None], right=True).squeeze(1).clamp(max=full.shape[1] - 1)
    logp = full.gather(1, tokens[:, None]).squeeze(1)
    behaviour = kept.gather(1, tokens[:, None]).squeeze(1) if kept is not full else logp
    return tokens, (logp, behaviour, entropy, top.indices, top.values)


def truncate(logp: Float[Tensor, "r V"], top_k: int, top_p: float) -> Float[Tensor, "r V"]:
    """Keep the top_k tokens, then the smallest set of them whose mass reaches top_p of the rest; renormalise."""
    ordered, ids = logp.sort(-1, descending=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k:
        drop[:, top_k:] = True
    if top_p < 1.0:
        mass = ordered.masked_fill(drop, NO_MASS).softmax(-1)
        drop |= mass.cumsum(-1) - mass >= top_p
    dropped = torch.zeros_like(drop).scatter(1, ids, drop)
    return logp.masked_fill(dropped, NO_MASS).log_softmax(-1)
