"""A student that several processes share: parameters, gradients and optimiser moments divided among them by FSDP2.

The update's forward passes gather one layer at a time. Sampling and scoring have uneven lengths in every process, so they
gather the whole student first and communicate nothing until they are done. The vocabulary head is read between a
forward pass and its backward, when it is whole, so it is differentiated like any other parameter.
"""

import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from opdkit.models import LanguageModel
from opdkit.train.processes import Processes


def shard(lm: LanguageModel, processes: Processes) -> None:
    """Divide the student's parameters among the processes, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(processes.device.type, (processes.count,))
    model = lm.model
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    model.read_hidden = types.MethodType(_read_hidden, model)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "read_hidden")
    lm.forward = model.read_hidden
    with torch.no_grad():  # the first pass decides which module is the root: it must not be a layer that sampling calls
        lm.hidden(torch.zeros(1, 1, dtype=torch.long, device=processes.device))
    model.reshard()  # the root stays whole after a forward pass, and its parameters would be the whole ones


def _read_hidden(model: Any, **inputs: Any) -> Any:
    return model.base_model(**inputs)


def is_sharded(lm: LanguageModel) -> bool:
    return bool(_divided([lm.model]))


@contextmanager
def whole(lm: LanguageModel) -> Iterator[None]:
    """Every process holds all parameters inside the block, and forward passes without gradient communicate nothing."""
    parts = _divided(lm.model.modules())
    forward = lm.forward
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    if parts:
        lm.forward = None
    try:
        yield
    finally:
        lm.forward = forward
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not lm.model, recurse=False)


def last_micro_batch(lm: LanguageModel, is_last: bool) -> None:
    """Sum gradients over the processes in the last backward pass of an update only."""
    if is_sharded(lm):
        lm.model.set_requires_gradient_sync(is_last)


def gathered(value: Any) -> Any:
    """A nested state with every sharded tensor made whole; all processes must call it with states alike."""
    if isinstance(value, Tensor):
        return value.full_tensor() if hasattr(value, "full_tensor") else value
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(item) for item in value)
    return value


def whole_weights(lm: LanguageModel) -> dict[str, Tensor] | None:
    """The state dict of a sharded student, whole, tied weights once; None where nothing is sharded. Collective."""
    if not is_sharded(lm):
        return None
    once = dict(lm.saved.named_parameters())
    every = dict(lm.saved.named_parameters(remove_duplicate=False))
    return {k: gathered(v) for k, v in lm.saved.state_dict().items() if k in once or k not in every}


def scattered(state: dict[int, dict[str, Any]], parameters: list[torch.nn.Parameter]) -> dict[int, dict[str, Any]]:
    """An optimiser's per-parameter state with tensors of a parameter's shape divided as that parameter is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    found: dict[int, dict[str, Any]] = {}
    for index, values in state.items():
        p = parameters[index]
        found[index] = {
            key: distribute_tensor(v.to(p.device), p.device_mesh, p.placements)
            if isinstance(p, DTensor) and isinstance(v, Tensor) and v.shape == p.shape
            else v
            for key, v in values.items()
        }
    return found


def _divided(modules: Iterable[Any]) -> list[Any]:
    """Those of some modules that FSDP2 divided."""
    from torch.distributed.fsdp import FSDPModule

    return [m for m in modules if isinstance(m, FSDPModule)]


def _layers(model: Any) -> list[torch.nn.Module]:
    """The repeated blocks of a transformer: the classes that transformers itself says must not be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [m for m in model.modules() if type(m).__name__ in names]
