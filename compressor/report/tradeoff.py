"""Each task's accuracy against the latency of whatever answers it."""

from collections.abc import Iterator
from itertools import cycle
from typing import TYPE_CHECKING, Any

from compressor.report.blocks import Drawing, Section
from compressor.report.figure import INK, LIMIT, PAPER, SERIES, milliseconds, panels, styled, svg, tail
from compressor.report.schema import ArtifactResult, BaselineResult, Report, TaskResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
MARKERS = "osDhp"  # shapes with room for a digit
OWN, SHARED = "artifact of this task", "artifact of several tasks"

Owner = ArtifactResult | BaselineResult


def section(report: Report) -> Section | None:
    """None when no task has both a score and something timed."""
    plotted = [(task, owners) for task in report.tasks if (owners := list(_owners(report, task)))]
    if not plotted:
        return None
    names = [OWN, SHARED, *dict.fromkeys(baseline.name for baseline in report.baselines)]
    looks = dict(zip(names, _looks(), strict=False))
    caption = (
        "Up is better in every panel, left is faster. A mark is the median latency of one inference, its digit the"
        " number of threads. Filled marks were measured, hollow ones emulated or estimated."
    )
    columns = min(COLUMNS, len(plotted))
    rows = -(-len(plotted) // columns)
    with styled():
        figure, axes = panels(2.5 * rows + 0.6, rows, columns)
        for panel, (task, owners) in zip(axes, plotted, strict=False):
            _draw(panel, task, owners, looks)
        for panel in axes[len(plotted) :]:
            panel.set_axis_off()
        handles = {label: mark for a in axes for mark, label in zip(*a.get_legend_handles_labels(), strict=True)}
        shown = [name for name in names if name in handles]
        figure.legend([handles[name] for name in shown], shown, loc="outside upper left", ncols=4, labelcolor=INK)
        return Section("Accuracy against latency", (Drawing(svg(figure, "tradeoff", caption), caption),))


def _owners(report: Report, task: TaskResult) -> Iterator[tuple[str, Owner, float]]:
    """(legend, what was timed, score) of everything timed that answers the task."""
    for artifact in report.artifacts:
        if task.name in artifact.tasks and artifact.latency_ms and task.after is not None:
            yield OWN if len(artifact.tasks) == 1 else SHARED, artifact, task.after
    for baseline in report.baselines:
        score = task.after if baseline.artifact else task.before
        if task.name in baseline.tasks and baseline.latency_ms and score is not None:
            yield baseline.name, baseline, score


def _looks() -> Iterator[tuple[str, str]]:
    """Colours and markers; as there are six of these and five of those, thirty pairs come before one comes again."""
    return zip(cycle(SERIES), cycle(MARKERS), strict=False)


def _draw(
    axes: "Axes", task: TaskResult, owners: list[tuple[str, Owner, float]], looks: dict[str, tuple[str, str]]
) -> None:
    xs, ys = [], [score for _, _, score in owners]
    for name, owner, score in owners:
        if owner.latency_ms is None:
            continue
        colour, marker = looks[name]
        xs.append(owner.latency_ms.p50)
        measured = owner.latency_ms.kind == "measured"
        face, edge = (colour, PAPER) if measured else (PAPER, colour)
        colouring: dict[str, Any] = {"markerfacecolor": face, "markeredgecolor": edge}
        axes.plot(xs[-1], score, marker, markersize=11.5, label=name, clip_on=False, **colouring)
        digit: dict[str, Any] = {"ha": "center", "va": "center_baseline", "color": edge, "fontsize": 7.5}
        axes.annotate(str(owner.threads), (xs[-1], score), **digit)
    if task.before is not None and task.budget is not None:
        floor = task.before + (-task.budget if task.higher_is_better else task.budget)
        axes.axhline(floor, color=LIMIT, linewidth=1.2, linestyle=(0, (4, 2)))
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate("budget", (1, floor), (0, -2), color=LIMIT, fontsize=8, ha="right", va="top", **place)
        ys.append(floor)
    pad = 0.25 * (max(ys) - min(ys)) or 0.05 * abs(ys[0]) or 1.0
    low, high = min(ys) - pad, max(ys) + pad
    axes.set_ylim((low, high) if task.higher_is_better else (high, low))
    direction = "higher" if task.higher_is_better else "lower"
    axes.set_title(f"{tail(task.name, 22)}: {tail(task.metric, 16)}, {direction} is better")
    axes.set_xscale("log")
    axes.set_xlim(min(xs) / 1.35, max(xs) * 1.35)
    milliseconds(axes)
    axes.locator_params(axis="y", nbins=5)
    axes.grid(True)
