"""The table of features of TRL, verl, ms-swift and opdkit, from `peers.yaml`; our cells are looked up before they are printed.

Left out: checks of the other systems' cells; the file says at which versions they were read.
"""

import ast
import importlib
import inspect
import sys
import tomllib
from functools import cache
from pathlib import Path

import yaml

from opdkit.catalogue import method_function, method_names
from opdkit.config import recipe_path
from opdkit.errors import RecipeError
from opdkit.fields import fields

ROOT = Path(__file__).parents[1]
SYSTEMS = ("trl", "verl", "ms-swift", "opdkit")
READ_AT = ("Read in the sources and documents of TRL 1.16.0, verl (2026-08-22, 1dda039) and ms-swift (2026-08-22, 3602360); "
           "what was an open pull request there counts as absent.")  # fmt: skip


def rows() -> list[dict]:
    """The rows of `peers.yaml`. Ends the program when one of our cells does not hold."""
    found = yaml.safe_load((ROOT / "scripts" / "peers.yaml").read_text())
    for row in found:
        for check in row["checks"]:
            if not holds(check):
                sys.exit(f"scripts/peers.yaml: '{row['feature']}' claims {row['opdkit']!r}, but {check} does not hold")
    return found


def holds(check: str) -> bool:
    """Whether a check of `peers.yaml` is true in this checkout."""
    kind, _, what = check.partition(":")
    return {"method": lambda: what in method_names(), "field": lambda: what in _types(), "value": lambda: _value(what),
            "import": lambda: _imports(what), "test": lambda: _test(what), "command": lambda: _command(what),
            "recipe": lambda: _recipe(what), "file": lambda: (ROOT / what).is_file(), "extra": lambda: what in _extras(),
            "no": lambda: what not in _imports_of_the_package()}[kind]()  # fmt: skip


@cache
def _types() -> dict[str, str]:
    return {name: kind for name, kind, _, _ in fields()}


def _value(what: str) -> bool:
    """Whether a field's type, or a method argument's (method.NAME.ARGUMENT), names a value."""
    name, _, text = what.rpartition(":")
    if name.startswith("method."):
        _, method, argument = name.split(".")
        return repr(text) in str(inspect.signature(method_function(method)).parameters[argument].annotation)
    return repr(text) in _types()[name]


def _imports(what: str) -> bool:
    module, _, name = what.partition(":")
    try:
        return name in vars(importlib.import_module(module))
    except ModuleNotFoundError:
        return False


def _test(what: str) -> bool:
    """Whether a test of this name is in a file."""
    file, _, name = what.partition("::")
    if not (ROOT / file).is_file():
        return False
    return name in [
        node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
    ]


def _command(name: str) -> bool:
    from opdkit.cli import app

    return name in [command.name for command in app.registered_commands]


def _recipe(name: str) -> bool:
    try:
        return recipe_path(name).is_file()
    except RecipeError:
        return False


def _extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@cache
def _imports_of_the_package() -> frozenset[str]:
    """The first part of every module that the package imports anywhere."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {name.split(".")[0] for name in names}
    return frozenset(found)


def table(short: bool) -> str:
    """The table as Markdown; `short` is the README's."""
    lines = ["| | TRL | verl | ms-swift | **opdkit** |", "|---|---|---|---|---|"]
    for row in rows():
        if short and not row.get("short"):
            continue
        cells = [row[name] for name in SYSTEMS]
        if short:
            cells[-1] = row.get("brief", cells[-1])
        lines.append(f"| {row['feature']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
