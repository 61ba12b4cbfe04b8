"""Which values of a network are quantized: rules by operator, read from its trace.

A contraction reads and writes grids; those of two values that are multiplied have their zeros at 0, as integers'
products would need sums of either else. What adds, joins or averages works on grids where one of its operands has one.
What moves, picks or clips values keeps the grid of what it reads. Everything else computes in floating point, and what
it reads from a grid is converted back.
"""

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from compressor.graph import name_of


def _named(names: str) -> frozenset[str]:
    return frozenset(names.split())


WEIGHTED = _named("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear")
PRODUCTS = _named("matmul bmm mm")
ACTIVATIONS = _named("relu relu6 hardtanh clamp clamp_min")
"""What a contraction or a sum does to its answer before that is rounded, where nothing else reads the answer."""

_ARITHMETIC = _named(
    "add sub mul cat concat stack avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d mean upsample_linear1d upsample_bilinear2d upsample_trilinear3d"
)
_MOVING = _named(
    "view reshape _unsafe_view flatten unflatten permute transpose t mT numpy_T swapaxes swapdims movedim moveaxis "
    "squeeze unsqueeze slice select narrow unbind split split_with_sizes tensor_split chunk expand expand_as repeat "
    "tile repeat_interleave roll flip rot90 pixel_shuffle pixel_unshuffle channel_shuffle getitem contiguous clone "
    "dropout feature_dropout detach alias max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "amax upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad1d "
    "replication_pad2d"
)
_KEEPING = _MOVING | ACTIVATIONS


@dataclass(frozen=True, slots=True)
class Points:
    """Where a trace is quantized.

    Attributes:
        values: names of the nodes whose values are put on a grid of their own, in graph order.
        weighted: names of the contractions whose weight is put on a grid.
        centred: those of the values whose grids have their zeros at 0.
        layers: names of all contractions that could be quantized, whether or not they were asked to stay as they are.
    """

    values: tuple[str, ...]
    weighted: tuple[str, ...]
    layers: tuple[str, ...]
    centred: frozenset[str] = frozenset()


def points(network: fx.GraphModule, whole: Collection[str] = (), answers: Collection[int] = ()) -> Points:
    """Read them from a trace whose batch norms are folded.

    Args:
        whole: contractions that stay in floating point.
        answers: positions of the outputs that are left as they are computed, where a contraction computes them.
    """
    found = _Points(whole)
    for node in network.graph.nodes:
        found.visit(node)
    output = next(node for node in network.graph.nodes if node.op == "output")
    given = {answer for position, answer in enumerate(output.args[0]) if position not in answers}
    order = [node for node in network.graph.nodes if node in found.on_grid and not _only_answers(node, given, found)]
    centred = frozenset(node.name for node in found.centred)
    return Points(tuple(n.name for n in order), tuple(found.weighted), tuple(found.layers), centred)


class _Points:
    def __init__(self, whole: Collection[str]) -> None:
        self.whole = whole
        self.on_grid: set[fx.Node] = set()
        self.constant: set[fx.Node] = set()  # the same for every input: weights, and what is computed of them
        self.keeps: set[fx.Node] = set()  # values on the grid of what they were made of
        self.centred: set[fx.Node] = set()
        self.weighted: list[str] = []
        self.layers: list[str] = []

    def visit(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self.constant.add(node)
        if node.op != "call_function":
            return
        name, reads = name_of(node), [n for n in node.all_input_nodes if n not in self.constant]
        if not reads and node.all_input_nodes:
            self.constant.add(node)
            return
        if name in WEIGHTED | PRODUCTS:
            self._contract(node, name, reads)
        elif name in _ARITHMETIC and any(map(self._has_grid, reads)):
            for read in reads:
                self._require(read)
            self.on_grid.add(tail(node))
        elif name in _KEEPING and reads and self._has_grid(reads[0]):
            self.keeps.add(node)

    def _contract(self, node: fx.Node, name: str, reads: list[fx.Node]) -> None:
        if not _floating(node) or (name in WEIGHTED and node.args[1] not in self.constant):
            return
        self.layers.append(node.name)
        if node.name in self.whole:
            return
        for read in reads:
            self._require(read)
        if any(n in self.constant for n in node.args[:2]):
            self.weighted.append(node.name)
        else:
            self.centred |= {self._origin(read) for read in reads}
        self.on_grid.add(tail(node))

    def _has_grid(self, node: fx.Node) -> bool:
        return node in self.on_grid or node in self.keeps

    def _origin(self, node: fx.Node) -> fx.Node:
        """The value whose grid a node is on."""
        while node not in self.on_grid:
            node = node.all_input_nodes[0]
        return node

    def _require(self, node: fx.Node) -> None:
        """Put a value on a grid, or that which only moving made it of."""
        if self._has_grid(node):
            return
        first = node.args[0] if node.op == "call_function" and node.args else None
        moved = node.op == "call_function" and name_of(node) in _MOVING
        if moved and isinstance(first, fx.Node) and first not in self.constant:
            self._require(first)
            self.keeps.add(node)
        else:
            self.on_grid.add(node)


def _only_answers(node: fx.Node, given: Collection[fx.Node], found: _Points) -> bool:
    """Is a value, maybe moved, read by nothing but the output, and by no position of it that is to have a grid?"""
    if node in given:
        return False
    rest = [user for user in node.users if user.op != "output"]
    return all(user in found.keeps and _only_answers(user, given, found) for user in rest)


def tail(node: fx.Node) -> fx.Node:
    """Where the answer of a contraction or a sum is rounded: after an activation that is all that reads it."""
    users = list(node.users)
    alone = len(users) == 1 and users[0].op == "call_function" and name_of(users[0]) in ACTIVATIONS
    return users[0] if alone and users[0].all_input_nodes == [node] else node


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return value is None or value.is_floating_point()
