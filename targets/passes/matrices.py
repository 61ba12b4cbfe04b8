"""Give matrix products and what goes over rows kernels of their own: dense layers, attention, softmax, layer norm."""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import tvm
from tvm import relax

from profiles.device import Device
from targets.kernels.dense import dense, narrow_dense
from targets.kernels.product import product
from targets.kernels.rows import layer_norm, softmax
from targets.passes.channels import Channels
from targets.passes.walk import Walk, array_of, ints, operator, rewrite, shape_of


def matrices(module: tvm.IRModule, device: Device) -> tvm.IRModule:
    """The module with such operators as kernels, weights packed; the rest untouched."""
    return rewrite(module, lambda builder, old: _Matrices(builder, old, device))


class _Matrices(Walk):
    def __init__(self, builder: relax.BlockBuilder, module: tvm.IRModule, device: Device) -> None:
        super().__init__(builder, module)
        self._device, self._lanes = device, device.vector_lanes
        self._rules: dict[str, Callable[[Any], Any]] = {
            "relax.matmul": self._matmul,
            "relax.nn.softmax": self._softmax,
            "relax.nn.layer_norm": self._layer_norm,
        }

    def call(self, var: Any, call: Any) -> Any:
        rule = self._rules.get(operator(call))
        made = rule(call) if rule is not None and call.ty.dtype == "float32" else None
        return super().call(var, call) if made is None else made

    def _matmul(self, call: Any) -> Any:
        weights, shape = array_of(self.read(call.args[1])), shape_of(call)
        if weights is None:
            return self._product(call)
        if weights.ndim != 2 or len(shape) < 2:
            return None
        depth, outputs = weights.shape
        x = self._shaped(call.args[0], (prod(shape[:-1]), depth))
        if outputs < self._lanes:
            packed = np.ascontiguousarray(Channels((depth,), self._lanes).pack(weights.T, 1))
            made = self.kernel(narrow_dense, x, relax.const(packed), anchors=True)
        else:
            packed = np.ascontiguousarray(Channels((outputs,), self._lanes).pack(weights, 1).swapaxes(0, 1))
            made = self.kernel(dense, x, relax.const(packed), anchors=True, outputs=outputs, device=self._device)
        return self._as(made, shape)

    def _product(self, call: Any) -> Any:
        """Of two computed matrices, or of as many pairs of them as there are batches; none is repeated."""
        (*batch, rows, depth), right = shape_of(call.args[0]), shape_of(call.args[1])
        if tuple(batch) != right[:-2] or len(right) < 2 or array_of(self.read(call.args[0])) is not None:
            return None
        a = self._shaped(call.args[0], (prod(batch), rows, depth))
        b = self._shaped(call.args[1], (prod(batch), *right[-2:]))
        made = self.kernel(product, a, b, anchors=True, device=self._device)
        return self._as(made, shape_of(call))

    def _softmax(self, call: Any) -> Any:
        shape = shape_of(call)
        if int(call.attrs.axis) % len(shape) != len(shape) - 1:
            return None
        made = self.kernel(softmax, self._rows(call.args[0]), anchors=True, lanes=self._lanes)
        return self._as(made, shape)

    def _layer_norm(self, call: Any) -> Any:
        (x, scale, shift), shape, attrs = call.args, shape_of(call), call.attrs
        if [axis % len(shape) for axis in ints(attrs.axes)] != [len(shape) - 1] or not (attrs.center and attrs.scale):
            return None
        settings = {"epsilon": float(attrs.epsilon), "lanes": self._lanes}
        made = self.kernel(
            layer_norm, self._rows(x), self.read(scale), self.read(shift), anchors=True, name="layer_norm", **settings
        )
        return self._as(made, shape)

    def _rows(self, value: Any) -> Any:
        shape = shape_of(value)
        return self._shaped(value, (prod(shape[:-1]), shape[-1]))

    def _shaped(self, value: Any, shape: tuple[int, ...]) -> Any:
        return self._as(self.read(value), shape)

    def _as(self, value: Any, shape: tuple[int, ...]) -> Any:
        """A value in another shape; as it is where it has that shape, so that what follows can join its kernel."""
        return value if shape_of(value) == shape else self.builder.emit(relax.op.reshape(value, shape))
