"""Inline SVG through matplotlib, in colours that the page chooses, so that one drawing serves light and dark."""

import io
import math
import re
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 11.0

# Colours that nobody draws in, each replaced by a variable of page.html once the drawing is text.
INK, QUIET, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
BEFORE, AFTER, LIMIT = "#050505", "#060606", "#070707"
SERIES = ("#060606", "#080808", "#050505", "#090909", "#0a0a0a", "#0b0b0b")
VARIABLES = {
    INK: "--ink",
    QUIET: "--quiet",
    GRID: "--line",
    PAPER: "--paper",
    BEFORE: "--before",
    AFTER: "--after",
    LIMIT: "--bad",
    "#080808": "--third",
    "#090909": "--fourth",
    "#0a0a0a": "--fifth",
    "#0b0b0b": "--sixth",
}

STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": QUIET,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
}


def panels(height_inches: float, rows: int = 1, columns: int = 1, **options: Any) -> "tuple[Figure, list[Axes]]":
    """A figure of the page's width with its axes in reading order; draw within `styled()`."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06))
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(grid.flat)


def styled() -> Any:
    """The context in which everything is drawn and turned into text."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def svg(figure: "Figure", name: str, label: str) -> Markup:
    """The figure as an SVG element that scales to its place; `name` keeps its ids apart from the other figures'."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    width, height = figure.get_size_inches() * 96
    view = f"0 0 {width * 0.75:g} {height * 0.75:g}"
    start = f'<svg viewBox="{view}" width="{width:.0f}" height="{height:.0f}" role="img" aria-label="{escape(label)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: start, text, count=1)
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids are made from the text drawn and the salt; a prefix keeps equal ones in two figures apart.
    text = re.sub(r'(id="|url\(#|href="#)', lambda found: f"{found[1]}{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return Markup(text.replace("'DejaVu Sans'", "var(--font)"))


def height(rows: int, row_inches: float) -> float:
    """Inches for so many rows and the axis under them."""
    return rows * row_inches + 0.75


def milliseconds(axes: "Axes") -> None:
    """Ticks and label of a logarithmic latency axis whose limits are set."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high / low < 100 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**e for e in exponents for step in steps]
    if sum(low <= tick <= high for tick in ticks) < 2:
        ticks = list(MaxNLocator(4).tick_values(low, high))
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("latency in ms, logarithmic")


def tail(name: str, most: int = 30) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= most else f"\N{HORIZONTAL ELLIPSIS}{name[1 - most :]}"
