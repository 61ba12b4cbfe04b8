"""What the accelerator computes with its sums: the reference that simulators, circuit and compiler agree with.

A contraction's sum becomes `clamp(round((sum + bias) * multiplier / 2^shift) + zero)`, halves to even; that is an
int8 of the answer's grid. Where another tensor is added, the result goes through a second, narrower step.

Source: the scheme of Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", CVPR 2018, with multipliers of 17 bits and a sign.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from targets.errors import TargetError

Int8 = NDArray[np.int8]
Int64 = NDArray[np.int64]

MULTIPLIER_BITS = 17
LARGEST_SHIFT = 48
LARGEST_SUM = 2**30
"""Of products, and of a bias: together they fit an accumulator."""
FRACTION_BITS = 8
"""Values of the side buffer enter the pipeline of the accumulators with so many fractional bits."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """How a channel's sums become steps of a grid; each array has one element for each channel.

    Attributes:
        bias: int32, added to the sum.
        multiplier: -2^17 < multiplier < 2^17.
        shift: 1 to 48.
    """

    bias: Int64
    multiplier: Int64
    shift: Int64

    @classmethod
    def of(cls, factor: NDArray[np.float64], bias: NDArray[np.float64]) -> "Scaling":
        """The nearest to `(sum + bias) * factor`.

        Raises:
            TargetError: a factor is too large or a bias does not fit the accumulators.
        """
        multiplier, shift = fixed_point(factor)
        if np.abs(bias).max(initial=0) >= LARGEST_SUM:
            raise TargetError(f"A bias of {np.abs(bias).max():.3g} steps does not fit an accumulator of 32 bits.")
        return cls(np.rint(bias).astype(np.int64), multiplier, shift)

    def __len__(self) -> int:
        return len(self.bias)

    def part(self, first: int, last: int) -> "Scaling":
        """That of some channels."""
        return Scaling(self.bias[first:last], self.multiplier[first:last], self.shift[first:last])


@dataclass(frozen=True, slots=True)
class Addition:
    """Another tensor, added to the int8 result: `((x - zero) * own + (y - other_zero) * other) / 2^shift`.

    Attributes:
        own, other: factors of the result and of the other tensor, 0 to 2^17 - 1.
        zero, low, high: of the sum's grid, and where it is clamped.
    """

    own: int
    other: int
    other_zero: int
    shift: int
    zero: int
    low: int
    high: int

    @classmethod
    def of(cls, own: float, other: float, other_zero: int, zero: int, low: int, high: int) -> "Addition":
        """From both factors as real numbers, at least one of which is not zero."""
        _, (shift,) = fixed_point(np.array([max(own, other)]))
        multipliers = [min(round(factor * 2.0 ** int(shift)), 2**MULTIPLIER_BITS - 1) for factor in (own, other)]
        return cls(multipliers[0], multipliers[1], other_zero, int(shift), zero, low, high)


@dataclass(frozen=True, slots=True)
class Step:
    """All that POST does to a block of channels.

    Attributes:
        zero, low, high: of the answer's grid, and where it is clamped, as ReLU does.
        addition: a second step, if there is one.
    """

    scaling: Scaling
    zero: int
    low: int = -128
    high: int = 127
    addition: Addition | None = None

    def part(self, first: int, last: int) -> "Step":
        """That of some channels."""
        return replace(self, scaling=self.scaling.part(first, last))


def fixed_point(factor: NDArray[np.float64]) -> tuple[Int64, Int64]:
    """(multiplier, shift), such that multiplier / 2^shift is nearest to each factor; the sign is the multiplier's.

    Raises:
        TargetError: a factor is not finite, or too large.
    """
    if not np.isfinite(factor).all() or np.abs(factor).max(initial=0) >= 2 ** (MULTIPLIER_BITS - 2):
        raise TargetError(f"A scale of {np.abs(factor).max():.3g} is too large to requantize with.")
    _, exponent = np.frexp(factor)
    shift = np.clip(MULTIPLIER_BITS - exponent, 1, LARGEST_SHIFT)
    multiplier = np.rint(factor * np.exp2(shift)).astype(np.int64)
    over = np.abs(multiplier) == 2**MULTIPLIER_BITS
    return np.where(over, multiplier // 2, multiplier), np.where(over, shift - 1, shift).astype(np.int64)


def rounded(value: Int64, shift: Int64 | int) -> Int64:
    """value / 2^shift, halves to even, as ONNX's QuantizeLinear rounds."""
    half = np.left_shift(np.int64(1), np.asarray(shift, np.int64) - 1)
    odd = np.right_shift(value, shift) & 1
    return np.asarray(np.right_shift(value + half - 1 + odd, shift), np.int64)


def requantized(sums: NDArray[Any], step: Step, other: Int8 | None = None) -> Int8:
    """int8 (..., channels) of sums that are int32 (..., channels).

    Args:
        other: what the step's addition adds, of the same shape.
    """
    scaling = step.scaling
    value = (sums.astype(np.int64) + scaling.bias) * scaling.multiplier
    result = np.clip(rounded(value, scaling.shift) + step.zero, step.low, step.high)
    if (then := step.addition) is not None:
        assert other is not None
        total = (result - step.zero) * then.own + (other.astype(np.int64) - then.other_zero) * then.other
        result = np.clip(rounded(total, then.shift) + then.zero, then.low, then.high)
    return result.astype(np.int8)


def lifted(total: NDArray[Any]) -> Int64:
    """What the largest or the sum of a window of int8 is to the pipeline of the accumulators."""
    return total.astype(np.int64) << FRACTION_BITS
