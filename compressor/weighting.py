"""How much each task's loss counts in a training: as told, by learnt uncertainty, or by how slowly it falls."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Rule = Literal["fixed", "uncertainty", "progress"]
_TEMPERATURE = 2.0


class Weighting:
    """Sums losses of tasks; a task that a batch has no loss for is left out of it.

    `fixed` factors always apply. "uncertainty" adds a learnt log variance s to each task: exp(-s) * loss + s (Kendall,
    Gal and Cipolla, CVPR 2018). "progress" weighs a task by its mean loss over the last window of steps over that of
    the window before, through a softmax of temperature 2 whose weights sum to the number of tasks (Liu, Johns and
    Davison, "dynamic weight average", CVPR 2019; AdapMTL, ACM MM 2024, goes by the same change).
    """

    def __init__(self, rule: Rule, names: Sequence[str], fixed: Mapping[str, float], window: int) -> None:
        self._rule, self._names, self._fixed, self._window = rule, list(names), fixed, window
        self._log_variance = nn.Parameter(torch.zeros(len(self._names)))
        self._sums, self._counts = torch.zeros(len(self._names)), torch.zeros(len(self._names))
        self._before = torch.zeros(len(self._names))
        self._factors = torch.ones(len(self._names))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is learnt beside the network."""
        return [self._log_variance] if self._rule == "uncertainty" else []

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on, by name; to be changed in place."""
        return {
            "log_variance": self._log_variance.data, "sums": self._sums, "counts": self._counts,
            "before": self._before, "factors": self._factors,
        }

    def total(self, losses: Mapping[str, Tensor], step: int) -> Tensor:
        """The sum to descend on, for the losses of one batch at step 0, 1, ..."""
        terms = []
        for name, loss in losses.items():
            at = self._names.index(name)
            term = self._fixed.get(name, 1.0) * loss
            if self._rule == "uncertainty":
                term = torch.exp(-self._log_variance[at]) * term + self._log_variance[at]
            elif self._rule == "progress":
                term = float(self._factors[at]) * term
                self._sums[at] += float(loss.detach())
                self._counts[at] += 1
            terms.append(term)
        if self._rule == "progress" and (step + 1) % self._window == 0:
            self._turn()
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def _turn(self) -> None:
        """A window is over: weigh by how much of the one before is left of each loss."""
        seen = self._counts > 0
        now = torch.where(seen, self._sums / self._counts.clamp_min(1), self._before)
        change = torch.where(seen & (self._before > 0), now / self._before.clamp_min(1e-12), 1.0)
        self._factors.copy_(len(self._names) * torch.softmax(change / _TEMPERATURE, 0))
        self._before.copy_(now)
        self._sums.zero_()
        self._counts.zero_()
