"""The answer first: is every task within its budget, and what did that buy."""

from compressor.report.blocks import Block, Cell, Lines, Section, Tiles
from compressor.report.numbers import TIMES, change, count, number, percent, size, threads
from compressor.report.schema import Report, TaskResult


def section(report: Report) -> Section:
    blocks: list[Block] = [Lines(tuple(verdict(task) for task in report.tasks)), Tiles(tuple(_tiles(report)))]
    if report.warnings:
        blocks.append(Lines(tuple(Cell(f"Warning: {text}", "warn") for text in report.warnings)))
    return Section(_headline(report.tasks), tuple(blocks))


def _headline(tasks: tuple[TaskResult, ...]) -> str:
    beyond = [task.name for task in tasks if task.within_budget is False]
    unknown = [task.name for task in tasks if task.within_budget is None]
    if beyond:
        return f"{len(beyond)} of {len(tasks)} tasks beyond budget: {', '.join(beyond)}"
    if unknown:
        return f"{len(tasks) - len(unknown)} of {len(tasks)} tasks within budget, not judged: {', '.join(unknown)}"
    return f"All {len(tasks)} tasks are within their budgets" if len(tasks) > 1 else "The task is within its budget"


def verdict(task: TaskResult) -> Cell:
    """A task's scores, and whether it is within its budget, in a sentence."""
    if task.before is None or task.after is None:
        return Cell(f"{task.name}: cannot be scored, so its budget was not judged.", "quiet")
    scores = f"{task.name}: {task.metric} {number(task.before, 4)} \N{RIGHTWARDS ARROW} {number(task.after, 4)}"
    if task.budget is None:
        return Cell(f"{scores}, no budget set.", "quiet")
    judged = "within" if task.within_budget else "beyond"
    return Cell(
        f"{scores}, {judged} its budget of {task.budget_text}{_used(task)}.", "good" if task.within_budget else "bad"
    )


def _used(task: TaskResult) -> str:
    if task.drop is None or not task.budget:
        return ""
    return f" ({percent(task.drop / task.budget)} of it used)" if task.drop > 0 else " (no worse than before)"


def _tiles(report: Report) -> list[tuple[str, str]]:
    before, after = report.original, report.compressed
    tiles = [
        (
            change(before.parameters, after.parameters),
            f"parameters, {count(before.parameters)} to {count(after.parameters)}",
        ),
        (change(before.macs, after.macs), f"multiply-adds, {count(before.macs)} to {count(after.macs)}"),
    ]
    if after.nonzero_parameters < after.parameters:
        share = percent(after.nonzero_parameters / after.parameters)
        tiles.append((share, f"of the parameters kept are not zero, {count(after.nonzero_parameters)}"))
    for n in sorted({artifact.threads for artifact in report.artifacts}):
        ratios = [a.ratio_to_dense for a in report.artifacts if a.threads == n and a.ratio_to_dense]
        for name in dict.fromkeys(ratio.baseline for ratio in ratios):
            values = [1 / ratio.value for ratio in ratios if ratio.baseline == name and ratio.value > 0]
            if values:
                over = f", over {len(values)} artifacts" if len(values) > 1 else ""
                tiles.append((_range(values), f"the speed of {name}, {threads(n)}{over}"))
    if report.artifacts:
        sizes = {artifact.name: artifact.bytes for artifact in report.artifacts}
        smallest, largest = min(sizes.values()), max(sizes.values())
        what = "on disk for the artifact"
        if len(sizes) > 1:
            what = f"on disk for the largest of {len(sizes)} artifacts, {size(smallest)} for the smallest"
        tiles.append((size(largest), what))
    return tiles


def _range(values: list[float]) -> str:
    low, high = number(min(values), 2), number(max(values), 2)
    return f"{low}{TIMES}" if low == high else f"{low}\N{EN DASH}{high}{TIMES}"
