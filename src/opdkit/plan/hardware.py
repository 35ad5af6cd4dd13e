"""Named GPUs and how much of their memory a run can use. Left out: speed."""

from dataclasses import dataclass

from opdkit.config import nearest
from opdkit.errors import RecipeError

GIB = 2**30
CONTEXT = 1.0  # GiB: CUDA context, cuBLAS and NCCL workspaces
FRAGMENTS = 0.04  # share of the memory that the allocator's blocks leave unusable


@dataclass(frozen=True)
class Gpu:
    """A GPU by name; `memory` is what its driver reports in MiB, which is less than the name says."""

    name: str
    memory: int

    @property
    def usable(self) -> int:
        """Bytes that tensors can fill: the memory less CONTEXT and FRAGMENTS."""
        return int(self.memory * 2**20 * (1 - FRAGMENTS) - CONTEXT * GIB)


GPUS = {
    g.name: g
    for g in (
        Gpu("RTX-4090-24GB", 24_564), Gpu("RTX-5090-32GB", 32_607), Gpu("A100-40GB", 40_960), Gpu("L40S-48GB", 46_068),
        Gpu("A100-80GB", 81_920), Gpu("H100-80GB", 81_559), Gpu("H200-141GB", 143_771), Gpu("B200-192GB", 183_359),
    )
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """A GPU by name. Raises RecipeError naming the nearest one."""
    by_name = {known.lower(): gpu for known, gpu in GPUS.items()}
    if name.lower() not in by_name:
        raise RecipeError(f"unknown GPU '{name}'{nearest(name.upper(), list(GPUS))}")
    return by_name[name.lower()]
