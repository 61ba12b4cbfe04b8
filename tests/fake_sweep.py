"""A sweep that never was, of any number of trials; the same at every call."""

import random
from datetime import UTC, datetime

from compressor.report.search import Failure, Goal, Point, Sweep, nondominated

TASKS = (
    Goal(name="segmentation", metric="mIoU", higher_is_better=True, before=0.8127, budget=0.0244, budget_text="3 %"),
    Goal(name="depth", metric="abs_rel", higher_is_better=False, before=0.0512, budget=0.01, budget_text="0.01"),
    Goal(name="normals", metric="mean_angle_deg", higher_is_better=False, before=10.8, budget=None, budget_text=""),
)


def sweep(trials: int = 12, inside: bool = True, failed: int = 2) -> Sweep:
    """Less work leaves less of the budgets, more or less; the third is the recipe's own."""
    source = random.Random(trials)
    drawn = [_trial(number, source, inside) for number in range(trials)]
    drawn.sort(key=lambda point: (point.work, -point.margin))
    best = nondominated((point.work, point.margin) for point in drawn)
    points = tuple(p.model_copy(update={"front": (p.work, p.margin) in best}) for p in drawn)
    return Sweep(
        name="scenes",
        command="compress sweep examples/scenes --trials 12",
        recipe={"seed": 7, "stages": [{"kind": "prune"}]},
        seed=7,
        created=datetime(2026, 3, 14, 15, 9, 26, tzinfo=UTC),
        searched={"stages.0.macs": "0.1 to 0.9", "stages.0.criterion": "one of taylor, magnitude"},
        tasks=TASKS,
        trials=points,
        chosen=next((point.number for point in points if point.margin >= 0), None),
        own=2 if trials > 2 else None,
        failed=tuple(
            Failure(number=trials + at, settings={"stages.0.macs": 0.1}, why="Task 'depth' answers NaN.")
            for at in range(failed)
        ),
    )


def _trial(number: int, source: random.Random, inside: bool) -> Point:
    macs = source.uniform(0.1, 0.9)
    used = (0.35 / macs) ** 2 + source.uniform(0, 0.5) + (not inside)
    drops = (0.0244 * used, 0.01 * used * source.uniform(0.2, 0.9), -0.01)
    scores = {"segmentation": 0.8127 - drops[0], "depth": 0.0512 + drops[1], "normals": 10.8 + drops[2]}
    return Point(
        number=number,
        settings={"stages.0.macs": macs, "stages.0.criterion": source.choice(("taylor", "magnitude"))},
        work=macs * source.uniform(0.9, 1),
        margin=1 - used,
        scores=scores,
        front=False,
        seconds=60 * macs,
        folder=f"trials/{number}",
    )
