"""Lay tensors out: blocked for dense convolutions, in regions for sparse ones and for what lies between them.

Which convolutions are sparse is decided first, over the whole network (`forms.py`). A sparse convolution then waits
until something reads it: the bias, one residual sum and bounds (ReLU, ReLU6) that alone read it join its kernel, and it
makes the border that its readers need. A value changes its form where a reader needs another one, once.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from profiles.device import Device
from targets.base import Array
from targets.choice import Choices
from targets.kernels.moves import group_blocks, regroup, shift, ungroup, ungroup_blocks
from targets.kernels.regions import Layout, Regions, shifts
from targets.kernels.sparse import sparse_convolution
from targets.kernels.sparse_methods import SparseLayer
from targets.kernels.window import Window
from targets.passes.blocked import Blocked, Blocker
from targets.passes.channels import Channels
from targets.passes.forms import sparse_layers
from targets.passes.walk import array_of, operator, rewrite, shape_of

_ZERO_STAYS_ZERO = {f"relax.{name}": 2 for name in ("add", "subtract", "multiply")} | {
    f"relax.{name}": 1 for name in ("nn.relu", "nn.gelu", "nn.silu", "tanh")
}


def lay_out(module: tvm.IRModule, device: Device, choices: Choices) -> tvm.IRModule:
    """The module with convolutions and what is around them as kernels over blocks or regions; the rest untouched."""
    chosen = sparse_layers(module, device, choices)
    return rewrite(module, lambda builder, old: _Layouts(builder, old, device, choices, chosen))


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A sparse convolution that nothing has read yet; `source` and `residual` are old variables."""

    source: Any
    layer: SparseLayer
    bias: Array
    steps: tuple[tuple[str, float], ...] = ()
    residual: Any = None


class _Layouts(Blocker):
    def __init__(
        self, builder: relax.BlockBuilder, module: tvm.IRModule, device: Device, choices: Choices,
        chosen: dict[Any, SparseLayer],
    ) -> None:
        super().__init__(builder, module, device, choices)
        self._chosen = chosen
        self._waiting: dict[Any, _Waiting] = {}
        self._grouped: dict[Any, tuple[Any, Layout]] = {}  # flat forms by old variable
        self._moved: dict[Any, Any] = {}  # other flat forms by old variable and what lies where
        self._borders = _borders(chosen, self.bound)
        self._joins: dict[str, Callable[[Any], _Waiting | None]] = {
            "relax.add": self._sum,
            "relax.nn.relu": lambda call: self._bounded(call, "max", 0.0),
            "relax.maximum": lambda call: self._bounded(call, "max"),
            "relax.minimum": lambda call: self._bounded(call, "min"),
        }

    def bind(self, var: Any, value: Any) -> None:
        name = operator(value)
        join = self._joins.get(name)
        if var in self._chosen:
            self._waiting[var] = _Waiting(value.args[0], self._chosen[var], np.zeros(shape_of(value)[1], np.float32))
        elif join is not None and (made := join(value)) is not None:
            self._waiting[var] = made
        elif name in _ZERO_STAYS_ZERO and (flat := self._flat(value, _ZERO_STAYS_ZERO[name])) is not None:
            self._grouped[var] = flat
        else:
            if self.has_rule(name):
                for part in _variables(value):
                    self._blocks(part)
            super().bind(var, value)

    def read(self, value: Any) -> Any:
        if isinstance(value, relax.Var) and value not in self._new and self._is_grouped(value):
            flat, layout = self._regions_of(value)
            shape = shape_of(value)
            self._new[value] = self.call_kernel(ungroup(layout, shape[1]), [flat], shape)
        return super().read(value)

    # What may join a waiting convolution, and what works on flat tensors as it is

    def _sum(self, call: Any) -> _Waiting | None:
        for value, other in (call.args, reversed(call.args)):
            made = self._alone(value)
            if made is None or made.residual is not None or made.steps:
                continue
            constant = array_of(other)
            if constant is not None and constant.size in (1, len(made.bias)) and constant.ndim <= 4:
                if constant.size == 1 or constant.shape[-3:] == (len(made.bias), 1, 1):
                    return replace(made, bias=made.bias + constant.reshape(-1))
            elif isinstance(other, relax.Var) and other is not value and shape_of(other) == shape_of(value):
                return replace(made, residual=other)
        return None

    def _bounded(self, call: Any, step: str, bound: float | None = None) -> _Waiting | None:
        made = self._alone(call.args[0])
        if bound is None:
            constant = array_of(call.args[1])
            if constant is None or constant.size != 1:
                return None
            bound = float(constant.item())
        return None if made is None else replace(made, steps=(*made.steps, (step, bound)))

    def _alone(self, value: Any) -> _Waiting | None:
        """What waits under a name, when only one operator reads it and it was not made yet."""
        if not isinstance(value, relax.Var) or self.uses.get(value, 0) != 1 or value in self._grouped:
            return None
        return self._waiting.get(value)

    def _flat(self, call: Any, count: int) -> tuple[Any, Layout] | None:
        """The call on flat operands, if all lie in regions in one layout; zeros outside the plane stay zero."""
        parts = list(call.args)
        if len(parts) != count or not all(isinstance(part, relax.Var) and self._is_grouped(part) for part in parts):
            return None
        forms = [self._regions_of(part) for part in parts]
        if len({layout for _, layout in forms}) > 1 or {shape_of(part) for part in parts} != {shape_of(call)}:
            return None
        made = relax.Call(call.op, [flat for flat, _ in forms], call.attrs, call.ty_args)
        return self.builder.emit(made), forms[0][1]

    # Forms

    def _is_grouped(self, value: Any) -> bool:
        return value in self._grouped or value in self._waiting

    def _blocks(self, value: Any) -> None:
        """Give a value in regions its blocked form as well."""
        if value in self._blocked or not self._is_grouped(value):
            return
        flat, layout = self._regions_of(value)
        _, channels, height, width = shape_of(value)
        y, x = layout.regions.pixels(Window((1, 1)))
        places = np.where((y < height) & (x < width), y * width + x, -1)
        lanes = self._device.vector_lanes
        shape = (1, -(-channels // lanes), height, width, lanes)
        made = self.call_kernel(ungroup_blocks(layout, channels), [flat, _table(places)], shape)
        self._blocked[value] = Blocked(made, Channels((channels,), lanes))

    def _regions_of(self, value: Any) -> tuple[Any, Layout]:
        """A value's flat form; a kernel that waited is emitted now."""
        if value not in self._grouped:
            _, _, height, width = shape_of(value)
            regions = Regions.of(height, width, self._device.vector_lanes)
            layout = Layout(regions, self._borders.get(value, (0, 0, 0, 0)))
            if value in self._waiting:
                self._grouped[value] = self._emit(self._waiting[value], layout), layout
            else:
                self._grouped[value] = self._moved_to(value, *layout.pixels()), layout
        return self._grouped[value]

    def _emit(self, made: _Waiting, layout: Layout) -> Any:
        layer = made.layer
        if layer.border is not None:
            needed = Layout(layout.regions, layer.border)
            x, given = self._regions_of(made.source)
            if not given.covers(needed):
                x, given = self._moved_to(made.source, *needed.pixels()), needed
            conv = layer.convolution(layout, given)
        else:
            x = self._moved_to(made.source, *layout.regions.pixels(layer.window))
            conv = layer.convolution(layout, None)
        split = self._choices.best(layer.key, layer.candidates(self._device)).split
        conv = replace(conv, steps=made.steps, tile=split.tile, chunk=split.chunk, team=split.team)
        starts, offsets, values = conv.weights(layer.weights)
        given_ = [x, *map(relax.const, (starts, offsets, values, made.bias))]
        which, first, counts = layout.copies()
        if len(which):
            given_ += [_table(np.concatenate([which, first])), _table(counts)]
        if made.residual is not None:
            flat, beside = self._regions_of(made.residual)
            conv = replace(conv, residual=beside)
            given_.append(flat)
        self._choices.note(layer.key, layer.macs, layer.weights)
        about = {"layer": layer.key, "method": "sparse", "work": layer.nonzeros * layer.height * layer.width}
        function = sparse_convolution(conv, len(offsets), self._device, about)
        return self.call_kernel(function, given_, (layout.size(conv.outputs),))

    def _moved_to(self, source: Any, y: Array, x: Array) -> Any:
        """A value as flat vectors of these pixels, (vectors, lanes), zero for those outside the plane."""
        key = source, y.tobytes(), x.tobytes()
        if key not in self._moved:
            self._moved[key] = self._move(source, y, x)
        return self._moved[key]

    def _move(self, source: Any, y: Array, x: Array) -> Any:
        _, channels, height, width = shape_of(source)
        size = ((channels * len(y) + 2) * y.shape[1],)
        if self._is_grouped(source):
            flat, given = self._regions_of(source)
            places, stride = given.places(y, x), given.vectors * y.shape[1]
            if (spans := shifts(places)) is not None:
                starts, counts = spans
                function = shift(given.size(channels), stride, channels, *places.shape)
                return self.call_kernel(function, [flat, relax.const(starts), _table(counts)], size)
            function = regroup((given.size(channels),), y.shape[1], stride, channels, places.shape)
            return self.call_kernel(function, [flat, _table(places)], size)
        places = np.where((y >= 0) & (y < height) & (x >= 0) & (x < width), y * width + x, -1)
        blocked = self._blocked.get(source)
        if blocked is not None and len(blocked.channels.segments) == 1 and blocked.channels.lanes == y.shape[1]:
            function = group_blocks(channels, height, width, places.shape)
            return self.call_kernel(function, [blocked.value, _table(places)], size)
        function = regroup((1, channels, height, width), 0, height * width, channels, places.shape)
        return self.call_kernel(function, [self.read(source), _table(places)], size)


def _borders(chosen: dict[Any, SparseLayer], bound: dict[Any, Any]) -> dict[Any, tuple[int, int, int, int]]:
    """The border each variable needs for the sparse convolutions that read it as it lies."""
    found: dict[Any, tuple[int, int, int, int]] = {}
    for var, layer in chosen.items():
        border, source = layer.border, bound[var].args[0]
        if border is not None:
            top, left, bottom, right = map(max, zip(border, found.get(source, border), strict=True))
            found[source] = (top, left, bottom, right)
    return found


def _variables(value: Any) -> list[Any]:
    """Variables that a call reads, those in a tuple too."""
    if not isinstance(value, relax.Call):
        return []
    parts = [part for arg in value.args for part in (arg.fields if isinstance(arg, relax.Tuple) else [arg])]
    return [part for part in parts if isinstance(part, relax.Var)]


def _table(values: Array) -> Any:
    return relax.const(np.ascontiguousarray(values, np.int32).reshape(-1))
