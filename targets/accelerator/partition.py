"""A quantized program as what the host computes and what the accelerator computes, in Relax."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from targets.accelerator.network import Network, Value
from targets.accelerator.reading import Reading, Real, read


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
    main = module["main"]
    reading = read(main)
    return Partition(_Host(main, reading, prefix).module(), reading.networks, prefix)


class _Host:
    """Emits what the answers need, from them on backwards, with a call for each run in place of what it makes."""

    def __init__(self, main: relax.Function, reading: Reading, prefix: str) -> None:
        self.main, self.networks, self.known, self.prefix = main, reading.networks, reading.known, prefix
        self.bound = {one.var: one.value for block in main.body.blocks for one in block.bindings}
        self.variables = {var.name: var for var in self.bound}
        self.run_of = {name: run for run, network in enumerate(self.networks) for name in network.outputs}
        self.builder = relax.BlockBuilder()
        self.emitted: dict[Any, Any] = {}
        self.made: dict[str, Any] = {}

    def module(self) -> tvm.IRModule:
        with self.builder.function("main", list(self.main.params), attrs=dict(self.main.attrs or {})):
            with self.builder.dataflow():
                answers = self.builder.emit_output(self._emit(self.main.body.body))
            self.builder.emit_func_output(answers)
        return self.builder.finalize()

    def _emit(self, value: Any) -> Any:
        """A variable, or an expression of variables, of the new function."""
        if isinstance(value, relax.Tuple):
            return relax.Tuple([self._emit(one) for one in value.fields])
        if not isinstance(value, relax.Var) or value not in self.bound:
            return value  # a constant, a shape, or a parameter
        if value not in self.emitted:
            self.emitted[value] = self._new(value)
        return self.emitted[value]

    def _new(self, var: Any) -> Any:
        seen, value = self.known.get(var), self.bound[var]
        if isinstance(seen, Value) and seen.name in self.run_of:
            return self._made(seen.name)
        if isinstance(seen, Real) and seen.name == var.name:  # made in int8, as a pooling keeps its grid
            grid = self._grid(seen.name)
            return self.builder.emit(relax.op.dequantize(self._made(seen.name), *grid, axis=1, out_dtype="float32"))
        if isinstance(value, relax.Call):
            args = [self._emit(arg) for arg in value.args]
            return self.builder.emit(relax.Call(value.op, args, value.attrs, value.ty_args))
        return self.builder.emit(self._emit(value))

    def _grid(self, name: str) -> tuple[Any, Any]:
        grid = self.networks[self.run_of[name]].values[name].grid
        return relax.const(np.float32(grid.scale)), relax.const(np.int8(grid.zero))

    def _made(self, name: str) -> Any:
        """An int8 value that a run makes, or that the host quantizes."""
        if name not in self.run_of:
            return self._emit(self.variables[name])
        if name not in self.made:
            self._call(self.run_of[name])
        return self.made[name]

    def _call(self, run: int) -> None:
        network = self.networks[run]
        given = relax.Tuple([self._made(name) for name in network.inputs])
        types = [relax.TensorType((1, *network.values[name].shape), "int8") for name in network.outputs]
        found = self.builder.emit(relax.call_dps_packed(f"{self.prefix}{run}", given, out_ty=types))
        parts: Sequence[Any] = [found]
        if len(types) > 1:
            parts = [self.builder.emit(relax.TupleGetItem(found, k)) for k in range(len(types))]
        self.made |= dict(zip(network.outputs, parts, strict=True))
