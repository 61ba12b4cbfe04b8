"""What the reader of a program keeps of it: constants, layers whose answers have no grid yet, and their shapes."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from targets.accelerator.arithmetic import Scaling, Step
from targets.accelerator.layers import LARGEST_PAD, LARGEST_WINDOW, POINT, Contraction, Pair, Window
from targets.accelerator.network import Grid

Floats = NDArray[np.float64]

PICTURE = 4
"""Dimensions of a tensor that is taken as one picture; others have their channels last."""


@dataclass(frozen=True, slots=True)
class Constant:
    """integers * scale, the scale of its shape or broadcast to it; a plain constant has the scale 1."""

    integers: NDArray[Any]
    scale: Floats

    @property
    def real(self) -> Floats:
        return self.integers * self.scale


@dataclass(frozen=True, slots=True)
class Pending:
    """A layer whose answer has no grid yet.

    Attributes:
        other: what is added to the source, or what it is multiplied by.
        weights: of a contraction; None for everything else.
        bias: real, for each channel.
        share: of a pooling, what a window's sum is multiplied by.
        low, high: where the answer is clipped.
    """

    kind: Literal["contraction", "product", "largest", "sum", "addition"]
    source: str
    other: str | None = None
    weights: Constant | None = None
    window: Window = POINT
    groups: int = 1
    bias: Floats | None = None
    share: float = 1.0
    low: float = -np.inf
    high: float = np.inf


def contraction(made: Pending, source: Grid, grid: Grid, low: int, high: int) -> Contraction:
    assert made.weights is not None
    weights = made.weights.integers
    scale = np.broadcast_to(made.weights.scale, weights.shape)[:, 0, 0, 0]
    real = source.scale * scale
    bias = np.zeros(len(weights)) if made.bias is None else np.rint(made.bias / real)
    bias = bias - source.zero * weights.sum((1, 2, 3), dtype=np.int64)
    step = Step(Scaling.of(real / grid.scale, bias), grid.zero, low, high)
    return Contraction(_ungrouped(weights.astype(np.int8), made.groups), made.window, source.zero, step, made.groups)


def _ungrouped(weights: NDArray[np.int8], groups: int) -> NDArray[np.int8]:
    """Weights of groups as those of one, zero where a group does not read."""
    if groups == 1:
        return weights
    out, each = len(weights) // groups, weights.shape[1]
    whole = np.zeros((len(weights), groups * each, *weights.shape[2:]), np.int8)
    for g in range(groups):
        whole[g * out : (g + 1) * out, g * each : (g + 1) * each] = weights[g * out : (g + 1) * out]
    return whole


def clipped(made: Pending) -> bool:
    return bool(np.isfinite(made.low) or np.isfinite(made.high))


def int8_by_output(weights: Constant) -> bool:
    """Are they a convolution's, symmetric, with one scale, or one for each output?"""
    whole = weights.integers.ndim == 4 and np.abs(weights.integers).max(initial=0) <= 127
    return whole and (weights.scale.size == 1 or weights.scale.shape == (len(weights.integers), 1, 1, 1))


def pools(window: Window) -> bool:
    """Can POST go over such windows?"""
    return max(*window.size, *window.step) <= LARGEST_WINDOW and max(window.pad) <= LARGEST_PAD


def reaching(window: Window, picture: Pair, results: Pair) -> Window:
    """With as much of a frame at the far ends as so many results need, of which each has some of the picture.

    As it is where one would have none.
    """
    ends = list[int]()
    for along in (0, 1):
        last = (results[along] - 1) * window.step[along]
        if last >= window.pad[along] + picture[along]:
            return window
        ends.append(max(window.pad[2 + along], last + window.size[along] - window.pad[along] - picture[along]))
    return replace(window, pad=(*window.pad[:2], ends[0], ends[1]))


def grid_of(scale: Any, zero: Any) -> Grid | None:
    """Of a whole tensor."""
    if not isinstance(scale, Constant) or not isinstance(zero, Constant) or scale.integers.size != 1:
        return None
    return Grid(float(scale.integers.item()), int(zero.integers.item()))


def pair(values: Any) -> tuple[int, int]:
    first, second = (int(value) for value in values)
    return first, second


def frame(values: Any) -> tuple[int, int, int, int]:
    top, left, bottom, right = (int(value) for value in values)
    return top, left, bottom, right


def is_int8(var: Any) -> bool:
    return str(var.ty.dtype) == "int8"


def picture(var: Any, *, last: bool = False) -> list[int] | None:
    """(channels, height, width) of one picture; of what has its channels last, missing dimensions are of size 1."""
    shape = [int(size) for size in var.ty.shape]
    if not shape or shape[0] != 1 or len(shape) > PICTURE or (len(shape) < PICTURE and not last):
        return None
    return [shape[-1], *[1] * (PICTURE - len(shape)), *shape[1:-1]] if last else shape[1:]


def variables(value: Any) -> list[Any]:
    """Those that an expression reads, in tuples too."""
    if isinstance(value, relax.Var):
        return [value]
    parts = list(value.args) if isinstance(value, relax.Call) else []
    parts += list(value.fields) if isinstance(value, relax.Tuple) else []
    parts += [value.tuple_value] if isinstance(value, relax.TupleGetItem) else []
    return [found for part in parts for found in variables(part)]
