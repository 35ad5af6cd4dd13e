"""The processes of one run: who does which prompts, sums over all of them, and what only the main one does.

Every process samples, scores and differentiates its own prompts. What has to be exact over the whole step (the
denominators of means, gradients, metrics, evaluations) is summed here; with one process every call is the identity.
Collectives stand between phases and never inside sampling or scoring, where processes have uneven work.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from opdkit.errors import RunError

T = TypeVar("T")
BUCKET = 2**25  # numbers of one gradient message: 128 MiB of float32


@dataclass(frozen=True)
class Processes:
    """Which process this is (`rank`, from 0) of how many (`count`), and its device."""

    rank: int
    count: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's items: every count-th, so that all processes get equal shares (or one more)."""
        return list(items[self.rank :: self.count])

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64; every process must give as many values."""
        return self._reduce(values, dist.ReduceOp.SUM) if self.count > 1 else list(values)

    def largest(self, value: int) -> int:
        return int(self._reduce([value], dist.ReduceOp.MAX)[0]) if self.count > 1 else value

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, in the order of `mine` undone where every process gives the items that it had."""
        if self.count == 1:
            return list(items)
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, list(items))
        longest = max(map(len, found))
        return [part[i] for i in range(longest) for part in found if i < len(part)]

    def share(self, value: T) -> T:
        """The main process's value."""
        box = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace the gradient of every given parameter by its sum over all processes; an absent one counts as 0."""
        if self.count == 1:
            return
        bucket: list[torch.Tensor] = []
        size = 0
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            bucket.append(p.grad)
            size += p.numel()
            if size >= BUCKET:
                _sum(bucket)
                bucket, size = [], 0
        _sum(bucket)

    def check_same(self, parts: Mapping[str, str]) -> None:
        """Raise RunError, in every process, unless all of them were given the same text for every part."""
        if self.count == 1:
            return
        found: list[Any] = [None] * self.count
        dist.all_gather_object(
            found, {k: hashlib.blake2b(v.encode(), digest_size=8).hexdigest() for k, v in parts.items()}
        )
        for name in parts:
            groups: dict[str, list[int]] = {}
            for rank, given in enumerate(found):
                groups.setdefault(given[name], []).append(rank)
            if len(groups) > 1:
                raise RunError(
                    f"the processes of this run were given different {name}: processes "
                    + " and ".join(str(ranks) for ranks in groups.values())
                    + " do not agree; start all of them with the same recipe and the same files"
                )

    def _reduce(self, values: Sequence[float], how: Any) -> list[float]:
        box = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        if box.numel():
            dist.all_reduce(box, op=how)
        return [float(v) for v in box]


def _sum(gradients: list[torch.Tensor]) -> None:
    if not gradients:
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for g in gradients:
        by_dtype.setdefault(g.dtype, []).append(g)
    for group in by_dtype.values():
        flat = torch.cat([g.reshape(-1) for g in group])
        dist.all_reduce(flat)
        for g, part in zip(group, flat.split([g.numel() for g in group]), strict=True):
            g.copy_(part.view_as(g))
