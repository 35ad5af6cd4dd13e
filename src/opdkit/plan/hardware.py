"""Where a run would take place: named GPUs with their published numbers, or the machine that plans."""

import os
from dataclasses import dataclass
from pathlib import Path

from opdkit.config import nearest
from opdkit.errors import RecipeError

GIB = 2**30
CONTEXT = 1.0  # GiB: CUDA context, cuBLAS and NCCL workspaces
FRAGMENTS = 0.04  # share of the memory that the allocator's blocks leave unusable


@dataclass(frozen=True)
class Gpu:
    """A GPU by name, with its data sheet's dense rates; `memory` (MiB) is what its driver reports, less than its name."""

    name: str
    memory: int
    half: float  # TFLOP/s of bfloat16 and float16 products
    single: float  # TFLOP/s of float32 products: PyTorch uses no TF32 unless told to
    bandwidth: float  # GB/s of its memory
    cuda = True

    @property
    def usable(self) -> int:
        """Bytes that tensors can fill: the memory less CONTEXT and FRAGMENTS."""
        return int(self.memory * 2**20 * (1 - FRAGMENTS) - CONTEXT * GIB)


@dataclass(frozen=True)
class Host:
    """The machine that plans, with its processors; `usable` is the memory (bytes) that is free now."""

    usable: int
    name: str = "this machine"
    cuda = False


GPUS = {
    g.name: g
    for g in (
        Gpu("RTX-4090-24GB", 24_564, 165.0, 83.0, 1008.0), Gpu("RTX-5090-32GB", 32_607, 210.0, 105.0, 1792.0),
        Gpu("A100-40GB", 40_960, 312.0, 19.5, 1555.0), Gpu("L40S-48GB", 46_068, 362.0, 92.0, 864.0),
        Gpu("A100-80GB", 81_920, 312.0, 19.5, 2039.0), Gpu("H100-80GB", 81_559, 989.0, 67.0, 3350.0),
        Gpu("H200-141GB", 143_771, 989.0, 67.0, 4800.0), Gpu("B200-192GB", 183_359, 2250.0, 80.0, 8000.0),
    )
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """A GPU by name. Raises RecipeError naming the nearest one."""
    by_name = {known.lower(): gpu for known, gpu in GPUS.items()}
    if name.lower() not in by_name:
        raise RecipeError(f"unknown GPU '{name}'{nearest(name.upper(), list(GPUS))}")
    return by_name[name.lower()]


def this_machine() -> Host:
    """The machine with what the system calls available, or where it does not say so, all of its memory."""
    if (listed := Path("/proc/meminfo")).is_file():
        found = dict(line.split(":", 1) for line in listed.read_text().splitlines())
        return Host(int(found["MemAvailable"].split()[0]) * 1024)
    return Host(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
