"""Steps whose ratios are short binary fractions, which integer arithmetic multiplies by without an error of its own.

Between two grids an integer runtime multiplies by the ratio of their steps, in a fixed-point number of a few bits, and
ONNX Runtime by that ratio in float32. Where they differ, so do values near the middle between two steps, and the layers
behind carry that on. So the ratios are rounded here, and steps chosen to have them: those of weights for contractions,
those of values where they are added, joined or averaged. No step moves by more than a few parts in 100,000.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import frexp, prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from compressor.graph import argument, name_of, shape_of
from compressor.quantization.grids import Grid, Quantization
from compressor.quantization.points import PRODUCTS, tail

RATIO_BITS = 16
"""One less than the accelerator's multipliers have, as the sum of two values takes both ratios to one shift."""
_FURTHEST = 2.0**-10
_SUMS = frozenset(("add", "sub", "cat", "concat", "stack"))
_AVERAGES = {"mean"} | {f"{kind}{dims}d" for kind in ("avg_pool", "adaptive_avg_pool") for dims in (1, 2, 3)}


def rounded(network: fx.GraphModule, how: Quantization) -> Quantization:
    """The same grids, their steps moved so that ratios between them have `RATIO_BITS` bits.

    A ratio stays as it is where others that are rounded already decide it, as where a value is added to a sum of itself
    and another, and where one operand's steps are so much finer than another's that rounding would move them far.

    Args:
        network: the folded trace that the grids belong to, computed.
    """
    values = _Values(how.values)
    for node in network.graph.nodes:
        if node.op != "call_function" or (made := values.made_by(node)) is None:
            continue
        read = [name for name in map(values.origin, _read(node)) if name is not None]
        if name_of(node) in PRODUCTS and node.name not in how.scales and len(read) == 2:
            values.settle_product(made, read)
        elif name_of(node) in _SUMS | _AVERAGES:
            values.settle_sum(made, read, _count(node))
    scales = dict(how.scales)
    for node in network.graph.nodes:
        if node.name in scales and (made := values.made_by(node)) and (source := values.origin(node.args[0])):
            ratio = values.step[source] / values.step[made]
            found = _to_bits(scales[node.name].double().numpy() * ratio) / ratio
            scales[node.name] = torch.from_numpy(found).float()
    return replace(how, values=values.grids(), scales=scales)


class _Values:
    """Steps of grids, and which of them have ratios that are not to change."""

    def __init__(self, grids: Mapping[str, Grid]) -> None:
        self._grids = grids
        self.step = {name: grid.scale for name, grid in grids.items()}
        self._family = {name: {name} for name in grids}
        self._fixed = set[str]()

    def grids(self) -> dict[str, Grid]:
        as_floats = {name: float(torch.tensor(step, dtype=torch.float32)) for name, step in self.step.items()}
        return {name: replace(grid, scale=as_floats[name]) for name, grid in self._grids.items()}

    def made_by(self, node: fx.Node) -> str | None:
        """The value that an operator's answer is rounded to, if it is."""
        name = tail(node).name
        return name if name in self.step else None

    def origin(self, node: object) -> str | None:
        """The value whose grid a node is on; None where it has none."""
        while isinstance(node, fx.Node) and node.name not in self.step:
            node = next(iter(node.all_input_nodes), None)
        return node.name if isinstance(node, fx.Node) else None

    def settle_sum(self, made: str, read: Iterable[str], count: int) -> None:
        """Round what each operand's steps are multiplied by, all as multiples of the same power of two."""
        read = list(dict.fromkeys(read))
        largest = max((self.step[name] for name in read), default=0.0) / self.step[made] / count
        unit = 2.0 ** (frexp(largest)[1] - RATIO_BITS)
        for name in read:
            ratio = self.step[name] / self.step[made] / count
            self._join(name, made, round(ratio / unit) * unit / ratio)

    def settle_product(self, made: str, read: list[str]) -> None:
        """Round what the products' sums are multiplied by; what the steps of all three are stays so."""
        ratio = prod(self.step[name] for name in read) / self.step[made]
        if not self._family[made] & (self._fixed | self._family[read[0]] | self._family[read[1]]):
            self._move(made, ratio / float(_to_bits(np.array(ratio))))
        for name in (made, *read):
            self._fixed |= self._family[name]

    def _join(self, one: str, other: str, factor: float) -> None:
        """Make the ratio of two values' steps `factor` times what it is, and keep it."""
        if self._family[one] is self._family[other] or not abs(factor - 1) < _FURTHEST:
            return
        if not self._family[other] & self._fixed:
            self._move(other, 1 / factor)
        elif not self._family[one] & self._fixed:
            self._move(one, factor)
        else:
            return
        family = self._family[one] | self._family[other]
        self._fixed |= family if family & self._fixed else set()
        for name in family:
            self._family[name] = family

    def _move(self, name: str, factor: float) -> None:
        for member in self._family[name]:
            self.step[member] *= factor


def _read(node: fx.Node) -> list[object]:
    first = node.args[0]
    joined = name_of(node) in ("cat", "concat", "stack")
    return list(first) if joined and isinstance(first, list | tuple) else list(node.args[:2])


def _count(node: fx.Node) -> int:
    """Of how many values an average is."""
    if name_of(node).startswith("avg_pool"):
        size = argument(node, "kernel_size")
        dims = int(name_of(node)[-2])
        return prod(size) if len(size) == dims else int(size[0]) ** dims
    if name_of(node) in _AVERAGES and (whole := prod(shape_of(node))):
        return max(1, prod(shape_of(node.all_input_nodes[0])) // whole)
    return 1


def _to_bits(ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest numbers of so many bits."""
    fraction, exponent = np.frexp(ratio)
    found: NDArray[np.float64] = np.ldexp(np.rint(np.ldexp(fraction, RATIO_BITS)), exponent - RATIO_BITS)
    return found
