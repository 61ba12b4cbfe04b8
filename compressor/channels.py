"""Which channels belong together: one analysis of a traced network that pruning, pathways and reports all read.

Every index of every parameter axis gets an id. An activation carries, for each of its elements, the id of the channel
that produced it; data movement (permute, reshape, concat, slice, pixel shuffle, ...) is then simply *executed* on
these id tensors, so no operator needs an index map of its own. An operator that ties two channels together (add,
batch norm, depthwise conv) merges their ids in a union-find. An operator that mixes channels in a way not understood
here merges them with `FIXED`: those channels are never removed.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

FIXED = 0
"""The id of everything that must stay: network inputs, outputs, and channels mixed by an operator not understood."""


class Axis(NamedTuple):
    """One dimension of a named parameter or buffer."""

    tensor: str
    dim: int


@dataclass(frozen=True, slots=True)
class Contraction:
    """One use of a weight: `macs_per_pair` multiply-adds for each pair of a channel read and a channel written.

    `reads` is None for a depthwise convolution, whose written channel is its read channel.
    """

    node: str
    weight: str
    writes: Axis
    reads: Axis | None
    macs_per_pair: int


@dataclass(slots=True)
class ChannelMap:
    """The result of the analysis.

    Attributes:
        axes: class of each index of each parameter axis that can change size (int64 vector as long as the axis).
        contractions: every use of a weight, in graph order.
        values: for each node, the id of each element of its output (shape of the output, stride 0 where it repeats).
        mixed: node names that merged channels with FIXED, with the operator; what a report lists as not prunable.
    """

    axes: dict[Axis, Tensor] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    mixed: dict[str, str] = field(default_factory=dict)


def analyse(network: fx.GraphModule, resizable: Iterable[str], hold: Iterable[str] = ()) -> ChannelMap:
    """Analyse a network traced by `compressor.trace`.

    Args:
        resizable: names of the tensors that can be cut (the parameters and buffers of the module); any other
            constant is held as it is.
        hold: nodes whose channels all stay, because a cut there could not be expressed.
    """
    return _Analysis(network, frozenset(resizable), frozenset(hold)).run()


class _Analysis:
    def __init__(self, network: fx.GraphModule, resizable: frozenset[str], hold: frozenset[str]) -> None:
        self.network, self.resizable, self.hold = network, resizable, hold
        self.parent = torch.zeros(1, dtype=torch.int64)
        self.found = ChannelMap()
        self.uses: dict[str, int] = {}

    # --- ids

    def axis(self, tensor: str, dim: int) -> Tensor:
        """The ids of a parameter axis, made on first use; FIXED for a tensor that cannot be cut."""
        size = self.tensor(tensor).shape[dim]
        if tensor not in self.resizable:
            return torch.zeros(size, dtype=torch.int64)
        key = Axis(tensor, dim)
        if key not in self.found.axes:
            fresh = torch.arange(len(self.parent), len(self.parent) + size)
            self.parent = torch.cat([self.parent, fresh])
            self.found.axes[key] = fresh
        return self.found.axes[key]

    def tensor(self, name: str) -> Tensor:
        found: Any = self.network
        for part in name.split("."):
            found = getattr(found, part)
        if not isinstance(found, Tensor):
            raise TypeError(f"{name} is a {type(found).__name__}, not a tensor")
        return found

    def root(self, ids: Tensor) -> Tensor:
        """The class of each id; repeats stay repeats (stride 0)."""
        while True:
            above = self.parent[self.parent]
            if torch.equal(above, self.parent):
                return self.parent[_distinct(ids)].expand(ids.shape)
            self.parent = above

    def merge(self, left: Tensor, right: Tensor) -> None:
        """Merge id pairs element by element (same shape)."""
        pairs = (
            torch.stack([_distinct(left).reshape(-1), _distinct(right).reshape(-1)], 1)
            if (left.shape == right.shape and left.stride() == right.stride())
            else torch.stack([left.reshape(-1), right.reshape(-1)], 1)
        )
        parent = self.parent.tolist()

        def find(item: int) -> int:
            while parent[item] != item:
                parent[item] = parent[parent[item]]
                item = parent[item]
            return item

        for a, b in torch.unique(pairs, dim=0).tolist():
            low, high = sorted((find(a), find(b)))
            parent[high] = low  # FIXED is 0, so it always wins
        self.parent = torch.tensor(parent)

    def fix(self, ids: Any) -> None:
        for part in _tensors(ids):
            self.merge(flat := torch.unique(part), torch.zeros_like(flat))

    def along(self, ids: Tensor, dim: int) -> Tensor | None:
        """One class for each index of `dim` when all elements of that index agree; otherwise None."""
        rows = _distinct(self.root(ids).movedim(dim, 0), keep=1).flatten(1)
        first = rows[:, 0] if rows.shape[1] else rows.new_zeros(rows.shape[0])
        return first if bool((rows == first[:, None]).all()) else None

    # --- the walk

    def run(self) -> ChannelMap:
        for node in self.network.graph.nodes:
            if node.op == "placeholder":
                self.found.values[node.name] = _fixed(node)
            elif node.op == "get_attr":
                self.found.values[node.name] = _Constant(str(node.target))
            elif node.op == "call_function":
                self.found.values[node.name] = self.call(node)
                if node.name in self.hold:
                    self.fix(self.found.values[node.name])
                    self.fix([self.ids(argument) for argument in node.all_input_nodes])
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self.fix(self.ids(source))
        found = self.found
        found.axes = {axis: self.root(ids) for axis, ids in found.axes.items()}
        found.values = {
            name: torch.utils._pytree.tree_map_only(Tensor, self.root, ids)
            for name, ids in found.values.items()
            if not isinstance(ids, _Constant)
        }
        return found

    def call(self, node: fx.Node) -> Any:
        rule = RULES.get(_name(node))
        if rule is None or not _is_traced(node):
            return self.mix(node)
        return rule(self, node)

    def mix(self, node: fx.Node) -> Any:
        """An operator not understood: all it touches stays."""
        for source in node.all_input_nodes:
            self.fix(self.ids(source))
        self.found.mixed[node.name] = _name(node)
        return _fixed(node)

    def ids(self, node: fx.Node) -> Any:
        """Element ids of a node's value; a parameter used as a value carries its only long axis."""
        value = self.found.values.get(node.name)
        if not isinstance(value, _Constant):
            return value
        shape = self.tensor(value.name).shape
        long = [dim for dim, size in enumerate(shape) if size > 1]
        if len(long) != 1:
            for dim in range(len(shape)):
                self.fix(self.axis(value.name, dim))
            return torch.zeros(1, dtype=torch.int64).expand(shape) if shape else torch.zeros((), dtype=torch.int64)
        return _spread(self.axis(value.name, long[0]), shape, long[0])

    def constant(self, argument: Any) -> str | None:
        value = self.found.values.get(argument.name) if isinstance(argument, fx.Node) else None
        return value.name if isinstance(value, _Constant) else None


class _Constant(NamedTuple):
    """A parameter, buffer or literal tensor, before an operator says what its axes mean."""

    name: str


# --- rules, one for each way an operator treats channels

Rule = Callable[[_Analysis, fx.Node], Any]


def _moved(run: _Analysis, node: fx.Node) -> Any:
    """Data movement: do to the ids what the operator does to the values."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), run.ids)
    name = _name(node)
    if name in ("view", "_unsafe_view"):
        return args[0].reshape(args[1])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _same(run: _Analysis, node: fx.Node) -> Any:
    """One value in, each element its own answer."""
    return run.ids(node.args[0])  # type: ignore[arg-type]


def _pointwise(run: _Analysis, node: fx.Node) -> Any:
    """Two values, element by element: channels that meet belong together, a broadcast channel gates them."""
    shape = _shape(node)
    operands = [argument for argument in node.args if isinstance(argument, fx.Node)]
    activations = [a for a in operands if run.constant(a) is None]
    if not activations:
        return run.mix(node)
    ids = [run.root(run.ids(a)).expand(shape) for a in activations]
    for other, source in zip(ids[1:], activations[1:], strict=True):
        _meet(run, (activations[0], ids[0]), (source, other))
    # the operand that is not broadcast names the answer's channels
    widest = max(range(len(ids)), key=lambda k: torch.unique(_distinct(ids[k])).numel())
    for operand in operands:
        name = run.constant(operand)
        if name is not None and not _tie(run, name, ids[widest]):
            run.fix(ids[widest])
            run.found.mixed[node.name] = _name(node)
    return run.root(ids[widest])


def _meet(run: _Analysis, left: tuple[fx.Node, Tensor], right: tuple[fx.Node, Tensor]) -> None:
    for (gate_node, gate), (_, gated) in ((left, right), (right, left)):
        small = _shape(gate_node)
        grown = [1] * (gate.dim() - len(small)) + list(small)
        sizes = enumerate(zip(grown, gate.shape, strict=True))
        if any(size == 1 and full > 1 and _varies(gated, dim) for dim, (size, full) in sizes):
            run.fix(gate)  # one answer scales many channels: it stays, they are free
            return
    run.merge(left[1], right[1])


def _tie(run: _Analysis, name: str, ids: Tensor) -> bool:
    """Tie each long axis of a constant operand to the channels it meets; False when they do not line up."""
    shape = run.tensor(name).shape
    offset = ids.dim() - len(shape)
    for dim, size in enumerate(shape):
        if size == 1 or not _varies(run.root(ids), dim + offset):
            continue
        along = run.along(ids, dim + offset)
        if along is None:
            return False
        run.merge(run.axis(name, dim), along)
    return True


def _normalised(run: _Analysis, node: fx.Node) -> Any:
    """Batch norm: scale, shift and statistics go with their channel."""
    ids = run.ids(node.args[0])  # type: ignore[arg-type]
    along = run.along(ids, 1)
    if along is None:
        return run.mix(node)
    for argument in node.args[1:5]:
        name = run.constant(argument)
        if name is not None:
            run.merge(run.axis(name, 0), along)
    return run.root(ids)


def _sloped(run: _Analysis, node: fx.Node) -> Any:
    """PReLU: one slope a channel, or one for all."""
    name = run.constant(node.args[1])
    if name is not None and run.tensor(name).numel() > 1:
        along = run.along(run.ids(node.args[0]), 1)  # type: ignore[arg-type]
        if along is None:
            return run.mix(node)
        run.merge(run.axis(name, 0), along)
    return run.ids(node.args[0])  # type: ignore[arg-type]


def _windowed(run: _Analysis, node: fx.Node) -> Any:
    """Pooling and resizing: every channel by itself, over positions that share it."""
    along = run.along(run.ids(node.args[0]), 1)  # type: ignore[arg-type]
    return run.mix(node) if along is None else _spread(along, _shape(node), 1)


def _padded(run: _Analysis, node: fx.Node) -> Any:
    ids = run.ids(node.args[0])  # type: ignore[arg-type]
    pads: list[int] = node.args[1]  # type: ignore[assignment]
    touched = [ids.dim() - 1 - k // 2 for k, amount in enumerate(pads) if amount]
    along = run.along(ids, 1) if ids.dim() > 1 else None
    if along is None or 1 in touched:
        return run.mix(node)
    return _spread(along, _shape(node), 1)


def _reduced(run: _Analysis, node: fx.Node) -> Any:
    """Mean, sum, max over dimensions in which the channel does not change; softmax likewise."""
    ids = run.root(run.ids(node.args[0]))  # type: ignore[arg-type]
    given = node.args[1] if len(node.args) > 1 else list(range(ids.dim()))
    dims = [d % ids.dim() for d in (given if isinstance(given, list | tuple) else [given])]  # type: ignore[operator]
    if any(_varies(ids, dim) for dim in dims):
        return run.mix(node)
    shape = _shape(node)
    if len(shape) == ids.dim() and list(shape) == list(ids.shape):
        return ids
    kept = ids
    for dim in sorted(dims, reverse=True):
        kept = kept.narrow(dim, 0, 1) if len(shape) == ids.dim() else kept.select(dim, 0)
    return kept


def _convolution(run: _Analysis, node: fx.Node) -> Any:
    name = run.constant(node.args[1])
    along = run.along(run.ids(node.args[0]), 1)  # type: ignore[arg-type]
    if name is None or along is None:
        return run.mix(node)
    transposed = _name(node).startswith("conv_transpose")
    groups = int(_argument(node, 6, "groups", 1))
    weight = run.tensor(name)
    out, into = (1, 0) if transposed else (0, 1)
    shape = _shape(node)
    positions = _product(shape) // shape[1] if not transposed else _product(_shape(node.args[0])) // len(along)
    per_pair = positions * _product(weight.shape[2:])
    writes = run.axis(name, out)
    if groups == 1:
        run.merge(run.axis(name, into), along)
        reads = Axis(name, into)
    elif groups == len(along) and not transposed:
        run.merge(writes, along.repeat_interleave(len(writes) // groups))
        reads = None
    else:
        return _count(run, node, name, per_pair, run.mix(node))
    run.found.contractions.append(Contraction(node.name, name, Axis(name, out), reads, per_pair))
    _bias(run, node.args[2] if len(node.args) > 2 else None, writes)
    return _spread(run.root(writes), shape, 1)


def _linear(run: _Analysis, node: fx.Node) -> Any:
    name = run.constant(node.args[1])
    along = run.along(run.ids(node.args[0]), -1)  # type: ignore[arg-type]
    if name is None or along is None:
        return run.mix(node)
    run.merge(run.axis(name, 1), along)
    writes = run.axis(name, 0)
    _bias(run, node.args[2] if len(node.args) > 2 else None, writes)
    shape = _shape(node)
    positions = _product(shape) // shape[-1]
    run.found.contractions.append(Contraction(node.name, name, Axis(name, 0), Axis(name, 1), positions))
    return _spread(run.root(writes), shape, len(shape) - 1)


def _embedding(run: _Analysis, node: fx.Node) -> Any:
    name = run.constant(node.args[0])
    if name is None:
        return run.mix(node)
    shape = _shape(node)
    return _spread(run.axis(name, 1), shape, len(shape) - 1)


def _bias(run: _Analysis, argument: Any, writes: Tensor) -> None:
    name = run.constant(argument)
    if name is not None:
        run.merge(run.axis(name, 0), writes)


def _count(run: _Analysis, node: fx.Node, weight: str, per_pair: int, answer: Any) -> Any:
    """A grouped convolution stays whole but its work is counted: writes every channel, reads its own group."""
    writes, reads = Axis(weight, 0), Axis(weight, 1)
    for axis in (writes, reads):
        run.fix(run.axis(*axis))
    run.found.contractions.append(Contraction(node.name, weight, writes, reads, per_pair))
    return answer


def _item(run: _Analysis, node: fx.Node) -> Any:
    return run.found.values[node.args[0].name][node.args[1]]  # type: ignore[union-attr, index]


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: Mapping[str, Rule] = {
    **_table(_convolution, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_table(_linear, "linear"),
    **_table(_embedding, "embedding"),
    **_table(_normalised, "batch_norm instance_norm"),
    **_table(_sloped, "prelu"),
    **_table(_pointwise, "add add_ sub sub_ mul mul_ div div_ maximum minimum rsub"),
    **_table(
        _same,
        "relu relu_ relu6 relu6_ sigmoid sigmoid_ tanh tanh_ silu silu_ gelu elu elu_ selu selu_ celu leaky_relu "
        "leaky_relu_ hardtanh hardtanh_ hardswish hardswish_ hardsigmoid hardsigmoid_ softplus mish clamp clamp_ "
        "clamp_min clamp_max exp neg abs sqrt rsqrt pow square dropout dropout_ feature_dropout clone contiguous "
        "detach to _to_copy alias lift_fresh_copy",
    ),
    **_table(
        _windowed,
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_max_pool2d upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
        "_upsample_nearest_exact2d lp_pool2d",
    ),
    **_table(_padded, "constant_pad_nd pad reflection_pad2d replication_pad2d"),
    **_table(_reduced, "mean sum amax amin softmax log_softmax _softmax"),
    **_table(
        _moved,
        "view reshape _unsafe_view flatten unflatten permute transpose t slice select narrow index_select cat concat stack "
        "split split_with_sizes chunk unbind squeeze unsqueeze expand repeat roll flip pixel_shuffle pixel_unshuffle "
        "channel_shuffle movedim swapaxes",
    ),
    "getitem": _item,
}


# --- small facts about nodes and ids


def _name(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    name = getattr(node.target, "_schema", None)
    return name.name.split("::")[-1] if name is not None else str(node.target)


def _is_traced(node: fx.Node) -> bool:
    return all(
        isinstance(s.meta.get("val"), Tensor | list | tuple)
        for s in (node, *node.all_input_nodes)
        if s.op != "get_attr"
    )


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _fixed(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return torch.zeros((), dtype=torch.int64).expand(tuple(value.shape))
    if isinstance(value, list | tuple):
        return [torch.zeros((), dtype=torch.int64).expand(tuple(v.shape)) for v in value]
    return value


def _spread(along: Tensor, shape: Iterable[int], dim: int) -> Tensor:
    """Repeat one id per index of `dim` over a whole shape, without memory."""
    sizes = list(shape)
    view = [1] * len(sizes)
    view[dim] = len(along)
    return along.reshape(view).expand(sizes)


def _distinct(ids: Tensor, keep: int = 0) -> Tensor:
    """Drop the repeats of an expanded tensor (stride 0), from dimension `keep` on."""
    for dim in range(keep, ids.dim()):
        if ids.stride(dim) == 0 and ids.shape[dim] > 1:
            ids = ids.narrow(dim, 0, 1)
    return ids


def _varies(ids: Tensor, dim: int) -> bool:
    if ids.shape[dim] <= 1 or ids.stride(dim) == 0:
        return False
    return not bool((ids == ids.narrow(dim, 0, 1)).all())


def _tensors(ids: Any) -> list[Tensor]:
    return [part for part in torch.utils._pytree.tree_leaves(ids) if isinstance(part, Tensor)]


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= int(size)
    return total
