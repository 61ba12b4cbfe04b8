"""Layers as the accelerator computes them: integers from integers, and what they answer in numpy."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from targets.accelerator.arithmetic import LARGEST_SUM, Int8, Step, lifted, requantized
from targets.errors import TargetError

LARGEST_WINDOW, LARGEST_PAD = 15, 15
"""Lines and columns that POST takes the largest or the sum of, and that LOAD puts around a picture."""

Pair = tuple[int, int]
Frame = tuple[int, int, int, int]
"""Lines and columns around a picture: top, left, bottom, right."""


@dataclass(frozen=True, slots=True)
class Window:
    """What of a picture each result is computed of.

    Attributes:
        size: lines and columns that are read.
        step: lines and columns between results (stride).
        spread: lines and columns between what is read (dilation).
        pad: the frame around the picture.
    """

    size: Pair = (1, 1)
    step: Pair = (1, 1)
    spread: Pair = (1, 1)
    pad: Frame = (0, 0, 0, 0)

    def reach(self, count: Pair) -> Pair:
        """Lines and columns, frame included, that so many lines and columns of results read."""
        pairs = zip(count, self.step, self.size, self.spread, strict=True)
        height, width = ((n - 1) * step + (size - 1) * spread + 1 for n, step, size, spread in pairs)
        return height, width

    def results(self, height: int, width: int) -> Pair:
        """Lines and columns of results.

        Raises:
            TargetError: the window is larger than the picture.
        """
        top, left, bottom, right = self.pad
        full = height + top + bottom, width + left + right
        least = self.reach((1, 1))
        if least[0] > full[0] or least[1] > full[1]:
            raise TargetError(f"A window of {least[0]} x {least[1]} does not fit a picture of {full[0]} x {full[1]}.")
        return (full[0] - least[0]) // self.step[0] + 1, (full[1] - least[1]) // self.step[1] + 1

    def of(self, picture: NDArray[Any], fill: int) -> NDArray[Any]:
        """(channels, lines, columns, size[0], size[1]), a view of a framed copy."""
        top, left, bottom, right = self.pad
        framed = np.pad(picture, ((0, 0), (top, bottom), (left, right)), constant_values=fill)
        seen = sliding_window_view(framed, self.reach((1, 1)), (1, 2))
        return seen[:, :: self.step[0], :: self.step[1], :: self.spread[0], :: self.spread[1]]


POINT = Window()
"""A single value."""


@dataclass(frozen=True, slots=True)
class Contraction:
    """A convolution; a dense layer and a matrix product are ones of a single tap.

    Attributes:
        weights: int8 (outputs, inputs, size[0], size[1]); those of groups lie in a tensor full of zeros, whose empty
            tiles cost nothing.
        pad_value: what the frame holds, the zero of the input's grid.
        step: for all outputs.
        groups: how many there were.
        pool: lines and columns of results, of which the largest sum is kept: what pooling its answers would keep where
            no scale is negative.
    """

    weights: Int8
    window: Window
    pad_value: int
    step: Step
    groups: int = 1
    pool: Pair = (1, 1)

    def __post_init__(self) -> None:
        if self.weights.dtype != np.int8 or self.weights.ndim != 4 or len(self.step.scaling) != len(self.weights):
            raise TargetError("A contraction needs int8 weights (outputs, inputs, lines, columns) and as many scales.")
        if self.pool != (1, 1) and self.step.addition is not None:
            raise TargetError("A contraction whose answers are pooled cannot add another tensor.")
        if self.weights[0].size * 2**14 >= LARGEST_SUM:
            raise TargetError(f"A sum of {self.weights[0].size} products does not fit an accumulator of 32 bits.")

    def results(self, height: int, width: int) -> Pair:
        """Lines and columns of results."""
        found = self.window.results(height, width)
        return found[0] // self.pool[0], found[1] // self.pool[1]

    def __call__(self, x: Int8, other: Int8 | None = None) -> Int8:
        """int8 (outputs, lines, columns) of int8 (inputs, height, width), plus `other` where the step adds it."""
        seen = self.window.of(x, self.pad_value)
        sums = np.einsum("ihwyx,oiyx->hwo", seen.astype(np.float64), self.weights.astype(np.float64), optimize=True)
        height, width = self.results(*x.shape[1:])
        parts = height, self.pool[0], width, self.pool[1], -1
        sums = sums[: height * self.pool[0], : width * self.pool[1]].reshape(parts).max((1, 3))
        added = None if other is None else other.transpose(1, 2, 0)
        return requantized(sums.astype(np.int64), self.step, added).transpose(2, 0, 1)


@dataclass(frozen=True, slots=True)
class Pooling:
    """The largest value or the sum of each window, channel by channel, requantized.

    A window of one value is what scales and shifts channels, as a batch norm that no contraction takes in does.
    """

    kind: Literal["largest", "sum"]
    window: Window
    pad_value: int
    step: Step

    def results(self, height: int, width: int) -> Pair:
        """Lines and columns of results."""
        return self.window.results(height, width)

    def __call__(self, x: Int8, other: Int8 | None = None) -> Int8:
        """int8 (channels, lines, columns) of int8 (channels, height, width)."""
        seen = self.window.of(x, self.pad_value).astype(np.int64)
        found = seen.max((3, 4)) if self.kind == "largest" else seen.sum((3, 4))
        return requantized(lifted(found.transpose(1, 2, 0)), self.step).transpose(2, 0, 1)


@dataclass(frozen=True, slots=True)
class Product:
    """The products of two values, line by line: of attention's queries and keys, each head a line.

    The second one has a channel for each channel of results, and a column for each channel of the first.

    Attributes:
        channels: of the results.
    """

    channels: int
    step: Step

    def results(self, height: int, width: int) -> Pair:
        """Lines and columns of results."""
        return height, width

    def __call__(self, x: Int8, other: Int8 | None = None) -> Int8:
        """int8 (channels, lines, columns) of int8 (factors, lines, columns) and (channels, lines, factors)."""
        assert other is not None
        sums = np.einsum("khw,nhk->hwn", x.astype(np.float64), other.astype(np.float64), optimize=True)
        return requantized(sums.astype(np.int64), self.step).transpose(2, 0, 1)


Layer = Contraction | Pooling | Product
