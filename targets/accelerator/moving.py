"""Values that are only moved stay on their grid: a host moves them as integers, and the accelerator reads those."""

from typing import Any

import tvm
from tvm import relax

from targets.passes.walk import Walk, array_of, operator, rewrite

MOVES = frozenset(
    f"relax.{name}"
    for name in ("split", "strided_slice", "concat", "permute_dims", "reshape", "squeeze", "expand_dims")
)


def moved_as_integers(module: tvm.IRModule) -> tvm.IRModule:
    """What moves dequantized values of one grid moves the integers instead, and is dequantized after that."""
    return rewrite(module, _Moving)


class _Moving(Walk):
    """Attributes:
    dequantized: the call that made each such variable of the new function.
    """

    def __init__(self, builder: relax.BlockBuilder, module: tvm.IRModule) -> None:
        super().__init__(builder, module)
        self.dequantized: dict[Any, Any] = {}

    def call(self, var: Any, call: Any) -> Any:
        new = self.renewed(call)
        moves = _moved(new)
        sources = [self.dequantized[part] for part in moves if part in self.dequantized]
        if moves and len(sources) == len(moves) and len({_grid(source) for source in sources}) == 1:
            integers = [source.args[0] for source in sources]
            given = relax.Tuple(integers) if isinstance(new.args[0], relax.Tuple) else integers[0]
            moved = self.builder.emit(relax.Call(new.op, [given, *new.args[1:]], new.attrs, new.ty_args))
            if isinstance(moved.ty, relax.TupleType):
                parts = [self.builder.emit(moved[k]) for k in range(len(moved.ty.fields))]
                return relax.Tuple([self._dequantize(part, sources[0]) for part in parts])
            return self._dequantize(moved, sources[0])
        made = self.builder.emit(new)
        if operator(new) == "relax.dequantize" and isinstance(new.args[0], relax.Var) and _grid(new) is not None:
            self.dequantized[made] = new
        return made

    def _dequantize(self, integers: Any, like: Any) -> Any:
        axis = min(1, len(integers.ty.shape) - 1)
        call = relax.op.dequantize(integers, like.args[1], like.args[2], axis, "float32")
        made = self.builder.emit(call)
        self.dequantized[made] = call
        return made


def _moved(call: Any) -> list[Any]:
    """The tensors that a call moves."""
    if operator(call) not in MOVES:
        return []
    return list(call.args[0].fields) if isinstance(call.args[0], relax.Tuple) else [call.args[0]]


def _grid(dequantize: Any) -> tuple[float, int] | None:
    """Scale and zero, where there is one of each."""
    scale, zero = (array_of(part) for part in dequantize.args[1:3])
    if scale is None or zero is None or scale.size != 1:
        return None
    return float(scale.item()), int(zero.item())
