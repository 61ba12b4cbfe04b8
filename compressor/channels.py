"""Which channels belong together: one analysis of a traced network that pruning, pathways and reports all read.

Every index of every parameter axis gets an id. An activation carries, for each of its elements, the id of the channel
that produced it; data movement (permute, reshape, concat, slice, pixel shuffle, ...) is then simply *executed* on
these id tensors, so no operator needs an index map of its own. An operator that ties two channels together (add,
batch norm, depthwise conv) merges their ids in a union-find. An operator that mixes channels in a way not understood
here merges them with `FIXED`: those channels are never removed. What each operator does is in `compressor.operators`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from compressor.graph import name_of, tensor_of
from compressor.ids import FIXED, Classes, compact, spread, whole
from compressor.macs import macs_of
from compressor.norms import SHRINKING, over_channels
from compressor.operators import RULES, keep_even

__all__ = ["FIXED", "Analysis", "Axis", "ChannelMap", "Contraction", "Mixed", "Product", "analyse"]


class Axis(NamedTuple):
    """One dimension of a named parameter or buffer."""

    tensor: str
    dim: int


@dataclass(frozen=True, slots=True)
class Contraction:
    """One use of a weight: `macs_per_pair` multiply-adds for each pair of a channel read and a channel written.

    `reads` is None for a depthwise convolution, and one with many groups, which writes where it reads: a channel goes
    with the group it is in.
    """

    node: str
    weight: str
    writes: Axis
    reads: Axis | None
    macs_per_pair: int


@dataclass(frozen=True, slots=True)
class Product:
    """A product of two activations: `macs_per_index` multiply-adds for each index left of one dimension of channels.

    Attributes:
        ids: class of each index of that dimension.
        summed: the dimension is the one summed over, so that no weight reads its channels.
    """

    node: str
    ids: Tensor
    macs_per_index: int
    summed: bool


class Mixed(NamedTuple):
    """An operator at which the last free channels that some weights write met what stays, or were mixed."""

    operator: str
    weights: tuple[str, ...]


@dataclass(slots=True)
class ChannelMap:
    """The result of the analysis.

    Attributes:
        axes: class of each index of each parameter axis that an operator reads (int64 vector as long as the axis).
        contractions: every use of a weight whose channels are understood, in graph order.
        products: every product of activations that shrinks with their channels.
        whole_macs: multiply-adds of all other operators, which never shrink.
        values: for each node, the class of each element of its output (shape of the output, stride 0 where it
            repeats); a list for an operator with several outputs; parameters have none.
        mixed: by node name, the operators because of which weights keep all their channels; not an answer's own.
        norms: by node name, the dimension that a norm or mean of channels goes over, and its classes, where it may
            go over fewer.
    """

    axes: dict[Axis, Tensor] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    whole_macs: int = 0
    values: dict[str, Tensor | list[Tensor]] = field(default_factory=dict)
    mixed: dict[str, Mixed] = field(default_factory=dict)
    norms: dict[str, tuple[int, Tensor]] = field(default_factory=dict)

    @property
    def class_count(self) -> int:
        """One more than the largest class; a bool tensor of this length says something of each."""
        return 1 + max((int(ids.max()) for ids in self.axes.values() if len(ids)), default=FIXED)

    def summed(self) -> Tensor:
        """Bool by class: a product of activations sums over it, so that only zeros where it is written silence it."""
        found = torch.zeros(self.class_count, dtype=torch.bool)
        for product in self.products:
            if product.summed:
                found[product.ids] = True
        found[FIXED] = False
        return found


def analyse(
    network: fx.GraphModule, resizable: Iterable[str], hold: Iterable[str] = (), *, even: bool = False,
    tied: Iterable[tuple[Axis, Axis]] = (), shrinks: bool = False,
) -> ChannelMap:
    """Analyse a network traced by `compressor.trace`.

    Args:
        resizable: names of the tensors that can be cut (the parameters and buffers of the module); any other
            constant is held as it is.
        hold: nodes whose channels all stay, because a cut there could not be expressed.
        even: what code takes apart in equal parts (chunk, a view as groups and channels) stays equal, channel by
            channel, so that the same code does it in the cut network.
        tied: pairs of axes that lose the same indices, whatever the graph says.
        shrinks: norms and means over channels may go over fewer (`compressor.norms`).
    """
    return Analysis(network, frozenset(resizable), frozenset(hold), even, tuple(tied), shrinks).run()


class Analysis:
    """The walk through the graph; what the rules in `compressor.operators` work with."""

    def __init__(
        self, network: fx.GraphModule, resizable: frozenset[str], hold: frozenset[str], even: bool,
        tied: tuple[tuple[Axis, Axis], ...], shrinks: bool,
    ) -> None:
        self.network, self.resizable, self.hold, self.even, self.pairs = network, resizable, hold, even, tied
        self.shrinks = shrinks
        self.classes = Classes()
        self.found = ChannelMap()
        self.constants: dict[str, str] = {}
        self._whole: set[str] = set()

    def run(self) -> ChannelMap:
        for node in self.network.graph.nodes:
            if node.op == "placeholder":
                self.found.values[node.name] = _whole(node)
            elif node.op == "get_attr":
                self.constants[node.name] = str(node.target)
            elif node.op == "call_function":
                self.found.values[node.name] = self._call(node)
            elif node.op == "output":
                self.fix_inputs(node)
        if self.even:
            for node in self.network.graph.nodes:
                keep_even(self, node)
        found = self.found
        for first, second in self.pairs:
            self.classes.merge(found.axes[first], found.axes[second])
        found.axes = {axis: self.classes.root(ids) for axis, ids in found.axes.items()}
        found.values = {name: self._rooted(ids) for name, ids in found.values.items()}
        found.norms = {name: (dim, self.classes.root(ids)) for name, (dim, ids) in found.norms.items()}
        found.products = [replace(product, ids=self.classes.root(product.ids)) for product in found.products]
        weighted = {c.node for c in found.contractions} | {product.node for product in found.products}
        found.whole_macs = sum(macs_of(n) for n in self.network.graph.nodes if n.name not in weighted)
        return found

    def _call(self, node: fx.Node) -> Tensor | list[Tensor]:
        rule, before = RULES.get(name_of(node)), self.classes.fixed
        ids = None
        if rule is not None and _is_traced(node):
            over = over_channels(self, node) if self.shrinks and name_of(node) in SHRINKING else None
            ids = rule(self, node) if over is None else over
        if ids is None:
            ids = self._mix(node)
        if node.name in self.hold:
            self.fix_inputs(node)
            for part in [ids] if isinstance(ids, Tensor) else ids:
                self.classes.fix(part)
        if self.classes.fixed > before:
            self._tell(node)
        return self._rooted(ids)

    def _tell(self, node: fx.Node) -> None:
        """Put down to a node what cannot go any more."""
        written = {c.weight: self.found.axes[c.writes] for c in self.found.contractions if c.weight not in self._whole}
        whole = [weight for weight, ids in written.items() if not bool(self.classes.root(ids).any())]
        if whole:
            self._whole.update(whole)
            self.found.mixed[node.name] = Mixed(name_of(node), tuple(whole))

    def _mix(self, node: fx.Node) -> Tensor | list[Tensor]:
        """An operator, or a use of one, that is not understood: all it touches stays."""
        self.found.products = [product for product in self.found.products if product.node != node.name]
        self.fix_inputs(node)
        return _whole(node)

    def _rooted(self, ids: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(ids, Tensor):
            return compact(self.classes.root(ids))
        return [compact(self.classes.root(part)) for part in ids]

    # --- what rules ask and say

    def constant(self, argument: Any) -> str | None:
        """The name of the parameter, buffer or literal tensor that an argument is; None for anything else."""
        return self.constants.get(argument.name) if isinstance(argument, fx.Node) else None

    def tensor(self, name: str) -> Tensor:
        return tensor_of(self.network, name)

    def ids(self, argument: Any) -> Any:
        """Element ids of a node's value; a parameter used as a value carries its only long axis, or stays whole."""
        name = self.constant(argument)
        if name is None:
            return self.found.values[argument.name]
        shape = tuple(self.tensor(name).shape)
        long = [dim for dim, size in enumerate(shape) if size > 1]
        if len(long) != 1:
            self.bind(name, {})
            return whole(shape)
        self.bind(name, {long[0]: self.axis(name, long[0])})
        return spread(self.axis(name, long[0]), shape, long[0])

    def tied(self, argument: Any, dim: int) -> Tensor | None:
        """One class for each index of `dim` of a node's value, made so by merging; None where it has no such dimension.

        After a pixel shuffle, for example, the channels that became one channel's positions are one class.
        """
        ids = self.ids(argument)
        if not isinstance(ids, Tensor) or not -ids.dim() <= dim < ids.dim():
            return None
        return self.classes.tie(ids, dim)

    def axis(self, tensor: str, dim: int) -> Tensor:
        """The ids of a parameter axis, made on first use; FIXED for a tensor that cannot be cut."""
        size = self.tensor(tensor).shape[dim]
        if tensor not in self.resizable:
            return whole((size,))
        key = Axis(tensor, dim)
        if key not in self.found.axes:
            self.found.axes[key] = self.classes.fresh(size)
        return self.found.axes[key]

    def bind(self, tensor: str, axes: dict[int, Tensor]) -> None:
        """One use of a constant: each given axis goes with these ids, every other axis stays whole.

        Every use binds every axis, so that a tensor used twice is only ever cut where both uses allow it.
        """
        for dim in range(self.tensor(tensor).dim()):
            mine = self.axis(tensor, dim)
            self.classes.merge(mine, axes[dim] if dim in axes else whole((len(mine),)))

    def contract(self, node: fx.Node, weight: str, writes: int, reads: int | None) -> None:
        """Record a use of a weight whose axis `writes` makes the answer's channels."""
        sizes = self.tensor(weight).shape
        pairs = sizes[writes] * (1 if reads is None else sizes[reads])
        into = None if reads is None else Axis(weight, reads)
        found = Contraction(node.name, weight, Axis(weight, writes), into, macs_of(node) // max(1, pairs))
        self.found.contractions.append(found)
        self.found.axes.setdefault(found.writes, self.axis(weight, writes))
        if into is not None:
            self.found.axes.setdefault(into, self.axis(weight, into.dim))

    def multiply(self, node: fx.Node, ids: Tensor, macs: int, *, summed: bool) -> None:
        """Record a product of activations that costs so much for all of these indices together."""
        self.found.products.append(Product(node.name, ids, macs // max(1, len(ids)), summed))

    def fix_inputs(self, node: fx.Node) -> None:
        """All that a node reads stays."""
        for source in node.all_input_nodes:
            ids = self.ids(source)
            for part in [ids] if isinstance(ids, Tensor) else ids:
                self.classes.fix(part)


def _whole(node: fx.Node) -> Tensor | list[Tensor]:
    """FIXED ids for whatever a node gives; none for what is no tensor."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return whole(tuple(value.shape))
    if isinstance(value, list | tuple):
        return [whole(tuple(v.shape)) if isinstance(v, Tensor) else whole(()) for v in value]
    return []


def _is_traced(node: fx.Node) -> bool:
    """Are the shapes of all that a node reads and gives known?"""
    nodes = [node, *(source for source in node.all_input_nodes if source.op != "get_attr")]
    return all(isinstance(n.meta.get("val"), Tensor | list | tuple) for n in nodes)
