"""Global channel pruning inside each task's budget."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressor.bench import Bench, reestimate_batchnorm
from compressor.criteria import CRITERIA
from compressor.errors import CompressError
from compressor.groups import Group, Prunable
from compressor.model import MultiTaskModel, get_tensor
from compressor.training import Training, train
from profiles.settings import Settings, did_you_mean

EXACT = 1e-6


class Prune(Settings):
    """Remove the channels worth least per multiply-add and parameter they cost, in rounds, until the goal is met.

    Attributes:
        macs, parameters: fraction of the original's to keep (0-1); at least one is needed, every given one is met.
        rounds: the goal is approached geometrically; importance is measured anew in each round.
        criterion: a name in CRITERIA.
        combine: how a channel's importance to each task becomes one number: each task's row is first scaled to sum 1
            and divided by the task's budget relative to the others, then "max" protects what any one task needs, "sum"
            trades tasks against each other.
        slack: budgets are multiplied by this while pruning, since a later `finetune` wins much of the drop back.
        keep_at_least: no group goes below this fraction of its width.
        round_to: widths become multiples of this; 0 means the device's vector width.
        recover: a short training after each round, before it is judged.
    """

    kind: Literal["prune"]
    macs: float | None = Field(gt=0, lt=1, default=None)
    parameters: float | None = Field(gt=0, lt=1, default=None)
    rounds: int = Field(ge=1, default=4)
    criterion: str = "taylor"
    combine: Literal["max", "sum"] = "max"
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
        refused: set[str] = set()
        good = model
        for turn in range(1, self.rounds + 1):
            share = turn / self.rounds
            goal = tuple(
                full[k] if fraction is None else int(full[k] * fraction**share)
                for k, fraction in enumerate((self.macs, self.parameters))
            )
            candidate, reached = self._shrink(good, bench, goal, refused)
            if self.recover and self.recover.steps:
                train(candidate, bench, self.recover, f"prune {turn}/{self.rounds}", bench.seed + turn)
            reestimate_batchnorm(candidate.module, bench.calibration(self.batches))
            scores = bench.scores(candidate)
            over = {name: left for name, left in bench.margins(scores, self.slack).items() if left < 0}
            told = ", ".join(f"{name} {score:.4g}" for name, score in scores.items())
            bench.progress.line(
                f"  prune {turn}/{self.rounds}: MACs {reached[0] / full[0]:.0%}, "
                f"parameters {reached[1] / full[1]:.0%}; {told}"
            )
            if over:
                worst = min(over, key=lambda name: over[name])
                bench.note(
                    f"prune stopped before round {turn} of {self.rounds}: task '{worst}' would leave its budget "
                    f"(times {self.slack:g}) by {-over[worst]:.4g}."
                )
                return good
            good = candidate
            if any(now > wanted for now, wanted in zip(reached, goal, strict=True)):
                bench.note("prune ended short of its goal: every group is at its smallest allowed width.")
                return good
        return good

    def _shrink(
        self, model: MultiTaskModel, bench: Bench, goal: tuple[int, ...], refused: set[str]
    ) -> tuple[MultiTaskModel, tuple[int, int]]:
        """A copy cut to the goal, shown to answer as the uncut network does with the same channels zeroed."""
        prunable = Prunable.of(model)
        score_TC = CRITERIA[self.criterion].score(model, prunable, bench, self.batches)
        value_C = combine(score_TC, [task.name for task in model.tasks], bench, self.combine)
        while True:
            multiple = self.round_to or bench.multiple
            keep = choose(prunable, value_C, goal, multiple, self.keep_at_least, refused)
            cut = _removed_as_zeroed(model, prunable, keep)
            if cut is not None:
                return cut, prunable.cost(keep)
            wrong = [
                g.name for g in prunable.groups if not keep[g.classes].all() and not _alone(model, prunable, keep, g)
            ]
            if not wrong:
                raise CompressError("Pruned groups answer wrongly together but not alone; nothing was removed.")
            refused.update(wrong)
            bench.note(f"groups left whole, because the module cannot be cut there: {', '.join(wrong)}.")


def combine(score_TC: Tensor, tasks: list[str], bench: Bench, how: str) -> Tensor:
    """(class,) one value a channel from one row a task: rows sum to 1, tighter relative budgets weigh more."""
    scaled_TC = score_TC / score_TC.sum(1, keepdim=True).clamp_min(1e-30)
    tightness = torch.ones(len(tasks))
    for row, task in enumerate(tasks):
        if task in bench.budgets and task in bench.before:
            before = bench.before[task]
            tightness[row] = 1 / max(bench.budgets[task].allowed(before) / max(abs(before), 1e-9), 1e-4)
    scaled_TC = scaled_TC * (tightness / tightness.max())[:, None]
    return scaled_TC.max(0).values if how == "max" else scaled_TC.sum(0)


def choose(
    prunable: Prunable, value_C: Tensor, goal: tuple[int, ...], multiple: int, keep_at_least: float, refused: set[str]
) -> Tensor:
    """Bool by class: greedily drop the vector-wide slice of channels with the least value for the cost it saves."""
    keep = prunable.keep_all()
    orders = {
        g.name: g.classes[value_C[g.classes].argsort(stable=True)] for g in prunable.groups if g.name not in refused
    }
    full = prunable.cost(keep)
    now = full
    gains: dict[str, tuple[float, Tensor]] = {}
    groups = {g.name: g for g in prunable.groups}
    while any(have > want for have, want in zip(now, goal, strict=True)):
        for name, order in orders.items():
            dropped = _slice(groups[name], order, keep, multiple, keep_at_least)
            if dropped is None:
                gains.pop(name, None)
                continue
            trial = keep.clone()
            trial[dropped] = False
            after = prunable.cost(trial)
            saved = sum(
                (have - then) / total
                for have, then, total, want in zip(now, after, full, goal, strict=True)
                if have > want
            )
            gains[name] = (float(value_C[dropped].sum()) / max(saved, 1e-12), dropped)
        if not gains:
            return keep
        best = min(gains, key=lambda name: gains[name][0])
        keep[gains[best][1]] = False
        now = prunable.cost(keep)
    return keep


def _slice(group: Group, order: Tensor, keep: Tensor, multiple: int, keep_at_least: float) -> Tensor | None:
    """The next channels to drop so that the width becomes a multiple; None when the group may not shrink further."""
    left = order[keep[order]]
    count = len(left) % multiple or multiple
    floor = max(multiple if len(group) >= multiple else len(group), keep_at_least * len(group))
    return left[:count] if len(left) - count >= floor else None


def _alone(model: MultiTaskModel, prunable: Prunable, keep: Tensor, group: Group) -> bool:
    only = prunable.keep_all()
    only[group.classes] = keep[group.classes]
    return _removed_as_zeroed(model, prunable, only) is not None


def _removed_as_zeroed(model: MultiTaskModel, prunable: Prunable, keep: Tensor) -> MultiTaskModel | None:
    """The cut copy if it answers (in float64) as the uncut network with those channels read as zero; otherwise None."""
    zeroed, cut = model.clone(), model.clone()
    with torch.no_grad():
        for axis in prunable.reads():
            gone = (~keep[prunable.channels.axes[axis]]).nonzero().flatten()
            get_tensor(zeroed.module, axis.tensor).index_fill_(axis.dim, gone, 0.0)
        cut.cut(prunable.kept(keep))
        inputs = tuple(x.double() if x.is_floating_point() else x for x in model.inputs)
        wanted = zeroed.module.double().eval()
        probe = MultiTaskModel(cut.clone().module.double().eval(), model.tasks, inputs)
        try:
            given = probe.answers(*inputs)
        except (RuntimeError, ValueError):
            return None  # a size written into the module's own code
        reference = MultiTaskModel(wanted, model.tasks, inputs).answers(*inputs)
    for name, answer in reference.items():
        if given[name].shape != answer.shape or float((given[name] - answer).abs().max()) > EXACT * float(
            answer.abs().max()
        ):
            return None
    return cut
