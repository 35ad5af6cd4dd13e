"""Every setting of a recipe, with its type, default and meaning: as rows, and as the table behind `opd train --help`.

Left out: the settings themselves (`config`).
"""

import ast
import json
import re
from collections.abc import Iterator
from itertools import groupby
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opdkit.config import ModelConfig, Recipe, section_of

FIELDS_INTRO = (
    "Every setting of a recipe. In the YAML file a setting stands under its section; on the command line it is "
    "written section.key=value, and the value is read as YAML: 1e-3, true, null, [a, b], {level: 2}."
)


def fields(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted name, type, default, description with unit) of every field of a recipe."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        if (inner := section_of(kind)) is not None:
            yield from fields(inner, f"{prefix}{name}.")
            continue
        if name == "teachers":
            yield from fields(ModelConfig, f"{prefix}teachers.NAME.")
            continue
        default = "required" if info.is_required() else repr(info.default)
        yield f"{prefix}{name}", _type_name(kind), default, info.description or ""


def _type_name(kind: Any) -> str:
    """A Python annotation as text, without the bounds that the description's error messages give."""
    if get_origin(kind) is Annotated:
        return _type_name(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(_type_name(part) for part in get_args(kind))
    if kind is type(None):
        return "None"
    return str(kind).replace("typing.", "") if get_args(kind) else kind.__name__


def print_fields() -> None:
    """Print every recipe field by section: its name, type, default and what it means, with its unit."""
    page = console()
    page.print(plain(FIELDS_INTRO))
    known = list(fields())
    width = max(len(name) for name, *_ in known)
    for section, rows in groupby(known, key=lambda row: row[0].rpartition(".")[0]):
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="bold cyan", min_width=width, overflow="fold")
        table.add_column(overflow="fold")
        for name, kind, default, meaning in rows:
            table.add_row(plain(name), plain(f"{_yaml_type(kind)}, {_yaml_default(default)}\n{_yaml_none(meaning)}"))
        page.print()
        page.print(plain(section or "top level"), style="bold")
        page.print(table)


def console() -> Console:
    """A terminal that prints text as it is."""
    return Console(highlight=False, markup=False)


def plain(text: str) -> Text:
    """Text that rich prints as it is: brackets are not markup, nothing is cut."""
    return Text(text)


def _yaml_none(text: str) -> str:
    return re.sub(r"\bNone\b", "null", text)


def _yaml_type(kind: str) -> str:
    """A Python annotation in the words of a recipe: `Optional[Literal['a', 'b']]` is `a | b | null`."""
    kind = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", "").replace(", ", " | "), kind)
    return _yaml_none(re.sub(r"^Optional\[(.*)\]$", r"\1 | None", kind))


def _yaml_default(default: str) -> str:
    """A default as one would type it in YAML; JSON is YAML, and plain words need no quotes."""
    if default == "required":
        return default
    return "default " + re.sub(r'^"(.+)"$', r"\1", json.dumps(ast.literal_eval(default)))
