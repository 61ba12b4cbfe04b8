"""Correct TVM's fusion patterns: what changes a tensor's shape is not element-wise, even where no index shifts.

AnnotateTIROpPattern looks at indices alone, so padding at the end of an axis, or a slice from its start, passes for an
element-wise operator and would join a kernel whose tiles do not cover its result.
"""

import tvm
from tvm import tirx

_BROADCAST, _INJECTIVE = 1, 2  # relay's numbering, which FuseOps reads; element-wise is 0


def correct_patterns(module: tvm.IRModule) -> tvm.IRModule:
    """Element-wise and broadcast functions whose inputs do not broadcast to their output become injective."""
    module = module.clone()
    for name, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and int(function.attrs.get("op_pattern", _INJECTIVE)) <= _BROADCAST:
            *inputs, output = ([int(size) for size in parameter.shape] for parameter in function.params)
            if not all(_broadcasts(shape, output) for shape in inputs):
                module.update_func(name, function.with_attr("op_pattern", _INJECTIVE))
    return module


def _broadcasts(shape: list[int], output: list[int]) -> bool:
    return len(shape) <= len(output) and all(
        size in (1, out) for size, out in zip(reversed(shape), reversed(output), strict=False)
    )
