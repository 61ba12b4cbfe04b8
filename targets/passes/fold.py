"""Fold what is known at compile time: reshapes of constants, and batch norms into the convolution before them."""

from typing import Any

import numpy as np
import tvm
from tvm import relax

from targets.base import Array
from targets.passes.walk import Walk, array_of, ints, operator, rewrite, shape_of


def fold(module: tvm.IRModule) -> tvm.IRModule:
    """No batch norm is left, and no constant is moved about at run time."""
    return rewrite(module, _Fold)


class _Fold(Walk):
    def call(self, var: Any, call: Any) -> Any:
        name = operator(call)
        first = array_of(self.read(call.args[0])) if call.args else None
        if name == "relax.nn.batch_norm":
            return self._batch_norm(call)
        if first is not None and name == "relax.reshape":
            return relax.const(first.reshape(shape_of(call)))
        if first is not None and name == "relax.permute_dims":
            axes = ints(call.attrs.axes) if call.attrs.axes else None
            return relax.const(np.ascontiguousarray(first.transpose(axes)))
        return super().call(var, call)

    def _batch_norm(self, call: Any) -> Any:
        gamma, beta, mean, variance = (array_of(self.read(argument)) for argument in call.args[1:5])
        if gamma is None or beta is None or mean is None or variance is None:
            return super().call(None, call)
        scale = gamma / np.sqrt(variance + np.float32(call.attrs.epsilon))
        shift = beta - mean * scale
        shape = [1] * len(shape_of(call.args[0]))
        shape[int(call.attrs.axis)] = -1
        folded = self._scaled_convolution(call.args[0], scale)
        if folded is None:
            scaled = self.builder.emit(relax.op.multiply(self.read(call.args[0]), relax.const(scale.reshape(shape))))
        else:
            scaled, bias = folded
            shift = shift + bias * scale
        shifted = self.builder.emit(relax.op.add(scaled, relax.const(shift.reshape(shape).astype(np.float32))))
        return relax.Tuple([shifted, self.read(call.args[3]), self.read(call.args[4])])

    def _scaled_convolution(self, value: Any, scale: Array) -> tuple[Any, Array] | None:
        """The convolution behind `value` with scaled weights, and its bias; None unless `value` alone reads it."""
        source: Any = self.bound.get(value)
        bias = np.zeros_like(scale)
        if operator(source) == "relax.add" and self.uses[value] == 1:
            constant = array_of(self.read(source.args[1]))
            if constant is None or constant.size != scale.size:
                return None
            value, bias = source.args[0], constant.reshape(-1)
            source = self.bound.get(value)
        weights = array_of(self.read(source.args[1])) if operator(source) == "relax.nn.conv2d" else None
        if weights is None or self.uses[value] != 1:
            return None
        scaled = relax.const((weights * scale[:, None, None, None]).astype(np.float32))
        made = relax.Call(source.op, [self.read(source.args[0]), scaled], source.attrs, source.ty_args)
        return self.builder.emit(made), bias
