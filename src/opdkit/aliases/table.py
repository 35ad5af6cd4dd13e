"""The tables `peers.yaml` and `names.yaml` as values, and the look-up of a name.

Left out: what a value becomes (`values.py`) and which of several settings wins (`translate.py`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml

from opdkit.aliases.joint import JOINT
from opdkit.errors import RecipeError

ANY = "any"  # a meaning that every system shares


@dataclass(frozen=True)
class Meaning:
    """What one or several names mean in some systems. `names.yaml` says what each field is."""

    names: tuple[str, ...]
    of: tuple[str, ...]
    also: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    to: tuple[str, ...] = ()
    how: str = "same"
    choices: Mapping[Any, Any] | None = None
    means: str = ""
    differs: str = ""
    refuse: str = ""
    ignore: str = ""
    harmless: tuple[Any, ...] = ()

    @property
    def spellings(self) -> tuple[str, ...]:
        return self.names + self.also

    @property
    def says(self) -> str:
        return self.means or self.ignore or self.refuse

    def __hash__(self) -> int:
        return id(self)

    def same_as(self, other: "Meaning") -> bool:
        """Whether both do the same thing with a name, whoever says it."""
        mine, theirs = ((m.to, m.how, m.choices, bool(m.refuse), bool(m.ignore)) for m in (self, other))
        return mine == theirs


@dataclass(frozen=True)
class Rule:
    """One way in which a system's names choose the method here."""

    when: Mapping[str, Any]
    method: str = ""
    passed: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    means: str = ""
    differs: str = ""
    refuse: str = ""


@dataclass(frozen=True)
class Peer:
    """A system: what it takes for names that are left out, and its rules."""

    name: str
    title: str
    defaults: Mapping[str, Any]
    rules: tuple[Rule, ...]
    refuse: str = ""


@cache
def peers() -> dict[str, Peer]:
    """All systems by name."""
    found: dict[str, Peer] = {}
    for name, entry in _load("peers.yaml")["peers"].items():
        base = found[entry["like"]].defaults if "like" in entry else {}
        rules = tuple(
            Rule(r.get("when", {}), r.get("method", ""), tuple(r.get("pass", ())), r.get("set", {}), r.get("means", ""),
                 r.get("differs", ""), " ".join(r.get("refuse", "").split()))
            for r in entry.get("rules", ())
        )  # fmt: skip
        found[name] = Peer(name, entry["title"], {**base, **entry.get("defaults", {})}, rules, entry.get("refuse", ""))
    return found


@cache
def meanings() -> tuple[Meaning, ...]:
    """Every meaning, in the order of the file."""
    groups = _load("peers.yaml")["groups"]
    found = []
    for entry in _load("names.yaml"):
        of = [peer for name in entry.get("of", [ANY]) for peer in groups.get(name, [name])]
        found.append(
            Meaning(
                _list(entry["names"]), tuple(of), _list(entry.get("also")), _list(entry.get("reads")), _list(entry.get("to")),
                entry.get("as", "same"), entry.get("choices"), entry.get("means", ""), entry.get("differs", ""),
                entry.get("refuse", ""), entry.get("ignore", ""), _list(entry.get("harmless"), empty=False),
            )
        )  # fmt: skip
    return tuple(found)


@cache
def look_up(name: str, peer: str | None) -> tuple[Meaning, ...]:
    """The meanings of a name: for a peer at most one, without a peer all that differ from each other."""
    found = [m for m in meanings() if any(_fits(pattern, name) for pattern in m.spellings)]
    if peer is not None:
        return tuple(m for m in found if peer in m.of or ANY in m.of)[:1]
    different: list[Meaning] = []
    for meaning in found:
        if not any(meaning.same_as(other) for other in different):
            different.append(meaning)
    return tuple(different)


def known_names(peer: str | None) -> list[str]:
    """Every name that a peer, or anyone, uses, without those that are patterns."""
    return [n for m in meanings() if peer is None or peer in m.of or ANY in m.of for n in m.spellings if "*" not in n]


def is_prefix(key: str) -> bool:
    """Whether some dotted name goes on below this key."""
    parts = key.split(".")
    longer = (name.split(".") for m in meanings() for name in m.spellings if name.count(".") >= len(parts))
    return any(all(own in ("*", "**", part) for own, part in zip(name, parts, strict=False)) for name in longer)


def is_joint(meaning: Meaning) -> bool:
    """Whether the names of a meaning make one setting together."""
    return meaning.how in JOINT


def chosen_peer(name: Any) -> Peer:
    """The peer of a recipe's `peer:`. Raises RecipeError for an unknown one, and for one of which nothing can be had."""
    from opdkit.config import nearest

    if not isinstance(name, str) or name not in peers():
        raise RecipeError(f"peer: {name!r} is not a system whose names are known{nearest(str(name), list(peers()))}")
    if peers()[name].refuse:
        raise RecipeError(f"peer: {name} ({peers()[name].title}): {peers()[name].refuse}")
    return peers()[name]


def _fits(pattern: str, name: str) -> bool:
    if "*" not in pattern:
        return pattern == name
    return re.fullmatch(re.escape(pattern).replace(r"\*\*", ".+").replace(r"\*", r"[^.]+"), name) is not None


def _list(value: Any, empty: bool = True) -> tuple[Any, ...]:
    if value is None and empty:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


@cache
def _load(name: str) -> Any:
    loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    return yaml.load((resources.files("opdkit.aliases") / name).read_text(encoding="utf-8"), Loader=loader)
