"""Decide over a whole network which convolutions are sparse: a minimum cut between regions and blocks.

Each convolution costs what its kernel costs in either form, element-wise operators nothing, everything else exists in
blocks only; where a value is made in one form and read in the other, the change costs too. With two forms the cheapest
assignment is a minimum cut, and found exactly. Source of layouts as a choice with costs on edges: Anderson and Gregg,
"Optimal DNN Primitive Selection with Partitioned Boolean Quadratic Programming", CGO 2018.
"""

from dataclasses import dataclass
from typing import Any

import networkx
import numpy as np
import tvm
from tvm import relax

from profiles.device import Device
from targets.choice import Choices
from targets.kernels.methods import ConvolutionLayer
from targets.kernels.regions import Regions
from targets.kernels.sparse_methods import SparseLayer
from targets.kernels.tile import CACHE_BYTES
from targets.kernels.window import Window
from targets.passes.walk import array_of, bindings, ints, operator, rounds, shape_of

# Cycles, fitted to times of single kernels with AVX-512.
_MOVE, _FAR_MOVE = 9.0, 17.0  # a vector that changes its form, of a tensor that a core's own cache holds or not
_GATHER = 20.0  # a vector whose lanes come one by one
_DEPTHWISE = 1.7  # a vector multiply-add of a dense depthwise kernel
_CALL = 6000.0  # one more kernel, started on several threads
_MOST = 0.6  # density above which a kernel that skips zeros need not be considered
_WORTH = 0.85  # the share of the dense time below which it is done: an estimate may be off by as much

_FREE = frozenset(
    f"relax.{name}"
    for name in ("add", "subtract", "multiply", "maximum", "minimum", "nn.relu", "nn.gelu", "nn.silu", "tanh")
)


def sparse_layers(module: tvm.IRModule, device: Device, choices: Choices) -> dict[Any, SparseLayer]:
    """The convolutions that should be sparse, by variable."""
    layers = {
        var: layer for var, layer in convolutions(module).items()
        if layer.groups > 1 or layer.nonzeros <= _MOST * layer.weights.size
    }
    if not any(layer.groups == 1 for layer in layers.values()):
        return {}
    weighed = {b.var: (layers[b.var], b.value) for b in bindings(module) if b.var in layers}
    costs = _weighed(weighed, rounds(module), device, choices)
    graph = networkx.DiGraph()
    for binding in bindings(module):
        var, value = binding.var, binding.value
        if var in layers:
            cost = costs[var]
            _tie(graph, "blocks", var, cost.sparse)
            _tie(graph, var, "regions", _WORTH * cost.dense)
        elif operator(value) not in _FREE or len(value.ty.shape) != 4 or shape_of(value)[0] != 1:
            _tie(graph, "blocks", var, float("inf"))
        for source in _pictures(value):
            if var in layers and layers[var].border is None:
                continue  # its input changes its form anyway
            if source not in graph:
                _tie(graph, "blocks", source, float("inf"))  # an input of the network
            _, channels, height, width = shape_of(source)
            move = _moved(channels, Regions.of(height, width, device.vector_lanes))
            _tie(graph, source, var, move)
            _tie(graph, var, source, move)
    _, inside = networkx.minimum_cut(graph, "blocks", "regions")[1]
    for cost in costs.values():
        cost.tell(choices)
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


@dataclass(frozen=True, slots=True)
class _Costs:
    """Cycles of one convolution in either form, changes of form that its kernel alone needs included."""

    sparse: float
    dense: float
    keys: tuple[str, str]
    nonzeros: int
    measured: bool

    def tell(self, choices: Choices) -> None:
        """Let whoever reads about a layer know what the other form would have taken."""
        how = "measured" if self.measured else "estimated"
        for key, name, ratio in (
            (self.keys[0], "dense", self.dense / self.sparse), (self.keys[1], "sparse", self.sparse / self.dense)
        ):
            if key:
                choices.instead[key, self.nonzeros] = f"{name} {ratio:.2f}x ({how})"


def _weighed(
    found: dict[Any, tuple[SparseLayer, Any]], exact: bool, device: Device, choices: Choices
) -> dict[Any, _Costs]:
    """What each convolution costs in either form; measured times where both forms have some."""
    dense = {var: _dense(layer, value, exact, device) for var, (layer, value) in found.items()}
    for var, (layer, _) in found.items():
        choices.best(layer.key, layer.candidates(device))
        if (other := dense[var]) is not None:
            choices.best(other.key, other.candidates(device))
    costs = {}
    for var, (layer, _) in found.items():
        regions, other = Regions.of(layer.height, layer.width, device.vector_lanes), dense[var]
        other_key = other.key if other is not None else ""
        measured = choices.measured(layer.key) and choices.measured(other_key)
        sparse = choices.cycles(layer.key, measured) + _CALL
        if layer.border is None:
            reach = layer.window.reach(regions.rows, 0) * layer.window.reach(regions.columns, 1)
            sparse += layer.inputs * reach * _GATHER + _CALL
        plain = choices.cycles(other_key, measured) if other is not None else _grouped_cycles(layer, device)
        costs[var] = _Costs(sparse, plain + _CALL, (layer.key, other_key), layer.nonzeros, measured)
    return costs


def _grouped_cycles(layer: SparseLayer, device: Device) -> float:
    """Estimate for a depthwise or grouped convolution in blocks."""
    taps, each = int(np.prod(layer.window.kernel)), layer.inputs // layer.groups
    products = -(-layer.outputs // device.vector_lanes) * layer.height * layer.width * taps * each
    return products * (_DEPTHWISE if each == 1 else 1.0)


def _dense(layer: SparseLayer, value: Any, exact: bool, device: Device) -> ConvolutionLayer | None:
    """The same convolution in blocks; None for a grouped one, which has no candidates there."""
    if layer.groups > 1:
        return None
    lanes = device.vector_lanes
    blocks, in_blocks = -(-layer.outputs // lanes), -(-layer.inputs // lanes)
    source: tuple[int, ...] = (1, in_blocks, *layer.size, lanes)
    weights: tuple[int, ...] = (blocks, in_blocks, *layer.window.kernel, lanes, lanes)
    if layer.inputs < lanes and not isinstance(value.args[0], relax.Call):
        source, weights = (1, layer.inputs, *layer.size), (blocks, layer.inputs, *layer.window.kernel, 1, lanes)
    return ConvolutionLayer(source, weights, layer.window, layer.height, layer.width, exact)


def _moved(channels: int, regions: Regions) -> float:
    vectors = channels * regions.positions
    return vectors * (_FAR_MOVE if 4 * regions.lanes * vectors > CACHE_BYTES else _MOVE) + _CALL


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
