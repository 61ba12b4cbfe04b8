"""The verification ladder: every form a pathway takes must answer as the network it came from, rung by rung."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from compressor.errors import CompressError
from compressor.export import run, session
from compressor.model import MultiTaskModel
from compressor.pathway import Pathway
from targets.base import Array, Program

RUNGS = ("pathway", "onnx", "onnxsim", "relax", "artifact")
"""Each is compared with eager PyTorch; the first that differs is named, with the first layer that differs in it."""

TOLERANCE: Mapping[str, float] = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
"""Largest accepted difference by dtype, as a fraction of the largest magnitude eager answers; other dtypes: equal."""

Answer = Callable[..., Mapping[str, Array]]


@dataclass(frozen=True, slots=True)
class Compared:
    """One task on one rung: the largest difference to eager over all inputs, and what was accepted."""

    rung: str
    task: str
    max_abs_error: float
    tolerance: float


def climb(
    model: MultiTaskModel,
    pathway: Pathway,
    programs: tuple[Program, Program],
    inputs: Sequence[tuple[Tensor, ...]],
    make_relax: Callable[[Program], Answer],
    make_artifact: Callable[[Program], Answer],
    built: Answer,
) -> list[Compared]:
    """Compare every rung with eager on every input.

    Args:
        programs: the pathway's ONNX as exported, and simplified.
        make_relax, make_artifact: build a runner for any program; only used for parts of it, to find a wrong layer.
        built: the loaded artifact.

    Raises:
        CompressError: naming the first rung that differs, the task, the error, and the first layer that differs.
    """
    with torch.no_grad():
        eager = [{t: a.numpy() for t, a in model.answers(*x).items() if t in pathway.tasks} for x in inputs]
    exported, simplified = programs
    relax = make_relax(simplified)
    answer: dict[str, Answer] = {
        "pathway": lambda *x: _network(pathway, x),
        "onnx": _onnx(exported.model),
        "onnxsim": _onnx(simplified.model),
        "relax": relax,
        "artifact": built,
    }
    found = []
    arrays = [tuple(t.numpy() for t in x) for x in inputs]
    for rung in RUNGS:
        for task in pathway.tasks:
            compared = _compare(rung, task, [e[task] for e in eager], [answer[rung](*x)[task] for x in arrays])
            if not compared.max_abs_error <= compared.tolerance:
                where = _first_difference(rung, exported, simplified, arrays[0], make_relax, make_artifact)
                raise CompressError(
                    f"Task '{task}' of pathway '{pathway.name}': rung '{rung}' differs from eager PyTorch by "
                    f"{compared.max_abs_error:.2e} (tolerance {compared.tolerance:.2e}){where}. Nothing was deployed."
                )
            found.append(compared)
    return found


def _compare(rung: str, task: str, wanted: Sequence[Array], given: Sequence[Array]) -> Compared:
    error, scale = 0.0, 0.0
    for want, have in zip(wanted, given, strict=True):
        error = max(error, difference(want, have))
        scale = max(scale, float(np.abs(want.astype(np.float64)).max(initial=0.0)))
    return Compared(rung, task, error, TOLERANCE.get(str(wanted[0].dtype), 0.0) * max(scale, 1e-6))


def difference(want: Array, have: Array) -> float:
    """Largest absolute difference; infinite for another shape or dtype, or NaN or infinity in other places."""
    if want.shape != have.shape or want.dtype != have.dtype:
        return float("inf")
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(have)):
        return float("inf")
    if not np.array_equal(want[~finite], have[~finite], equal_nan=want.dtype.kind == "f"):
        return float("inf")
    gap = np.abs(want[finite].astype(np.float64) - have[finite].astype(np.float64))
    return float(gap.max(initial=0.0))


def _network(pathway: Pathway, inputs: tuple[Array, ...]) -> dict[str, Array]:
    with torch.no_grad():
        outputs = pathway.network(*(torch.from_numpy(np.array(x)) for x in inputs))
    return {task: out.numpy() for task, out in zip(pathway.tasks, outputs, strict=True)}


def _onnx(model: onnx.ModelProto) -> Answer:
    loaded: onnxruntime.InferenceSession = session(model)
    return lambda *x: run(loaded, x)


def _first_difference(
    rung: str,
    exported: Program,
    simplified: Program,
    inputs: tuple[Array, ...],
    make_relax: Callable[[Program], Answer],
    make_artifact: Callable[[Program], Answer],
) -> str:
    """ ", first at layer 'x' (Conv)" by bisection over the program's values, or "" where it cannot be said."""
    if rung in ("pathway", "onnx"):
        return ""
    suspect = {"onnxsim": _onnx_of, "relax": make_relax, "artifact": make_artifact}[rung]
    trusted = exported if rung == "onnxsim" else simplified
    known = {out for node in trusted.model.graph.node for out in node.output}
    values = [value for value in _values(simplified.model) if value[0] in known]

    def differs(value: str) -> bool:
        want, have = _part(trusted, value, inputs, _onnx_of), _part(simplified, value, inputs, suspect)
        return not difference(want, have) <= TOLERANCE["float32"] * max(float(np.abs(want).max(initial=0.0)), 1e-6)

    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if differs(values[middle][0]) else (middle + 1, high)
    return f", first at layer '{values[low][0]}' ({values[low][1]})" if values else ""


def _onnx_of(program: Program) -> Answer:
    return _onnx(program.model)


def _values(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """(value, operator) of every floating-point value a node computes, in graph order."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    floats = {
        v.name
        for v in (*inferred.value_info, *inferred.output)
        if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    return [(out, node.op_type) for node in model.graph.node for out in node.output if out in floats]


def _part(program: Program, value: str, inputs: tuple[Array, ...], make: Callable[[Program], Answer]) -> Array:
    """What a runner of the part of a program up to one value answers there."""
    extractor = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(program.model))
    part = extractor.extract_model([i.name for i in program.model.graph.input], [value])
    return make(Program("part", part, (value,)))(*inputs)[value]
