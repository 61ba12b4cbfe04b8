"""What a claim about pruning has to beat, beside the controls that are plain settings of `prune`.

PAGCP as published (Ye et al., T-PAMI 2023): one threshold on the worst task's loss, a grid of nineteen rates, no fresh
batch norm; training the pruned network's shape from scratch; and a ticket's densities at random places.
"""

import math
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from compressor.allocation import kept, ranking
from compressor.bench import Bench
from compressor.costs import Costs, Ledger
from compressor.criteria import CRITERIA
from compressor.groups import Group, Prunable
from compressor.model import MultiTaskModel
from compressor.stages.ticket import Ticket, initial, rewind
from compressor.training import Training, train
from compressor.workload import Batch

GRID = [0.05 * k for k in range(1, 20)]
RATE, TOLERANCE, ORDER_AT, KEPT_GROUPS = 0.06, 6.0, 0.3, 0.8
MOST_ROUNDS, LOSS_BATCHES = 8, 4


@dataclass
class Published:
    """PAGCP's rounds of `prune -> retrain` until the multiply-adds are met; `asked` counts questions of the last."""

    macs: float
    recover: Training
    asked: int = 0

    def run(self, model: MultiTaskModel, bench: Bench) -> MultiTaskModel:
        start = Prunable.of(model)
        full = start.cost(start.keep_all())
        for turn in range(1, MOST_ROUNDS + 1):
            prunable = Prunable.of(model)
            now = prunable.cost(prunable.keep_all())
            if now[0] <= self.macs * full[0]:
                break
            keep = self._round(model, prunable, bench, int(self.macs * full[0]))
            if bool(keep.all()):
                break
            model = prunable.cut(model, keep)
            train(model, bench, self.recover, f"published PAGCP, round {turn}", bench.seed + turn)
            bench.progress.line(f"  published PAGCP, round {turn}: MACs {prunable.cost(keep)[0] / full[0]:.0%}")
        return model

    def _round(self, model: MultiTaskModel, prunable: Prunable, bench: Bench, goal: int) -> Tensor:
        self.asked, batches = 0, list(islice(bench.workload.batches("calibrate", bench.seed), LOSS_BATCHES))
        groups, ledger = prunable.groups, Ledger(prunable)
        base = self._losses(model, prunable, bench, batches, prunable.keep_all())
        scores = CRITERIA["magnitude-l1"](model, prunable, bench, 1)[0]
        ranked = ranking(groups, scores)
        left: dict[str, list[int]] = dict(ranked)
        saved = {g.name: ledger.saving(ranked[g.name][-max(1, round(ORDER_AT * len(g))) :])[0] for g in groups}
        shrink, threshold = _decay(len(groups)), RATE
        price: dict[str, float] = {}
        for group in sorted(groups, key=lambda g: -saved[g.name]):
            before, whole = dict(base), ranked[group.name]
            for rate in GRID:
                left[group.name] = whole[: len(whole) - min(round(rate * len(whole)), len(whole) - 1)]
                found = self._losses(model, prunable, bench, batches, kept(prunable, groups, left))
                if max(found[t] / base[t] for t in base) > 1 + threshold:
                    previous = max(0.0, rate - GRID[0])
                    left[group.name] = whole[: len(whole) - min(round(previous * len(whole)), len(whole) - 1)]
                    threshold *= shrink
                    base = {t: max(base[t], found[t]) for t in base}
                    break
            else:
                left[group.name] = whole  # as published: the last rate falls through without being applied
            gone = whole[len(left[group.name]) :]
            gain = ledger.saving(gone)[0]
            rise = max(found[t] / before[t] - 1 for t in before)
            price[group.name] = rise / gain if gone and gain else math.inf
            ledger.drop(gone)
        bench.asked.append((self.asked, len(groups)))
        best = sorted(groups, key=lambda g: price[g.name])[: round(KEPT_GROUPS * len(groups))]
        return _until(prunable, groups, {g.name: left[g.name] for g in best}, ranked, goal)

    def _losses(
        self, model: MultiTaskModel, prunable: Prunable, bench: Bench, batches: list[Batch], keep: Tensor
    ) -> dict[str, float]:
        self.asked += 1
        probe = model.clone()
        total: dict[str, float] = {}
        prunable.silence(probe.module, keep)
        with torch.no_grad():
            for batch in batches:
                for name, loss in bench.workload.losses(probe.answers(*batch.inputs), batch).items():
                    total[name] = total.get(name, 0.0) + float(loss)
        return total


def _decay(groups: int) -> float:
    """The root of prod (1 + RATE * x^i) = TOLERANCE over all groups, at most 1."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        reached = math.prod(1 + RATE * middle**i for i in range(groups))
        low, high = (middle, high) if reached < TOLERANCE else (low, middle)
    return high


def _until(
    prunable: Prunable, groups: tuple[Group, ...], left: dict[str, list[int]], ranked: dict[str, list[int]], goal: int
) -> Tensor:
    """The groups' new widths, as many of them as the goal needs: a control must not be cut further than we are."""
    now = dict(ranked)
    for name in left:
        now[name] = left[name]
        keep = kept(prunable, groups, now)
        cost: Costs = prunable.cost(keep)
        if cost[0] <= goal:
            break
    return kept(prunable, groups, now)


def from_scratch(pruned: MultiTaskModel, bench: Bench, how: Training) -> MultiTaskModel:
    """The same shape with fresh weights, trained as the pruned network is, for as many steps."""
    fresh = initial(pruned, bench)
    train(fresh, bench, how, "from scratch", bench.seed)
    return fresh


def random_masks(model: MultiTaskModel, bench: Bench, ticket: Ticket, how: Training) -> MultiTaskModel:
    """As many weights in every layer as the ticket keeps of the trained ones in one round, but anywhere; trained from
    there.
    """
    untrained = ticket.train.model_copy(update={"steps": 0})
    found = ticket.model_copy(update={"train": untrained, "rounds": 1}).run(model, bench)
    chance = torch.Generator().manual_seed(bench.seed)
    masks = {}
    for name, mask in found.masks.items():
        order = torch.randperm(mask.numel(), generator=chance)
        masks[name] = mask.flatten()[order].reshape(mask.shape)
    state = {name: value.clone() for name, value in model.module.state_dict().items()}
    anywhere = rewind(model, state, masks)
    train(anywhere, bench, how, "random places", bench.seed)
    return anywhere
