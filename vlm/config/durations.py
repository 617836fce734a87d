"""Times as users write and read them."""

import re
from math import ceil

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
DURATION = re.compile("".join(rf"(?:(?P<{unit}>\d+(?:\.\d+)?){unit})?" for unit in UNITS))


def seconds_of(text: str) -> float | None:
    """The seconds of a time such as 2h, 90m or 1h30m; None if it is none. A number without a unit is none."""
    found = DURATION.fullmatch(text.strip().lower()) if len(text) < 60 else None
    parts = {unit: float(value) for unit, value in found.groupdict().items() if value} if found else {}
    return sum(UNITS[unit] * value for unit, value in parts.items()) if parts else None


def in_words(seconds: float) -> str:
    """A time in the largest unit of which there are two at least: 90 s, 2.5 h."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def rounded_up(seconds: float) -> str:
    """A time as users write it, and at least as long: 40s, 3m, 12h."""
    for size, unit in ((3600, "h"), (60, "m")):
        if seconds > 3 * size:
            return f"{ceil(seconds / size)}{unit}"
    return f"{ceil(seconds / 10) * 10}s"
