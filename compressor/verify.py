"""The verification ladder: every form a pathway takes must answer as the network it came from, rung by rung."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from compressor.errors import CompressError
from compressor.export import run, session
from compressor.leeway import leeway
from compressor.model import MultiTaskModel
from compressor.pathway import Pathway
from targets.base import Array, Program
from targets.errors import TargetError

RUNGS = ("pathway", "onnx", "onnxsim", "relax", "artifact")
"""Each is compared with eager PyTorch; the first that differs is named, with the first layer that differs in it."""

GRIDS = "on grids"
TOLERANCE: Mapping[str, float] = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2, GRIDS: 3e-2}
"""Largest accepted difference by dtype, as a fraction of the largest magnitude eager answers; other dtypes: equal.

Where a network is quantized on grids that are not exact, sums that differ in their last bit round to neighbouring steps
in places, and so on from there: ONNX Runtime's answers for the scenes example differ by up to 2 % in single pixels.
Where that makes more of a difference, so much more is accepted (`leeway.py`), up to `CHAOS`."""

CHAOS = 0.25
"""Of the largest answer: what moves further by rounding alone cannot be verified, and says little."""

Answer = Callable[..., Mapping[str, Array]]
Make = Callable[[Program], Answer]


@dataclass(frozen=True, slots=True)
class Compared:
    """One task on one rung: the largest difference over all inputs to what was trusted, and what was accepted."""

    rung: str
    task: str
    max_abs_error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.max_abs_error <= self.tolerance


def climb(
    model: MultiTaskModel,
    pathway: Pathway,
    programs: tuple[Program, Program],
    inputs: Sequence[tuple[Tensor, ...]],
    make_relax: Make,
    make_artifact: Make,
    built: Answer | None,
) -> list[Compared]:
    """Compare every rung with eager on every input.

    Args:
        programs: the pathway's ONNX as exported, and simplified.
        make_relax, make_artifact: build a runner for any program; the latter is only asked for parts, to find a layer.
        built: the loaded artifact; None where it cannot run, and the ladder ends before it.

    Raises:
        CompressError: naming the first rung that differs, the task, the error, and the first layer that differs.
    """
    with torch.no_grad():
        eager = [{t: a.numpy() for t, a in model.answers(*x).items() if t in pathway.tasks} for x in inputs]
    exported, simplified = programs
    arrays = [tuple(t.numpy() for t in x) for x in inputs]
    rounding = leeway(exported.model, arrays) if on_grids(exported.model) else None
    rungs: dict[str, Callable[[], Answer | None]] = {
        "pathway": lambda: lambda *x: _network(pathway, x),
        "onnx": lambda: onnx_answers(exported),
        "onnxsim": lambda: onnx_answers(simplified),
        "relax": lambda: make_relax(simplified),
        "artifact": lambda: built,
    }
    found = []
    for rung in RUNGS:
        answer = rungs[rung]()
        if answer is None:
            break
        given = [answer(*x) for x in arrays]
        for task in pathway.tasks:
            pairs = [(want[task], have[task]) for want, have in zip(eager, given, strict=True)]
            compared = compare(rung, task, pairs, None if rounding is None else rounding[task])
            if not compared.holds:
                worst = max(range(len(pairs)), key=lambda k: difference(*pairs[k]))
                suspect = _Suspect(pathway, exported, simplified, make_relax, make_artifact)
                where = suspect.first_layer(rung, task, arrays[worst])
                raise CompressError(
                    f"Task '{task}' of pathway '{pathway.name}': rung '{rung}' {told(compared, *pairs[worst])} eager "
                    f"PyTorch{where}. Nothing was deployed."
                )
            found.append(compared)
    return found


def on_grids(model: onnx.ModelProto) -> bool:
    """Does a graph round anything to a grid?"""
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def compare(rung: str, task: str, pairs: Sequence[tuple[Array, Array]], rounding: float | None = None) -> Compared:
    """How far what is given (second) is from what is wanted (first), over several inputs.

    Args:
        rounding: of a network that rounds values to grids, how far that alone moves the answer; else None.
    """
    error = max(difference(want, have) for want, have in pairs)
    scale = max(float(np.abs(want.astype(np.float64)).max(initial=0.0, where=np.isfinite(want))) for want, _ in pairs)
    dtype = str(pairs[0][0].dtype)
    if rounding is not None and "float" in dtype:
        scale = max(scale, 1e-6)
        return Compared(rung, task, error, min(max(TOLERANCE[GRIDS] * scale, rounding), CHAOS * scale))
    return Compared(rung, task, error, TOLERANCE.get(dtype, 0.0) * max(scale, 1e-6))


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


def told(compared: Compared, want: Array, have: Array) -> str:
    """ "differs by 1.00e-02 (tolerance 1.00e-04) from", or what else is wrong; who is right follows."""
    if want.shape != have.shape or want.dtype != have.dtype:
        return f"answers {have.dtype} {have.shape}, not {want.dtype} {want.shape} as"
    if not np.isfinite(compared.max_abs_error):
        return "answers NaN or infinity in other places than"
    return f"differs by {compared.max_abs_error:.2e} (tolerance {compared.tolerance:.2e}) from"


def onnx_answers(program: Program) -> Answer:
    """ONNX Runtime, running the graph as it is written."""
    loaded = session(program.model, optimised=False)
    return lambda *x: run(loaded, x)


def _network(pathway: Pathway, inputs: tuple[Array, ...]) -> dict[str, Array]:
    with torch.no_grad():
        outputs = pathway.network(*(torch.from_numpy(np.array(x)) for x in inputs))
    return {task: out.numpy() for task, out in zip(pathway.tasks, outputs, strict=True)}


@dataclass(frozen=True, slots=True)
class _Suspect:
    """A pathway whose forms do not agree, to be searched for the layer where that begins."""

    pathway: Pathway
    exported: Program
    simplified: Program
    make_relax: Make
    make_artifact: Make

    def first_layer(self, rung: str, task: str, inputs: tuple[Array, ...]) -> str:
        """ ", first at layer 'x' (Conv)": it differs from the rung before and what it reads does not; "" if unknown."""
        if rung == "pathway":
            return ""
        program = self.exported if rung == "onnx" else self.simplified
        trusted = {
            "onnx": lambda: _values_of_network(self.pathway, inputs),
            "onnxsim": lambda: _values_of_program(self.exported, inputs),
        }.get(rung, lambda: _values_of_program(self.simplified, inputs))()
        make = {"relax": self.make_relax, "artifact": self.make_artifact}.get(rung, onnx_answers)
        nodes = {name: node for name, node in _above(program, task).items() if name in trusted}

        @cache
        def differs(value: str) -> bool:
            try:
                have = _part(program, value, inputs, make)
            except (TargetError, CompressError):
                return False  # a part that cannot stand alone tells nothing
            rounding = 0.0 if on_grids(program.model) else None
            return not compare(rung, value, [(trusted[value], have)], rounding).holds

        order = list(nodes)
        if not order or not differs(order[-1]):
            return ""
        low, high = 0, len(order) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if differs(order[middle]) else (middle + 1, high)
        at = order[low]
        while (above := next((i for i in nodes[at].input if i in nodes and differs(i)), None)) is not None:
            at = above
        return f", first at layer '{_layer(nodes[at])}' ({nodes[at].op_type})"


def _above(program: Program, task: str) -> dict[str, onnx.NodeProto]:
    """The values a task's answer is computed from, itself included, in graph order, each with the node that does it."""
    makers = {out: node for node in program.model.graph.node for out in node.output}
    wanted, open_ = set(), [task]
    while open_:
        value = open_.pop()
        if value in makers and value not in wanted:
            wanted.add(value)
            open_ += makers[value].input
    return {value: node for value, node in makers.items() if value in wanted}


def _layer(node: onnx.NodeProto) -> str:
    """What a person calls a node: the module whose weight it reads, or else the value it makes."""
    return str(next((i.removesuffix(".weight") for i in node.input if i.endswith(".weight")), node.output[0]))


def _values_of_program(program: Program, inputs: tuple[Array, ...]) -> dict[str, Array]:
    """Every floating-point value a program computes, by ONNX Runtime."""
    model = onnx.shape_inference.infer_shapes(program.model)
    graph = model.graph
    have = {output.name for output in graph.output}
    made = {out for node in graph.node for out in node.output}
    graph.output.extend(
        value
        for value in graph.value_info
        if value.name in made - have and value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    )
    found = run(session(model, optimised=False), inputs)
    return {name: array for name, array in found.items() if array.dtype.kind == "f"}


def _values_of_network(pathway: Pathway, inputs: tuple[Array, ...]) -> dict[str, Array]:
    """Every floating-point value the traced network computes; the exporter calls its values as the graph does."""
    seen: dict[str, Array] = _network(pathway, inputs)

    class Recording(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            result = super().run_node(node)
            if isinstance(result, Tensor) and result.is_floating_point():
                seen[node.name] = result.detach().numpy()
            return result

    with torch.no_grad():
        Recording(pathway.network).run(*(torch.from_numpy(np.array(x)) for x in inputs))
    return seen


def _part(program: Program, value: str, inputs: tuple[Array, ...], make: Make) -> Array:
    """What a runner of the part of a program up to one value answers there."""
    extractor = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(program.model))
    part = extractor.extract_model([i.name for i in program.model.graph.input], [value])
    return make(Program("part", part, (value,)))(*inputs)[value]
