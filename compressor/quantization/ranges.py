"""How far a value reaches, from batches that are seen once: extremes, percentiles, or least squared error."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from compressor.quantization.grids import HIGHEST, LARGEST_WEIGHT, LOWEST, Grid, short

Rule = Literal["minmax", "percentile", "mse"]

_BINS = 4096
_EXACT = 2**24  # the most that a float32 count counts to
_STEPS = 48  # shares of the full range that "mse" tries


class Histogram:
    """Counts of a value in equal bins around zero; bins become twice as wide for what lies outside, but no more.

    Attributes:
        low, high: extremes seen, exactly; both 0 before anything was.
        finite: whether all was; such as masks are not, and nothing is counted of them.
    """

    def __init__(self) -> None:
        self.low, self.high, self.finite = 0.0, 0.0, True
        self._reach = 0.0  # the bins go from -reach to reach
        self._counts = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Count in every element."""
        flat = values.detach().float().flatten()
        self.finite = self.finite and bool(flat.isfinite().all())
        if not len(flat) or not self.finite:
            return
        low, high = (float(x) for x in torch.aminmax(flat))
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high)
        if self._reach == 0.0:
            self._reach = largest
        while largest > self._reach > 0.0:
            half = self._counts.reshape(-1, 2).sum(1)
            self._counts.zero_()
            self._counts[_BINS // 4 : -_BINS // 4] = half
            self._reach *= 2
        if self._reach > 0.0:
            for part in torch.split(flat, _EXACT):
                self._counts += torch.histc(part, _BINS, -self._reach, self._reach).double()

    def grid(self, rule: Rule, percentile: float, *, centred: bool = False, exact: bool = False) -> Grid:
        """The grid of these values.

        Args:
            centred: whether its zero is at 0.
            exact: whether its scale is a power of two.
            percentile: share of all values (0-100), for that rule, outside of which as many are cut off at either end.
        """
        spanning = partial(Grid.centred if centred else Grid.spanning, exact=exact)
        if rule == "minmax" or self._reach == 0.0:
            return spanning(self.low, self.high)
        if rule == "percentile":
            return spanning(*self._within(percentile))
        shares = torch.linspace(1.0, 0.1, _STEPS).tolist()
        tried = [spanning(self.low * share, self.high * share) for share in shares]
        return min(tried, key=self._error)

    def _within(self, percentile: float) -> tuple[float, float]:
        total = self._counts.cumsum(0)
        out = float(total[-1]) * (1 - percentile / 100) / 2
        width = 2 * self._reach / _BINS
        first = int((total <= out).sum())
        last = int((total < float(total[-1]) - out).sum())
        return max(self.low, first * width - self._reach), min(self.high, (last + 1) * width - self._reach)

    def _error(self, grid: Grid) -> float:
        """Squared error of all that was counted, each at the middle of its bin."""
        width = 2 * self._reach / _BINS
        middles = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * width - self._reach
        steps = (middles / grid.scale).round().clamp(LOWEST - grid.zero_point, HIGHEST - grid.zero_point)
        return float((self._counts * (middles - steps * grid.scale).square()).sum())


def weight_scales(weight: Tensor, dim: int | None, rule: Rule, *, exact: bool = False) -> Tensor:
    """float32 symmetric scales, one for each index along `dim`, or one for the whole weight where it is None.

    "mse" tries shares of the largest magnitude; the other rules take all of it. Those that are to be exact are short.
    """
    values = weight.detach().float()
    rows = values.reshape(1, -1) if dim is None else values.transpose(0, dim).flatten(1)
    largest = rows.abs().amax(1)
    largest = torch.where(largest > 0, largest, largest.max().clamp_min(1e-12))  # a pruned channel's is any
    largest = largest / LARGEST_WEIGHT
    if rule != "mse":
        return short(largest) if exact else largest
    best, least = largest, torch.full_like(largest, float("inf"))
    for share in torch.linspace(1.0, 0.4, 31).tolist():
        scale = short(share * largest) if exact else share * largest
        on_grid = (rows / scale[:, None]).round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT) * scale[:, None]
        error = (rows - on_grid).square().sum(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
