"""Accuracy budgets: the largest drop each task accepts, in its own metric and direction."""

from collections.abc import Mapping
from dataclasses import dataclass

from compressor.margin import margin
from compressor.workload import Task


@dataclass(frozen=True, slots=True)
class Budget:
    """Largest accepted drop of one task's metric.

    Attributes:
        amount: in the metric's unit, or as a fraction (0-1) of the original score when relative.
    """

    amount: float
    relative: bool

    @classmethod
    def parse(cls, text: str | float | int) -> "Budget":
        """`"3 %"` is relative to the original score; a number is in the metric's own unit.

        Raises:
            ValueError: neither, or negative, or not finite.
        """
        raw = str(text).strip()
        relative = raw.endswith("%")
        try:
            amount = float(raw.removesuffix("%")) / (100 if relative else 1)
        except ValueError:
            raise ValueError("a budget is a number in the metric's unit, or a percentage such as '3 %'") from None
        if not 0 <= amount < float("inf"):
            raise ValueError("a budget is at least 0 and finite")
        return cls(amount, relative)

    def allowed(self, before: float) -> float:
        """The largest accepted drop in the metric's own unit."""
        return self.amount * abs(before) if self.relative else self.amount

    def __str__(self) -> str:
        return f"{self.amount * 100:g} %" if self.relative else f"{self.amount:g}"


def drop(task: Task, before: float, after: float) -> float:
    """How much worse a task became, in its metric's unit; negative when it improved."""
    return before - after if task.higher_is_better else after - before


def margins(
    tasks: tuple[Task, ...],
    budgets: Mapping[str, Budget],
    before: Mapping[str, float],
    after: Mapping[str, float],
    slack: float = 1.0,
) -> dict[str, float]:
    """What is left of each budget, in the metric's unit (negative: overspent); `slack` multiplies the budgets."""
    return {
        task.name: margin(
            before[task.name], after[task.name], slack * budgets[task.name].allowed(before[task.name]),
            higher_is_better=task.higher_is_better,
        )
        for task in tasks
        if task.name in budgets
    }
