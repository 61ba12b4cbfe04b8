"""Decide over a whole network which convolutions are sparse: a minimum cut between regions and blocks.

Each convolution costs what its kernel costs in either form, element-wise operators nothing, everything else exists in
blocks only; where a value is made in one form and read in the other, the change costs too. With two forms the cheapest assignment is a minimum cut, and found exactly. Source of the formulation as a choice of layouts with costs
on edges: Anderson and Gregg, "Optimal DNN Primitive Selection with Partitioned Boolean Quadratic Programming", CGO 2018.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx
import numpy as np
import tvm
from tvm import relax

from profiles.device import Device
from targets.base import Array
from targets.choice import Choices
from targets.kernels.methods import ConvolutionLayer
from targets.kernels.regions import Regions
from targets.kernels.window import Window
from targets.passes.walk import array_of, bindings, ints, operator, shape_of

# Cycles, fitted to times of single kernels with AVX-512.
_PRODUCT = 1.1  # a vector multiply-add of a sparse kernel, its read included
_VISIT = 30.0  # an output channel of a tile: its sums begun, stored, the loop left unforeseen
_NONZERO = 2.0  # one more weight with its place, from memory
_MOVE, _GATHER = 9.0, 20.0  # a vector that changes its form as whole squares, and one whose lanes come one by one
_DEPTHWISE = 1.7  # a vector multiply-add of a dense depthwise kernel
_CALL = 6000.0  # one more kernel, started on several threads
_MOST = 0.6  # density above which a kernel that skips zeros need not be considered
_WORTH = 0.9  # the share of the dense time below which it is done: an estimate may be off by as much

_FREE = frozenset(
    f"relax.{name}" for name in ("add", "subtract", "multiply", "maximum", "minimum", "nn.relu")
)


@dataclass(frozen=True)
class SparseLayer:
    """A convolution of one picture as a sparse kernel sees it; weights, (O, I of a group, h, w), as in the network."""

    inputs: int
    size: tuple[int, int]
    weights: Array
    window: Window
    groups: int
    height: int
    width: int

    @property
    def outputs(self) -> int:
        """Channels."""
        return int(self.weights.shape[0])

    @cached_property
    def nonzeros(self) -> int:
        """Weights that are not zero."""
        return int(np.count_nonzero(self.weights))

    @property
    def macs(self) -> int:
        """Multiply-adds by definition, zeros included."""
        return self.weights.size * self.height * self.width

    @property
    def key(self) -> str:
        """What reports know it by; the density is rounded, as times depend little on which weights are zero."""
        def text(sizes: tuple[int, ...]) -> str:
            return "x".join(map(str, sizes))

        window, (height, width) = self.window, self.size
        geometry = f"s{text(window.strides)} p{text(window.padding)} d{text(window.dilation)} g{self.groups}"
        density = f"{self.nonzeros / max(1, self.weights.size):.2g}"
        return f"sparse {self.inputs}x{height}x{width} by {text(self.weights.shape)} {geometry}, density {density}"

    def cycles(self, lanes: int) -> float:
        """Estimate, the change of form that a stride or another size needs included."""
        regions = Regions.of(self.height, self.width, lanes)
        cost = self.nonzeros * (regions.positions * _PRODUCT + _NONZERO) + _CALL
        cost += self.outputs * -(-regions.positions // 28) * _VISIT
        if border_of(self) is None:
            reach = self.window.reach(regions.rows, 0) * self.window.reach(regions.columns, 1)
            cost += self.inputs * reach * _GATHER + _CALL
        return cost


def border_of(layer: SparseLayer) -> tuple[int, int, int, int] | None:
    """The border that lets a layer read its input as it lies; None if it cannot, as input and output differ in size."""
    window = layer.window
    top, left = window.padding[:2]
    bottom, right = ((window.kernel[axis] - 1) * window.dilation[axis] - window.padding[axis] for axis in (0, 1))
    same = layer.size == (layer.height, layer.width) and window.strides == (1, 1)
    return (top, left, bottom, right) if same and bottom >= 0 and right >= 0 else None


def sparse_layers(module: tvm.IRModule, device: Device, choices: Choices) -> dict[Any, SparseLayer]:
    """The convolutions that should be sparse, by variable."""
    layers = {
        var: layer for var, layer in convolutions(module).items()
        if layer.groups > 1 or layer.nonzeros <= _MOST * layer.weights.size
    }
    if not any(layer.groups == 1 for layer in layers.values()):
        return {}
    graph = networkx.DiGraph()
    costs = {}
    for binding in bindings(module):
        var, value = binding.var, binding.value
        if var in layers:
            layer = layers[var]
            costs[var] = layer.cycles(device.vector_lanes), _WORTH * _dense_cycles(layer, value, device, choices)
            _tie(graph, "blocks", var, costs[var][0])
            _tie(graph, var, "regions", costs[var][1])
        elif operator(value) not in _FREE or len(value.ty.shape) != 4 or shape_of(value)[0] != 1:
            _tie(graph, "blocks", var, float("inf"))
        for source in _pictures(value):
            if var in layers and border_of(layers[var]) is None:
                continue  # its input changes its form anyway
            if source not in graph:
                _tie(graph, "blocks", source, float("inf"))  # an input of the network
            _, channels, height, width = shape_of(source)
            cost = channels * Regions.of(height, width, device.vector_lanes).positions * _MOVE + _CALL
            _tie(graph, source, var, cost)
            _tie(graph, var, source, cost)
    _, inside = networkx.minimum_cut(graph, "blocks", "regions")[1]
    return {var: layer for var, layer in layers.items() if var in inside}


def convolutions(module: tvm.IRModule) -> dict[Any, SparseLayer]:
    """Every convolution that a sparse kernel could do, by variable."""
    return {b.var: layer for b in bindings(module) if (layer := _layer(b.value)) is not None}


def _tie(graph: Any, first: Any, second: Any, cost: float) -> None:
    """Let it cost as much to have the first among the blocks and the second among the regions."""
    known = graph.edges[first, second]["capacity"] if graph.has_edge(first, second) else 0.0
    graph.add_edge(first, second, capacity=known + cost)


def _layer(value: Any) -> SparseLayer | None:
    if operator(value) != "relax.nn.conv2d":
        return None
    weights, attrs, shape = array_of(value.args[1]), value.attrs, shape_of(value)
    if weights is None or weights.dtype != np.float32 or weights.ndim != 4 or shape[0] != 1:
        return None
    if attrs.data_layout != "NCHW" or attrs.kernel_layout != "OIHW":
        return None
    window = Window(weights.shape[2:], ints(attrs.strides), ints(attrs.padding), ints(attrs.dilation))
    _, inputs, height, width = shape_of(value.args[0])
    return SparseLayer(inputs, (height, width), weights, window, int(attrs.groups), *shape[2:])


def _dense_cycles(layer: SparseLayer, value: Any, device: Device, choices: Choices) -> float:
    lanes = device.vector_lanes
    blocks, in_blocks = -(-layer.outputs // lanes), -(-layer.inputs // lanes)
    if layer.groups > 1:
        taps = layer.window.kernel[0] * layer.window.kernel[1]
        per_group = layer.inputs // layer.groups
        products = blocks * layer.height * layer.width * taps * (1 if per_group == 1 else per_group)
        return products * (_DEPTHWISE if per_group == 1 else 1.0) + _CALL
    planar = layer.inputs < lanes and not isinstance(value.args[0], relax.Call)
    source: tuple[int, ...] = (1, in_blocks, *layer.size, lanes)
    weights: tuple[int, ...] = (blocks, in_blocks, *layer.window.kernel, lanes, lanes)
    if planar:
        source, weights = (1, layer.inputs, *layer.size), (blocks, layer.inputs, *layer.window.kernel, 1, lanes)
    dense = ConvolutionLayer(source, weights, layer.window, layer.height, layer.width)
    return min(candidate.cycles for candidate in dense.candidates(device)) + _CALL


def _pictures(value: Any) -> list[Any]:
    """Variables a call reads that have channels, rows and columns, of one picture."""
    if not isinstance(value, relax.Call | relax.Tuple):
        return []
    fields = value.fields if isinstance(value, relax.Tuple) else value.args
    parts = [part for arg in fields for part in (arg.fields if isinstance(arg, relax.Tuple) else [arg])]
    return [
        part for part in parts
        if isinstance(part, relax.Var) and hasattr(part.ty, "shape") and len(part.ty.shape) == 4
        and shape_of(part)[0] == 1
    ]
