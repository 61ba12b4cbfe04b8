"""A sweep's page: the Pareto front of work against budgets, the trial to take, and all others with why."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.report.blocks import Cell, Code, Drawing, Facts, Lines, Section, Table, Tiles, Tone
from compressor.report.figure import AFTER, BEFORE, INK, LIMIT, PAPER, QUIET, panels, styled, svg
from compressor.report.numbers import MINUS, NONE, number, percent, seconds
from compressor.report.page import page, read_json
from compressor.report.schema import TaskResult
from compressor.report.search import Point, Sweep
from compressor.report.summary import verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

JSON, HTML = "sweep.json", "sweep.html"

DEEPEST = -2.0  # margins under this are drawn at the edge: overspent threefold is as hopeless as thirtyfold
NUMBERED = 24  # most trials of a front whose numbers fit beside their marks


def read(directory: Path) -> Sweep:
    """The sweep in a folder, checked.

    Raises:
        CompressError: none there, or not one of this version; every fault at once.
    """
    return read_json(directory / JSON, Sweep)


def texts(sweep: Sweep) -> dict[str, str]:
    """The files of a sweep's report by name."""
    return {HTML: render(sweep), JSON: sweep.model_dump_json(indent=1, by_alias=True) + "\n"}


def render(sweep: Sweep) -> str:
    """The page: one self-contained HTML text, equal for equal sweeps."""
    byline = f"taskpress sweep, {sweep.created.strftime('%Y-%m-%d %H:%M %Z')}, seed {sweep.seed}"
    sections = {name: draw(sweep) for name, draw in SECTIONS.items()}
    return page(sweep.name, byline, sweep.schema_, JSON, sections)


def share(margin: float) -> str:
    """What is left of a budget, signed; far outside it, digits say nothing."""
    return f"under {MINUS}1,000 %" if margin < -10 else percent(margin, signed=True)


def value(setting: Any) -> str:
    """A setting in few digits."""
    return f"{setting:.4g}" if isinstance(setting, float) else str(setting)


def _summary(sweep: Sweep) -> Section:
    taken = sweep.taken
    if sweep.chosen is None:
        title = "No trial keeps every task inside its budget"
        which = "overspends least"
    else:
        title = f"Trial {taken.number} does {percent(taken.work)} of the work with every task inside its budget"
        which = "is chosen: the least work inside all budgets"
    tiles = [
        (percent(taken.work), f"of the multiply-adds left and not zero in trial {taken.number}, which {which}"),
        (share(taken.margin), "left of a budget to the task nearest its end"),
        (_trials(len(sweep.trials)), f"finished, {len(sweep.front)} on the front, {len(sweep.failed)} failed"),
    ]
    lines = tuple(verdict(result) for result in sweep.results(taken))
    return Section(title, (Lines(lines), Tiles(tuple(tiles))))


def _front(sweep: Sweep) -> Section:
    lead = (
        "On the front no trial has both less work and more left of its budgets. Work is the share of the original's"
        " multiply-adds that is left and not zero; a margin is what the task nearest its end has left of its budget."
    )
    inside = [point for point in sweep.front if point.margin >= 0]
    outside = [point for point in sweep.front if point.margin < 0]
    tables = _tables(sweep, inside or outside, ("Trials on the front", "Their scores"))
    if inside and outside:
        captions = (f"{_trials(len(outside))} on the front with a budget overspent", "Their scores")
        tables += _tables(sweep, outside, captions, folded=True)
    return Section("Pareto front", (_scatter(sweep), *tables), lead)


def _others(sweep: Sweep) -> Section | None:
    others = [point for point in sweep.trials if not point.front]
    if not others:
        return None
    captions = (f"{_trials(len(others))} behind the front", "Their scores")
    return Section("Other trials", tuple(_tables(sweep, others, captions, folded=True)))


def _failed(sweep: Sweep) -> Section | None:
    if not sweep.failed:
        return None
    names = list(sweep.searched)
    rows = tuple(
        (str(one.number), *(value(one.settings.get(name, NONE)) for name in names), one.why) for one in sweep.failed
    )
    return Section("Failed trials", (Table(("Trial", *names, "Why"), f"r{'r' * len(names)}l", rows),))


def _recipe(sweep: Sweep) -> Section:
    facts = {"Command": sweep.command, "Seed": str(sweep.seed), **sweep.searched}
    text = json.dumps(sweep.model_dump(mode="json")["recipe"], indent=2, ensure_ascii=False)
    return Section("What was searched", (Facts(facts), Code(text)), "The ranges, and the recipe with every default.")


SECTIONS: dict[str, Callable[[Sweep], Section | None]] = {
    "summary": _summary,
    "front": _front,
    "others": _others,
    "failed": _failed,
    "recipe": _recipe,
}


def _tables(sweep: Sweep, points: Sequence[Point], captions: tuple[str, str], folded: bool = False) -> list[Table]:
    """What the trials were set to and came to; then each task's score, its drop and the share of its budget used."""
    names = list(sweep.searched)
    head = ("Trial", "", "Work left", "Margin", "Nearest its end", *names, "Time")
    rows: tuple[tuple[str | Cell, ...], ...] = tuple(
        (
            str(point.number),
            mark(sweep, point),
            percent(point.work),
            Cell(share(point.margin), "" if point.margin >= 0 else "bad"),
            _nearest(sweep, point),
            *(value(point.settings[name]) for name in names),
            seconds(point.seconds),
        )
        for point in points
    )
    settings = Table(head, f"rlrrl{'r' * len(names)}r", rows, captions[0], folded)
    columns = tuple(text for task in sweep.tasks for text in (f"{task.name}, {task.metric}", "drop", "of budget"))
    original = tuple(text for task in sweep.tasks for text in (number(task.before, 4), NONE, NONE))
    budgets = tuple(text for task in sweep.tasks for text in (NONE, number(task.budget), task.budget_text or NONE))
    scores = tuple(
        (str(point.number), *(cell for result in sweep.results(point) for cell in _scored(result))) for point in points
    )
    rows_scored = (("original", *original), ("budget", *budgets), *scores)
    return [settings, Table(("Trial", *columns), f"r{'rrr' * len(sweep.tasks)}", rows_scored, captions[1], folded)]


def _scored(result: TaskResult) -> tuple[str | Cell, ...]:
    tone: Tone = "bad" if result.within_budget is False else ""
    used = NONE if result.drop is None or not result.budget else percent(result.drop / result.budget)
    return number(result.after, 4), number(result.drop, 2), Cell(used, tone)


def mark(sweep: Sweep, point: Point) -> str:
    """What is to be said of a trial beside its figures."""
    marks = (("chosen", sweep.chosen), ("recipe's own", sweep.own))
    return ", ".join(text for text, trial in marks if trial == point.number)


def _nearest(sweep: Sweep, point: Point) -> str:
    """The task that has least left of its budget."""
    judged = [(r.name, r.margin, r.budget) for r in sweep.results(point)]
    left = {name: margin / max(budget or 0, 1e-12) for name, margin, budget in judged if margin is not None}
    return min(left, key=lambda name: left[name], default="")


def _trials(count: int) -> str:
    return f"{count} trial{'s' * (count != 1)}"


def _scatter(sweep: Sweep) -> Drawing:
    below = sum(point.margin < DEEPEST for point in sweep.trials)
    caption = (
        "Every finished trial: left is less work, up is more left of the budget of the task nearest its end."
        " The line is the most margin found for so much work or less; under the dashed line a budget is overspent."
    )
    if below:
        caption += f" {_trials(below)} at the lower edge went below {share(DEEPEST)}."
    with styled():
        figure, (axes,) = panels(4.4)
        lowest = _frame(axes, sweep)
        works, margins = zip(*((point.work, max(point.margin, lowest)) for point in sweep.front), strict=True)
        steps = (*works, axes.get_xlim()[1]), (*margins, margins[-1])
        axes.plot(*steps, color=AFTER, linewidth=1.2, drawstyle="steps-post", zorder=1)
        for point in sweep.trials:
            shape = "v" if point.margin < lowest else "D" if point.number == sweep.own else "o"
            look: dict[str, Any] = {"color": AFTER if point.front else BEFORE, "markeredgecolor": PAPER}
            look |= {"zorder": 3 if point.front else 2, "clip_on": False}
            size = 7.5 if point.front else 6
            axes.plot(point.work, max(point.margin, lowest), shape, markersize=size, **look)
        _names(axes, sweep, lowest)
        return Drawing(svg(figure, "front", caption), caption)


def _frame(axes: "Axes", sweep: Sweep) -> float:
    """Limits, labels and the line where budgets end; returns the lowest margin that is drawn where it is."""
    works, margins = [p.work for p in sweep.trials], [p.margin for p in sweep.trials]
    lowest = max(DEEPEST, min(margins))
    high = max(0.0, *margins)
    low = min(0.0, lowest)
    pad = 0.08 * (high - low) or 0.1
    across = 0.08 * (max(works) - min(works)) or 0.1 * max(works) or 0.1
    axes.set_xlim(max(0.0, min(works) - across), max(works) + across)
    axes.set_ylim(low - pad, high + 1.5 * pad)
    axes.axhline(0, color=LIMIT, linewidth=1.2, linestyle=(0, (4, 2)), zorder=0)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate("budget", (1, 0), (0, -2), color=LIMIT, fontsize=8, ha="right", va="top", **place)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %".replace("-", MINUS))
    axes.locator_params(nbins=7)
    axes.set_xlabel("work left", color=QUIET)
    axes.set_ylabel("margin: least left of a budget", color=QUIET)
    axes.grid(True)
    return lowest


def _names(axes: "Axes", sweep: Sweep, lowest: float) -> None:
    """Numbers of the trials on the front, if they fit; always that of the chosen one, ringed, and the recipe's own."""
    left, right = axes.get_xlim()
    for point in sweep.trials:
        at = (point.work, max(point.margin, lowest))
        marked = mark(sweep, point)
        if point.number == sweep.chosen:
            ring: dict[str, Any] = {"markersize": 14, "markerfacecolor": "none", "markeredgecolor": INK, "zorder": 4}
            axes.plot(*at, "o", clip_on=False, **ring)
        if marked or (point.front and len(sweep.front) <= NUMBERED and point.margin >= lowest):
            text = f"{point.number}, {marked}" if marked else str(point.number)
            # Above a front and to its left nothing is; behind it there is more room below.
            place = (point.work - left) / (right - left)
            leftward = place > 0.2 if point.front else place > 0.8
            offset = (-6 if leftward else 6, 7 if point.front else -13)
            aside: dict[str, Any] = {"textcoords": "offset points", "ha": "right" if leftward else "left"}
            axes.annotate(text, at, offset, color=INK, fontsize=8, **aside)
