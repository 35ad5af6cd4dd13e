"""The table of all parts that a recipe's text may name (`opdkit.expressions`), with arguments and first sentences."""

import inspect
import re
from collections.abc import Callable
from typing import Any

from opdkit import losses
from opdkit.expressions import part_names
from opdkit.pieces import Piece

MARKS = {  # methods that only parts of a group have
    "Controllers": ("init", "measure"),
    "Hooks": ("init", "update"),
    "Prepare steps": ("needs", "__call__"),
}


def table() -> str:
    groups: dict[str, list[str]] = {}
    for name, maker in sorted(part_names().items(), key=lambda item: item[0].lower()):
        groups.setdefault(kind(maker), []).append(f"| `{name}({arguments(maker)})` | {sentence(maker)} |")
    made = [
        f"**{group}**\n\n| part | what it is |\n|---|---|\n" + "\n".join(rows) for group, rows in sorted(groups.items())
    ]
    return "\n\n".join(made)


def kind(maker: Callable[..., Any]) -> str:
    """What a part is, by what makes it."""
    if not isinstance(maker, type):
        return "Signals and weights"
    if maker.__module__ == losses.__name__:
        return "Losses"
    for group, methods in MARKS.items():
        if all(method in vars(maker) for method in methods):
            return group
    return "Terms, views, supports, sources, contexts"


def arguments(maker: Callable[..., Any]) -> str:
    shown = []
    for p in inspect.signature(maker).parameters.values():
        star = "*" if p.kind is p.VAR_POSITIONAL else ""
        default = "" if p.default is p.empty else "=..." if is_long(p.default) else f"={p.default!r}"
        shown.append(f"{star}{p.name}{default}")
    return ", ".join(shown).replace("|", "\\|")


def is_long(value: Any) -> bool:
    """Whether a default has no short text: a dataclass field's factory, or a piece."""
    return "factory" in repr(value) or isinstance(value, Piece)


def sentence(maker: Callable[..., Any]) -> str:
    text = " ".join((inspect.getdoc(maker) or "").split("\n\n")[0].split())
    return re.split(r"(?<!Eq)(?<!Eqs)\. (?=[A-Z`])", text)[0].rstrip(".").replace("|", "\\|")
