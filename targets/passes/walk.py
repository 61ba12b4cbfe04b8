"""Rebuild a module's main function binding by binding: the frame that this package's Relax passes fill in."""

from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax, tirx

from targets.base import Array

# FuseOps lets element-wise operators join a kernel of this pattern, and nothing else.
_FUSES_ELEMENTWISE = {"op_pattern": 4}


class Walk:
    """Visits every binding of a straight main function in order and emits what should stand in its place.

    Subclasses override `call`. `bound` gives the old value behind an old variable, `uses` how often it is read.
    """

    def __init__(self, builder: relax.BlockBuilder, module: tvm.IRModule) -> None:
        self.builder = builder
        self.bound: dict[Any, Any] = {}
        self.uses: dict[Any, int] = {}
        self._module = module
        self._new: dict[Any, Any] = {}
        for binding in bindings(module):
            self.bound[binding.var] = binding.value
            for var in relax.analysis.free_vars(binding.value):
                self.uses[var] = self.uses.get(var, 0) + 1

    def call(self, var: Any, call: Any) -> Any:
        """What replaces a call; as it stands, unless overridden."""
        del var
        return self.builder.emit(self.renewed(call))

    def bind(self, var: Any, value: Any) -> None:
        """Take one binding over."""
        self._new[var] = self.call(var, value) if isinstance(value, relax.Call) else self.read(value)

    def read(self, value: Any) -> Any:
        """An old expression in terms of the new function."""
        if isinstance(value, relax.Tuple):
            return relax.Tuple([self.read(part) for part in value.fields])
        if isinstance(value, relax.TupleGetItem):
            whole = self.read(value.tuple_value)
            if isinstance(whole, relax.Tuple):
                return whole.fields[value.index]
            return self.builder.emit(whole[value.index])
        return self._new.get(value, value) if isinstance(value, relax.Var) else value

    def kernel(
        self, function: Callable[..., Any], *arguments: Any, anchors: bool = False, name: str = "", **settings: Any
    ) -> Any:
        """Emit a call of a kernel that is written as a tensor expression; an anchor lets element-wise ones join it."""
        attrs = {"primfunc_attrs": _FUSES_ELEMENTWISE} if anchors else {}

        def compute(*tensors: Any) -> Any:
            return function(*tensors, **settings)

        return self.builder.emit_te(compute, *arguments, primfunc_name_hint=name or function.__name__, **attrs)

    def call_kernel(self, function: tirx.PrimFunc, arguments: list[Any], shape: tuple[int, ...]) -> Any:
        """Emit a call of a kernel that is written loop by loop."""
        name = self.builder.add_func(function.without_attr("global_symbol"), str(function.attrs["global_symbol"]))
        return self.builder.emit(relax.call_tir(name, arguments, relax.TensorType(shape, "float32")))

    def renewed(self, call: Any) -> Any:
        """The same call on new arguments; a kernel it names comes along."""
        arguments = [self.read(argument) for argument in call.args]
        if operator(call) == "relax.call_tir":
            kernel = call.args[0]
            arguments[0] = self.builder.add_func(self._module[kernel], kernel.name_hint)
        return relax.Call(call.op, arguments, call.attrs, call.ty_args)


def rewrite(module: tvm.IRModule, make: Callable[[relax.BlockBuilder, tvm.IRModule], Walk]) -> tvm.IRModule:
    """A module whose main function is what the walk made of the given one."""
    main = module["main"]
    builder = relax.BlockBuilder()
    walk = make(builder, module)
    with builder.function("main", params=list(main.params), attrs=dict(main.attrs)):
        with builder.dataflow():
            for binding in bindings(module):
                walk.bind(binding.var, binding.value)
            answers = builder.emit_output(walk.read(main.body.body))
        builder.emit_func_output(answers)
    return relax.transform.DeadCodeElimination()(builder.get())


def bindings(module: tvm.IRModule) -> list[Any]:
    """Bindings of the main function, in order."""
    return [binding for block in module["main"].body.blocks for binding in block.bindings]


def rounds(module: tvm.IRModule) -> bool:
    """Does it round values to a grid?"""
    return any(operator(one.value) in ("relax.round", "relax.quantize") for one in bindings(module))


def operator(value: Any) -> str:
    """Name of the operator a call applies, such as "relax.nn.conv2d"; empty for anything else."""
    return str(getattr(value.op, "name", "")) if isinstance(value, relax.Call) else ""


def array_of(value: Any) -> Array | None:
    """The array of a constant, or None."""
    return value.value.numpy() if isinstance(value, tvm.ir.GenericConst) else None


def shape_of(value: Any) -> tuple[int, ...]:
    """Static shape of an expression."""
    return tuple(int(size) for size in value.ty.shape)


def ints(values: Any) -> tuple[int, ...]:
    """A TVM array of integers as Python's."""
    return tuple(int(value) for value in values)
