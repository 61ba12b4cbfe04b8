"""Global channel pruning inside each task's budget."""

from collections.abc import Mapping
from math import ceil
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressor.bench import Bench, reestimate_batchnorm
from compressor.costs import Costs, Ledger
from compressor.criteria import CRITERIA
from compressor.errors import CompressError
from compressor.groups import Group, Prunable
from compressor.model import MultiTaskModel
from compressor.training import Training, train
from profiles.settings import Settings, did_you_mean

Combine = Literal["max", "sum", "unanimous"]

LEAST_PRESSURE = 0.1
"""Weight of a task that has not used its budget at all, when another has used exactly its own."""


class Prune(Settings):
    """Remove the channels worth least per multiply-add and parameter they cost, in rounds, until the goal is met.

    Attributes:
        macs, parameters: fraction of what the stage was given to keep (0-1); at least one is needed, every given one
            is met.
        rounds: the goal is approached geometrically; importance is measured anew in each round.
        criterion: a name in CRITERIA.
        combine: how a channel's importance to each task becomes one number: each task's row is first scaled to sum 1
            and weighed by the share of its budget that the task has used so far, then "max" protects what any one task
            needs, "sum" trades tasks against each other. "unanimous" takes each task's ranks instead, unweighed: a
            channel goes when every task ranks it low (Sun et al., "DiSparse", CVPR 2022).
        batches: calibration batches that importance is measured on, and batch norm where nothing is recovered.
        slack: budgets are multiplied by this while pruning, since a later `finetune` wins much of the drop back.
        keep_at_least: no group goes below this fraction of the width it came with.
        round_to: widths become multiples of this; 0 means the device's vector width.
        recover: a short training after each round, before it is judged.
    """

    kind: Literal["prune"]
    macs: float | None = Field(gt=0, lt=1, default=None)
    parameters: float | None = Field(gt=0, lt=1, default=None)
    rounds: int = Field(ge=1, default=4)
    criterion: str = "taylor"
    combine: Combine = "max"
    batches: int = Field(ge=1, default=16)
    slack: float = Field(ge=1, default=1.0)
    keep_at_least: float = Field(ge=0, le=1, default=0.1)
    round_to: int = Field(ge=0, default=0)
    recover: Training | None = None

    @model_validator(mode="after")
    def _has_goal(self) -> "Prune":
        if self.macs is None and self.parameters is None:
            raise ValueError("a goal is missing: give 'macs', 'parameters' or both, as the fraction to keep")
        if self.criterion not in CRITERIA:
            raise ValueError(f"no criterion '{self.criterion}'.{did_you_mean(self.criterion, CRITERIA)}")
        return self

    @property
    def train_steps(self) -> int:
        return self.rounds * (self.recover.steps if self.recover else 0)

    def run(self, model: MultiTaskModel, bench: Bench) -> MultiTaskModel:
        """The furthest point towards the goal at which every task is inside its (slackened) budget."""
        start = Prunable.of(model)
        full = start.cost(start.keep_all())
        multiple = self.round_to or bench.multiple
        floors = {
            group.name: max(min(multiple, len(group)), ceil(self.keep_at_least * len(group))) for group in start.groups
        }
        good, goal, pressure = model, full, dict[str, float]()
        for turn in range(1, self.rounds + 1):
            goal = self._goal(full, turn)
            candidate, reached = self._shrink(good, bench, goal, multiple, floors, pressure)
            if self.recover and self.recover.steps:  # which leaves batch norm better estimated than a few batches would
                train(candidate, bench, self.recover, f"prune {turn}/{self.rounds}", bench.seed + turn)
            else:
                reestimate_batchnorm(candidate.module, bench.calibration(self.batches))
            scores = bench.scores(candidate)
            told = "; ".join(
                [
                    f"MACs {reached[0] / full[0]:.0%}, parameters {reached[1] / full[1]:.0%}",
                    ", ".join(f"{name} {score:.4g}" for name, score in scores.items()),
                ]
            )
            bench.progress.line(f"  prune {turn}/{self.rounds}: {told}")
            if over := bench.over(scores, self.slack):
                bench.note(f"prune stopped before round {turn} of {self.rounds}: {over}.")
                return good
            good, pressure = candidate, spent(bench, scores)
            if _short(reached, goal):
                bench.note(
                    "prune ended short of its goal: no group may become narrower (widths are multiples of "
                    f"{multiple}, at least {self.keep_at_least:.0%} of what they were)."
                )
                return good
        return good

    def _goal(self, full: Costs, turn: int) -> Costs:
        share = turn / self.rounds
        macs, parameters = (1.0 if fraction is None else fraction**share for fraction in (self.macs, self.parameters))
        return int(full[0] * macs), int(full[1] * parameters)

    def _shrink(
        self,
        model: MultiTaskModel,
        bench: Bench,
        goal: Costs,
        multiple: int,
        floors: Mapping[str, int],
        pressure: Mapping[str, float],
    ) -> tuple[MultiTaskModel, Costs]:
        """A copy cut to the goal, shown to answer as the uncut network does with the same channels zeroed."""
        prunable = Prunable.of(model)
        score_TC = CRITERIA[self.criterion](model, prunable, bench, self.batches)
        value_C = combine(score_TC, [task.name for task in model.tasks], bench, self.combine, pressure)
        groups = list(prunable.groups)
        while True:
            keep = choose(prunable, groups, value_C, goal, multiple, floors)
            cut = _cut(model, prunable, keep)
            if cut is not None:
                return cut, prunable.cost(keep)
            wrong = [g for g in groups if not keep[g.classes].all() and not _alone(model, prunable, keep, g)]
            if not wrong:
                raise CompressError(
                    "Channels of several groups can each be removed alone, but not together: "
                    f"{', '.join(g.name for g in groups if not keep[g.classes].all())}. Nothing was removed."
                )
            groups = [group for group in groups if group not in wrong]
            bench.note(
                "left whole, because the module's own code fixes their size: "
                f"{', '.join(group.name for group in wrong)}."
            )


def combine(
    score_TC: Tensor, tasks: list[str], bench: Bench, how: Combine, pressure: Mapping[str, float]
) -> Tensor:
    """(class,) one value a channel from one row a task: rows sum to 1, then weigh as their tasks need protection.

    Ranks, for "unanimous", run from 0 to 1 and are equal for equal scores.

    A task weighs as much of its budget as it has used (`pressure`, from the round before); before anything is known, as
    tight as its budget is relative to its score. One without a budget weighs as one with a budget of 100 %.
    """
    if how == "unanimous":
        ranks = [row_C.unique(return_inverse=True)[1] for row_C in score_TC]
        return torch.stack([rank / rank.max().clamp_min(1) for rank in ranks]).max(0).values
    scaled_TC = score_TC / score_TC.sum(1, keepdim=True).clamp_min(1e-30)
    weight_T = torch.tensor([pressure.get(task, 1 / _relative_budget(bench, task)) for task in tasks])
    scaled_TC = scaled_TC * (weight_T / weight_T.max())[:, None]
    return scaled_TC.max(0).values if how == "max" else scaled_TC.sum(0)


def spent(bench: Bench, scores: Mapping[str, float]) -> dict[str, float]:
    """The share of its budget that each task has used, at least `LEAST_PRESSURE`; nothing unless all tasks have one."""
    left = bench.margins(scores)
    if len(left) < len(bench.original.tasks):
        return {}
    allowed = {name: bench.budgets[name].allowed(bench.before[name]) for name in left}
    return {name: max(1 - left[name] / max(allowed[name], 1e-12), LEAST_PRESSURE) for name in left}


def _relative_budget(bench: Bench, task: str) -> float:
    before = abs(bench.before.get(task, 0.0))
    if task not in bench.budgets or not before:
        return 1.0
    return min(1.0, max(bench.budgets[task].allowed(before) / before, 1e-4))


def choose(
    prunable: Prunable, groups: list[Group], value_C: Tensor, goal: Costs, multiple: int, floors: Mapping[str, int]
) -> Tensor:
    """Bool by class: greedily drop the vector-wide slice of channels with the least value for the cost it saves."""
    ledger = Ledger(prunable)
    full = ledger.now
    value = value_C.tolist()
    left = {g.name: sorted(g.classes.tolist(), key=lambda identity: value[identity], reverse=True) for g in groups}
    terms = {g.name: ledger.touching(left[g.name]) for g in groups}
    offers: dict[str, tuple[float, Costs, list[int]]] = {}
    stale = set(left)
    while wanted := [k for k in (0, 1) if ledger.now[k] > goal[k]]:
        for name in stale:
            dropped = _slice(left[name], multiple, floors[name])
            offers.pop(name, None)
            if dropped:
                offers[name] = sum(value[identity] for identity in dropped), ledger.saving(dropped), dropped

        def price(name: str) -> float:
            worth, saved, _ = offers[name]
            return worth / max(sum(saved[k] / full[k] for k in wanted), 1e-30)

        best = min((name for name in left if name in offers), key=price, default=None)
        if best is None:
            break
        enough = [n for n in left if n in offers and all(ledger.now[k] - offers[n][1][k] <= goal[k] for k in wanted)]
        if enough and offers[last := min(enough, key=lambda n: offers[n][0])][0] <= offers[best][0]:
            best = last  # one more slice will do, so its cost does not matter any more
        dropped = offers[best][2]
        ledger.drop(dropped)
        left[best] = left[best][: -len(dropped)]
        stale = {name for name in left if terms[name] & terms[best]}
    keep = prunable.keep_all()
    for group in groups:
        keep[group.classes] = False
        keep[torch.tensor(left[group.name], dtype=torch.int64)] = True
    return keep


def _short(reached: Costs, goal: Costs) -> bool:
    return any(now > wanted for now, wanted in zip(reached, goal, strict=True))


def _slice(left: list[int], multiple: int, floor: int) -> list[int]:
    """The least valuable channels to drop to reach the next multiple; none when that is below `floor`."""
    count = len(left) % multiple or multiple
    return left[-count:] if len(left) - count >= floor else []


def _alone(model: MultiTaskModel, prunable: Prunable, keep: Tensor, group: Group) -> bool:
    """Can this group's channels go if all others stay?"""
    only = prunable.keep_all()
    only[group.classes] = keep[group.classes]
    return _cut(model, prunable, only) is not None


def _cut(model: MultiTaskModel, prunable: Prunable, keep: Tensor) -> MultiTaskModel | None:
    """The cut copy, or None where the module's own code does not allow it."""
    try:
        return prunable.cut(model, keep)
    except CompressError:
        return None
