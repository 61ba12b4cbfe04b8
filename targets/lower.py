"""ONNX to Relax: import a checked program, refuse by name what is not supported, and run it plainly as a reference."""

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import helper
from tvm import relax
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter

from targets.base import Program, Tensor
from targets.errors import TargetError
from targets.kernels.resize import resize, taps
from targets.runner import VirtualMachineRunner

# The importer knows more operators than these; an operator is listed once a test compares it with ONNX Runtime.
SUPPORTED = frozenset((
    "Abs", "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Constant", "Conv", "ConvTranspose",
    "DepthToSpace", "DequantizeLinear", "Div", "Dropout", "Elu", "Erf", "Exp", "Expand", "Flatten", "Gather", "Gelu",
    "Gemm", "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization",
    "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "MatMul", "Max", "MaxPool", "Min", "Mish", "Mul", "Neg",
    "PRelu", "Pad", "Pow", "QuantizeLinear", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum",
    "Relu", "Reshape", "Resize", "Selu", "Sigmoid", "Slice", "Softmax", "Softplus", "SpaceToDepth", "Split", "Sqrt",
    "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
))


def lower(program: Program, *, integers: bool = False) -> tvm.IRModule:
    """The program as a Relax module: weights bound as constants, static shapes, outputs a tuple in task order.

    Args:
        integers: keep what is quantized as integers, for a target that computes with them.

    Raises:
        TargetError: unsupported operators (all of them named), a shape that is not static, outputs that are not
            the tasks, an answer that no operator computes, or a node the importer cannot convert.
    """
    graph = program.model.graph
    _check(program)
    opset = next(o.version for o in program.model.opset_import if o.domain in ("", "ai.onnx"))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            module = _Importer(integers=integers).from_onnx(graph, opset)
    except (ValueError, TypeError, AssertionError, RuntimeError, AttributeError, LookupError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise TargetError(f"Program '{program.name}' cannot be imported: {reason}") from error
    return _with_tuple_output(module, program)


def reference(program: Program) -> VirtualMachineRunner:
    """Run the program through TVM's plain legalisation: slow, and a check on all else this package does to it."""
    executable = tvm.compile(lower(program), tvm.target.Target({"kind": "llvm"}))
    return VirtualMachineRunner(executable.jit(), tvm.cpu(), signature(program), program.tasks, threads=1)


def signature(program: Program) -> tuple[Tensor, ...]:
    """Inputs of a program, in order, weights left out."""
    weights = {tensor.name for tensor in program.model.graph.initializer}
    return tuple(_tensor(value) for value in program.model.graph.input if value.name not in weights)


def answers(program: Program) -> tuple[Tensor, ...]:
    """Outputs of a program, in order."""
    return tuple(_tensor(value) for value in program.model.graph.output)


def _check(program: Program) -> None:
    graph = program.model.graph
    unknown = sorted({node.op_type if not node.domain else f"{node.domain}.{node.op_type}" for node in graph.node
                      if node.op_type not in SUPPORTED or node.domain not in ("", "ai.onnx")})
    if unknown:
        raise TargetError(
            f"Program '{program.name}' uses {'an operator' if len(unknown) == 1 else 'operators'} that no target "
            f"compiles: {', '.join(unknown)}. Supported: {', '.join(sorted(SUPPORTED))}."
        )
    found = tuple(value.name for value in graph.output)
    if found != program.tasks:
        raise TargetError(f"Program '{program.name}' answers {found}, but its tasks are {program.tasks}.")
    for tensor in (*signature(program), *answers(program)):
        if not all(size > 0 for size in tensor.shape):
            raise TargetError(
                f"Tensor '{tensor.name}' of program '{program.name}' has no static shape: {tensor.shape}. "
                "Export with example inputs of the size that will run."
            )


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
    return Tensor(name=value.name, shape=shape, dtype=str(helper.tensor_dtype_to_np_dtype(kind.elem_type)))


def _with_tuple_output(module: tvm.IRModule, program: Program) -> tvm.IRModule:
    """Make even a single answer a tuple of one, and refuse answers that nothing computes (they would alias inputs)."""
    main = module["main"]
    fields, computed = _answers_of(main)
    for task, value in zip(program.tasks, fields, strict=True):
        if not isinstance(value, relax.Var) or value not in computed:
            raise TargetError(f"Task '{task}' of program '{program.name}' answers with an input or a constant.")
    for spec, value in zip(answers(program), fields, strict=True):
        if (found := tuple(int(size) for size in value.ty.shape)) != spec.shape:
            raise TargetError(
                f"Task '{spec.name}' of program '{program.name}' should have shape {spec.shape}, but TVM's importer "
                f"makes it {found}: an operator before it is not imported as ONNX means it."
            )
    if not isinstance(main.ret_ty, relax.TupleType):
        result = relax.Var("answers", relax.TupleType([main.ret_ty]))
        block = main.body.blocks[-1]
        bindings = [*block.bindings, relax.VarBinding(result, relax.Tuple([fields[0]]))]
        body = relax.SeqExpr([*main.body.blocks[:-1], relax.DataflowBlock(bindings)], result)
        module["main"] = relax.Function(main.params, body, relax.TupleType([main.ret_ty]), attrs=main.attrs)
    return module


def _answers_of(main: relax.Function) -> tuple[list[Any], set[Any]]:
    bound = {binding.var: binding.value for block in main.body.blocks for binding in block.bindings}
    value = main.body.body
    while isinstance(bound.get(value), relax.Var):
        value = bound[value]
    whole = bound.get(value)
    return list(whole.fields) if isinstance(whole, relax.Tuple) else [value], set(bound)


class _Importer(ONNXGraphImporter):  # type: ignore[misc]
    """TVM's importer with a few operators said more directly or, where it is wrong, rightly."""

    def __init__(self, *, integers: bool) -> None:
        super().__init__(None, "float32")
        self.direct = {name: how for name, how in _DIRECT.items() if not (integers and how is _dequantize)}

    def _convert_operator(self, op_name: str, inputs: Any, attrs: dict[str, Any], opset: int) -> Any:
        if op_name in self.direct:
            direct = self.direct[op_name](self.bb, [self._constant(value) for value in inputs], attrs)
            if direct is not None:
                return self.bb.normalize(direct)
        return super()._convert_operator(op_name, inputs, attrs, opset)

    def _constant(self, value: Any) -> Any:
        return value.value.numpy() if isinstance(value, tvm.ir.GenericConst) else value


def _clip(builder: relax.BlockBuilder, inputs: Sequence[Any], attrs: dict[str, Any]) -> Any:
    """Clip with bounds known now; the importer's own emits a kernel for every bound."""
    low, high = [*inputs[1:], None, None][:2]
    low, high = attrs.get("min", low), attrs.get("max", high)
    if not all(bound is None or isinstance(bound, float | np.ndarray) for bound in (low, high)):
        return None
    x = inputs[0]
    if low is not None and not np.isnan(low):
        x = relax.op.maximum(x, relax.const(float(low), x.ty.dtype.dtype))
    if high is not None and not np.isnan(high):
        x = relax.op.minimum(x, relax.const(float(high), "float32"))
    return x


def _pad(builder: relax.BlockBuilder, inputs: Sequence[Any], attrs: dict[str, Any]) -> Any:
    """Padding with a constant, by widths known now, as an operator instead of an opaque kernel."""
    if attrs.get("mode", b"constant") != b"constant" or len(inputs) < 2 or not isinstance(inputs[1], np.ndarray):
        return None
    x, widths, value, axes = [*inputs, None, None][:4]
    if not all(part is None or isinstance(part, np.ndarray) for part in (value, axes)) or (widths < 0).any():
        return None
    rank = len(x.ty.shape)
    before_after = np.zeros((rank, 2), np.int64)
    before_after[range(rank) if axes is None else axes] = widths.reshape(2, -1).T
    fill = 0.0 if value is None else float(value.item())
    return relax.op.nn.pad(x, [int(width) for width in before_after.ravel()], "constant", fill)


def _resize(builder: relax.BlockBuilder, inputs: Sequence[Any], attrs: dict[str, Any]) -> Any:
    """Resizing by scales that make no whole size: ONNX keeps to the scale, the importer's to the ratio of sizes."""
    x, _, scales, _ = [*inputs, None, None, None][:4]
    if not isinstance(scales, np.ndarray) or scales.size != 4 or len(x.ty.shape) != 4:
        return None
    sizes = [int(size) for size in x.ty.shape]
    exact = [float(scale) * size for scale, size in zip(scales, sizes, strict=True)]
    if all(abs(size - round(size)) < 1e-4 for size in exact) or exact[:2] != sizes[:2]:
        return None
    method = attrs.get("mode", b"nearest").decode()
    how = (
        "nearest_neighbor" if method == "nearest" else method,
        attrs.get("coordinate_transformation_mode", b"half_pixel").decode(),
        attrs.get("nearest_mode", b"round_prefer_floor").decode(), float(attrs.get("cubic_coeff_a", -0.75)),
    )
    tables = []
    for axis in (2, 3):
        table = taps(sizes[axis], int(exact[axis]), *how, scale=float(scales[axis]))
        if table is None:
            raise TargetError(f"Resize by {scales.tolist()} with {how[:3]} is not compiled.")
        tables += [relax.const(table.index), relax.const(table.weight)]
    return builder.emit_te(resize, x, *tables)


def _dequantize(builder: relax.BlockBuilder, inputs: Sequence[Any], attrs: dict[str, Any]) -> Any:
    """Integers on a grid as the real numbers they stand for: constants at once, others without ever being integers.

    A target without int8 kernels computes in float32 in any case, and a value that stays there can be fused with what
    makes it and what reads it.
    """
    x, scale, zero = [*inputs, None][:3]
    if not isinstance(scale, np.ndarray) or not isinstance(zero, np.ndarray):
        return None
    if isinstance(x, np.ndarray):
        along = [-1 if d == attrs.get("axis", 1) % max(1, x.ndim) else 1 for d in range(x.ndim)]
        scale, zero = (part.reshape(along) if part.size > 1 else part for part in (scale, zero))
        return relax.const((x.astype(np.float32) - zero.astype(np.float32)) * scale)
    made = builder.lookup_binding(x) if isinstance(x, relax.Var) else x
    if made is None or getattr(getattr(made, "op", None), "name", "") != "relax.quantize":
        return None
    given = [value.value.numpy() for value in made.args[1:] if isinstance(value, tvm.ir.GenericConst)]
    if len(given) < 2 or given[0].size > 1 or not np.array_equal(given[0], scale) or not np.array_equal(given[1], zero):
        return None
    bounds, step = np.iinfo(given[1].dtype), relax.const(float(scale.item()), "float32")
    low, high = (relax.const(float(bound - int(zero.item())), "float32") for bound in (bounds.min, bounds.max))
    steps = builder.emit(relax.op.round(builder.emit(relax.op.divide(made.args[0], step))))
    inside = builder.emit(relax.op.minimum(builder.emit(relax.op.maximum(steps, low)), high))
    return relax.op.multiply(inside, step)


_DIRECT: dict[str, Callable[[relax.BlockBuilder, Sequence[Any], dict[str, Any]], Any]] = {
    "Clip": _clip, "DequantizeLinear": _dequantize, "Pad": _pad, "Resize": _resize,
}
