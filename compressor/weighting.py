"""How much each task's loss counts in a training: as told, by learnt uncertainty, by how slowly it falls, or by what is
left of its budget.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Rule = Literal["fixed", "uncertainty", "progress", "margins"]
_TEMPERATURE = 2.0
_LEAST_LEFT, _MOST_LEFT = -2.0, 1.0  # shares of a budget between which weights differ, by e^3 at the most


class Weighting:
    """Sums losses of tasks; a task that a batch has no loss for is left out of it.

    `fixed` factors always apply. "uncertainty" adds a learnt log variance s to each task: exp(-s) * loss + s (Kendall,
    Gal and Cipolla, CVPR 2018). "progress" weighs a task by its mean loss over the last window of steps over that of
    the window before, through a softmax of temperature 2 whose weights sum to the number of tasks (Liu, Johns and
    Davison, "dynamic weight average", CVPR 2019; AdapMTL, ACM MM 2024, goes by the same change, over 500 iterations).
    "margins" weighs a task by the share of its budget that it has left, the less the more, through a softmax of
    temperature 1 that sums to the number of tasks; a task without a budget counts as one that has lost nothing.
    """

    def __init__(
        self, rule: Rule, names: Sequence[str], fixed: Mapping[str, float], window: int,
        device: torch.device | None = None,
    ) -> None:
        self._rule, self._names, self._fixed, self._window = rule, list(names), fixed, window
        self._log_variance = nn.Parameter(torch.zeros(len(self._names), device=device))
        self._sums, self._counts, self._before, self._factors = (
            torch.full((len(self._names),), float(value), device=device) for value in (0, 0, 0, 1)
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is learnt beside the network."""
        return [self._log_variance] if self._rule == "uncertainty" else []

    @property
    def tallies(self) -> list[Tensor]:
        """What was counted on this process's batches alone."""
        return [self._sums, self._counts] if self._rule == "progress" else []

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on, by name; to be changed in place."""
        return {
            "log_variance": self._log_variance.data, "sums": self._sums, "counts": self._counts,
            "before": self._before, "factors": self._factors,
        }

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The sum to descend on, for the losses of one batch."""
        terms = []
        for name, loss in losses.items():
            at = self._names.index(name)
            term = self._fixed.get(name, 1.0) * loss
            if self._rule == "uncertainty":
                term = torch.exp(-self._log_variance[at]) * term + self._log_variance[at]
            else:
                term = self._factors[at] * term
            if self._rule == "progress":
                self._sums[at] += loss.detach()
                self._counts[at] += 1
            terms.append(term)
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def turn(self, step: int) -> None:
        """After step 0, 1, ...: where a window is over, weigh by how much of the one before is left of each loss."""
        if self._rule != "progress" or (step + 1) % self._window:
            return
        seen = self._counts > 0
        now = torch.where(seen, self._sums / self._counts.clamp_min(1e-12), self._before)
        change = torch.where(seen & (self._before > 0), now / self._before.clamp_min(1e-12), 1.0)
        self._factors.copy_(len(self._names) * torch.softmax(change / _TEMPERATURE, 0))
        self._before.copy_(now)
        self._sums.zero_()
        self._counts.zero_()

    def follow(self, shares: Mapping[str, float]) -> None:
        """Weigh by the share of its budget that each task has left, where that is the rule."""
        if self._rule == "margins":
            left = torch.tensor([shares.get(name, _MOST_LEFT) for name in self._names])
            weights = torch.softmax(-left.clamp(_LEAST_LEFT, _MOST_LEFT), 0)
            self._factors.copy_(len(self._names) * weights)
