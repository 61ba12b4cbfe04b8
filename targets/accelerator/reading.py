"""A quantized Relax function as integer layers: as much of it as the accelerator computes.

What lies between a dequantize and the quantize behind it is one layer: a contraction with its bias and activation, a
pooling, or a sum of two values, which a contraction that nothing else reads takes in. Moving values from one grid to
another is a pooling of windows of one value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tvm import ir, relax

from targets.accelerator.arithmetic import FRACTION_BITS, Scaling, Step
from targets.accelerator.layers import LARGEST_PAD, LARGEST_WINDOW, POINT, Contraction, Layer, Pooling, Window
from targets.accelerator.merging import Sum, pooled, summed
from targets.accelerator.network import Grid, Network, Node, Value
from targets.errors import TargetError

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Constant:
    """integers * scale, the scale of its shape or broadcast to it; a plain constant has the scale 1."""

    integers: NDArray[Any]
    scale: Floats

    @property
    def real(self) -> Floats:
        return self.integers * self.scale


@dataclass(frozen=True, slots=True)
class Real:
    """A value of the network as the real numbers that it stands for."""

    name: str


@dataclass(frozen=True, slots=True)
class Pending:
    """A layer whose answer has no grid yet.

    Attributes:
        weights: of a contraction; None for a pooling, or a sum of two values.
        bias: real, for each channel.
        share: of a pooling, what a window's sum is multiplied by.
        low, high: where the answer is clipped.
    """

    kind: Literal["contraction", "largest", "sum", "addition"]
    source: str
    other: str | None = None
    weights: Constant | None = None
    window: Window = POINT
    groups: int = 1
    bias: Floats | None = None
    share: float = 1.0
    low: float = -np.inf
    high: float = np.inf


@dataclass(frozen=True, slots=True)
class Reading:
    """What the accelerator computes of a function, in runs of it between which the host computes.

    Attributes:
        networks: the runs, in their order. An input is quantized by the host, or made by an earlier run.
        known: what of the function's variables is a value, by variable: an int8 `Value`, or as a real number `Real`.
    """

    networks: tuple[Network, ...]
    known: Mapping[Any, object]


def read(function: relax.Function) -> Reading:
    """All layers that can be computed, each as early as what it reads is there.

    Raises:
        TargetError: there is none.
    """
    reader = _Reader()
    for block in function.body.blocks:
        for binding in block.bindings:
            reader.visit(binding.var, binding.value)
    return Reading(reader.networks(), reader.known)


class _Reader:
    """Reads binding after binding.

    Attributes:
        runs: of each value, the run that makes it, or the first that can be given it.
        levels: of each variable that the host computes, the first run that can be given something made of it.
    """

    def __init__(self) -> None:
        self.known: dict[Any, Constant | Value | Real | Pending] = {}
        self.values: dict[str, Value] = {}
        self.nodes: list[Node | Sum] = []
        self.outputs: dict[str, None] = {}
        self.runs: dict[str, int] = {}
        self.levels: dict[Any, int] = {}

    def networks(self) -> tuple[Network, ...]:
        made = {node.result for node in self.nodes}
        outputs = [name for name in self.outputs if name in made]
        if not outputs:
            raise TargetError("The accelerator computes none of the network's layers: it needs int8, so quantize it.")
        nodes = pooled(summed(self.nodes, self.values, outputs), self.values, outputs)
        found = []
        for run in sorted({self.runs[node.result] for node in nodes}):
            mine = [node for node in nodes if self.runs[node.result] == run]
            made = {node.result for node in mine}
            wanted = {*outputs, *(name for node in nodes if self.runs[node.result] != run for name in node.reads)}
            inputs = dict.fromkeys(name for node in mine for name in node.reads if name not in made)
            names = [node.result for node in mine if node.result in wanted]
            found.append(Network(self.values, mine, tuple(inputs), names))
        return tuple(found)

    def visit(self, var: Any, value: Any) -> None:
        """Take a binding in, or let the host compute it."""
        if isinstance(value, relax.Var) and value in self.known:
            self.known[var] = self.known[value]
            return
        name = value.op.name.removeprefix("relax.") if isinstance(value, relax.Call) else ""
        made = None
        if rule := _RULES.get(name):
            made = rule(self, var, [self._operand(arg) for arg in value.args], value)
        if made is not None:
            self.known[var] = made
            return
        level, made_here = 0, {node.result for node in self.nodes}
        for operand in variables(value):
            seen, names = self.known.get(operand), list[str]()
            if isinstance(seen, Real | Value):
                names = [seen.name]
            elif isinstance(seen, Pending):  # which the host has to compute, from what it is made of
                names = [name for name in (seen.source, seen.other) if name is not None]
            self.outputs |= dict.fromkeys(names)
            there = (self.runs[name] + (name in made_here) for name in names)
            level = max(level, self.levels.get(operand, 0), *there)
        self.levels[var] = level

    def _operand(self, arg: Any) -> Any:
        if isinstance(arg, ir.GenericConst):
            return Constant(arg.value.numpy(), np.ones(()))
        return self.known.get(arg, arg)

    def _value(self, var: Any, shape: Sequence[int], grid: Grid) -> Value:
        found = Value(var.name, (shape[0], shape[1], shape[2]), grid)
        self.values[found.name] = found
        return found

    # --- operators: what they make of their operands, or None where the host has to

    def quantize(self, var: Any, args: list[Any], call: Any) -> Value | None:
        x, scale, zero = args[:3]
        grid, shape = _grid(scale, zero), _picture(var)
        if grid is None or shape is None or not _is_int8(var):
            return None
        if isinstance(x, Real):
            x = Pending("largest", x.name)
        if isinstance(x, Pending):
            self._finish(x, value := self._value(var, shape, grid))
            return value
        if isinstance(x, relax.Var):
            self.runs[var.name] = self.levels.get(x, 0)
            return self._value(var, shape, grid)
        return None

    def dequantize(self, var: Any, args: list[Any], call: Any) -> Real | Constant | None:
        x, scale, zero = args[:3]
        if isinstance(x, Value):
            return Real(x.name) if _grid(scale, zero) == x.grid else None
        if isinstance(x, relax.Var) and (grid := _grid(scale, zero)) and (shape := _picture(x)) and _is_int8(x):
            self.runs[x.name] = self.levels.get(x, 0)
            self.known[x] = self._value(x, shape, grid)
            return Real(x.name)
        if isinstance(x, Constant) and isinstance(scale, Constant) and isinstance(zero, Constant):
            along = [-1 if d == int(call.attrs.axis) % max(1, x.integers.ndim) else 1 for d in range(x.integers.ndim)]
            parts = [p.integers.reshape(along) if p.integers.size > 1 else p.integers for p in (scale, zero)]
            return Constant(x.integers.astype(np.int64) - parts[1].astype(np.int64), parts[0].astype(np.float64))
        return None

    def move(self, var: Any, args: list[Any], call: Any) -> Constant | None:
        """reshape and permute_dims of constants."""
        x = args[0]
        if not isinstance(x, Constant):
            return None
        shape = [int(size) for size in var.ty.shape]
        wide = np.broadcast_to(x.scale, x.integers.shape)
        if call.op.name == "relax.reshape":
            return Constant(x.integers.reshape(shape), wide.reshape(shape))
        axes = [int(axis) for axis in call.attrs.axes]
        return Constant(x.integers.transpose(axes), wide.transpose(axes))

    def conv2d(self, var: Any, args: list[Any], call: Any) -> Pending | None:
        x, weights = args
        if not isinstance(x, Real) or not isinstance(weights, Constant) or not _int8_by_output(weights):
            return None
        how, size = call.attrs, weights.integers.shape[2:]
        window = Window((size[0], size[1]), _pair(how.strides), _pair(how.dilation), _frame(how.padding))
        if max(window.pad) > LARGEST_PAD:
            return None
        return Pending("contraction", x.name, weights=weights, window=window, groups=int(how.groups))

    def max_pool2d(self, var: Any, args: list[Any], call: Any) -> Real | None:
        x, how = args[0], call.attrs
        if not isinstance(x, Real) or bool(how.ceil_mode) or _pair(how.dilation) != (1, 1):
            return None
        window, shape = Window(_pair(how.pool_size), _pair(how.strides), (1, 1), _frame(how.padding)), _picture(var)
        if shape is None or not _pools(window):
            return None
        self._finish(Pending("largest", x.name, window=window), self._value(var, shape, self.values[x.name].grid))
        return Real(var.name)

    def avg_pool2d(self, var: Any, args: list[Any], call: Any) -> Pending | None:
        x, how = args[0], call.attrs
        frame = _frame(how.padding)
        if not isinstance(x, Real) or bool(how.ceil_mode) or (any(frame) and not bool(how.count_include_pad)):
            return None
        window = Window(_pair(how.pool_size), _pair(how.strides), (1, 1), frame)
        if not _pools(window):
            return None
        return Pending("sum", x.name, window=window, share=1 / (window.size[0] * window.size[1]))

    def mean(self, var: Any, args: list[Any], call: Any) -> Pending | None:
        x = args[0]
        axes = call.attrs.axis
        if not isinstance(x, Real) or axes is None or sorted(int(a) % 4 for a in axes) != [2, 3]:
            return None
        size = self.values[x.name].shape[1:]
        if not _pools(Window(size)):
            return None
        return Pending("sum", x.name, window=Window(size), share=1 / (size[0] * size[1]))

    def add(self, var: Any, args: list[Any], call: Any) -> Pending | None:
        x, y = args
        if isinstance(x, Constant):
            x, y = y, x
        if isinstance(x, Pending) and isinstance(y, Constant) and x.kind == "contraction" and not _clipped(x):
            channels = x.weights.integers.shape[0] if x.weights is not None else 0
            along_channels = y.real.ndim >= 3 and y.real.shape[-3] == y.real.size == channels
            if y.real.size != 1 and not along_channels:
                return None
            bias = np.zeros(channels) if x.bias is None else x.bias
            return replace(x, bias=bias + y.real.reshape(-1))
        if isinstance(x, Real) and isinstance(y, Real) and self.values[x.name].shape == self.values[y.name].shape:
            return Pending("addition", x.name, y.name)
        return None

    def clip(self, var: Any, args: list[Any], call: Any) -> Pending | None:
        """relu, maximum and minimum with a constant."""
        x, bound = args[0], args[1].real if len(args) > 1 and isinstance(args[1], Constant) else np.zeros(())
        if isinstance(x, Real):
            x = Pending("largest", x.name)
        if not isinstance(x, Pending) or bound.size != 1 or (len(args) > 1 and not isinstance(args[1], Constant)):
            return None
        edge = float(bound.reshape(()))
        if call.op.name == "relax.minimum":
            return replace(x, low=min(x.low, edge), high=min(x.high, edge))
        return replace(x, low=max(x.low, edge), high=max(x.high, edge))

    # --- layers

    def _finish(self, made: Pending, result: Value) -> None:
        """The layer, now that its answer has a grid."""
        grid, source = result.grid, self.values[made.source]
        self.runs[result.name] = max(self.runs[name] for name in (made.source, made.other) if name is not None)
        low, high = (int(np.clip(np.rint(x / grid.scale) + grid.zero, -128, 127)) for x in (made.low, made.high))
        if made.kind == "addition":
            assert made.other is not None
            self.nodes.append(Sum(made.source, made.other, result.name, low, high))
            return
        layer: Layer
        if made.kind == "contraction":
            layer = _contraction(made, source.grid, grid, low, high)
        else:
            taps = made.window.size[0] * made.window.size[1] if made.kind == "sum" else 1
            factor = made.share * source.grid.scale / grid.scale / 2**FRACTION_BITS
            bias = -(2.0**FRACTION_BITS) * taps * source.grid.zero
            ones = np.ones(source.shape[0])
            step = Step(Scaling.of(factor * ones, bias * ones), grid.zero, low, high)
            layer = Pooling(made.kind, made.window, -128 if made.kind == "largest" else source.grid.zero, step)
        self.nodes.append(Node(layer, made.source, result.name))


def _contraction(made: Pending, source: Grid, grid: Grid, low: int, high: int) -> Contraction:
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


def _clipped(made: Pending) -> bool:
    return bool(np.isfinite(made.low) or np.isfinite(made.high))


def _int8_by_output(weights: Constant) -> bool:
    """Are they a convolution's, symmetric, with one scale, or one for each output?"""
    whole = weights.integers.ndim == 4 and np.abs(weights.integers).max(initial=0) <= 127
    return whole and (weights.scale.size == 1 or weights.scale.shape == (len(weights.integers), 1, 1, 1))


def _pools(window: Window) -> bool:
    """Can POST go over such windows?"""
    return max(*window.size, *window.step) <= LARGEST_WINDOW and max(window.pad) <= LARGEST_PAD


def _grid(scale: Any, zero: Any) -> Grid | None:
    """Of a whole tensor."""
    if not isinstance(scale, Constant) or not isinstance(zero, Constant) or scale.integers.size != 1:
        return None
    return Grid(float(scale.integers.item()), int(zero.integers.item()))


def _pair(values: Any) -> tuple[int, int]:
    first, second = (int(value) for value in values)
    return first, second


def _frame(values: Any) -> tuple[int, int, int, int]:
    top, left, bottom, right = (int(value) for value in values)
    return top, left, bottom, right


def _is_int8(var: Any) -> bool:
    return str(var.ty.dtype) == "int8"


def _picture(var: Any) -> list[int] | None:
    """(channels, height, width) of one picture."""
    shape = [int(size) for size in var.ty.shape]
    return shape[1:] if len(shape) == 4 and shape[0] == 1 else None


def variables(value: Any) -> list[Any]:
    """Those that an expression reads, in tuples too."""
    if isinstance(value, relax.Var):
        return [value]
    parts = list(value.args) if isinstance(value, relax.Call) else []
    parts += list(value.fields) if isinstance(value, relax.Tuple) else []
    parts += [value.tuple_value] if isinstance(value, relax.TupleGetItem) else []
    return [found for part in parts for found in variables(part)]


_RULES = {
    "quantize": _Reader.quantize, "dequantize": _Reader.dequantize, "reshape": _Reader.move,
    "permute_dims": _Reader.move, "nn.conv2d": _Reader.conv2d, "nn.max_pool2d": _Reader.max_pool2d,
    "nn.avg_pool2d": _Reader.avg_pool2d, "mean": _Reader.mean, "add": _Reader.add, "nn.relu": _Reader.clip,
    "maximum": _Reader.clip, "minimum": _Reader.clip,
}  # fmt: skip
