"""Every task before and after against its budget, as bars that share one scale and as figures."""

from compressor.report.blocks import Block, Cell, Drawing, Section, Table
from compressor.report.figure import AFTER, GRID, INK, LIMIT, QUIET, height, panels, styled, svg, tail
from compressor.report.numbers import NONE, number, percent
from compressor.report.schema import Report, TaskResult

HEAD = ("Task", "Metric", "Better", "Before", "After", "Drop", "Budget", "As written", "Margin", "Verdict", "Split")


def section(report: Report) -> Section:
    table = Table(HEAD, "lllrrrrrrll", tuple(_row(task) for task in report.tasks))
    judged = [(task, task.drop / task.budget) for task in report.tasks if task.budget and task.drop is not None]
    drawings: list[Block] = [_bars(judged)] if judged else []
    return Section(
        "Tasks and their budgets",
        (*drawings, table),
        "Scores are in each metric's own unit; a drop is how much worse a task became, whichever way its metric runs.",
    )


def _row(task: TaskResult) -> tuple[str | Cell, ...]:
    verdict = {True: Cell("within", "good"), False: Cell("beyond", "bad"), None: Cell("not judged", "quiet")}
    digest = f" ({task.split_sha256[:8]})" if task.split_sha256 else ""
    return (
        task.name,
        task.metric,
        "higher" if task.higher_is_better else "lower",
        number(task.before, 4),
        number(task.after, 4),
        number(task.drop),
        number(task.budget),
        task.budget_text or NONE,
        number(task.margin),
        verdict[task.within_budget],
        f"{task.split}{digest}",
    )


def _bars(judged: list[tuple[TaskResult, float]]) -> Drawing:
    caption = (
        "Share of each task's budget that was used. Left of zero the task improved; past 100 % is beyond its budget."
    )
    with styled():
        figure, (axes,) = panels(height(len(judged), 0.34))
        used = [share for _, share in judged]
        rows = range(len(judged))
        axes.barh(rows, used, height=0.62, color=[AFTER if share <= 1 else LIMIT for share in used])
        for row, share in zip(rows, used, strict=True):
            side = -1 if share < 0 else 1
            axes.annotate(
                percent(share),
                (share, row),
                (4 * side, 0),
                textcoords="offset points",
                va="center",
                ha="right" if share < 0 else "left",
                color=INK,
            )
        axes.axvline(0, color=GRID, linewidth=1)
        axes.axvline(1, color=LIMIT, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.annotate(
            "budget", (1, 1), (4, 2), xycoords=("data", "axes fraction"), textcoords="offset points", color=LIMIT
        )
        axes.set_yticks(rows, [tail(task.name) for task, _ in judged], color=INK)
        axes.invert_yaxis()
        low, high = min(0.0, *used), max(1.0, *used)
        axes.set_xlim(low - 0.08 * (high - low) * (low < 0), high + 0.1 * (high - low))
        axes.xaxis.set_major_formatter(lambda value, _: percent(value) if value else "0 %")
        axes.set_xlabel("share of the budget used", color=QUIET)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        return Drawing(svg(figure, "tasks", caption), caption)
