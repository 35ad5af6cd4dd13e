"""Memory for a chunk of logits that outlives the call which fills it.

On a CPU a fresh tensor of 64 MiB is 16,384 pages that the system hands out and clears one by one as they are written, which
takes as long as several passes over it: at 4,096 ids a quarter of the head's time. So every thread keeps one room for each
name, the largest that it was asked for. Other devices have allocators that do this themselves.
"""

import threading

import torch
from jaxtyping import Float
from torch import Tensor

KEPT = 2**24  # entries: 64 MiB of float32, the largest chunk that nobody asked for by name


class _Kept(threading.local):
    def __init__(self) -> None:
        self.rooms: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


def room(name: str, rows: int, width: int, like: Tensor, dtype: torch.dtype) -> Float[Tensor, "rows width"]:
    """Memory of the thread's own on the device of `like`, with undefined contents: those of the last use of the name.

    Only one use of a name at a time. Rooms above KEPT, other devices and tensors that hold no numbers (a rehearsal's) get a
    new one.
    """
    key, need = (name, dtype), rows * width
    if need > KEPT or like.device.type != "cpu" or type(like) not in (Tensor, torch.nn.Parameter):
        return like.new_empty(rows, width, dtype=dtype)
    held = _kept.rooms
    if key not in held or held[key].numel() < need:
        held.pop(key, None)  # before the larger one exists
        with torch.inference_mode(False):  # sampling may ask first, and a pass with a gradient next
            held[key] = torch.empty(need, dtype=dtype)
    return held[key][:need].view(rows, width)


def release() -> None:
    """Give back what this thread keeps."""
    _kept.rooms.clear()
