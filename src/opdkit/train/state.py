"""What a run must remember, as one JSON value and named tensors, and back: exactly, and without pickle.

Left out: arbitrary objects. A state is made of dicts, lists, tuples, tensors, numbers, strings, bools and None.
"""

import math
import random
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdkit.errors import RunError

# safetensors has no word for the others (complex128, quantised types)
DTYPES = frozenset(
    [
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    ]
)
Key = (str, int, float, bool, type(None), tuple)


def pack(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a nested state into a JSON value and its tensors by name (contiguous, on the CPU).

    The same tensor object in two places is stored once. Tensors that merely share memory become independent copies.
    In the JSON value {"$tensor": name}, {"$tuple": [...]}, {"$dict": [[key, value], ...]} (keys that are no plain
    strings) and {"$float": "nan"} stand for what JSON cannot say.
    Raises RunError, naming the place, for anything that `unpack` could not restore exactly.
    """
    packer = _Packer()
    return packer.encode(state, ()), packer.tensors


def unpack(obj: Any, tensors: dict[str, Tensor]) -> Any:
    """The state that `pack` split; its tensors are those of `tensors`, not copies."""
    if isinstance(obj, list):
        return [unpack(item, tensors) for item in obj]
    if not isinstance(obj, dict):
        return obj
    if "$tensor" in obj:
        return tensors[obj["$tensor"]]
    if "$float" in obj:
        return float(obj["$float"])
    if "$tuple" in obj:
        return tuple(unpack(item, tensors) for item in obj["$tuple"])
    if "$dict" in obj:
        return {unpack(key, tensors): unpack(value, tensors) for key, value in obj["$dict"]}
    return {key: unpack(value, tensors) for key, value in obj.items()}


class _Packer:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}  # id of a tensor -> its name
        self._kept: list[Tensor] = []  # ids stay valid while the tensors live
        self._storages: set[int] = set()

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        if isinstance(value, Tensor):
            return {"$tensor": self._store(value, path)}
        if type(value) is list:
            return [self.encode(item, (*path, str(i))) for i, item in enumerate(value)]
        if type(value) is tuple:
            return {"$tuple": [self.encode(item, (*path, str(i))) for i, item in enumerate(value)]}
        if type(value) is dict:
            return self._dict(value, path)
        raise _cannot(path, f"a {type(value).__name__}", "a dict, list, tuple, tensor, number, string, bool or None")

    def _dict(self, value: dict[Any, Any], path: tuple[str, ...]) -> dict[str, Any]:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(item, (*path, key)) for key, item in value.items()}
        pairs = []
        for key, item in value.items():
            if not isinstance(key, Key):
                raise _cannot(path, f"a dict with a {type(key).__name__} as key", "strings, numbers or tuples as keys")
            pairs.append([self.encode(key, path), self.encode(item, (*path, str(key)))])
        return {"$dict": pairs}

    def _store(self, tensor: Tensor, path: tuple[str, ...]) -> str:
        if id(tensor) in self._names:
            return self._names[id(tensor)]
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in DTYPES:
            raise _cannot(path, f"a {tensor.layout} {tensor.dtype} tensor on {tensor.device}", "a dense, real one")
        name = "/".join(path) or "state"
        while name in self.tensors or name == "__metadata__":  # the one name that safetensors keeps for itself
            name += "'"
        stored = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = stored.untyped_storage()
        if storage.data_ptr() in self._storages or storage.nbytes() != stored.numel() * stored.element_size():
            stored = stored.clone()  # safetensors refuses tensors that share memory
            storage = stored.untyped_storage()
        if storage.nbytes():
            self._storages.add(storage.data_ptr())
        self.tensors[name], self._names[id(tensor)] = stored, name
        self._kept.append(tensor)
        return name


def _cannot(path: tuple[str, ...], given: str, expected: str) -> RunError:
    return RunError(f"the state at {'.'.join(path) or 'its top'} is {given}; a checkpoint can hold {expected}")


def rng_state() -> dict[str, Any]:
    """State of the global generators of python, numpy and torch (CPU, and every CUDA device), for `pack`."""
    version, keys, gauss = random.getstate()
    name, numpy_keys, *numpy_rest = np.random.get_state(legacy=True)
    return {
        "python": [version, torch.tensor(keys, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(numpy_keys).astype(np.int64)), *numpy_rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned.

    With another number of CUDA devices their generators keep their state, and a warning says so.
    """
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys.tolist()), gauss))
    name, numpy_keys, *numpy_rest = state["numpy"]
    np.random.set_state((name, numpy_keys.numpy().astype(np.uint32), *numpy_rest))
    torch.set_rng_state(state["torch"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices != len(state["cuda"]):
        text = f"the checkpoint was written with {len(state['cuda'])} CUDA devices, this machine has {devices}"
        warnings.warn(f"{text}: the run goes on, with other random numbers on them", stacklevel=2)
    elif devices:
        torch.cuda.set_rng_state_all(state["cuda"])
