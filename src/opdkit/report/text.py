"""Numbers, times and names as the report prints them."""

import math
from datetime import datetime

MISSING = "–"


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits, thousands separated: 0.0312, 9,310, 1.5e-05."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    sign, value = ("−" if value < 0 else ""), abs(value)
    size = math.floor(math.log10(value))
    if size < -4:
        return f"{sign}{value:.{digits - 1}e}"
    return f"{sign}{value:,.{max(digits - 1 - size, 0)}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage: 86.4%."""
    return MISSING if share is None else f"{100 * share:.{digits}f}%".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds in the two units that matter: 12.3 s, 3 min 24 s, 2 h 5 min."""
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(value: int | None) -> str:
    """A number of parameters: 217 k, 0.59 M, 1.7 B."""
    if value is None:
        return MISSING
    for limit, unit in ((5e8, "B"), (5e5, "M"), (1e3, "k")):
        if value >= limit:
            scaled = value / {"B": 1e9, "M": 1e6, "k": 1e3}[unit]
            return f"{scaled:.3g} {unit}" if scaled < 1000 else f"{scaled:,.0f} {unit}"
    return str(value)


def moment(iso: str | None) -> str:
    """An ISO time to the minute with its zone: 2026-11-22 18:57 UTC. What is not an ISO time is shown as it is."""
    if iso is None:
        return MISSING
    try:
        parsed = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return f"{parsed:%Y-%m-%d %H:%M} {parsed.tzname() or ''}".strip()


def whole(value: int | None) -> str:
    """An integer with its thousands separated: 151,936."""
    return MISSING if value is None else f"{value:,}"


def teacher_name(name: str) -> str:
    """A teacher's row label; the usual name is not said twice."""
    return "Teacher" if name == "teacher" else f"Teacher {name}"
