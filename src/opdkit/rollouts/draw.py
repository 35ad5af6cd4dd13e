"""Drawing one token per row from hidden states, with the numbers that are recorded about the draw.

Axes: r rows, V real vocabulary, D hidden, k tokens that truncation leaves, Kt size of the recorded top-k list.

A draw inverts the cumulative distribution at a given uniform number, summed in float64: it is a function of (logits,
number), and never a token of probability 0. On the CPU a large vocabulary is worked through in blocks of rows.
With `Other` the tokens come from a mixture with a second model; what is recorded is still about the first one.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opdkit.divergences import NO_MASS, log_mixture
from opdkit.head import Head, blocks

SEGMENT = 512  # vocabulary entries whose masses are added up before one of them is searched
SHORT = 64  # entries whose maximum is taken before the largest are looked for
NUCLEUS = 64  # most probable ids that are looked at first when top-p needs an order


class Draw(NamedTuple):
    """One token for each row and its record (nats)."""

    tokens: Int[Tensor, " r"]
    logp: Float[Tensor, " r"]  # under softmax(logits / temperature) over the whole vocabulary
    behaviour: Float[Tensor, " r"]  # under the distribution that was drawn from: mixed, truncated, renormalised
    entropy: Float[Tensor, " r"]
    top_ids: Int[Tensor, "r Kt"]  # most probable ids, best first
    top: Float[Tensor, "r Kt"]


class Other(NamedTuple):
    """A second model that takes part in a draw: its head, its hidden states and its share of the mixture in [0, 1)."""

    head: Head
    hidden: Float[Tensor, "r E"]
    share: float


class Cut(NamedTuple):
    """How the distribution is truncated, and how much of it is recorded."""

    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False  # the most probable token instead of a draw
    keep_top: int = 1


def draw(
    head: Head, hidden: Float[Tensor, "r D"], uniform: Float[Tensor, " r"], cut: Cut, other: Other | None = None
) -> Draw:
    """Draw one token per row. `uniform` is float64 in [0, 1). With `other`, from share x other + (1 - share) x own."""
    z = head.logits(hidden)
    second = None if other is None else other.head.logits(other.hidden)
    parts = [slice(None)] if z.is_cuda else blocks(*z.shape)
    found = []
    for part in parts:
        mixed = None if other is None or second is None else (second[part], other.share)
        found.append(_draw_rows(z[part], uniform[part], cut, mixed))
    return found[0] if len(found) == 1 else Draw(*(torch.cat(column) for column in zip(*found, strict=True)))


def _draw_rows(
    z: Float[Tensor, "r V"], uniform: Float[Tensor, " r"], cut: Cut, mixed: tuple[Float[Tensor, "r V"], float] | None
) -> Draw:
    """Draw from some rows of logits, which are overwritten."""
    top, top_ids = largest(z, max(cut.keep_top, 1))
    best = top_ids[:, 0]  # of the logits: two of them can round to one log-prob
    p = (z - top[:, :1]).exp_()  # not normalised; the only exponential, which costs as much as all other passes
    total = p.sum(-1, keepdim=True)
    norm = top[:, :1] + total.log()
    logp = z.sub_(norm)
    entropy = -(p * logp).sum(-1) / total[:, 0]  # not vecdot: autocast would run it in half precision
    record = entropy, top_ids[:, : cut.keep_top], (top - norm)[:, : cut.keep_top]

    def at(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index[:, None]).squeeze(1)

    source = logp  # what is drawn from
    if mixed is not None:
        source = log_mixture(logp, mixed[0].log_softmax(-1), mixed[1])
        p, best = source.exp(), source.argmax(-1)
    if cut.greedy:
        return Draw(best, at(logp, best), torch.zeros_like(entropy), *record)
    if cut.top_k or cut.top_p < 1.0:
        ids, kept = truncate(source, cut.top_k, cut.top_p)
        column = inverse_cdf(kept.exp(), uniform)
        tokens = at(ids, column)
        return Draw(tokens, at(logp, tokens), at(kept, column), *record)
    tokens = inverse_cdf(p, uniform)
    return Draw(tokens, at(logp, tokens), at(source, tokens), *record)


def largest(z: Float[Tensor, "r V"], k: int) -> tuple[Float[Tensor, "r k"], Int[Tensor, "r k"]]:
    """The k largest entries of each row, best first, and their ids.

    They stand in the k segments with the largest maxima: of a large vocabulary only those are sorted.
    """
    vocab = z.shape[1]
    whole = vocab // SHORT * SHORT
    if whole < 8 * k * SHORT:
        few = torch.topk(z, k, dim=-1)
        return few.values, few.indices
    peaks = z[:, :whole].unflatten(1, (-1, SHORT)).amax(-1)
    found = torch.topk(peaks, k, dim=-1).indices
    columns = (found[:, :, None] * SHORT + torch.arange(SHORT, device=z.device)).flatten(1)
    rest = torch.arange(whole, vocab, device=z.device).expand(z.shape[0], -1)
    columns = torch.cat([columns, rest], 1)
    values, places = torch.topk(z.gather(1, columns), k, dim=-1)
    return values, columns.gather(1, places)


def inverse_cdf(p: Float[Tensor, "r V"], uniform: Float[Tensor, " r"]) -> Int[Tensor, " r"]:
    """The first index at which the running sum of p exceeds uniform x its total; `p` need not be normalised.

    `uniform` must be below 1: a float64 number below 1, times the total, is below the total in float64 too.
    """
    vocab = p.shape[1]
    if vocab <= 2 * SEGMENT:
        return _search(p.cumsum(-1, dtype=torch.float64), uniform[:, None])[0].squeeze(1)
    whole = vocab - vocab % SEGMENT
    mass = p[:, :whole].unflatten(1, (-1, SEGMENT)).sum(-1).double()
    if whole < vocab:
        mass = torch.cat([mass, p[:, whole:].sum(-1, keepdim=True).double()], 1)
    cdf = mass.cumsum(-1)
    segment, target = _search(cdf, uniform[:, None])
    size = mass.gather(1, segment)
    share = (target - cdf.gather(1, segment) + size) / size  # how far into the segment
    columns = segment * SEGMENT + torch.arange(SEGMENT, device=p.device)
    inside = p.gather(1, columns.clamp(max=vocab - 1)).masked_fill(columns >= vocab, 0.0)
    found, _ = _search(inside.cumsum(-1, dtype=torch.float64), share.clamp(0.0, 1 - 2**-53))
    return (segment * SEGMENT + found).clamp(max=vocab - 1).squeeze(1)


def _search(
    cdf: Float[Tensor, "r n"], uniform: Float[Tensor, "r 1"]
) -> tuple[Int[Tensor, "r 1"], Float[Tensor, "r 1"]]:
    """The first running sum above uniform x total, and that product. An entry of mass 0 is never the first."""
    target = uniform * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[1] - 1), target  # the end: only for NaN


def truncate(logp: Float[Tensor, "r V"], top_k: int, top_p: float) -> tuple[Int[Tensor, "r k"], Float[Tensor, "r k"]]:
    """Keep the top_k tokens, then the smallest set of them whose mass reaches top_p of theirs; renormalise.

    Returns ids, most probable first, and their new log-probs; a dropped token has log-prob NO_MASS. 0 and 1.0 = off.
    """
    vocab = logp.shape[1]
    top = torch.topk(logp, top_k or min(vocab, NUCLEUS), dim=-1)
    while not top_k and top.values.shape[1] < vocab and not _covers(top.values, top_p):
        top = torch.topk(logp, min(vocab, 8 * top.values.shape[1]), dim=-1)
    if top_p == 1.0:
        return top.indices, top.values.log_softmax(-1)
    mass = (top.values.log_softmax(-1) if top_k else top.values).double().exp()
    dropped = mass.cumsum(-1) - mass >= top_p
    return top.indices, top.values.masked_fill(dropped, NO_MASS).log_softmax(-1).masked_fill(dropped, NO_MASS)


def _covers(values: Float[Tensor, "r k"], top_p: float) -> bool:
    """Whether the listed tokens hold top_p of the mass in every row, with room for rounding."""
    return bool((values.double().exp().sum(-1) > top_p + 1e-5).all())
