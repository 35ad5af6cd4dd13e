"""The vocabulary head and the rows of log-probs that it can form, a few at a time.

Axes: n rows, N rows of a view, P rows of the head's weight, V real vocabulary (V <= P), D columns of the weight, r of
the low rank, H = D + r of the hidden states.

The products run in the hidden states' precision (autocast's, where it is on) and are kept in float32, or float64 for
float64 input. Where that takes a conversion, it is done for COLUMNS ids at a time, so that neither a second copy of
the logits nor one of the weight exists. Left out: sharded (tensor-parallel) heads.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK_ENTRIES = 2**24  # logits of one chunk when none is asked for: 64 MiB of float32
BLOCK_ENTRIES = 2**18  # elementwise block: 1 MiB of float32 stays in a core's cache
DEVICE_BLOCK_ENTRIES = 2**24  # elsewhere: enough work for one kernel launch
COLUMNS = 2**14  # ids of one product when precisions differ
PARAMETERS = ("weight", "bias", "low_rank")  # the tensors of a head that can be trained


def chunks(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows that cover n rows."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def blocks(n: int, width: int, device: torch.device | None = None) -> Iterator[slice]:
    """Consecutive slices of rows whose entries fit BLOCK_ENTRIES (DEVICE_BLOCK_ENTRIES off the CPU)."""
    entries = BLOCK_ENTRIES if device is None or device.type == "cpu" else DEVICE_BLOCK_ENTRIES
    return chunks(n, max(1, entries // max(width, 1)))


@dataclass(frozen=True)
class Head:
    """A vocabulary head: softmax(softcap(scale * (weight h + bias)) / temperature) over the real vocabulary.

    With `low_rank` the hidden states have D + r columns, and the product is weight h[:D] + low_rank h[D:] + bias: LoRA
    on the head, whose further columns are scale x A h, trains the low rank while the weight stays frozen.

    Rows of `weight` at and above `vocab` are padding, never formed: both sides are normalised over the tokenizer's real
    ids. ValueError when `vocab` exceeds the rows or the low rank has others, or for a temperature or soft-cap <= 0.
    """

    weight: Float[Tensor, "P D"]
    bias: Float[Tensor, " P"] | None = None
    vocab: int | None = None  # V; None = all rows are real
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    low_rank: Float[Tensor, "P r"] | None = None

    def __post_init__(self) -> None:
        rows = self.weight.shape[0]
        if self.vocab is not None and not 1 <= self.vocab <= rows:
            raise ValueError(f"vocab = {self.vocab}, but the head has {rows} rows; expected 1 to {rows} real ids")
        if self.low_rank is not None and self.low_rank.shape[0] != rows:
            raise ValueError(
                f"the low rank has {self.low_rank.shape[0]} rows and the weight {rows}; expected one per id"
            )
        if self.temperature <= 0 or (self.softcap is not None and self.softcap <= 0):
            raise ValueError(f"temperature {self.temperature} and softcap {self.softcap} must be above 0")

    @property
    def size(self) -> int:
        """V, the number of real token ids."""
        return self.vocab or self.weight.shape[0]

    def at(self, temperature: float) -> "Head":
        return replace(self, temperature=temperature)

    def chunk(self, rows: int | None = None) -> int:
        """Rows of one chunk: `rows`, or as many as CHUNK_ENTRIES logits allow, at least 16. ValueError below 1."""
        if rows is not None and rows < 1:
            raise ValueError(f"chunk = {rows} rows; expected at least 1, or None for the default")
        return rows or max(16, CHUNK_ENTRIES // self.size)

    def logits(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        """Logits over the real vocabulary after scale, soft-cap and temperature: float32, or float64 if `hidden` is."""
        z = self._product(hidden)
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z = z.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            z /= self.temperature
        return z

    def _split(self, hidden: Float[Tensor, "n H"]) -> list[tuple[slice, Tensor]]:
        """(columns of the hidden states, the matrix that reads them). ValueError for another number of columns."""
        d = self.weight.shape[1]
        parts = [(slice(0, d), self.weight)]
        if self.low_rank is not None:
            parts.append((slice(d, d + self.low_rank.shape[1]), self.low_rank))
        if hidden.shape[1] != parts[-1][0].stop:
            wanted = f"{parts[-1][0].stop}: {d} with its weight and {parts[-1][0].stop - d} with its low rank"
            raise ValueError(f"the hidden states have {hidden.shape[1]} columns, but the head reads {wanted}; append the "
                             "low rank's columns to them")  # fmt: skip
        return parts

    def _direct(self, hidden: Float[Tensor, "n H"]) -> bool:
        """Whether no product needs a conversion."""
        dtype, wide = precision(hidden)
        return dtype == wide and all(t is None or t.dtype == dtype for t in (self.weight, self.low_rank))

    def _product(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        dtype, wide = precision(hidden)
        bias = None if self.bias is None else self.bias[: self.size].to(dtype)
        (columns, weight), *rest = self._split(hidden)
        if self._direct(hidden):
            z = F.linear(hidden[:, columns], weight[: self.size], bias)
            for columns, matrix in rest:
                z.addmm_(hidden[:, columns], matrix[: self.size].T)
            return z
        z, low = hidden.new_empty(hidden.shape[0], self.size, dtype=wide), hidden.to(dtype)
        for ids in chunks(self.size, COLUMNS):
            z[:, ids] = F.linear(low[:, columns], weight[ids].to(dtype), None if bias is None else bias[ids])
            for more, matrix in rest:
                z[:, ids] += F.linear(low[:, more], matrix[ids].to(dtype))
        return z

    def through_tail(
        self, dz: Float[Tensor, "n V"], lp: Float[Tensor, "n V"] | None, lse: Float[Tensor, " n"] | None
    ) -> Float[Tensor, "n V"]:
        """Turn the gradient of the logits, in place, into that of `weight h + bias`; a soft-cap reads lp + lse."""
        factor = self.scale / self.temperature
        if self.softcap is not None:
            assert lp is not None and lse is not None
            capped = (lp + lse[:, None]).mul_(self.temperature / self.softcap)
            dz *= capped.square_().neg_().add_(1.0)
        return dz.mul_(factor) if factor != 1.0 else dz

    def hidden_gradient(self, dz: Float[Tensor, "n V"], hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
        """Gradient with respect to the hidden states, from that of `weight h + bias`."""
        dtype, wide = precision(hidden)
        parts = self._split(hidden)
        if self._direct(hidden):
            found = [dz @ matrix[: self.size] for _, matrix in parts]
            return found[0] if len(found) == 1 else torch.cat(found, 1)
        out = torch.zeros_like(hidden, dtype=wide)
        for ids in chunks(self.size, COLUMNS):
            piece = dz[:, ids].to(dtype)
            for columns, matrix in parts:
                out[:, columns] += piece @ matrix[ids].to(dtype)
        return out

    def add_gradients(
        self, weight: Tensor | None, bias: Tensor | None, low_rank: Tensor | None,
        dz: Float[Tensor, "n V"], hidden: Float[Tensor, "n H"],
    ) -> None:  # fmt: skip
        """Add the gradients of PARAMETERS to the given sums, in place; None is frozen. Padding rows are not touched."""
        for total, (columns, _) in zip((weight, low_rank), self._split(hidden), strict=False):  # no low rank: one part
            if total is not None:
                _add_outer(total[: self.size], dz, hidden[:, columns])
        if bias is not None:
            bias[: self.size] += dz.sum(0)


def _add_outer(total: Float[Tensor, "V k"], dz: Float[Tensor, "n V"], columns: Float[Tensor, "n k"]) -> None:
    """total += dz^T columns, in the precision of the products."""
    dtype, wide = precision(columns)
    if dtype == wide:
        total.addmm_(dz.T, columns)
        return
    for ids in chunks(total.shape[0], COLUMNS):
        total[ids] += dz[:, ids].T.to(dtype) @ columns.to(dtype)


def precision(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the products, dtype of logits, losses and sums) for some hidden states."""
    if hidden.dtype == torch.float64:
        return torch.float64, torch.float64
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype, torch.float32


def exact(z: Tensor) -> torch.autocast:
    """Autocast switched off, for what follows the products: it would round sums over the vocabulary."""
    return torch.autocast(z.device.type, enabled=False)


@dataclass(frozen=True)
class HeadRows:
    """A view's full-vocabulary log-probs, lazily: hidden states [N, H] and the head that reads them."""

    hidden: Float[Tensor, "N H"]
    head: Head

    def log_probs(self, rows: Int[Tensor, " n"] | slice) -> Float[Tensor, "n V"]:
        z = self.head.logits(self.hidden[rows])
        for block in blocks(z.shape[0], z.shape[1], z.device):
            z[block] -= z[block].logsumexp(-1, keepdim=True)  # runs on all threads even if the block is one row
        return z

    def take(self, rows: Int[Tensor, " n"]) -> "HeadRows":
        return HeadRows(self.hidden[rows], self.head)


@dataclass(frozen=True)
class TableRows:
    """Full-vocabulary log-probs that are simply held: for small vocabularies and tests."""

    table: Float[Tensor, "N V"]

    def log_probs(self, rows: Int[Tensor, " n"] | slice) -> Float[Tensor, "n V"]:
        return self.table[rows].clone()

    def take(self, rows: Int[Tensor, " n"]) -> "TableRows":
        return TableRows(self.table[rows])


# ---------------------------------------------------------------------------------------------------------------------
# Scores: no gradient


@dataclass(frozen=True)
class RowScores:
    """What `score_rows` read off N rows (nats); fields that were not asked for are None."""

    sampled: Float[Tensor, " N"]
    log_norm: Float[Tensor, " N"]  # log-sum-exp of the logits
    entropy: Float[Tensor, " N"] | None
    top_ids: Int[Tensor, "N Kt"] | None
    top: Float[Tensor, "N Kt"] | None
    ids: Int[Tensor, "N K"] | None  # the ids that `choose` gave
    valid: Bool[Tensor, "N K"] | None
    at_ids: Float[Tensor, "N K"] | None
    tail: Float[Tensor, " N"] | None  # log of the mass outside the valid ids


Choose = Callable[[slice, Tensor | None], tuple[Tensor, Tensor]]  # (rows, their top-k ids) -> ids, valid [n, K]


@torch.no_grad()
def score_rows(
    head: Head,
    hidden: Float[Tensor, "N H"],
    tokens: Int[Tensor, " N"],
    *,
    top_k: int = 0,
    entropy: bool = True,
    choose: Choose | None = None,
    chunk: int | None = None,
) -> RowScores:
    """Log-prob of each token, and on request entropy, the top-k, and log-probs at chosen ids with the tail outside.

    `choose` may read the chunk's own top-k ids, so candidate sets made of both models' lists need one pass only.
    Raises ValueError when `top_k` exceeds the vocabulary.
    """
    if top_k > head.size:
        raise ValueError(f"top_k = {top_k} exceeds the vocabulary of {head.size} ids; ask for at most that many")
    size = head.chunk(chunk)
    parts = [_score_chunk(head, hidden, tokens, rows, top_k, entropy, choose) for rows in chunks(hidden.shape[0], size)]
    if not parts:  # no rows: score an empty chunk for the shapes
        parts = [_score_chunk(head, hidden, tokens, slice(0, 0), top_k, entropy, choose)]
    columns = zip(*parts, strict=True)
    return RowScores(*(None if c[0] is None else torch.cat([t for t in c if t is not None]) for c in columns))  # type: ignore[arg-type]


def _score_chunk(
    head: Head, hidden: Tensor, tokens: Tensor, rows: slice, top_k: int, entropy: bool, choose: Choose | None
) -> list[Tensor | None]:
    z = head.logits(hidden[rows])
    top_ids = torch.topk(z, top_k, dim=-1).indices if top_k else None
    ids, valid = (None, None) if choose is None else choose(rows, top_ids)
    log_norm, ent, tail = (z.new_empty(z.shape[0]) for _ in range(3))
    with exact(z):
        for block in blocks(z.shape[0], z.shape[1], z.device):
            log_norm[block] = z[block].logsumexp(-1)
            lp = z[block].sub_(log_norm[block, None])
            if not entropy and ids is None:
                continue
            p = lp.exp()
            if entropy:
                ent[block] = -torch.linalg.vecdot(p, lp)
            if ids is not None and valid is not None:
                tail[block] = tail_of(p, ids[block], valid[block])
    at_top = None if top_ids is None else z.gather(1, top_ids)
    at_ids = None if ids is None else z.gather(1, ids)
    return [
        z.gather(1, tokens[rows, None]).squeeze(1), log_norm, ent if entropy else None, top_ids, at_top,
        ids, valid, at_ids, None if ids is None else tail,
    ]  # fmt: skip


def tail_of(p: Float[Tensor, "n V"], ids: Int[Tensor, "n K"], valid: Bool[Tensor, "n K"]) -> Float[Tensor, " n"]:
    """Log of the mass outside the valid ids, summed over that complement; `p` is overwritten.

    A mass of 0 (the ids cover the vocabulary) gives the log of the smallest normal number, never -inf.
    """
    return clear(p, ids, valid).sum(-1).clamp(min=torch.finfo(p.dtype).tiny).log()


def clear(p: Float[Tensor, "n V"], ids: Int[Tensor, "n K"], valid: Bool[Tensor, "n K"]) -> Float[Tensor, "n V"]:
    """Set the entries at the valid ids to 0, in place. An id may also stand in an invalid column: a product, because
    it does not depend on the order in which the columns are written."""
    return p.scatter_reduce_(1, ids, (~valid).to(p.dtype), "prod")
