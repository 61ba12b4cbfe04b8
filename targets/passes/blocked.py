"""Assign blocked layouts: channels in blocks of vector lanes from the first convolution to the last consumer.

Every value may have a planar form, a blocked form, or both; an operator with a blocked rule reads and makes blocked
forms, any other reads planar ones, and a conversion is emitted once, where a form is first missing. Fillers (lanes
beyond the last channel) hold arbitrary finite values: packed weights are zero there, and operators that could make
them infinite run planar unless there are none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from profiles.device import Device
from targets.base import Array
from targets.choice import Choices
from targets.kernels.layout import block, unblock
from targets.kernels.methods import ConvolutionLayer
from targets.kernels.moves import unblock_squares
from targets.kernels.resize import resize, resize_axis, taps
from targets.kernels.sliding import depthwise, max_pool, sum_pool, window_counts
from targets.kernels.transposed import Phases, interleave, phase_weights, phase_window
from targets.kernels.window import Window
from targets.passes.channels import Channels, pack_convolution, whole_groups
from targets.passes.walk import Walk, array_of, ints, operator, rounds, shape_of

_KEEP_FINITE = frozenset(
    f"relax.{name}"
    for name in (
        "nn.relu", "nn.leakyrelu", "nn.gelu", "nn.silu", "nn.softplus",
        "sigmoid", "tanh", "erf", "negative", "abs", "clip", "round",
    )
)
_ELEMENTWISE = _KEEP_FINITE | {"relax.exp", "relax.sqrt", "relax.rsqrt", "relax.log"}
_NARROW = 5  # lanes to a channel from which it is faster to resize planes, whose columns are gathered
_BINARY = frozenset(f"relax.{name}" for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum"))


@dataclass(frozen=True, slots=True)
class Blocked:
    """A value in blocked form: (N, blocks, H, W, lanes)."""

    value: Any
    channels: Channels


class Blocker(Walk):
    """Gives every operator that has a blocked rule its blocked kernel."""

    def __init__(
        self, builder: relax.BlockBuilder, module: tvm.IRModule, device: Device, choices: Choices
    ) -> None:
        super().__init__(builder, module)
        self._device, self._choices = device, choices
        self._lanes, self._exact = device.vector_lanes, rounds(module)
        self._blocked: dict[Any, Blocked] = {}
        self._rules: dict[str, Callable[[Any], Any]] = {
            "relax.nn.conv2d": self._convolution,
            "relax.nn.conv2d_transpose": self._transposed_convolution,
            "relax.nn.max_pool2d": self._max_pool,
            "relax.nn.avg_pool2d": self._average_pool,
            "relax.mean": self._global_mean,
            "relax.nn.prelu": self._prelu,
            "relax.nn.pad": self._pad,
            "relax.concat": self._concat,
            "relax.image.resize2d": self._resize,
            **dict.fromkeys(_ELEMENTWISE, self._unary),
            **dict.fromkeys(_BINARY, self._binary),
        }

    def has_rule(self, name: str) -> bool:
        """Whether an operator of that name reads blocked values where there are some."""
        return name in self._rules

    def bind(self, var: Any, value: Any) -> None:
        if isinstance(value, relax.Var) and value in self._blocked:
            self._blocked[var] = self._blocked[value]
            return
        rule = self._rules.get(operator(value))
        made = rule(value) if rule is not None and value.ty.dtype == "float32" else None
        if isinstance(made, Blocked):
            self._blocked[var] = made
        elif made is not None:
            self._new[var] = made
        else:
            super().bind(var, value)

    def read(self, value: Any) -> Any:
        if isinstance(value, relax.Var) and value not in self._new and value in self._blocked:
            self._new[value] = self._planar(self._blocked[value], shape_of(value))
        return super().read(value)

    # Forms

    def _planar(self, given: Blocked, shape: tuple[int, ...]) -> Any:
        if shape[2:] == (1, 1) and given.channels.whole:
            return self.builder.emit(relax.op.reshape(given.value, shape))
        segments, source = list(given.channels.segments), shape_of(given.value)
        if source[2] * source[3] < source[4]:
            return self.kernel(unblock, given.value, segments=segments)
        return self.call_kernel(unblock_squares(source, segments), [given.value], shape)

    def _block(self, value: Any) -> Blocked | None:
        """The blocked form of an old variable, converted if it has none; None for what has no channels."""
        if not isinstance(value, relax.Var) or len(value.ty.shape) != 4 or value.ty.dtype != "float32":
            return None
        if value not in self._blocked:
            channels = Channels((shape_of(value)[1],), self._lanes)
            made = self.kernel(block, self.read(value), lanes=self._lanes)
            self._blocked[value] = Blocked(made, channels)
        return self._blocked[value]

    # Rules: each returns the blocked result, a planar variable, or None to leave the operator as it is

    def _convolution(self, call: Any) -> Blocked | None:
        weights, attrs = array_of(call.args[1]), call.attrs
        if weights is None or attrs.data_layout != "NCHW" or attrs.kernel_layout != "OIHW":
            return None
        source, groups, (_, in_channels, *_) = call.args[0], int(attrs.groups), shape_of(call.args[0])
        window = Window(weights.shape[2:], ints(attrs.strides), ints(attrs.padding), ints(attrs.dilation))
        height, width = shape_of(call)[2:]
        outputs = Channels((weights.shape[0],), self._lanes)
        if source not in self._blocked and groups == 1 and in_channels < self._lanes:
            inputs, x = Channels((in_channels,), 1), self.read(source)
        else:
            given = self._block(source)
            if given is None:
                return None
            inputs, x = given.channels, given.value
        if groups == in_channels == weights.shape[0] and groups > 1:
            packed = np.ascontiguousarray(np.moveaxis(inputs.pack(weights[:, 0], 0), 1, -1))
            made = self.kernel(
                depthwise, x, relax.const(packed), anchors=True, window=window, height=height, width=width,
                device=self._device,
            )
            return Blocked(made, inputs)
        whole, groups = whole_groups(weights, groups, inputs) if groups > 1 else (weights, groups)
        per_group = inputs if groups == 1 else Channels((whole.shape[1],), self._lanes)
        packed = pack_convolution(whole, per_group, outputs)
        return Blocked(self._dense(x, weights, packed, window, height, width), outputs)

    def _dense(self, x: Any, weights: Array, packed: Array, window: Window, height: int, width: int) -> Any:
        """The dense convolution of `x` that is chosen for its layer; `weights` as the network has them."""
        layer = ConvolutionLayer(shape_of(x), packed.shape, window, height, width, self._exact)
        self._choices.note(layer.key, layer.source[0] * height * width * weights.size, weights)
        method = self._choices.best(layer.key, layer.candidates(self._device))
        return self.kernel(method.kernel, x, relax.const(method.pack(packed)), anchors=True, name="convolution")

    def _transposed_convolution(self, call: Any) -> Blocked | None:
        weights, attrs, given = array_of(call.args[1]), call.attrs, self._block(call.args[0])
        if weights is None or given is None or attrs.kernel_layout != "IOHW" or set(ints(attrs.dilation)) != {1}:
            return None
        sizes = zip(weights.shape[2:], ints(attrs.strides), ints(attrs.padding)[:2], shape_of(call)[2:], strict=True)
        rows, columns = (Phases(*size) for size in sizes)
        if rows.padding >= rows.kernel or columns.padding >= columns.kernel:
            return None
        outputs = Channels((shape_of(call)[1],), self._lanes)
        phases = Channels(outputs.segments * (rows.stride * columns.stride), self._lanes)
        packed = pack_convolution(phase_weights(weights, int(attrs.groups), rows, columns), given.channels, phases)
        made = self._dense(given.value, weights, packed, phase_window(rows, columns), rows.count, columns.count)
        return Blocked(self.kernel(interleave, made, rows=rows, columns=columns), outputs)

    def _max_pool(self, call: Any) -> Blocked | None:
        given, window = self._blocked.get(call.args[0]), _pool_window(call)
        if given is None:
            return None
        _, _, height, width = shape_of(call)
        made = self.kernel(
            max_pool, given.value, anchors=True, window=window, height=height, width=width, device=self._device
        )
        return Blocked(made, given.channels)

    def _average_pool(self, call: Any) -> Blocked | None:
        given, window = self._blocked.get(call.args[0]), _pool_window(call)
        if given is None:
            return None
        _, _, height, width = shape_of(call)
        counts = window_counts(window, shape_of(call.args[0])[2:], (height, width), bool(call.attrs.count_include_pad))
        return self._average(given, window, counts)

    def _global_mean(self, call: Any) -> Any:
        shape = shape_of(call.args[0])
        given = self._blocked.get(call.args[0])
        if given is None or call.attrs.axis is None or sorted(axis % 4 for axis in ints(call.attrs.axis)) != [2, 3]:
            return None
        made = self._average(given, Window(shape[2:]), np.full((1, 1), shape[2] * shape[3], np.float32))
        if call.attrs.keepdims:
            return made
        planar = self._planar(made, (*shape[:2], 1, 1))
        return self.builder.emit(relax.op.reshape(planar, shape[:2]))

    def _average(self, given: Blocked, window: Window, counts: Array) -> Blocked:
        height, width = counts.shape
        total = self.kernel(
            sum_pool, given.value, anchors=True, window=window, height=height, width=width, device=self._device
        )
        share = np.float32(1) / counts
        factor = share[0, 0] if np.all(share == share[0, 0]) else share[None, None, :, :, None]
        return Blocked(self.builder.emit(relax.op.multiply(total, relax.const(factor, "float32"))), given.channels)

    def _unary(self, call: Any) -> Blocked | None:
        given = self._blocked.get(call.args[0])
        if given is None or not (given.channels.whole or operator(call) in _KEEP_FINITE):
            return None
        renewed = relax.Call(call.op, [given.value, *call.args[1:]], call.attrs, call.ty_args)
        return Blocked(self.builder.emit(renewed), given.channels)

    def _binary(self, call: Any) -> Blocked | None:
        channels = next((self._blocked[part].channels for part in call.args if part in self._blocked), None)
        if channels is None or len(shape_of(call)) != 4 or shape_of(call)[1] != channels.count:
            return None
        divides = operator(call) == "relax.divide"
        if divides and not channels.whole and array_of(call.args[1]) is None:
            return None
        operands = [self._operand(part, channels, fill=float(divides)) for part in call.args]
        if any(operand is None for operand in operands):
            return None
        return Blocked(self.builder.emit(relax.Call(call.op, operands, call.attrs, call.ty_args)), channels)

    def _operand(self, value: Any, channels: Channels, fill: float) -> Any:
        """An operand that broadcasts against a blocked tensor with such channels; None if it cannot be had."""
        array = array_of(value)
        if array is not None:
            if array.size == 1:
                return relax.const(array.reshape(()))
            array = array.reshape((1,) * (4 - array.ndim) + array.shape)
            return relax.const(array[..., None] if array.shape[1] == 1 else _lanes_last(channels.pack(array, 1, fill)))
        if not isinstance(value, relax.Var):
            return None
        if len(value.ty.shape) == 4 and shape_of(value)[1] == 1 and channels.count > 1:
            return self.builder.emit(relax.op.expand_dims(self.read(value), [4]))
        known = self._blocked.get(value)
        if known is None and (len(value.ty.shape) != 4 or len(channels.segments) > 1):
            return None
        known = known or self._block(value)
        return known.value if known is not None and known.channels == channels else None

    def _prelu(self, call: Any) -> Blocked | None:
        given, slope = self._blocked.get(call.args[0]), array_of(self.read(call.args[1]))
        if given is None or slope is None or not (slope.size == 1 or int(call.attrs.axis) == 1):
            return None
        operand = self._operand(relax.const(slope.reshape(1, -1, 1, 1)), given.channels, 0.0)
        zero = relax.const(0.0, "float32")
        below = self.builder.emit(relax.op.multiply(operand, self.builder.emit(relax.op.minimum(given.value, zero))))
        above = self.builder.emit(relax.op.maximum(given.value, zero))
        return Blocked(self.builder.emit(relax.op.add(above, below)), given.channels)

    def _pad(self, call: Any) -> Blocked | None:
        given, widths = self._blocked.get(call.args[0]), ints(call.attrs.pad_width)
        finite = given is not None and (given.channels.whole or np.isfinite(float(call.attrs.pad_value)))
        if given is None or not finite or call.attrs.pad_mode != "constant" or len(widths) != 8 or any(widths[:4]):
            return None
        padded = relax.op.nn.pad(given.value, [*widths, 0, 0], "constant", float(call.attrs.pad_value))
        return Blocked(self.builder.emit(padded), given.channels)

    def _concat(self, call: Any) -> Blocked | None:
        parts = list(call.args[0].fields) if isinstance(call.args[0], relax.Tuple) else []
        if int(call.attrs.axis) != 1 or not any(part in self._blocked for part in parts):
            return None
        forms = [self._block(part) for part in parts]
        known = [form for form in forms if form is not None]
        if len(known) != len(forms):
            return None
        channels = known[0].channels
        for form in known[1:]:
            channels = channels.joined(form.channels)
        return Blocked(self.builder.emit(relax.op.concat([form.value for form in known], axis=1)), channels)

    def _resize(self, call: Any) -> Any:
        attrs, (_, _, given_h, given_w), (_, _, height, width) = call.attrs, shape_of(call.args[0]), shape_of(call)
        how = (attrs.method, attrs.coordinate_transformation_mode, attrs.rounding_method, float(attrs.cubic_alpha))
        rows, columns = taps(given_h, height, *how), taps(given_w, width, *how)
        if rows is None or columns is None or attrs.layout != "NCHW" or attrs.cubic_exclude:
            return None
        form = self._blocked.get(call.args[0])
        if form is None or form.channels.count * _NARROW <= form.channels.blocks * self._lanes:
            mixed = self.read(call.args[0])
            for axis, table in ((3, columns), (2, rows)):  # columns first: they are gathered value by value
                given = relax.const(table.index), relax.const(table.weight)
                mixed = self.kernel(resize_axis, mixed, *given, anchors=True, axis=axis)
            return mixed
        tables = [relax.const(table) for table in (rows.index, rows.weight, columns.index, columns.weight)]
        return Blocked(self.kernel(resize, form.value, *tables), form.channels)


def _pool_window(call: Any) -> Window:
    attrs = call.attrs
    return Window(ints(attrs.pool_size), ints(attrs.strides), ints(attrs.padding), ints(attrs.dilation))


def _lanes_last(array: Array) -> Array:
    """(N, blocks, lanes, H, W) as (N, blocks, H, W, lanes)."""
    return np.ascontiguousarray(array.transpose(0, 1, 3, 4, 2))
