"""What one value of another system becomes here: a small function for every `as:` of `names.yaml` that reads one name.

A value that cannot be raises WrongValue, whose text says what was expected. MISSING stands for no setting at all.
Left out: settings that several names make together (`joint.py`).
"""

from collections.abc import Callable
from typing import Any


class WrongValue(ValueError):
    """A value that a name cannot have; the text is what was expected."""


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING = _Missing()


def same(value: Any) -> Any:
    return value


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise WrongValue("expected text")
    if "${" in value:
        raise WrongValue("expected the value itself; references to other settings are not resolved here")
    return value


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise WrongValue("expected true or false")
    return value


def number(value: Any) -> float:
    """A float; YAML 1.1 reads 1e-6 as text, which is a number all the same."""
    try:
        if isinstance(value, bool | list | dict) or value is None:
            raise ValueError
        return float(value)
    except ValueError:
        raise WrongValue("expected a number") from None


def positive(value: Any) -> float:
    if number(value) <= 0:
        raise WrongValue("expected a number above 0")
    return number(value)


def share(value: Any) -> float:
    try:
        inside = 0.0 <= number(value) <= 1.0
    except WrongValue:
        inside = False
    if not inside:
        raise WrongValue("expected a number between 0 and 1")
    return number(value)


def complement(value: Any) -> float:
    return 1.0 - share(value)


def integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).lstrip("-").isdigit():
        raise WrongValue("expected a whole number")
    if int(value) < 1:
        raise WrongValue("expected a whole number of at least 1")
    return int(value)


def top_k(value: Any) -> int:
    if value in (0, -1, None):
        return 0
    return integer(value)


def targets(value: Any) -> Any:
    """A list of module names, one name or several in one text, or all-linear."""
    if value in ("all-linear", ["all-linear"]):
        return "all-linear"
    names = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise WrongValue("expected all-linear or a list of module names")
    return names


def init_kwargs(value: Any) -> Any:
    """transformers' from_pretrained arguments that are settings here."""
    if value in (None, {}):
        return MISSING
    known = {"dtype": "dtype", "torch_dtype": "dtype", "attn_implementation": "attn"}
    if not isinstance(value, dict) or set(value) - set(known):
        raise WrongValue("expected a mapping with dtype and attn_implementation only")
    return {known[key]: str(v).removeprefix("torch.") for key, v in value.items()}


def data(value: Any) -> dict[str, Any]:
    """Which kind of task a data set's name is."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise WrongValue("expected one data set; several in one run are not here yet")
    name = text(value)
    if name.startswith("testbed:"):
        return {"kind": "testbed", "name": name.removeprefix("testbed:")}
    return {"kind": "file" if name.endswith((".jsonl", ".parquet")) else "dataset", "path": name}


def verl_data(value: Any) -> dict[str, Any]:
    found = data(value)
    return found if found["kind"] == "testbed" else {**found, "format": "verl"}


def one_file(value: Any) -> Any:
    if value in (None, [], ""):
        return MISSING
    return text(value[0]) if isinstance(value, list) and len(value) == 1 else text(value)


def frequency(value: Any) -> Any:
    """Every n steps; 0, negative and null are never."""
    if isinstance(value, int) and value <= 0:
        return None
    return None if value is None else integer(value)


def trackers(value: Any) -> list[str]:
    """The trackers that are here, of theirs; the others' numbers are in metrics.jsonl."""
    names = [value] if isinstance(value, str) else ([] if value is None else value)
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise WrongValue("expected a tracker's name or a list of them")
    here = ["tensorboard", "wandb", "trackio"]
    unknown = [n for n in names if n not in [*here, "none", "all", "console", "file"]]
    if unknown:
        raise WrongValue(f"{', '.join(unknown)} is not here: expected tensorboard, wandb or trackio")
    return here[:1] if "all" in names else [n for n in here if n in names]


_ALL = (same, text, flag, number, positive, share, complement, integer, top_k, targets, init_kwargs, data, verl_data,
        one_file, frequency, trackers)  # fmt: skip
SINGLE: dict[str, Callable[[Any], Any]] = {f.__name__: f for f in _ALL}
