"""Methods as JSON and back: only the engine's own types are named and made."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from opdkit import losses, support
from opdkit.errors import MethodError
from opdkit.pieces import Piece, make_piece

_TYPES: dict[str, type] = {}  # name -> dataclass that a serialised method may name


def register(*types: type) -> None:
    """Let serialised methods hold these dataclasses."""
    _TYPES.update({t.__name__: t for t in types})


def registered() -> dict[str, type]:
    """The dataclasses that serialised methods may hold, by their names, of all modules that are imported."""
    return dict(_TYPES)


for _module in (losses, support):
    register(*(t for t in vars(_module).values() if dataclasses.is_dataclass(t) and isinstance(t, type)
               and t.__module__ == _module.__name__))  # fmt: skip


def encode(value: Any) -> Any:
    """A method or any part of it as JSON types."""
    if isinstance(value, Piece):
        return {"piece": value.name, "args": {k: encode(v) for k, v in value.args}}
    if type(value).__name__ in _TYPES:
        return {
            "type": type(value).__name__,
            **{f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)},
        }
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, Mapping):
        return {"map": {k: encode(v) for k, v in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise MethodError(f"cannot serialise {value!r}: it is not one of the engine's pieces, losses, supports or sources")


def decode(data: Any) -> Any:
    """The value that `encode` described; only the engine's own types are made. Raises MethodError."""
    if not isinstance(data, dict):
        return data
    if "piece" in data:
        return make_piece(data["piece"], {k: decode(v) for k, v in data["args"].items()})
    if "tuple" in data:
        return tuple(decode(v) for v in data["tuple"])
    if "map" in data:
        return {k: decode(v) for k, v in data["map"].items()}
    if data.get("type") not in _TYPES:
        raise MethodError(
            f"unknown type {data.get('type')!r} in a serialised method; known: {', '.join(sorted(_TYPES))}"
        )
    return _TYPES[data["type"]](**{k: decode(v) for k, v in data.items() if k != "type"})
