"""How far a quantized network's answers move by rounding alone: what two right ways to compute them may differ by.

Sums in another order differ in their last bits. Where one lies within that of the middle between two steps of a grid,
it is rounded to the other; the layers behind it carry that on, and in a deep network so many values end on a
neighbouring step that the answers differ by about as much as quantizing changed them. How far differs from network to
network, so it is measured: the same graph, each value nudged by such a last bit before it is rounded. Values that
float32 holds exactly, as exact grids make them (`quantization/grids.py`), are not nudged: there is one right answer.
"""

from collections.abc import Sequence
from math import frexp

import numpy as np
import onnx
from onnx import helper, numpy_helper

from compressor.export import run, session
from targets.base import Array

NUDGE = 1e-4
"""Of a step: more than float32 leaves open of a sum of a thousand products."""
_TIMES, _FACTOR = 3, 2.0
_EXACT = frozenset((
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Relu", "Clip", "MaxPool", "GlobalMaxPool", "Resize",
    "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Gather", "Pad", "Expand",
    "Tile", "DepthToSpace", "SpaceToDepth", "Identity",
))  # fmt: skip


def leeway(model: onnx.ModelProto, inputs: Sequence[tuple[Array, ...]]) -> dict[str, float]:
    """By answer, in its own unit: twice the largest distance that nudges moved a value of it; 0 without grids.

    Args:
        model: QDQ ONNX.
        inputs: of the graph's shapes; each is answered four times.

    Raises:
        CompressError: ONNX Runtime cannot load the graph.
    """
    names = [one.name for one in model.graph.output]
    plain, found = session(model, optimised=False), dict.fromkeys(names, 0.0)
    for seed in range(_TIMES):
        nudged = _nudged(model, seed)
        if nudged is None:
            break
        other = session(nudged, optimised=False)
        for given in inputs:
            wanted, have = run(plain, given), run(other, given)
            for name in names:
                if np.issubdtype(wanted[name].dtype, np.floating) and wanted[name].size:
                    gap = np.abs(have[name].astype(np.float64) - wanted[name])
                    moved = float(gap.max(initial=0.0, where=np.isfinite(gap)))
                    found[name] = max(found[name], _FACTOR * moved)
    return found


def _nudged(model: onnx.ModelProto, seed: int) -> onnx.ModelProto | None:
    """The graph with uniform noise before every rounding of what is not exact; None where nothing is."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    steps = {one.name: float(numpy_helper.to_array(one).max()) for one in found.graph.initializer if not one.dims}
    constants, given = {one.name for one in found.graph.initializer}, {one.name for one in found.graph.input}
    nodes, exact = list[onnx.NodeProto](), set(constants)
    for number, node in enumerate(found.graph.node):
        if node.op_type == "DequantizeLinear":
            known = node.input[0] in constants or _is_binary(steps.get(node.input[1]))
        else:
            known = node.op_type in _EXACT and exact.issuperset(filter(None, node.input))
        exact.update(node.output if known else ())
        rounds = node.op_type == "QuantizeLinear" and node.input[1] in steps
        if rounds and not (_is_binary(steps[node.input[1]]) and node.input[0] in exact | given):
            value, reach = node.input[0], NUDGE * steps[node.input[1]]
            noise, moved = f"{node.output[0]}.noise", f"{node.output[0]}.nudged"
            drawn = float(1 + 10_000 * seed + number)
            nodes += [
                helper.make_node("RandomUniformLike", [value], [noise], low=-reach, high=reach, seed=drawn),
                helper.make_node("Add", [value, noise], [moved]),
            ]
            node.input[0] = moved
        nodes.append(node)
    if len(nodes) == len(found.graph.node):
        return None
    del found.graph.node[:]
    found.graph.node.extend(nodes)
    return found


def _is_binary(step: float | None) -> bool:
    """Is it a power of two?"""
    return step is not None and frexp(step)[0] == 0.5
