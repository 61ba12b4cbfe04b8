"""A quantized program as what the host computes and what the accelerator computes, in Relax."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from targets.accelerator.moving import moved_as_integers
from targets.accelerator.network import Network, Value
from targets.accelerator.pending import variables
from targets.accelerator.reading import TURNED, Reading, Real, read


@dataclass(frozen=True, slots=True)
class Partition:
    """Both parts of a program.

    Attributes:
        host: its `main` calls the packed function `name(run)` for each run of the accelerator: int8 tensors in, then
            those that it fills.
        networks: what the accelerator computes in each run.
    """

    host: tvm.IRModule
    networks: tuple[Network, ...]
    prefix: str

    def name(self, run: int) -> str:
        return f"{self.prefix}{run}"


def partition(module: tvm.IRModule, prefix: str) -> Partition:
    """Split `main`, an imported program that kept its integers.

    Args:
        prefix: of the packed functions' names; another for each program that one process loads.

    Raises:
        TargetError: the accelerator computes none of its layers.
    """
    main = moved_as_integers(module)["main"]
    reading = read(main)
    return Partition(_Host(main, reading, prefix).module(), reading.networks, prefix)


class _Host:
    """What the answers need of the function, with a call for each run in place of what it makes.

    What the host computes is emitted in the function's order, but for what waits for a later run.
    """

    def __init__(self, main: relax.Function, reading: Reading, prefix: str) -> None:
        self.main, self.networks, self.known, self.prefix = main, reading.networks, reading.known, prefix
        self.bound = {one.var: one.value for block in main.body.blocks for one in block.bindings}
        self.run_of = {name: run for run, network in enumerate(self.networks) for name in network.outputs}
        self.builder = relax.BlockBuilder()
        self.emitted: dict[Any, Any] = {}
        self.made: dict[str, Any] = {}

    def module(self) -> tvm.IRModule:
        needed, levels = self._needed(), self._levels()
        with self.builder.function("main", list(self.main.params), attrs=dict(self.main.attrs or {})):
            with self.builder.dataflow():
                for run in range(len(self.networks) + 1):
                    for var in self.bound:
                        if var in needed and levels[var] == run:
                            self.emitted[var] = self._emit(var)
                    if run < len(self.networks):
                        self._call(run)
                answers = self.builder.emit_output(_renewed(self.main.body.body, self.emitted))
            self.builder.emit_func_output(answers)
        return self.builder.finalize()

    def _made_by(self, var: Any) -> str | None:
        """The name of what a run makes and this variable is: in int8, or as the real numbers of a pooling's answer."""
        seen = self.known.get(var)
        if isinstance(seen, Value) or (isinstance(seen, Real) and seen.name == var.name):
            return seen.name if seen.name in self.run_of else None
        return None

    def _needed(self) -> set[Any]:
        """Variables that the answers and the runs are made of; of what a run makes, no further."""
        found = set[Any]()
        inputs = {name.removesuffix(TURNED) for network in self.networks for name in network.inputs}
        open_ones = variables(self.main.body.body) + [var for var in self.bound if var.name in inputs]
        while open_ones:
            var = open_ones.pop()
            if var in self.bound and var not in found:
                found.add(var)
                open_ones += [] if self._made_by(var) else variables(self.bound[var])
        return found

    def _levels(self) -> dict[Any, int]:
        """How many runs are over before each variable can be computed."""
        found = dict[Any, int]()
        for var, value in self.bound.items():
            name = self._made_by(var)
            before = (found.get(operand, 0) for operand in variables(value))
            found[var] = max(before, default=0) if name is None else self.run_of[name] + 1
        return found

    def _emit(self, var: Any) -> Any:
        name = self._made_by(var)
        if name is None:
            return self.builder.emit(_renewed(self.bound[var], self.emitted))
        value = self.networks[self.run_of[name]].values[name]
        tensor = self._as_program(value, var)
        if isinstance(self.known[var], Value):
            return tensor
        steps = relax.const(np.float32(value.grid.scale)), relax.const(np.int8(value.grid.zero))
        axis = min(1, len(var.ty.shape) - 1)
        return self.builder.emit(relax.op.dequantize(tensor, *steps, axis=axis, out_dtype="float32"))

    def _as_program(self, value: Value, var: Any) -> Any:
        """What a run made, as the tensor that it is in the program."""
        made = self.made[value.name]
        if not value.last:
            return made
        moved = self.builder.emit(relax.op.permute_dims(made, [0, 2, 3, 1]))
        return self.builder.emit(relax.op.reshape(moved, [int(size) for size in var.ty.shape]))

    def _as_picture(self, value: Value, tensor: Any) -> Any:
        """A tensor of the program as a run takes it."""
        if not value.last:
            return tensor
        channels, height, width = value.shape
        whole = self.builder.emit(relax.op.reshape(tensor, [1, height, width, channels]))
        return self.builder.emit(relax.op.permute_dims(whole, [0, 3, 1, 2]))

    def _call(self, run: int) -> None:
        network, by_name = self.networks[run], {var.name: new for var, new in self.emitted.items()}
        given = relax.Tuple([
            self.made[name] if name in self.made
            else self._as_picture(network.values[name], by_name[name.removesuffix(TURNED)])
            for name in network.inputs
        ])  # fmt: skip
        types = [relax.TensorType((1, *network.values[name].shape), "int8") for name in network.outputs]
        found = self.builder.emit(relax.call_dps_packed(f"{self.prefix}{run}", given, out_ty=types))
        parts: Sequence[Any] = [found]
        if len(types) > 1:
            parts = [self.builder.emit(relax.TupleGetItem(found, k)) for k in range(len(types))]
        self.made |= dict(zip(network.outputs, parts, strict=True))


def _renewed(value: Any, new: Mapping[Any, Any]) -> Any:
    """An expression of the variables that took the place of its own."""
    if isinstance(value, relax.Var):
        return new.get(value, value)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([_renewed(one, new) for one in value.fields])
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(_renewed(value.tuple_value, new), value.index)
    if isinstance(value, relax.Call):
        return relax.Call(value.op, [_renewed(one, new) for one in value.args], value.attrs, value.ty_args)
    return value
