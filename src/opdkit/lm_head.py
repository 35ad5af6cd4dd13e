"""The vocabulary head and the rows of log-probs that it can form, a few at a time.

Axes: n rows, N rows of a view, P rows of the head's weight, V real vocabulary (V <= P), D columns of the weight, r of
the low rank, H = D + r of the hidden states.

The products run in the hidden states' precision (autocast's, where it is on), or in float32 on a CPU without
instructions for that precision, and are kept in float32, or float64 for float64 input. They are formed for some ids at
a time, so that neither a second copy of the logits nor one of the weight exists. Left out: sharded (tensor-parallel)
heads, and scores (`row_scores`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opdkit.divergences import LogProbs
from opdkit.errors import ModelError, RecipeError
from opdkit.products import add_outer, add_times, few, linear, prefers_onednn

CHUNK_ENTRIES = 2**24  # logits of one chunk when none is asked for: 64 MiB of float32
BLOCK_ENTRIES = 2**19  # elementwise block: 2 MiB of float32 stay in cache, and are worth waking all threads for
DEVICE_BLOCK_ENTRIES = 2**24  # elsewhere: enough work for one kernel launch
COLUMN_ENTRIES = 2**21  # of the weight in one product on the CPU: 8 MiB of float32 stay in cache, converted or not
DEVICE_COLUMNS = 2**14  # ids of one product elsewhere, and only where precisions differ
APART_ENTRIES = 2**20  # of a product that is formed apart: 4 MiB that stay in cache and in the allocator's hands
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
    ids. ModelError when `vocab` exceeds the rows or the low rank has others; RecipeError for a temperature or
    soft-cap <= 0.
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
            raise ModelError(f"vocab = {self.vocab}, but the head has {rows} rows; expected 1 to {rows} real ids")
        if self.low_rank is not None and self.low_rank.shape[0] != rows:
            raise ModelError(
                f"the low rank has {self.low_rank.shape[0]} rows and the weight {rows}; expected one per id"
            )
        if self.temperature <= 0 or (self.softcap is not None and self.softcap <= 0):
            raise RecipeError(f"temperature {self.temperature} and softcap {self.softcap} must be above 0")

    @property
    def size(self) -> int:
        """V, the number of real token ids."""
        return self.vocab or self.weight.shape[0]

    def at(self, temperature: float) -> "Head":
        return replace(self, temperature=temperature)

    def chunk(self, rows: int | None = None) -> int:
        """Rows of one chunk: `rows`, or as many as CHUNK_ENTRIES logits allow, at least 16. RecipeError below 1."""
        if rows is not None and rows < 1:
            raise RecipeError(f"chunk = {rows} rows; expected at least 1, or None for the default")
        return rows or max(16, CHUNK_ENTRIES // self.size)

    def logits(self, hidden: Float[Tensor, "n H"], out: Float[Tensor, "n V"] | None = None) -> Float[Tensor, "n V"]:
        """Logits over the real vocabulary after scale, soft-cap and temperature: float32, or float64 if `hidden` is.

        With `out` they are written there: a fresh tensor of this size costs as much as a pass over it in page faults.
        """
        z = self._product(hidden, hidden.new_empty(hidden.shape[0], self.size, dtype=precision(hidden)[1])
                          if out is None else out)  # fmt: skip
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z = z.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            z /= self.temperature
        return z

    def _split(self, hidden: Float[Tensor, "n H"]) -> list[tuple[slice, Tensor]]:
        """(columns of the hidden states, the matrix that reads them). ModelError for another number of columns."""
        d = self.weight.shape[1]
        parts = [(slice(0, d), self.weight)]
        if self.low_rank is not None:
            parts.append((slice(d, d + self.low_rank.shape[1]), self.low_rank))
        if hidden.shape[1] != parts[-1][0].stop:
            wanted = f"{parts[-1][0].stop}: {d} with its weight and {parts[-1][0].stop - d} with its low rank"
            raise ModelError(f"the hidden states have {hidden.shape[1]} columns, but the head reads {wanted}; append the "
                             "low rank's columns to them")  # fmt: skip
        return parts

    def _columns(self, hidden: Float[Tensor, "n H"]) -> Iterator[slice]:
        """The ids of each product."""
        if hidden.device.type == "cpu":
            most = COLUMN_ENTRIES // hidden.shape[1]
            if prefers_onednn():  # its results are formed apart
                most = min(most, APART_ENTRIES >> (hidden.shape[0] - 1).bit_length())  # few widths (products.pieces)
            return chunks(self.size, max(1, most))
        dtype, sums = precision(hidden)
        direct = dtype == sums and all(t is None or t.dtype == dtype for t in (self.weight, self.low_rank))
        return chunks(self.size, self.size if direct else DEVICE_COLUMNS)

    def _product(self, hidden: Float[Tensor, "n H"], z: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        dtype, _ = precision(hidden)
        low = hidden.to(dtype)
        with exact(z):
            for ids in self._columns(hidden):
                for i, (columns, matrix) in enumerate(self._split(hidden)):
                    x, w = low[:, columns], matrix[ids].to(dtype)
                    if i == 0 and few(x, w):
                        z[:, ids] = linear(x, w)
                    else:
                        add_product(z[:, ids], x, w.T, fresh=i == 0)
                if self.bias is not None:
                    z[:, ids] += self.bias[ids]
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
        dtype, sums = precision(hidden)
        out = torch.zeros_like(hidden, dtype=sums)
        with exact(dz):
            for ids in self._columns(hidden):
                piece = dz[:, ids].to(dtype)
                for columns, matrix in self._split(hidden):
                    add_product(out[:, columns], piece, matrix[ids].to(dtype))
        return out

    def add_gradients(
        self, weight: Tensor | None, bias: Tensor | None, low_rank: Tensor | None,
        dz: Float[Tensor, "n V"], hidden: Float[Tensor, "n H"],
    ) -> None:  # fmt: skip
        """Add the gradients of PARAMETERS to the given sums, in place; None is frozen. Padding rows are not touched."""
        for total, (columns, _) in zip((weight, low_rank), self._split(hidden), strict=False):  # no low rank: one part
            if total is not None:
                _add_outer(total[: self.size], dz, hidden[:, columns], list(self._columns(hidden)))
        if bias is not None:
            bias[: self.size] += dz.sum(0)


def _add_outer(
    total: Float[Tensor, "V k"], dz: Float[Tensor, "n V"], columns: Float[Tensor, "n k"], parts: list[slice]
) -> None:
    """total += dz^T columns, in the precision of the products; `parts` are the ids of one product where it is converted."""
    dtype, sums = precision(columns)
    low = columns.to(dtype)
    with exact(dz):
        if dtype == sums:
            add_outer(total, dz, low)
            return
        for ids in parts:
            add_product(total[ids], dz[:, ids].T.to(dtype), low)


def add_product(
    total: Float[Tensor, "m n"], a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], fresh: bool = False
) -> None:
    """total += a b, in place; `fresh`: total = a b, whatever was there."""
    if a.dtype == total.dtype:
        add_times(total, a, b, fresh)
    elif fresh:
        total.copy_(a @ b)
    else:
        total += a @ b


def precision(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the products, dtype of logits, losses and sums) for some hidden states."""
    if hidden.dtype == torch.float64:
        return torch.float64, torch.float64
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return dtype if device != "cpu" or multiplies(dtype) else torch.float32, torch.float32


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in a dtype below float64.

    Where it has not, torch multiplies bfloat16 and float16 in loops that take 4 to 50 times as long as float32 does.
    """
    if dtype == torch.float32 or not torch.backends.mkldnn.is_available():
        return dtype == torch.float32
    known = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in known and bool(known[dtype]())


def normalise(z: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """Turn logits into log-probs, in place; give the log-normalisers.

    torch's own log-softmax takes two thirds of the time, but adds up a row one number after the other: in float32 that
    costs the gradients half a digit at 32,000 ids and a whole one at 151,936.
    """
    lse = z.new_empty(z.shape[0])
    with exact(z):
        for block in blocks(z.shape[0], z.shape[1], z.device):
            lse[block] = normalise_block(z[block])[1]
    return lse


def normalise_block(z: Float[Tensor, "b V"]) -> tuple[LogProbs, Float[Tensor, " b"]]:
    """The same for rows that fit one block, with the exponentials that it takes."""
    top = z.amax(-1, keepdim=True)
    shifted = z.sub_(top).exp()
    norm = shifted.sum(-1, keepdim=True)
    log = norm.log()
    return LogProbs(z.sub_(log), shifted, norm), (top + log).squeeze(1)


def exact(z: Tensor) -> torch.autocast:
    """Autocast switched off, for what follows the products: it would round sums over the vocabulary."""
    return torch.autocast(z.device.type, enabled=False)


@dataclass(frozen=True)
class HeadRows:
    """A view's full-vocabulary log-probs, lazily: hidden states [N, H] and the head that reads them."""

    hidden: Float[Tensor, "N H"]
    head: Head

    @torch.no_grad()
    def log_probs(
        self, rows: Int[Tensor, " n"] | slice, out: Float[Tensor, "n V"] | None = None
    ) -> Float[Tensor, "n V"]:
        """The log-probs of some rows, written to `out` if it is given."""
        z = self.logits(rows, out)
        normalise(z)
        return z

    @torch.no_grad()
    def logits(self, rows: Int[Tensor, " n"] | slice, out: Float[Tensor, "n V"] | None = None) -> Float[Tensor, "n V"]:
        """The same, not normalised."""
        return self.head.logits(self.hidden[rows], out)

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
