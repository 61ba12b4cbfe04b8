"""Replace calls of elementary functions, which LLVM makes one lane at a time, by arithmetic it makes vectors of."""

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from targets.kernels.elementary import ELEMENTARY


def vector_math(module: tvm.IRModule) -> tvm.IRModule:
    """No float32 kernel calls exp, sigmoid, tanh or erf."""
    module = module.clone()
    for name, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc):
            module.update_func(name, function.with_body(tvm_ffi.structural_map(function.body, (tvm.ir.Call, _replace))))
    return module


def _replace(call: Any) -> Any:
    make = ELEMENTARY.get(getattr(call.op, "name", ""))
    return call if make is None or call.ty.dtype != "float32" else make(call.args[0])
