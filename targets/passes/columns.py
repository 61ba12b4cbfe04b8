"""Turn dense layers with mostly zero weights into 1x1 convolutions, whose sparse kernels do the rest.

Rows of the input become the pixels of a picture of one column; its channels are the features. What follows such a layer
feature by feature (bias, activation, another such layer) stays in that form.
"""

from math import prod
from typing import Any

import numpy as np
import tvm
from tvm import relax

from profiles.device import Device
from targets.base import Array
from targets.kernels.sparse_methods import SparseLayer
from targets.kernels.tile import convolution_tile, product_cycles
from targets.kernels.window import Window
from targets.passes.walk import Walk, array_of, operator, rewrite, shape_of

_MOST = 0.4  # density above which it is not considered
_TURN = 40.0  # cycles of a vector that is turned from rows into pixels, or back, and laid out in regions
_CALLS = 24_000.0  # of the kernels that do so
_ALONG = frozenset(f"relax.{name}" for name in ("nn.relu", "nn.gelu", "nn.silu", "sigmoid", "tanh"))


def columns(module: tvm.IRModule, device: Device) -> tvm.IRModule:
    """The module with 1x1 convolutions in place of dense layers that should be faster so; the rest untouched."""
    return rewrite(module, lambda builder, old: _Columns(builder, old, device))


class _Columns(Walk):
    def __init__(self, builder: relax.BlockBuilder, module: tvm.IRModule, device: Device) -> None:
        super().__init__(builder, module)
        self._device = device
        self._columns: dict[Any, Any] = {}  # pictures (1, features, rows, 1) by old variable

    def bind(self, var: Any, value: Any) -> None:
        made = self._layer(value) if operator(value) == "relax.matmul" else self._along(value)
        if made is None:
            super().bind(var, value)
        else:
            self._columns[var] = made

    def read(self, value: Any) -> Any:
        if isinstance(value, relax.Var) and value not in self._new and value in self._columns:
            shape = shape_of(value)
            rows = self.builder.emit(relax.op.permute_dims(self._columns[value], [0, 2, 3, 1]))
            self._new[value] = self.builder.emit(relax.op.reshape(rows, shape))
        return super().read(value)

    def _layer(self, call: Any) -> Any:
        weights = array_of(call.args[1])
        if weights is None or weights.ndim != 2 or weights.dtype != np.float32:
            return None
        rows = prod(shape_of(call)[:-1])
        if not _pays(weights, rows, self._device):
            return None
        kernel = relax.const(np.ascontiguousarray(weights.T)[:, :, None, None])
        return self.builder.emit(relax.op.nn.conv2d(self._column(call.args[0], rows), kernel))

    def _column(self, value: Any, rows: int) -> Any:
        if value not in self._columns:
            given = self.builder.emit(relax.op.reshape(self.read(value), (1, rows, 1, shape_of(value)[-1])))
            self._columns[value] = self.builder.emit(relax.op.permute_dims(given, [0, 3, 1, 2]))
            self._new.setdefault(value, self.read(value))
        return self._columns[value]

    def _along(self, value: Any) -> Any:
        """A bias or an activation of what has that form, in that form."""
        if not isinstance(value, relax.Call) or not value.args or value.args[0] not in self._columns:
            return None
        given = self._columns[value.args[0]]
        if operator(value) in _ALONG:
            return self.builder.emit(relax.Call(value.op, [given], value.attrs, value.ty_args))
        bias = array_of(value.args[1]) if operator(value) == "relax.add" else None
        if bias is None or bias.shape != shape_of(value)[-1:]:
            return None
        return self.builder.emit(relax.op.add(given, relax.const(bias.reshape(1, -1, 1, 1))))


def _pays(weights_KN: Array, rows: int, device: Device) -> bool:
    """Whether a sparse kernel should be faster even if its input and its output have to be turned."""
    lanes, (depth, outputs) = device.vector_lanes, weights_KN.shape
    if rows < lanes or np.count_nonzero(weights_KN) > _MOST * weights_KN.size:
        return False
    layer = SparseLayer(depth, (rows, 1), weights_KN.T[:, :, None, None], Window((1, 1)), 1, rows, 1)
    sparse = min(candidate.cycles for candidate in layer.candidates(device))
    turned = (depth + outputs) * -(-rows // lanes) * _TURN + _CALLS
    blocks = -(-outputs // lanes)
    dense = depth * product_cycles(convolution_tile(device, blocks, 1, rows, most_blocks=16), blocks, 1, rows)
    return bool(sparse + turned < dense)
