"""Counting the bytes of tensors that are alive while code runs on them; the tensors themselves need no memory.

Left out: memory inside kernels.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opdkit.products import prefers_onednn

MAPPED = 2**25  # bytes: larger blocks go back to the system as soon as they are freed (glibc)
# What a smaller block costs in a process, with the gaps that freed ones leave (benchmarks/plan.py): most of what a pass
# with gradient makes stays, so 1.34 to 1.43 was measured; without gradient all is freed soon, and 1.6 to 2.6. Kernels
# that oneDNN keeps (products.SHAPES) lie between the blocks and keep gaps apart.
HEAP, CHURNED, CHURNED_BESIDE_KERNELS = 1.4, 2.05, 2.4
LEFT = 16 * 2**20  # bytes that freed blocks of all sizes leave in a process whatever it does
KERNELS = 28 * 2**20  # bytes that oneDNN keeps


class Meter(TorchDispatchMode):
    """Counts the bytes of all storages made inside it that are alive. `known` tensors do not count, until one of them
    that is `replaced` is freed.

    `peaks` holds the largest number of each segment; `mark` starts the next one.
    """

    def __init__(
        self, known: Iterable[Any] = (), replaced: Iterable[Any] = (), number: float = 0.5, heap: float = 1.0
    ) -> None:
        super().__init__()
        self.number = number  # what every number is that the code reads
        self.heap = heap  # what a small storage counts
        self.live, self.peaks = 0, [0]
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for t in known)
        for storage in {t.untyped_storage() for t in replaced}:
            self._seen.add(storage)
            weakref.finalize(storage, self._free, held(storage.nbytes(), heap))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.number
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                size = held(storage.nbytes(), self.heap)
                self.live += size
                weakref.finalize(storage, self._free, size)
        self.peaks[-1] = max(self.peaks[-1], self.live)
        return out

    def _free(self, size: int) -> None:
        self.live -= size

    def mark(self) -> None:
        self.peaks.append(self.live)


def churned() -> float:
    """What a small block costs in a pass without gradient on this machine."""
    return CHURNED_BESIDE_KERNELS if prefers_onednn() else CHURNED


def left() -> int:
    """Bytes of a process on this machine that are no tensor's."""
    return LEFT + KERNELS * prefers_onednn()


def held(size: int, heap: float) -> int:
    """What a block of memory takes: its size, and gaps beside it where the allocator does not give it back at once."""
    return size if size >= MAPPED else int(heap * size)
