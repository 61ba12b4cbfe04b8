"""Cut a traced graph to the channels that are needed: every tensor, and every size written into an operator.

Operators that work channel by channel are copied as they are. One that moves data is given a new form by a rule of
`REWRITES`, and the form is proven: both run on tensors that hold each element's own number, and must agree.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from compressor.channels import Axis, ChannelMap
from compressor.graph import argument, name_of, shape_of, tensor_of, with_argument
from compressor.ids import distinct
from compressor.operators import MOVING, RESHAPING, move
from compressor.trace import living

Sides = list[Tensor]
"""For each dimension of a value, the indices that are left, ascending."""


class CannotCut(Exception):
    """Nodes whose remaining channels their operators cannot express; all channels there must stay."""

    def __init__(self, nodes: Sequence[str]) -> None:
        super().__init__(", ".join(nodes))
        self.nodes = tuple(nodes)


def cut(network: fx.GraphModule, channels: ChannelMap, need: Tensor) -> fx.GraphModule:
    """A new graph without the channels that are not needed.

    Args:
        need: bool by class.

    Raises:
        CannotCut: with every node at which it failed, so that the caller can hold them and try again.
    """
    return _Cut(network, channels, need).run()


class _Call(NamedTuple):
    """An operator in its new form, over the old graph's nodes; `target` None stands for its only argument."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Stuck(Exception):
    """No form of this operator gives what is left of its answer."""


class _Cut:
    def __init__(self, network: fx.GraphModule, channels: ChannelMap, need: Tensor) -> None:
        self.network, self.channels, self.need = network, channels, need
        self.graph = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        self.new: dict[fx.Node, fx.Node] = {}
        self.left: dict[fx.Node, Sides] = {}

    def run(self) -> fx.GraphModule:
        stuck: list[str] = []
        lost: set[fx.Node] = set()
        for node in self.network.graph.nodes:
            if lost.intersection(node.all_input_nodes):
                lost.add(node)  # after a node that failed nothing can be built, but other branches can be tried
                continue
            try:
                self.add(node)
            except _Stuck:
                stuck.append(node.name)
                lost.add(node)
        if stuck:
            raise CannotCut(stuck)
        return living(fx.GraphModule(self.tensors, self.graph))

    def add(self, node: fx.Node) -> None:
        """Put a node's new form into the new graph; nothing where none of its answer is left."""
        if node.op == "get_attr":
            self.add_tensor(node)
            return
        value = self.channels.values.get(node.name)
        if isinstance(value, Tensor):
            self.left[node] = self.rectangle(value)
            if value.numel() and not all(map(len, self.left[node])):
                return
        elif name_of(node) in MOVING and not all(bool(self.need[part].all()) for part in value or ()):
            return  # its items become slices of its input
        if node.op != "call_function" or self.is_whole(node):
            self.new[node] = self.graph.node_copy(node, self.renewed)
            return
        rewrite = REWRITES.get(name_of(node), _unchanged)
        self.emit(node, rewrite(self, node))

    def emit(self, node: fx.Node, call: _Call) -> None:
        origin = node.args[0] if name_of(node) == "getitem" else node
        if isinstance(origin, fx.Node) and name_of(origin) in MOVING:
            self.prove(node, origin, call)
        args, kwargs = fx.node.map_arg((call.args, dict(call.kwargs)), self.renewed)
        if call.target is None:
            self.new[node] = args[0]
        else:
            self.new[node] = self.graph.create_node("call_function", call.target, args, kwargs, node.name)

    def prove(self, node: fx.Node, origin: fx.Node, call: _Call) -> None:
        """Run the old and the new form on every element's own number."""
        labels: dict[fx.Node, Tensor] = {}
        first = 0
        for source in origin.all_input_nodes:
            shape = self.full(source)
            labels[source] = torch.arange(first, first := first + prod(shape)).reshape(shape)
        whole = move(origin, *fx.node.map_arg((origin.args, dict(origin.kwargs)), labels.__getitem__))
        wanted = _take(whole if origin is node else whole[node.args[1]], self.left[node])
        args, kwargs = fx.node.map_arg(
            (call.args, dict(call.kwargs)), lambda source: _take(labels[source], self.left[source])
        )
        try:
            given = args[0] if call.target is None else call.target(*args, **kwargs)
        except (RuntimeError, IndexError):
            raise _Stuck from None
        if not torch.equal(given, wanted):
            raise _Stuck

    def add_tensor(self, node: fx.Node) -> None:
        name = str(node.target)
        tensor = tensor_of(self.network, name)
        sides = []
        for dim, size in enumerate(tensor.shape):
            classes = self.channels.axes.get(Axis(name, dim))
            sides.append(torch.arange(size) if classes is None else self.need[classes].nonzero().flatten())
        self.left[node] = sides
        taken = _take(tensor.detach(), sides)
        trained = taken.is_floating_point() or taken.is_complex()
        self.tensors[name] = nn.Parameter(taken.clone(), requires_grad=False) if trained else taken
        self.new[node] = self.graph.node_copy(node)

    def rectangle(self, value: Tensor) -> Sides:
        """Kept indices of each dimension, if the kept elements are all combinations of them."""
        if not value.numel():
            return [torch.arange(size) for size in value.shape]
        keep, sides, inside = self.need[distinct(value)], [], 1
        for dim, size in enumerate(value.shape):
            others = tuple(d for d in range(keep.dim()) if d != dim)
            kept = keep.any(others) if others else keep
            inside *= int(kept.sum())
            sides.append((kept if len(kept) == size else kept.expand(size)).nonzero().flatten())
        if int(keep.sum()) != inside:
            raise _Stuck
        return sides

    def is_whole(self, node: fx.Node) -> bool:
        """Does neither what the node reads nor what it gives shrink?"""
        if any(source not in self.new for source in node.all_input_nodes):
            return False
        seen = [n for n in (node, *node.all_input_nodes) if n in self.left]
        return all(len(side) == size for n in seen for side, size in zip(self.left[n], self.full(n), strict=True))

    def full(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a node's value before the cut."""
        return tuple(tensor_of(self.network, str(node.target)).shape) if node.op == "get_attr" else shape_of(node)

    def renewed(self, node: fx.Node) -> fx.Node:
        if node not in self.new:
            raise _Stuck
        return self.new[node]


# --- rules: what an operator becomes when its channels shrink


def _unchanged(run: _Cut, node: fx.Node) -> _Call:
    return _Call(node.target, node.args, node.kwargs)


def _reshaped(run: _Cut, node: fx.Node) -> _Call:
    return _Call(torch.ops.aten.reshape.default, (node.args[0], [len(side) for side in run.left[node]]), {})


def _expanded(run: _Cut, node: fx.Node) -> _Call:
    return _Call(torch.ops.aten.expand.default, (node.args[0], [len(side) for side in run.left[node]]), {})


def _convolved(run: _Cut, node: fx.Node) -> _Call:
    """A grouped convolution has as many groups as its channels hold of what its weight says a group has."""
    channels = run.left[node if name_of(node).startswith("conv_transpose") else node.args[0]][1]  # type: ignore[index]
    groups = len(channels) // len(run.left[node.args[1]][1])  # type: ignore[index]
    return _Call(node.target, with_argument(node, "groups", groups), {})


def _normalised(run: _Cut, node: fx.Node) -> _Call:
    """A group norm keeps its groups' size."""
    each = run.full(node)[1] // int(argument(node, "num_groups"))
    return _Call(node.target, with_argument(node, "num_groups", len(run.left[node][1]) // each), {})


def _joined(run: _Cut, node: fx.Node) -> _Call:
    """Concatenate the parts of which anything is left."""
    parts = [part for part in node.args[0] if part in run.new]  # type: ignore[union-attr]
    if len(parts) == 1:
        return _Call(None, (parts[0],), {})
    return _Call(node.target, (parts, *node.args[1:]), node.kwargs)


def _sliced(run: _Cut, node: fx.Node) -> _Call:
    source, dim = argument(node, "self"), int(argument(node, "dim", 0))
    start, step = int(argument(node, "start") or 0), int(argument(node, "step", 1))
    size = run.full(source)[dim]
    first = max(start + size, 0) if start < 0 else start
    return _part(run, source, dim, first + step * run.left[node][dim])


def _selected(run: _Cut, node: fx.Node) -> _Call:
    source, dim = argument(node, "self"), int(argument(node, "dim"))
    index = int(argument(node, "index")) % run.full(source)[dim]
    return _Call(node.target, (source, dim, _position(run.left[source][dim], index)), {})


def _item(run: _Cut, node: fx.Node) -> _Call:
    """One part of a split, as a slice of what is left of the split's input; other tuples are taken as they are."""
    parent: Any = node.args[0]
    number: Any = node.args[1]
    if name_of(parent) not in MOVING:
        return _unchanged(run, node)
    source, dim = parent.args[0], int(argument(parent, "dim", 0))
    if name_of(parent) == "unbind":
        return _Call(torch.ops.aten.select.int, (source, dim, _position(run.left[source][dim], number)), {})
    first = sum(int(part.shape[dim]) for part in parent.meta["val"][:number])
    return _part(run, source, dim, first + run.left[node][dim])


def _part(run: _Cut, source: Any, dim: int, wanted: Tensor) -> _Call:
    """The wanted indices of a source's full size, as a slice of those that are left."""
    left = run.left[source][dim]
    at = [_position(left, index) for index in wanted.tolist()]
    step = at[1] - at[0] if len(at) > 1 else 1
    if at == list(range(len(left))):
        return _Call(None, (source,), {})
    if step < 1 or at != list(range(at[0], at[-1] + 1, step)):
        raise _Stuck
    return _Call(torch.ops.aten.slice.Tensor, (source, dim, at[0], at[-1] + 1, step), {})


def _position(left: Tensor, index: int) -> int:
    at = (left == index).nonzero().flatten()
    if not len(at):
        raise _Stuck
    return int(at[0])


def _take(value: Tensor, sides: Sides) -> Tensor:
    for dim, side in enumerate(sides):
        if len(side) < value.shape[dim]:
            value = value.index_select(dim, side)
    return value


REWRITES: Mapping[str, Callable[[_Cut, fx.Node], _Call]] = {
    **dict.fromkeys(RESHAPING, _reshaped),
    "expand": _expanded,
    "slice": _sliced,
    "narrow": _sliced,
    "select": _selected,
    "getitem": _item,
    "cat": _joined,
    "concat": _joined,
    "group_norm": _normalised,
    **{f"conv{kind}{n}d": _convolved for kind in ("", "_transpose") for n in (1, 2, 3)},
}
"""Operators not named here stay as they are; sizes that only the moved data could change are covered by the proof."""
