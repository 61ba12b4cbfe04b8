"""What each stage cost and did."""

from compressor.report.blocks import Section, Table
from compressor.report.numbers import NONE, change, count, number, seconds
from compressor.report.schema import Report, StageResult

SCORED_TASKS = 6  # most tasks whose scores fit beside the sizes


def section(report: Report) -> Section | None:
    """None when there were no stages."""
    if not report.stages:
        return None
    tasks = [task.name for task in report.tasks]
    wide = tasks if len(tasks) <= SCORED_TASKS else []
    head = ("", "Stage", "Time", "Multiply-adds", "vs original", "Parameters", "Nonzero", *wide, "Note")
    start = ("", "original", NONE, count(report.original.macs), NONE, count(report.original.parameters))
    before = tuple(number(task.before, 4) for task in report.tasks) if wide else ()
    original = (*start, count(report.original.nonzero_parameters), *before, "")
    rows = (original, *(_row(stage, report.original.macs, wide) for stage in report.stages))
    align = f"rlrrrrr{'r' * len(wide)}l"
    tables = [Table(head, align, rows)]
    if not wide:
        scores = tuple((task, *(number(stage.scores.get(task), 4) for stage in report.stages)) for task in tasks)
        heads = ("Task", *(f"{stage.index} {stage.kind}" for stage in report.stages))
        tables.append(Table(heads, "l" + "r" * len(report.stages), scores, "Scores after each stage", folded=True))
    return Section("Stages", tuple(tables), "Sizes and scores are those after the stage.")


def _row(stage: StageResult, macs: int, tasks: list[str]) -> tuple[str, ...]:
    resumed = " (result of an earlier run)" if stage.resumed else ""
    return (
        str(stage.index),
        f"{stage.kind}{resumed}",
        seconds(stage.seconds),
        count(stage.macs),
        change(macs, stage.macs),
        count(stage.parameters),
        count(stage.nonzero_parameters),
        *(number(stage.scores.get(task), 4) for task in tasks),
        stage.note,
    )
