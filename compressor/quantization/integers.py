"""Weights and biases as the integers that they are once they lie on a grid, in a graph and in ONNX."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import Tensor, fx

from compressor.errors import CompressError
from compressor.graph import argument, tensor_of
from compressor.quantization.grids import Quantization
from compressor.quantization.simulate import channel_dim, grid_of, weight_of

_CONTRACTIONS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, slots=True)
class Steps:
    """The grid of a constant tensor: whole multiples of `steps`, one along `dim` each, or a single one.

    Attributes:
        dtype: of the integers: "int8" for weights, "int32" for biases.
    """

    steps: Tensor
    dim: int | None
    dtype: str

    def taken(self, kept: Mapping[int, tuple[int, ...]]) -> "Steps":
        """What is left when the tensor is cut to these indices of its dimensions."""
        if self.dim is None or self.dim not in kept:
            return self
        return Steps(self.steps[list(kept[self.dim])], self.dim, self.dtype)


def steps_of(network: fx.GraphModule, how: Quantization) -> dict[str, Steps]:
    """By the name of the tensor: the grids of weights, and of the biases that are added to their accumulators."""
    found = {}
    for node in network.graph.nodes:
        if node.name not in how.scales:
            continue
        scale, weight = how.scales[node.name], weight_of(node)
        found[str(weight.target)] = Steps(scale, channel_dim(node) if len(scale) > 1 else None, "int8")
        bias = argument(node, "bias")
        if isinstance(bias, fx.Node) and bias.op == "get_attr":
            size = len(tensor_of(network, str(bias.target)))
            found[str(bias.target)] = Steps((scale * grid_of(node.args[0]).scale).expand(size), 0, "int32")
    return found


def to_integers(model: onnx.ModelProto, held: Mapping[str, tuple[Tensor, Steps]]) -> None:
    """Keep, in place, each of these constants as integers behind a DequantizeLinear, however the exporter called it.

    Args:
        held: by name, what the network holds and its grid. Matrices are found transposed as well.

    Raises:
        CompressError: a weight that the graph reads does not lie on its grid.
    """
    graph = model.graph
    known = {(form.shape, form.tobytes()): (dim, steps) for form, dim, steps in _forms(held)}
    reads = {name for node in graph.node if node.op_type in (*_CONTRACTIONS, "Add") for name in node.input}
    for kept in [one for one in graph.initializer if one.name in reads]:
        values = numpy_helper.to_array(kept)
        key = values.shape, values.tobytes()
        if values.dtype != np.float32 or key not in known:
            continue
        dim, steps = known[key]
        scale = steps.steps.detach().numpy().astype(np.float32)
        wide = scale if dim is None else scale.reshape([-1 if d == dim else 1 for d in range(values.ndim)])
        whole = np.rint(values.astype(np.float64) / wide).astype(steps.dtype)
        if not np.allclose(whole * wide.astype(np.float64), values, rtol=1e-5, atol=0):
            raise CompressError(f"'{kept.name}' does not lie on its grid; please report this network.")
        name = kept.name
        graph.initializer.remove(kept)
        scale = scale.reshape(()) if dim is None else scale
        for part, array in (("integers", whole), ("scale", scale), ("zero", np.zeros(scale.shape, steps.dtype))):
            graph.initializer.append(numpy_helper.from_array(array, f"{name}.{part}"))
        inputs = [f"{name}.{part}" for part in ("integers", "scale", "zero")]
        axis = {} if dim is None else {"axis": dim}
        graph.node.insert(0, helper.make_node("DequantizeLinear", inputs, [name], **axis))


def _forms(held: Mapping[str, tuple[Tensor, Steps]]) -> Iterator[tuple[np.ndarray, int | None, Steps]]:
    for tensor, steps in held.values():
        array = tensor.detach().numpy()
        yield array, steps.dim, steps
        if array.ndim == 2:
            yield np.ascontiguousarray(array.T), None if steps.dim is None else 1 - steps.dim, steps
