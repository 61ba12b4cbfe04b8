"""How figures are written in a report: few digits, units, and no percentile that n cannot support."""

import math

from compressor.report.blocks import Cell
from profiles.measure import FEWEST_SAMPLES

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
TOO_SMALL = Cell("n too small", "quiet")


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """That many significant digits: `0.0512`, `12.3`, `1,234`; an exponent only under 0.0001."""
    if value is None:
        return NONE
    rounded = float(f"{value:.{digits - 1}e}")
    magnitude = math.floor(math.log10(abs(rounded))) if value else 0
    sign = "+" if signed else ""
    if magnitude < -4:
        text = f"{rounded / 10.0**magnitude:{sign}.{digits - 1}f}e{magnitude}"
    else:
        text = f"{value:{sign},.{max(0, digits - 1 - magnitude)}f}"
    return text.replace("-", MINUS)


def count(value: int) -> str:
    """`812`, `12.3 k`, `1.04 M`, `3.74 G`."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= 0.9995 * size:
            return f"{number(value / size)} {unit}"
    return str(value)


def size(value: int | None) -> str:
    """Bytes in powers of 1024."""
    if value is None:
        return NONE
    for unit, step in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= step:
            return f"{number(value / step)} {unit}"
    return f"{value} B"


def percent(value: float | None, signed: bool = False) -> str:
    """A fraction as `61 %`, or `+1.2 %`; a decimal only under 10 %."""
    if value is None:
        return NONE
    digits = 0 if abs(value) >= 0.0995 else 1
    return f"{100 * value:{'+' if signed else ''}.{digits}f} %".replace("-", MINUS)


def change(before: int, after: int) -> str:
    """How much `after` differs from `before`, as a signed percentage of it."""
    return percent(after / before - 1, signed=True) if before else NONE


def percentile(value: float | None, percent: int, n: int) -> Cell:
    """A percentile in ms, or why there is none; a dash where nothing was measured."""
    if value is not None:
        return Cell(number(value))
    return TOO_SMALL if 0 < n < FEWEST_SAMPLES[percent] else Cell(NONE, "quiet")


def seconds(value: float | None) -> str:
    """`0.41 s`, `12.3 s`, `4 min 05 s`."""
    if value is None:
        return NONE
    if value < 60:
        return f"{number(value)} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def threads(n: int) -> str:
    return f"{n} thread" if n == 1 else f"{n} threads"


def listed(names: tuple[str, ...], most: int = 4) -> str:
    """`a, b, c and 5 more`."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
