"""Widths group by group, each as narrow as every task's budget allows when the cut network is asked.

Source: Ye et al., "Performance-Aware Global Channel Pruning for Multitask CNNs" (PAGCP), T-PAMI 2023: sequential,
greedy, the cut network itself as the oracle. Other than there, every task has a budget of its own instead of one
threshold on the worst task's loss; batch norm goes by the statistics of the batches that the network is asked on; and
the width is found by bisection, at most five questions a group instead of up to nineteen.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from compressor.allocation import kept, ranking
from compressor.bench import Bench, by_batch, reestimate_batchnorm, takes_batches
from compressor.costs import Costs, Ledger
from compressor.errors import CompressError
from compressor.groups import Group, Prunable
from compressor.margin import margin
from compressor.model import MultiTaskModel
from compressor.surgery import cut
from compressor.workload import Batch, Task

MOST_WIDTHS = 31  # a group's choices; bisection asks about five of them
_TYPICAL = 0.3  # share of its channels that a group's place in the order goes by, as published

Holds = Callable[[Group, Tensor, float], bool]
"""Whether every task is inside its share (0-1) of what it may lose when only these classes are kept."""


def walk(
    prunable: Prunable, groups: Sequence[Group], value_C: Tensor, goal: Costs, multiple: int,
    floors: Mapping[str, int], holds: Holds,
) -> Tensor:
    """Bool by class: the groups that save most first, each narrowed as far as `holds` allows, until the goal is met.

    A group may use up as much of what is allowed in all as it saves of what all of them could; what it leaves, later
    ones may use.
    """
    ledger, left = Ledger(prunable), ranking(groups, value_C)
    full = ledger.now
    worth = {g.name: _saved(ledger.saving(left[g.name][-max(1, round(_TYPICAL * len(g))) :]), full) for g in groups}
    share = 0.0
    for group in sorted(groups, key=lambda one: -worth[one.name]):
        share += worth[group.name] / max(sum(worth.values()), 1e-30)
        whole = left[group.name]
        cuts = _cuts(ledger, whole, goal, group.step(multiple), floors[group.name])
        low, high = -1, len(cuts)
        while high - low > 1:
            middle = (low + high) // 2
            left[group.name] = whole[: -cuts[middle]]
            fits = holds(group, kept(prunable, groups, left), min(share, 1.0))
            low, high = (middle, high) if fits else (low, middle)
        left[group.name] = whole if low < 0 else whole[: -cuts[low]]
        ledger.drop(whole[len(left[group.name]) :])
    return kept(prunable, groups, left)


class Oracle:
    """Asks cut networks without cutting: weights that read what is gone are zero. Only where a norm loses channels is
    the network cut.

    Batch norm takes each batch's own statistics, so that a question is one pass over the batches that are judged by.
    Where it cannot, as with a single value a channel, it is estimated anew on some batches before each question.

    Attributes:
        asked: questions so far.
        stopped: for each group that a budget kept wider than it could have been, the task nearest its end.
    """

    def __init__(self, model: MultiTaskModel, prunable: Prunable, bench: Bench, batches: int, slack: float) -> None:
        self._model, self._prunable, self._bench, self._slack = model, prunable, bench, slack
        self._probe = model.clone()
        self._state = {name: value.clone() for name, value in model.module.state_dict().items()}
        self._judging = judging(bench)
        by_batches = takes_batches(self._probe.module, self._judging, bench.device)
        self._settling = [] if by_batches else bench.calibration(batches)
        if by_batches:
            self._before = self._scored(bench.original.clone())
        else:
            self._before = bench.scores(bench.original, self._judging)
        self.asked = 0
        self.stopped: dict[str, str] = {}

    def scores(self, keep: Tensor) -> dict[str, float]:
        """Scores with only these classes kept."""
        self.asked += 1
        if any(not keep[ids].all() for _, ids in self._prunable.channels.norms.values()):
            narrower = cut(self._model, self._prunable, keep)
            if narrower is not None:  # its code may not go along, which is for the search's caller to see
                return self._scored(narrower)
        module = self._probe.module
        module.load_state_dict(self._state)
        self._prunable.silence(module, keep)
        return self._scored(self._probe)

    def _scored(self, model: MultiTaskModel) -> dict[str, float]:
        if self._settling:
            reestimate_batchnorm(model.module, self._settling, self._bench.device)
            return self._bench.scores(model, self._judging)
        with by_batch(model.module):
            return self._bench.scores(model, self._judging)

    def holds(self, group: Group, keep: Tensor, share: float) -> bool:
        """Whether every task keeps inside that share of its slackened budget; what stopped it is remembered."""
        scores, left = self.scores(keep), {}
        for task in self._bench.original.tasks:
            if task.name in self._bench.budgets:
                before, after = self._before[task.name], scores[task.name]
                budget = self._bench.budgets[task.name].allowed(before)
                bound = _bound(task, before, self._slack * share * budget)
                found = margin(before, after, bound, higher_is_better=task.higher_is_better)
                left[task.name] = found / max(bound, 1e-12)
        worst = min(left, key=lambda name: left[name])
        if left[worst] < 0:
            self.stopped[group.name] = worst
        return left[worst] >= 0


def _bound(task: Task, before: float, allowed: float) -> float:
    """The drop that is accepted of a network that will recover: of a score that falls, what its inverse might rise.

    An error may grow to three times what it was, an accuracy may fall to a third: no slack allows all of it to go.
    """
    return before * allowed / (before + allowed) if task.higher_is_better and before > 0 else allowed


def judging(bench: Bench) -> list[Batch]:
    """What a search may look at: the calibrate split where it labels every task with a budget, else the validate split.

    Raises:
        CompressError: no task has a budget to judge by.
    """
    if not bench.budgets:
        raise CompressError("search = 'sequential' goes by budgets, and the recipe has none; give [budgets].")
    found = list(bench.workload.batches("calibrate", bench.seed))
    labelled = {name for batch in found for name in batch.labels}
    return found if set(bench.budgets) <= labelled else bench.validation


def _cuts(ledger: Ledger, left: Sequence[int], goal: Costs, multiple: int, floor: int) -> list[int]:
    """How many channels may go, ascending, no more than the goal asks for; evenly thinned out where there are many."""
    found = []
    first = len(left) % multiple or multiple
    for count in range(first, len(left) - floor + 1, multiple):
        if all(now <= wanted for now, wanted in zip(ledger.now, goal, strict=True)):
            break
        found.append(count)
        saved = ledger.saving(left[-count:])
        if all(now - less <= wanted for now, less, wanted in zip(ledger.now, saved, goal, strict=True)):
            break
    picks = torch.linspace(0, len(found) - 1, min(MOST_WIDTHS, len(found))).round().long().tolist()
    return [found[k] for k in picks]


def _saved(saved: Costs, full: Costs) -> float:
    return sum(part / max(whole, 1) for part, whole in zip(saved, full, strict=True))
