"""A quantized Relax function as integer layers: as much of it as the accelerator computes.

What lies between a dequantize and the quantize behind it is one layer: a contraction with its bias and activation, a
pooling, or a sum of two values, which a contraction that nothing else reads takes in. Moving values from one grid to
another is a pooling of windows of one value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import ir, relax

from targets.accelerator.arithmetic import FRACTION_BITS, Scaling, Step
from targets.accelerator.layers import LARGEST_PAD, Layer, Pooling, Product, Window
from targets.accelerator.merging import Sum, pooled, summed
from targets.accelerator.network import Grid, Network, Node, Value
from targets.accelerator.pending import (
    PICTURE,
    Constant,
    Pending,
    clipped,
    contraction,
    frame,
    grid_of,
    int8_by_output,
    is_int8,
    pair,
    picture,
    pools,
    reaching,
    variables,
)  # fmt: skip
from targets.errors import TargetError

TURNED = ".turned"
"""Behind the name of a tensor that the host gives with its channels elsewhere than under its own name."""


@dataclass(frozen=True, slots=True)
class Real:
    """A value of the network as the real numbers that it stands for."""

    name: str


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

    def _value(self, var: Any, shape: Sequence[int], grid: Grid, *, last: bool) -> Value:
        found = Value(var.name, (shape[0], shape[1], shape[2]), grid, last)
        self.values[found.name] = found
        return found

    def _seen(self, real: Any, *, last: bool) -> Value | None:
        """The value behind real numbers, with its channels where they have to be.

        Of a picture that the host gives, that may be another value of the same tensor, whose channels are last.
        """
        value = self.values[real.name] if isinstance(real, Real) else None
        if value is None or value.last == last:
            return value
        turned = f"{value.name}{TURNED}"
        if value.last or any(node.result == value.name for node in self.nodes):
            return None
        if turned not in self.values:
            lines, columns, channels = value.shape
            self.values[turned] = replace(value, name=turned, shape=(channels, lines, columns), last=True)
            self.runs[turned] = self.runs[value.name]
        return self.values[turned]

    # --- operators: what they make of their operands, or None where the host has to

    def quantize(self, var: Any, args: list[Any], call: Any) -> Value | None:
        x, scale, zero = args[:3]
        grid = grid_of(scale, zero)
        if grid is None or not is_int8(var):
            return None
        if isinstance(x, Real):
            x = Pending("largest", x.name)
        if isinstance(x, Pending):
            last = self.values[x.source].last
            if (shape := picture(var, last=last)) is None:
                return None
            self._finish(x, value := self._value(var, shape, grid, last=last))
            return value
        if isinstance(x, relax.Var):
            return self._given(var, grid, self.levels.get(x, 0))
        return None

    def _given(self, var: Any, grid: Grid, level: int) -> Value | None:
        """What the host gives: with its channels last, but for pictures.

        A single row is left to the host: the array would wait for the weights, each of which it needs once.
        """
        last = len(var.ty.shape) != PICTURE
        shape = picture(var, last=last)
        if shape is None or (last and shape[1:] == [1, 1]):
            return None
        self.runs[var.name] = level
        return self._value(var, shape, grid, last=last)

    def dequantize(self, var: Any, args: list[Any], call: Any) -> Real | Constant | None:
        x, scale, zero = args[:3]
        if isinstance(x, Value):
            return Real(x.name) if grid_of(scale, zero) == x.grid else None
        if isinstance(x, relax.Var) and (grid := grid_of(scale, zero)) and is_int8(x):
            value = self._given(x, grid, self.levels.get(x, 0))
            if value is not None:
                self.known[x] = value
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
        x, weights = self._seen(args[0], last=False), args[1]
        if x is None or not isinstance(weights, Constant) or not int8_by_output(weights):
            return None
        how, size = call.attrs, weights.integers.shape[2:]
        window = Window((size[0], size[1]), pair(how.strides), pair(how.dilation), frame(how.padding))
        if max(window.pad) > LARGEST_PAD:
            return None
        return Pending("contraction", x.name, weights=weights, window=window, groups=int(how.groups))

    def matmul(self, var: Any, args: list[Any], call: Any) -> Pending | None:
        """By a constant matrix, or of two values whose grids have their zeros at 0."""
        x, y = self._seen(args[0], last=True), args[1]
        if x is None:
            return None
        if isinstance(y, Constant):
            if y.integers.ndim != 2 or (y.scale.ndim == 2 and y.scale.shape[0] != 1):
                return None
            columns = y.scale.reshape(-1, 1, 1, 1) if y.scale.size > 1 else y.scale
            weights = Constant(np.ascontiguousarray(y.integers.T)[:, :, None, None], columns)
            return Pending("contraction", x.name, weights=weights) if int8_by_output(weights) else None
        other = self._seen(y, last=True)
        if other is None or x.grid.zero or other.grid.zero or len(var.ty.shape) != len(call.args[1].ty.shape):
            return None
        if (x.shape[0], x.shape[1]) != (other.shape[2], other.shape[1]):
            return None
        return Pending("product", x.name, other.name)

    def max_pool2d(self, var: Any, args: list[Any], call: Any) -> Real | None:
        x, how = self._seen(args[0], last=False), call.attrs
        shape = picture(var)
        if x is None or shape is None or pair(how.dilation) != (1, 1):
            return None
        window = Window(pair(how.pool_size), pair(how.strides), (1, 1), frame(how.padding))
        if bool(how.ceil_mode):
            window = reaching(window, x.shape[1:], (shape[1], shape[2]))
        if not pools(window) or window.results(*x.shape[1:]) != tuple(shape[1:]):
            return None
        self._finish(Pending("largest", x.name, window=window), self._value(var, shape, x.grid, last=False))
        return Real(var.name)

    def avg_pool2d(self, var: Any, args: list[Any], call: Any) -> Pending | None:
        x, how = self._seen(args[0], last=False), call.attrs
        around = frame(how.padding)
        if x is None or bool(how.ceil_mode) or (any(around) and not bool(how.count_include_pad)):
            return None
        window = Window(pair(how.pool_size), pair(how.strides), (1, 1), around)
        if not pools(window):
            return None
        return Pending("sum", x.name, window=window, share=1 / (window.size[0] * window.size[1]))

    def mean(self, var: Any, args: list[Any], call: Any) -> Pending | None:
        x = self._seen(args[0], last=False)
        axes = call.attrs.axis
        if x is None or axes is None or sorted(int(a) % 4 for a in axes) != [2, 3]:
            return None
        size = x.shape[1:]
        if not pools(Window(size)):
            return None
        return Pending("sum", x.name, window=Window(size), share=1 / (size[0] * size[1]))

    def add(self, var: Any, args: list[Any], call: Any) -> Pending | None:
        x, y = args
        if isinstance(x, Constant):
            x, y = y, x
        if isinstance(x, Pending) and isinstance(y, Constant) and x.kind == "contraction" and not clipped(x):
            channels = x.weights.integers.shape[0] if x.weights is not None else 0
            dim = 1 if self.values[x.source].last else 3
            along_channels = y.real.ndim >= dim and y.real.shape[-dim] == y.real.size == channels
            if y.real.size != 1 and not along_channels:
                return None
            bias = np.zeros(channels) if x.bias is None else x.bias
            return replace(x, bias=bias + y.real.reshape(-1))
        if not isinstance(x, Real) or not isinstance(y, Real):
            return None
        for like in (x, y):
            own, other = (self._seen(one, last=self.values[like.name].last) for one in (x, y))
            if own is not None and other is not None and own.shape == other.shape:
                return Pending("addition", own.name, other.name)
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
        if made.kind == "product":
            assert made.other is not None
            real = source.grid.scale * self.values[made.other].grid.scale / grid.scale
            channels = result.shape[0]
            step = Step(Scaling.of(np.full(channels, real), np.zeros(channels)), grid.zero, low, high)
            self.nodes.append(Node(Product(channels, step), made.source, result.name, made.other))
            return
        if made.kind == "contraction":
            layer = contraction(made, source.grid, grid, low, high)
        else:
            taps = made.window.size[0] * made.window.size[1] if made.kind == "sum" else 1
            factor = made.share * source.grid.scale / grid.scale / 2**FRACTION_BITS
            bias = -(2.0**FRACTION_BITS) * taps * source.grid.zero
            ones = np.ones(source.shape[0])
            step = Step(Scaling.of(factor * ones, bias * ones), grid.zero, low, high)
            layer = Pooling(made.kind, made.window, -128 if made.kind == "largest" else source.grid.zero, step)
        self.nodes.append(Node(layer, made.source, result.name))


_RULES = {
    "matmul": _Reader.matmul, "quantize": _Reader.quantize, "dequantize": _Reader.dequantize, "reshape": _Reader.move,
    "permute_dims": _Reader.move, "nn.conv2d": _Reader.conv2d, "nn.max_pool2d": _Reader.max_pool2d,
    "nn.avg_pool2d": _Reader.avg_pool2d, "mean": _Reader.mean, "add": _Reader.add, "nn.relu": _Reader.clip,
    "maximum": _Reader.clip, "minimum": _Reader.clip,
}  # fmt: skip
