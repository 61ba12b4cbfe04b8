"""Turn convolutions whose weights are mostly zero into sparse kernels over regions, with what follows them inside.

A convolution waits until something reads it: the bias, one residual sum and bounds (ReLU, ReLU6) that alone read it
join its kernel. Between two sparse convolutions values stay in regions; every other operator reads the plain form.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from profiles.device import Device
from targets.base import Array
from targets.kernels.regions import Regions, shifts
from targets.kernels.sparse import SparseConvolution, regroup, shift, sparse_convolution, ungroup
from targets.kernels.window import Window
from targets.passes.walk import Walk, array_of, ints, operator, rewrite, shape_of

# Cycles, fitted to times of single kernels with AVX-512: a vector multiply-add that reads from the caches and one of a
# dense kernel, one vector of a tensor that is laid out anew, and starting one more kernel on several threads.
_SPARSE_CYCLES, _DENSE_CYCLES, _REGROUP_CYCLES, _KERNEL_CYCLES = 1.2, 0.54, 10.0, 10_000
_WORTH = 0.8  # the share of the dense time below which it is done: the estimate may be off by as much


def sparse(module: tvm.IRModule, device: Device) -> tvm.IRModule:
    """The module with sparse kernels wherever they should take less time than dense ones; the rest untouched."""
    return rewrite(module, lambda builder, old: _Sparse(builder, old, device))


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A sparse convolution that nothing has read yet; `source` and `residual` are old variables."""

    source: Any
    weights: Array
    kernel: SparseConvolution
    bias: Array
    residual: Any = None


class _Sparse(Walk):
    def __init__(self, builder: relax.BlockBuilder, module: tvm.IRModule, device: Device) -> None:
        super().__init__(builder, module)
        self._device = device
        self._waiting: dict[Any, _Waiting] = {}
        self._grouped: dict[Any, tuple[Any, Regions]] = {}  # flat forms by old variable
        self._bordered: dict[Any, Any] = {}  # inputs of kernels by old variable, regions and window
        self._rules: dict[str, Callable[[Any], _Waiting | None]] = {
            "relax.nn.conv2d": self._convolution,
            "relax.add": self._sum,
            "relax.nn.relu": lambda call: self._bounded(call, "max", 0.0),
            "relax.maximum": lambda call: self._bounded(call, "max"),
            "relax.minimum": lambda call: self._bounded(call, "min"),
        }

    def bind(self, var: Any, value: Any) -> None:
        rule = self._rules.get(operator(value))
        made = rule(value) if rule is not None else None
        if made is None:
            super().bind(var, value)
        else:
            self._waiting[var] = made

    def read(self, value: Any) -> Any:
        if isinstance(value, relax.Var) and value not in self._new and self._is_grouped(value):
            flat, regions = self._regions_of(value)
            shape = shape_of(value)
            self._new[value] = self._call(ungroup(regions, shape[1]), [flat], shape)
        return super().read(value)

    # What may wait, and what may join it

    def _convolution(self, call: Any) -> _Waiting | None:
        weights, attrs, shape = array_of(call.args[1]), call.attrs, shape_of(call)
        if weights is None or weights.dtype != np.float32 or weights.ndim != 4 or int(attrs.groups) != 1:
            return None
        if attrs.data_layout != "NCHW" or attrs.kernel_layout != "OIHW" or shape[0] != 1:
            return None
        window = Window(weights.shape[2:], ints(attrs.strides), ints(attrs.padding), ints(attrs.dilation))
        regions = Regions.of(shape[2], shape[3], self._device.vector_lanes)
        kernel = SparseConvolution(weights.shape[1], weights.shape[0], regions, window)
        if not _pays(kernel, weights):
            return None
        return _Waiting(call.args[0], weights, kernel, np.zeros(shape[1], np.float32))

    def _sum(self, call: Any) -> _Waiting | None:
        for value, other in (call.args, reversed(call.args)):
            made = self._alone(value)
            if made is None or made.residual is not None or made.kernel.steps:
                continue
            constant = array_of(other)
            if constant is not None and constant.size in (1, made.kernel.outputs) and constant.ndim <= 4:
                if constant.size == 1 or constant.shape[-3:] == (made.kernel.outputs, 1, 1):
                    return replace(made, bias=made.bias + constant.reshape(-1))
            elif isinstance(other, relax.Var) and other is not value and shape_of(other) == shape_of(value):
                return replace(made, residual=other, kernel=replace(made.kernel, residual=True))
        return None

    def _bounded(self, call: Any, step: str, bound: float | None = None) -> _Waiting | None:
        made = self._alone(call.args[0])
        if bound is None:
            constant = array_of(call.args[1])
            if constant is None or constant.size != 1:
                return None
            bound = float(constant.item())
        if made is None:
            return None
        return replace(made, kernel=replace(made.kernel, steps=(*made.kernel.steps, (step, bound))))

    def _alone(self, value: Any) -> _Waiting | None:
        """What waits under a name, when only one operator reads it and it was not made yet."""
        if not isinstance(value, relax.Var) or self.uses.get(value, 0) != 1 or value in self._grouped:
            return None
        return self._waiting.get(value)

    # Forms

    def _is_grouped(self, value: Any) -> bool:
        return value in self._grouped or value in self._waiting

    def _regions_of(self, value: Any) -> tuple[Any, Regions]:
        """A value's flat form; a kernel that waited is emitted now."""
        if value not in self._grouped:
            if value in self._waiting:
                self._grouped[value] = self._emit(self._waiting[value]), self._waiting[value].kernel.regions
            else:
                _, _, height, width = shape_of(value)
                regions = Regions.of(height, width, self._device.vector_lanes)
                self._grouped[value] = self._with_border(value, regions, Window((1, 1))), regions
        return self._grouped[value]

    def _emit(self, made: _Waiting) -> Any:
        kernel = made.kernel.chunked(int(np.count_nonzero(made.weights)), self._device)
        x = self._with_border(made.source, kernel.regions, kernel.window)
        starts, offsets, values = kernel.weights(made.weights)
        if not len(values):
            offsets, values = np.zeros(1, np.int32), np.zeros(1, np.float32)
        given = [x, *map(relax.const, (starts, offsets, values, made.bias))]
        if kernel.residual:
            given.append(self._regions_of(made.residual)[0])
        function = sparse_convolution(kernel, len(values), self._device)
        return self._call(function, given, (kernel.regions.size(kernel.outputs),))

    def _with_border(self, source: Any, regions: Regions, window: Window) -> Any:
        """A value as a kernel with this window reads it for these regions of outputs."""
        key = source, regions, window
        if key not in self._bordered:
            self._bordered[key] = self._laid_out(source, regions, window)
        return self._bordered[key]

    def _laid_out(self, source: Any, regions: Regions, window: Window) -> Any:
        _, channels, height, width = shape_of(source)
        y, x = regions.pixels(window)
        size = ((channels * len(y) + 2) * regions.lanes,)
        if not self._is_grouped(source):
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            places = np.where(inside, y * width + x, -1)
            function = regroup((1, channels, height, width), 0, height * width, channels, places.shape)
            return self._call(function, [self.read(source), _table(places)], size)
        flat, given = self._regions_of(source)
        places, stride = given.places(y, x), given.positions * given.lanes
        if given == regions and window == Window((1, 1)):
            return flat
        spans = shifts(places)
        if spans is None:
            function = regroup((given.size(channels),), given.lanes, stride, channels, places.shape)
            return self._call(function, [flat, _table(places)], size)
        starts, counts = spans
        function = shift(given.size(channels), stride, channels, len(starts), regions.lanes)
        return self._call(function, [flat, relax.const(starts), _table(counts)], size)

    def _call(self, function: tirx.PrimFunc, arguments: list[Any], shape: tuple[int, ...]) -> Any:
        name = self.builder.add_func(function.without_attr("global_symbol"), str(function.attrs["global_symbol"]))
        return self.builder.emit(relax.call_tir(name, arguments, relax.TensorType(shape, "float32")))


def _pays(kernel: SparseConvolution, weights: Array) -> bool:
    """Whether skipping zeros should save more than less regular reads and the change of layout cost."""
    regions, (outputs, inputs, *window) = kernel.regions, weights.shape
    sparse_cycles = np.count_nonzero(weights) * regions.positions * _SPARSE_CYCLES
    laid_out = inputs * kernel.down * kernel.across + outputs * regions.positions
    sparse_cycles += laid_out * _REGROUP_CYCLES + 2 * _KERNEL_CYCLES
    pixels = regions.height * regions.width
    dense_cycles = outputs * inputs * np.prod(window) * pixels / regions.lanes * _DENSE_CYCLES
    return bool(sparse_cycles < _WORTH * dense_cycles)


def _table(values: Array) -> Any:
    return relax.const(np.ascontiguousarray(values, np.int32).reshape(-1))
