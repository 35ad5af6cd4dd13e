"""What a recipe gives, in whose names: splits mappings into our settings and others' names, reads and writes by dotted key.

Left out: what the names mean (`table.py`).
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from opdkit.aliases.table import is_prefix, known_names, look_up
from opdkit.aliases.values import MISSING
from opdkit.config import ModelConfig, Recipe, nearest
from opdkit.errors import RecipeError


def split(data: Mapping[str, Any], peer: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(our part of a recipe, others' names with dotted keys). Raises RecipeError for a name that nobody uses."""
    own: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    for key, value in data.items():
        section = _section(key)
        if key not in Recipe.model_fields or (section and isinstance(value, str) and look_up(key, peer)):
            theirs |= dict(_leaves(key, value, peer))
        elif section and isinstance(value, dict):
            foreign = [k for k in value if _foreign(key, k, peer)]
            own[key] = {k: v for k, v in value.items() if k not in foreign}
            theirs |= {k: value[k] for k in foreign}
        else:
            own[key] = dict(value) if isinstance(value, dict) else value
    return own, theirs


def split_pairs(pairs: Mapping[str, Any], peer: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same for dotted settings of the command line."""
    own: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    for key, value in pairs.items():
        first, _, rest = key.partition(".")
        if first not in Recipe.model_fields or (not rest and _section(first) and look_up(key, peer)):
            theirs |= dict(_leaves(key, value, peer))
        elif rest and _foreign(first, rest, peer):
            theirs[rest] = value
        else:
            own[key] = value
    return own, theirs


def at(data: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, MISSING where there is none, None below a section that is null."""
    found: Any = data
    for part in key.split("."):
        if found is None:
            return None
        if not isinstance(found, Mapping) or part not in found:
            return MISSING
        found = found[part]
    return found


def put(data: dict[str, Any], key: str, value: Any) -> None:
    """Write a value at a dotted key, without changing mappings that the caller may share."""
    first, _, rest = key.partition(".")
    if not rest:
        data[first] = value
        return
    inner = dict(data.get(first) or {})
    put(inner, rest, value)
    data[first] = inner


def own_default(key: str) -> Any:
    """Our default of a setting; MISSING for required ones, arguments of methods, and sections that are off by default."""
    section: type[BaseModel] = Recipe
    *sections, last = key.split(".")
    if sections[:1] == ["teachers"]:
        section, sections = ModelConfig, []
    for name in sections:
        info = section.model_fields.get(name)
        inner = _models(info.annotation) if info is not None and info.default is not None else []
        if not inner:
            return MISSING
        section = inner[0]
    info = section.model_fields.get(last)
    return MISSING if info is None or info.is_required() else info.default


def show(value: Any) -> str:
    """A value as one would type it in YAML."""
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def _leaves(key: str, value: Any, peer: str | None) -> Iterator[tuple[str, Any]]:
    """The names below a key that is not ours. Raises RecipeError for one that nobody uses."""
    if look_up(key, peer) or look_up(key, None):
        yield key, value
    elif isinstance(value, Mapping) and value and is_prefix(key):
        for inner, found in value.items():
            yield from _leaves(f"{key}.{inner}", found, peer)
    else:
        hint = nearest(key, list(Recipe.model_fields))
        if "did you mean" not in hint:
            theirs = nearest(key, known_names(peer))
            hint = theirs if "did you mean" in theirs else hint + (f", and the names of {peer}" if peer else "")
        raise RecipeError(f"unknown key '{key}'{hint}")


def _foreign(section: str, key: str, peer: str | None) -> bool:
    """Whether a key inside one of our sections is another system's name for one of that section's settings."""
    model = _section(section)
    if model is None or key in model.model_fields:
        return False
    targets = [target for m in look_up(key, peer) for target in m.to]
    return f"{section}.{key}" not in targets and any(t.split(".")[0] in (section, "rule") for t in targets)


def _section(name: str) -> type[BaseModel] | None:
    """The section of a recipe by name; None for `teachers`, whose keys are free, and for plain values."""
    info = Recipe.model_fields.get(name)
    found = _models(info.annotation) if info is not None and name != "teachers" else []
    return found[0] if found else None


def _models(kind: Any) -> list[type[BaseModel]]:
    return [k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)]
