"""Bias correction: what rounding moves the mean of a layer's output by is taken back.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, measured on
calibration batches instead of computed from batch norm, one layer after the other, so that a layer is corrected for
what those before it, themselves corrected, still leave.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from compressor.graph import name_of
from compressor.quantization.calibrate import Trace
from compressor.quantization.grids import Quantization
from compressor.quantization.points import WEIGHTED
from compressor.quantization.simulate import quantized


def offsets(trace: Trace, how: Quantization, batches: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """By contraction: what to add to each channel of its output, the mean over batches."""
    sums: dict[str, Tensor] = {}
    with torch.no_grad():
        for inputs in batches:
            network = trace(inputs)
            wanted = _Means(network, how.scales)
            wanted.run(*inputs)
            given = _Correcting(quantized(network, how), wanted.found)
            given.run(*inputs)
            for name, gap in given.gaps.items():
                sums[name] = sums[name] + gap if name in sums else gap
    return {name: total / len(batches) for name, total in sums.items()}


class _Means(fx.Interpreter):
    """Means of contractions' outputs by channel."""

    def __init__(self, network: fx.GraphModule, names: Iterable[str]) -> None:
        super().__init__(network)
        self.names = set(names)
        self.found: dict[str, Tensor] = {}

    def run_node(self, node: fx.Node) -> object:
        result = super().run_node(node)
        if node.name in self.names and name_of(node) in WEIGHTED:
            self.found[node.name] = _mean(node, result)
        return result


class _Correcting(fx.Interpreter):
    """Adds to each contraction's output what its means lack, and tells how much that was."""

    def __init__(self, network: fx.GraphModule, wanted: dict[str, Tensor]) -> None:
        super().__init__(network)
        self.wanted = wanted
        self.gaps: dict[str, Tensor] = {}

    def run_node(self, node: fx.Node) -> object:
        result = super().run_node(node)
        if node.name in self.wanted:
            gap = self.gaps[node.name] = self.wanted[node.name] - _mean(node, result)
            result = result + (gap if name_of(node) == "linear" else gap.reshape(-1, *[1] * (result.dim() - 2)))
        return result


def _mean(node: fx.Node, result: Tensor) -> Tensor:
    channel = result.dim() - 1 if name_of(node) == "linear" else 1
    return result.mean([dim for dim in range(result.dim()) if dim != channel])
