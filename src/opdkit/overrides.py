"""Settings on the command line: `section.key=value`, the value read as YAML.

Left out: whether the key exists; the recipe's validation says so.
"""

import contextlib
from typing import Any

import yaml

from opdkit.errors import RecipeError


def parse_override(override: str) -> tuple[str, Any]:
    """(dotted key, value) of `a.b=c`. Raises RecipeError for another form, or a value that is not YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override '{override}' is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override '{override}': the value is not valid YAML ({error})") from error
    if value == "None":  # as Python and this program's own help print it
        return key, None
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-3 as text
            return key, float(value)
    return key, value


def apply_override(data: dict[str, Any], key: str, value: Any) -> None:
    """Write a value at a dotted key; sections that are missing are made. Raises RecipeError below a plain value."""
    *sections, last = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise RecipeError(f"override '{key}={value}': '{section}' is a value, not a section")
    data[last] = value
