"""What a sweep found, as `sweep.json` holds it; one that contradicts itself is refused. See docs/report.md."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, model_validator

from compressor.report.schema import Part, TaskResult


class Goal(Part):
    """One task and how it is judged.

    Attributes:
        before: the original's score; None when the task cannot be scored.
        budget: the largest accepted drop in the metric's own unit; None without one. `budget_text` is as written.
    """

    name: str
    metric: str
    higher_is_better: bool
    before: float | None
    budget: NonNegativeFloat | None
    budget_text: str

    def at(self, score: float | None) -> TaskResult:
        """The task with a score on the validate split."""
        return TaskResult.of(
            self.name,
            self.metric,
            higher_is_better=self.higher_is_better,
            before=self.before,
            after=score,
            budget=self.budget,
            budget_text=self.budget_text,
            split="validate",
        )


class Point(Part):
    """A finished trial.

    Attributes:
        settings: what was set, by the names that `--set` takes.
        work: share of the original's multiply-adds that is left and has a weight which is not zero.
        margin: least share of a budget that is left to any task (negative: overspent).
        scores: by task.
        front: no other trial is better in work or margin without being worse in the other.
        folder: its finished stages, under the sweep's folder.
    """

    number: NonNegativeInt
    settings: Mapping[str, Any]
    work: NonNegativeFloat
    margin: float
    scores: Mapping[str, float]
    front: bool
    seconds: NonNegativeFloat
    folder: str


class Failure(Part):
    """A trial that has no figures, and why."""

    number: NonNegativeInt
    settings: Mapping[str, Any]
    why: str


class Sweep(Part):
    """Everything a sweep found out; `sweep.html` is drawn from this and nothing else.

    Attributes:
        command: as a shell would take it.
        recipe: resolved, with every default.
        searched: in words, what each setting was searched over.
        trials: those that finished, by work.
        chosen: the trial with the least work inside all budgets; None when none is.
        own: the trial that has the recipe's own settings, where these lie inside what is searched.
    """

    model_config = ConfigDict(populate_by_name=True)

    schema_: Literal["taskpress.sweep/1"] = Field(default="taskpress.sweep/1", alias="schema")
    name: str
    command: str
    recipe: Mapping[str, Any]
    seed: int
    created: datetime
    searched: Mapping[str, str]
    tasks: tuple[Goal, ...] = Field(min_length=1)
    trials: tuple[Point, ...] = Field(min_length=1)
    chosen: NonNegativeInt | None
    own: NonNegativeInt | None
    failed: tuple[Failure, ...]

    @property
    def front(self) -> tuple[Point, ...]:
        return tuple(point for point in self.trials if point.front)

    @property
    def taken(self) -> Point:
        """The chosen trial, or where none is inside all budgets the one that overspends least."""
        inside = [point for point in self.trials if point.number == self.chosen]
        return inside[0] if inside else max(self.trials, key=lambda point: point.margin)

    def results(self, point: Point) -> tuple[TaskResult, ...]:
        """Every task at a trial."""
        return tuple(task.at(point.scores.get(task.name)) for task in self.tasks)

    @model_validator(mode="after")
    def _follows_from_its_trials(self) -> "Sweep":
        figures = [(point.work, point.margin) for point in self.trials]
        if figures != sorted(figures, key=lambda figure: (figure[0], -figure[1])):
            raise ValueError("the trials are not in the order of their work")
        best = nondominated(figures)
        if wrong := [point.number for point in self.trials if point.front != ((point.work, point.margin) in best)]:
            raise ValueError(f"whether trial {wrong[0]} is on the front does not follow from the trials")
        if self.chosen != next((point.number for point in self.trials if point.margin >= 0), None):
            raise ValueError("the trial that is chosen does not follow from the trials")
        return self


def nondominated(figures: Iterable[tuple[float, float]]) -> set[tuple[float, float]]:
    """Of (work, margin) those to which no other has as little work and as much margin, and less or more of either."""
    found: set[tuple[float, float]] = set()
    most = float("-inf")
    for work, margin in sorted(figures, key=lambda figure: (figure[0], -figure[1])):
        if margin > most:
            found.add((work, margin))
            most = margin
    return found
