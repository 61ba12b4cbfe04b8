"""Grids from calibration batches, each seen once."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, fx

from compressor.errors import CompressError
from compressor.graph import argument, tensor_of
from compressor.model import MultiTaskModel
from compressor.quantization.grids import SCALE_BITS, Grid, Quantization, short
from compressor.quantization.points import Points, points
from compressor.quantization.ranges import Histogram, Rule, weight_scales
from compressor.quantization.ratios import rounded
from compressor.quantization.simulate import channel_dim, computed, folded, weight_of
from compressor.trace import as_brought

LARGEST_BIAS = 2.0 ** (24 - SCALE_BITS)
"""In steps of its layer's sums: times a short scale, float32 holds it."""

Trace = Callable[[tuple[Tensor, ...]], fx.GraphModule]
"""The folded trace for inputs of these shapes."""


def seen(trace: Trace, names: Iterable[str], batches: Iterable[tuple[Tensor, ...]]) -> dict[str, Histogram]:
    """What values, by node, the network computes over all batches."""
    found = {name: Histogram() for name in names}

    class Watching(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            result = super().run_node(node)
            if node.name in found and isinstance(result, Tensor):
                found[node.name].add(result)
            return result

    with torch.no_grad():
        for inputs in batches:
            Watching(trace(inputs)).run(*inputs)
    return found


def grids(
    network: fx.GraphModule, where: Points, histograms: Mapping[str, Histogram], rules: tuple[Rule, Rule],
    percentile: float, *, exact: bool,
) -> Quantization:
    """The grids of those values, and of the weights; a value that is infinite in places, as masks are, gets none.

    Args:
        network: a folded trace, computed.
        rules: for values, for weights.
        exact: as `grids.py` says; else only the ratios between them are short (`ratios.py`).

    Raises:
        CompressError: a contraction reads such a value.
    """
    finite = [name for name in where.values if histograms[name].finite]
    values: dict[str, Grid] = {
        name: histograms[name].grid(rules[0], percentile, centred=name in where.centred, exact=exact)
        for name in finite
    }
    scales = {}
    for node in network.graph.nodes:
        if node.name in where.weighted:
            weight, least = tensor_of(network, str(weight_of(node).target)), _least(network, node, values)
            scale = weight_scales(weight, channel_dim(node), rules[1], exact=exact)
            scales[node.name] = torch.maximum(scale, short(least) if exact else least)
    found = Quantization(values, scales)
    return found if exact else rounded(network, found)


def roughly(model: MultiTaskModel) -> MultiTaskModel:
    """A copy on grids that its example inputs alone say, for what does not hang on them, such as cycles.

    Raises:
        CompressError: a contraction reads a value that is infinite in places.
    """
    network = folded(as_brought(model, model.inputs))
    where = points(network, (), range(len(model.tasks)))
    histograms = seen(lambda _: network, where.values, [model.inputs])
    found = model.clone()
    found.quantization = grids(computed(network), where, histograms, ("minmax", "minmax"), 100, exact=True)
    return found


def _least(network: fx.GraphModule, node: fx.Node, values: Mapping[str, Grid]) -> Tensor:
    """The scale at which a layer's bias is `LARGEST_BIAS`."""
    bias, source = argument(node, "bias"), node.args[0]
    if not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return torch.zeros(1)
    while isinstance(source, fx.Node) and source.name not in values:
        source = source.args[0] if source.args else None
    if not isinstance(source, fx.Node):
        raise CompressError(f"What '{node.name}' reads is infinite on the calibrate split, where no grid reaches.")
    least = tensor_of(network, str(bias.target)).detach().abs() / (LARGEST_BIAS * values[source.name].scale)
    return least if channel_dim(node) is not None else least.max().reshape(1)
