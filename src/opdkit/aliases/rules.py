"""Which method a peer's names choose: the first of its rules that fits.

Left out: what the chosen method's arguments become (`translate.py`).
"""

from collections.abc import Mapping
from typing import Any

from opdkit.aliases.table import Meaning, Peer, Rule
from opdkit.errors import RecipeError


def fitting(peer: Peer, names: Mapping[str, Any]) -> Rule:
    """The first rule whose `when` fits the values. Raises RecipeError when none does."""
    for rule in peer.rules:
        if all(_fits(wanted, names.get(name)) for name, wanted in rule.when.items()):
            return rule
    seen = ", ".join(f"{n}: {names.get(n)!r}" for n in dict.fromkeys(n for r in peer.rules for n in r.when))
    raise RecipeError(f"peer: {peer.name}: no method here fits {seen}; name one of ours with method.name")


def unread(peer: Peer, meaning: Meaning | None, names: Mapping[str, tuple[Any, int]], level: int) -> bool:
    """Whether a name of a meaning was given at this level or above, differs from the default and is read by no rule."""
    if meaning is None:
        return False
    asked = {name for rule in peer.rules for name in rule.when}
    return any(
        name in names and names[name][1] >= level and name not in asked and names[name][0] != peer.defaults.get(name)
        for name in meaning.names
    )


def _fits(wanted: Any, value: Any) -> bool:
    if wanted in ("given", "absent"):
        return (value not in (None, [], "", False)) == (wanted == "given")
    return value in wanted if isinstance(wanted, list) else value == wanted
