"""Extract the pathway of a task set: the part of a network its answers need, and nothing else, exactly.

Three cuts, each without changing an answer: operators no chosen answer depends on; channels and slices of fused layers
that only other tasks read; channels every remaining reader of which has only zero weights (as masks leave them).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from compressor.channels import FIXED, Axis, ChannelMap, Contraction, analyse
from compressor.errors import CompressError
from compressor.model import MultiTaskModel
from compressor.trace import export, flatten, prune_tensors, trace

EXACT = 1e-6
"""Largest difference accepted, relative to the largest answer, when both networks run in float64."""


@dataclass(frozen=True, slots=True)
class Pathway:
    """One task set's network.

    Attributes:
        network: traced graph, one output for each task in order.
        kept: indices kept of each cut tensor's dimensions, as MultiTaskModel.kept but relative to the whole model.
        tensors: names of the tensors that are left.
        macs: multiply-adds of one inference over the example inputs.
        error: largest difference to the whole network, relative, as measured in float64.
    """

    tasks: tuple[str, ...]
    network: fx.GraphModule
    kept: Mapping[str, Mapping[int, tuple[int, ...]]]
    macs: int
    effective_macs: int
    error: float

    @property
    def name(self) -> str:
        return "+".join(self.tasks)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor the pathway reads, by its name in the whole model."""
        return {
            str(n.target): _tensor(self.network, str(n.target)) for n in self.network.graph.nodes if n.op == "get_attr"
        }

    def parameters(self, model: MultiTaskModel) -> int:
        """How many trained values are left (buffers such as batch-norm statistics not counted)."""
        trained = {name for name, _ in model.module.named_parameters(remove_duplicate=False)}
        return sum(tensor.numel() for name, tensor in self.tensors.items() if name in trained)


def extract(model: MultiTaskModel, tasks: Sequence[str]) -> Pathway:
    """Cut the pathway of the named tasks and prove it on the example inputs.

    Raises:
        CompressError: an unknown task, or a pathway whose answers differ from the whole network's.
    """
    by_name = {task.name: task for task in model.tasks}
    if unknown := [name for name in tasks if name not in by_name]:
        raise CompressError(f"No task {', '.join(map(repr, unknown))}. Tasks: {', '.join(by_name)}.")
    chosen = [by_name[name] for name in tasks]
    whole = trace(model, chosen)
    resizable = dict(model.module.state_dict())
    hold: set[str] = set()
    while True:  # ends: `hold` grows at every turn, and with every node held nothing is cut
        channels = analyse(whole, resizable, hold)
        need = needed(whole, channels)
        try:
            network = _cut(whole, channels, need)
            break
        except _CannotCut as at:
            hold.add(at.node)
    error = _difference(whole, network, model.inputs)
    if not error <= EXACT:
        raise CompressError(
            f"The pathway of {'+'.join(tasks)} differs from the whole network by {error:.1e} of its largest answer; "
            "it was not used. Please report this network."
        )
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for axis, classes in channels.axes.items():
        left = need[classes].nonzero().flatten()
        if len(left) < len(classes):
            kept.setdefault(axis.tensor, {})[axis.dim] = tuple(left.tolist())
    network = flatten(export(network, model.inputs))
    dense, effective = count_macs(network)
    return Pathway(tuple(tasks), network, kept, dense, effective, error)


def needed(network: fx.GraphModule, channels: ChannelMap) -> Tensor:
    """Bool by class: does an output depend on it through a weight that is not zero? (FIXED always is needed.)"""
    size = 1 + max((int(ids.max()) for ids in channels.axes.values() if len(ids)), default=0)
    need = torch.zeros(size, dtype=torch.bool)
    need[FIXED] = True
    reading = [(c, _links(network, c)) for c in reversed(channels.contractions) if c.reads is not None]
    while True:
        before = int(need.sum())
        for contraction, link_WR in reading:
            reads = channels.axes[contraction.reads]  # type: ignore[index]
            alive = need[channels.axes[contraction.writes]]
            need[reads[link_WR[alive].any(0)]] = True
            if bool(alive.any()) and not bool(need[reads].any()):
                need[reads[0]] = True  # an operator without any input channel cannot be expressed
        if int(need.sum()) == before:
            return need


def count_macs(network: fx.GraphModule) -> tuple[int, int]:
    """(multiply-adds of one inference, those with a weight that is not zero), counted over all contractions.

    Products of two activations (attention) count fully in both.
    """
    dense = effective = 0
    for contraction in analyse(network, ()).contractions:
        weight = _tensor(network, contraction.weight)
        taps = weight.numel() // (weight.shape[0] * weight.shape[1])
        positions = contraction.macs_per_pair // taps
        dense += weight.numel() * positions
        effective += int((weight != 0).sum()) * positions
    for node in network.graph.nodes:
        if node.op == "call_function" and node.target in _PRODUCTS and "val" in node.args[0].meta:
            work = int(node.meta["val"].numel()) * int(node.args[0].meta["val"].shape[-1])
            dense, effective = dense + work, effective + work
    return dense, effective


_PRODUCTS = (torch.ops.aten.matmul.default, torch.ops.aten.bmm.default, torch.ops.aten.mm.default)


class _CannotCut(Exception):
    """A node whose remaining channels cannot be expressed by its operator; its channels must all stay."""

    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.node = node


def _links(network: fx.GraphModule, contraction: Contraction) -> Tensor:
    """(written, read) bool: is there a weight that is not zero between the two channels?"""
    weight = _tensor(network, contraction.weight).detach()
    taps = (weight != 0).flatten(2).any(2) if weight.dim() > 2 else weight != 0
    return taps if contraction.writes.dim == 0 else taps.T


def _cut(whole: fx.GraphModule, channels: ChannelMap, need: Tensor) -> fx.GraphModule:
    """A new graph with the channels that are not needed gone from every tensor and every hard-coded size."""
    graph = fx.Graph()
    tensors: dict[str, Tensor] = {}
    new: dict[fx.Node, fx.Node] = {}
    left: dict[fx.Node, list[Tensor]] = {}  # for each activation, the kept indices of each of its dimensions
    ids: dict[fx.Node, Tensor] = {}
    for node in whole.graph.nodes:
        value = channels.values.get(node.name)
        if isinstance(value, Tensor):
            left[node] = _rectangle(node, need[value])
            ids[node] = _take(value, left[node])
        if node.op == "get_attr":
            tensors[str(node.target)] = _take_axes(
                _tensor(whole, str(node.target)), str(node.target), channels.axes, need
            )
            new[node] = graph.node_copy(node)
        elif node.op != "call_function" or not isinstance(value, Tensor):
            if isinstance(value, list | tuple) and _is_cut(node, value, left, need):
                continue  # its items are rewritten as slices of its input
            new[node] = graph.node_copy(node, lambda old: new[old])
        else:
            new[node] = _rewrite(graph, node, new, left, ids, tensors)
    network = fx.GraphModule(tensors, graph)  # type: ignore[arg-type]
    network.graph.eliminate_dead_code()
    return prune_tensors(network)


def _rectangle(node: fx.Node, keep: Tensor) -> list[Tensor]:
    """Kept indices of each dimension, if the kept elements are all combinations of them."""
    sides = []
    for dim in range(keep.dim()):
        others = tuple(d for d in range(keep.dim()) if d != dim)
        sides.append((keep.any(others) if others else keep).nonzero().flatten())
    count = 1
    for side in sides:
        count *= len(side)
    if int(keep.sum()) != count:
        raise _CannotCut(node.name)
    return sides


def _is_cut(node: fx.Node, parts: Sequence[object], left: Mapping[fx.Node, list[Tensor]], need: Tensor) -> bool:
    """Does a node with several results (split, chunk) have a channel that goes?"""
    return any(isinstance(part, Tensor) and not bool(need[part].all()) for part in parts)


def _rewrite(
    graph: fx.Graph,
    node: fx.Node,
    new: dict[fx.Node, fx.Node],
    left: Mapping[fx.Node, list[Tensor]],
    ids: Mapping[fx.Node, Tensor],
    tensors: Mapping[str, Tensor],
) -> fx.Node:
    """One operator over the channels that are left."""
    aten = torch.ops.aten
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    sizes = [len(side) for side in left[node]]
    before = [int(size) for size in node.meta["val"].shape]
    target = getattr(node.target, "_schema", None)
    name = target.name.split("::")[-1] if target is not None else "getitem"
    if name == "getitem" and source is not None and source not in new:
        parent = source.args[0]
        assert isinstance(parent, fx.Node)
        return _slice_of(graph, node, parent, new, left)
    if (name in ("slice", "narrow") and sizes != before) or (
        name == "slice" and source is not None and len(left[source][_dim(node)]) != source.meta["val"].shape[_dim(node)]
    ):
        assert source is not None
        return _slice_of(graph, node, source, new, left)
    if name == "select" and source is not None:
        dim, index = _dim(node), int(node.args[2])  # type: ignore[call-overload]
        size = int(source.meta["val"].shape[dim])
        at = (left[source][dim] == index % size).nonzero().flatten()
        if not len(at):
            raise _CannotCut(node.name)
        copied = graph.node_copy(node, lambda old: new[old])
        copied.args = (new[source], dim, int(at[0]))
        return _keep_meta(copied, node)
    if name in ("cat", "concat"):
        parts = [part for part in node.args[0] if all(len(side) for side in left.get(part, [range(1)]))]  # type: ignore[union-attr]
        if len(parts) == 1:
            return new[parts[0]]  # type: ignore[index]
        copied = graph.node_copy(node, lambda old: new[old])
        copied.args = ([new[part] for part in parts], *node.args[1:])  # type: ignore[index]
        return copied
    if sizes == before and all(
        len(side) == size
        for a in node.all_input_nodes
        if a in left
        for side, size in zip(left[a], a.meta["val"].shape, strict=True)
    ):
        return graph.node_copy(node, lambda old: new[old])
    if not all(sizes):
        raise _CannotCut(node.name)
    copied = graph.node_copy(node, lambda old: new[old])
    if name in ("view", "reshape", "_unsafe_view", "expand", "unflatten", "repeat"):
        assert source is not None
        if name in ("expand", "repeat"):
            copied.target, copied.args, copied.kwargs = aten.expand.default, (new[source], sizes), {}
            if name == "repeat":
                raise _CannotCut(node.name)
        else:
            copied.target, copied.args, copied.kwargs = aten.reshape.default, (new[source], sizes), {}
        if name != "expand" and not torch.equal(ids[source].reshape(sizes), ids[node]):
            raise _CannotCut(node.name)
    elif name in ("conv1d", "conv2d", "conv3d") and len(node.args) > 6 and int(node.args[6]) > 1:  # type: ignore[call-overload]
        assert source is not None
        groups = int(node.args[6])  # type: ignore[call-overload]
        if groups == source.meta["val"].shape[1]:
            copied.args = (*copied.args[:6], len(left[source][1]))
    elif name in _MOVING:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda old: ids[old])
        try:
            moved = node.target(*args, **kwargs)  # type: ignore[operator]
        except RuntimeError:
            raise _CannotCut(node.name) from None
        if not torch.equal(moved, ids[node]):
            raise _CannotCut(node.name)
    return copied


_MOVING = frozenset(
    [
        "flatten",
        "permute",
        "transpose",
        "t",
        "index_select",
        "stack",
        "squeeze",
        "unsqueeze",
        "roll",
        "flip",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "movedim",
        "swapaxes",
    ]
)


def _slice_of(
    graph: fx.Graph, node: fx.Node, source: fx.Node, new: dict[fx.Node, fx.Node], left: Mapping[fx.Node, list[Tensor]]
) -> fx.Node:
    """A slice or one part of a split, as a slice of what is left of its input; nothing at all when it takes everything."""
    splits = node.target is not torch.ops.aten.slice.Tensor and node.target is not torch.ops.aten.narrow.default
    parent = node.args[0] if splits else node
    assert isinstance(parent, fx.Node)
    dim = _dim(parent, 2 if splits else 1) % source.meta["val"].dim()
    first = _offset(node, parent) if splits else int(_start(node))
    step = int(node.args[4]) if node.target is torch.ops.aten.slice.Tensor and len(node.args) > 4 else 1  # type: ignore[call-overload]
    size = int(node.meta["val"].shape[dim])
    taken = first + step * left[node][dim]
    if first < 0 or step != 1 or first + size > source.meta["val"].shape[dim]:
        raise _CannotCut(node.name)
    at = torch.searchsorted(left[source][dim], taken)
    if not torch.equal(left[source][dim][at.clamp(max=len(left[source][dim]) - 1)], taken) or not len(at):
        raise _CannotCut(node.name)
    if len(at) == len(left[source][dim]):
        return new[source]
    if not torch.equal(at, torch.arange(int(at[0]), int(at[0]) + len(at))):
        raise _CannotCut(node.name)
    args = (new[source], dim, int(at[0]), int(at[0]) + len(at))
    return graph.call_function(torch.ops.aten.slice.Tensor, args)


def _offset(item: fx.Node, split: fx.Node) -> int:
    """Where the part that a getitem takes begins, from the sizes of the parts before it."""
    dim = _dim(split, 2) % split.meta["val"][0].dim()
    return sum(int(part.shape[dim]) for part in split.meta["val"][: int(item.args[1])])  # type: ignore[call-overload]


def _start(node: fx.Node) -> int:
    start = node.args[2] if len(node.args) > 2 else 0
    return int(start or 0)  # type: ignore[call-overload]


def _dim(node: fx.Node, position: int = 1) -> int:
    given = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return int(given)  # type: ignore[call-overload]


def _keep_meta(node: fx.Node, like: fx.Node) -> fx.Node:
    node.meta = {k: v for k, v in like.meta.items() if k != "val"}
    return node


def _take(value: Tensor, sides: Sequence[Tensor]) -> Tensor:
    for dim, side in enumerate(sides):
        if len(side) < value.shape[dim]:
            value = value.index_select(dim, side)
    return value


def _take_axes(tensor: Tensor, name: str, axes: Mapping[Axis, Tensor], need: Tensor) -> Tensor:
    for dim in range(tensor.dim()):
        classes = axes.get(Axis(name, dim))
        if classes is not None and not bool(need[classes].all()):
            tensor = tensor.index_select(dim, need[classes].nonzero().flatten())
    return torch.nn.Parameter(tensor.detach().clone(), requires_grad=False) if tensor.is_floating_point() else tensor


def _difference(whole: fx.GraphModule, part: fx.GraphModule, inputs: tuple[Tensor, ...]) -> float:
    """Largest difference of any answer, relative to the largest answer, in float64 on inputs of the given shapes."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    import copy

    with torch.no_grad():
        left, right = (copy.deepcopy(network).double() for network in (whole, part))
        for scale in (1.0, 0.3):
            tried = tuple(
                x.double() * scale + 0.1 * scale * torch.randn(x.shape, generator=generator, dtype=torch.float64)
                if x.is_floating_point()
                else x
                for x in inputs
            )
            for a, b in zip(left(*tried), right(*tried), strict=True):
                if a.shape != b.shape:
                    return float("inf")
                worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    return worst


def _tensor(network: fx.GraphModule, name: str) -> Tensor:
    found: object = network
    for part in name.split("."):
        found = getattr(found, part)
    assert isinstance(found, Tensor)
    return found
