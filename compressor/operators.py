"""How each operator treats channels: one rule for each way, and the table of operators that follow it.

A rule returns the ids of the operator's answer, or None when it does not understand this use of it; then everything
the operator touches stays whole.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from compressor.graph import argument, name_of, shape_of
from compressor.ids import distinct, spread, varies, whole
from compressor.products import attention, einsum, matmul
from compressor.reductions import reduced, together

if TYPE_CHECKING:
    from compressor.channels import Analysis

Rule = Callable[["Analysis", fx.Node], Tensor | list[Tensor] | None]


def moved(run: "Analysis", node: fx.Node) -> Tensor | list[Tensor] | None:
    """Data movement: do to the ids what the operator does to the values."""
    counted = set(node.all_input_nodes) - set(tree_leaves(node.args[0]))
    if counted or isinstance(argument(node, "dtype"), torch.dtype):
        return None  # view.dtype reads the same bytes as other numbers; repeat_interleave may take a tensor of counts
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), run.ids)
    made = move(node, args, kwargs)
    return made if isinstance(made, Tensor) else list(made)


def move(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Execute a data movement on other tensors than its own, of any strides."""
    if name_of(node) in RESHAPING:
        return args[0].reshape(shape_of(node))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _elementwise(run: "Analysis", node: fx.Node) -> Tensor | None:
    """Values met element by element: channels that meet belong together, a broadcast value gates and stays whole."""
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    activations = [a for a in operands if run.constant(a) is None] or operands
    known = isinstance(node.meta["val"], Tensor) and set(operands) == set(node.all_input_nodes)
    if not activations or not known:
        return None
    shape = shape_of(node)
    _meet(run, activations, shape)
    ids = max((run.classes.root(run.ids(a)).expand(shape) for a in activations), key=_freedom)
    for operand in operands:
        name = run.constant(operand)
        if name is not None and operand not in activations:
            _tie(run, name, ids)
    return ids


def _meet(run: "Analysis", activations: list[fx.Node], shape: tuple[int, ...]) -> None:
    """Merge what meets; what is broadcast over channels stays whole, and what meets it does in their common dimensions.
    """
    grown = {a: (1,) * (len(shape) - len(shape_of(a))) + shape_of(a) for a in activations}

    def ids(a: fx.Node) -> Tensor:
        return run.classes.root(run.ids(a)).expand(shape)

    def dims(a: fx.Node, *, broadcast: bool) -> list[int]:
        return [d for d, (own, full) in enumerate(zip(grown[a], shape, strict=True)) if (own < full) is broadcast]

    gates = [a for a in grown if any(varies(ids(other), d) for other in grown for d in dims(a, broadcast=True))]
    for gate in gates:
        run.classes.fix(ids(gate))
    free = [a for a in grown if a not in gates]
    for a in free:
        run.classes.merge(ids(free[0]), ids(a))
        met = {d for gate in gates for d in dims(gate, broadcast=False)}
        if not together(run, ids(a), met):
            run.classes.fix(ids(a))


def _freedom(ids: Tensor) -> int:
    return int(torch.unique(ids).numel())


def _tie(run: "Analysis", name: str, ids: Tensor) -> None:
    """Tie each long axis of a constant operand to the channels it meets, which become one where it meets several at an
    index, as of tokens of which one has channels of its own; the axis with most channels first.
    """
    sizes, tied = run.tensor(name).shape, dict[int, Tensor]()
    axes = {dim + ids.dim() - len(sizes): dim for dim, size in enumerate(sizes) if size > 1}
    for full in sorted(axes, key=lambda d: -_freedom(distinct(ids.movedim(d, 0)[:, None], keep=1).flatten(1)[:, 0])):
        if varies(ids := run.classes.root(ids), full):
            tied[axes[full]] = run.classes.tie(ids, full)
    run.bind(name, tied)


def _normalised(run: "Analysis", node: fx.Node) -> Tensor | list[Tensor] | None:
    """Batch norm and instance norm: scale, shift and statistics go with their channel."""
    parameters = [a for a in node.args[1:5] if isinstance(a, fx.Node)]
    names = [run.constant(a) for a in parameters]
    along = run.tied(node.args[0], 1)
    if along is None or None in names or len(node.all_input_nodes) != 1 + len(set(parameters)):
        return None
    for name in filter(None, names):
        run.bind(name, {0: along})
    ids = run.ids(node.args[0])
    if isinstance(node.meta["val"], Tensor):
        return ids  # type: ignore[no-any-return]
    return [ids, *(whole(tuple(v.shape)) for v in node.meta["val"][1:])]  # the statistics of inference are empty


def _sloped(run: "Analysis", node: fx.Node) -> Tensor | None:
    """PReLU: one slope a channel, or one for all."""
    name = run.constant(node.args[1])
    if name is None or run.constant(node.args[0]) is not None:
        return None
    if run.tensor(name).numel() == 1:
        run.bind(name, {})
        return run.ids(node.args[0])  # type: ignore[no-any-return]
    along = run.tied(node.args[0], 1)
    if along is None:
        return None
    run.bind(name, {0: along})
    return run.ids(node.args[0])  # type: ignore[no-any-return]


def _normalised_together(run: "Analysis", node: fx.Node) -> Tensor | None:
    """Group norm: its statistics are those of a whole group, so that groups go whole."""
    given = [a for a in (argument(node, "weight"), argument(node, "bias")) if isinstance(a, fx.Node)]
    names, along = [run.constant(a) for a in given], run.tied(node.args[0], 1)
    groups = int(argument(node, "num_groups"))
    if along is None or not names or None in names or groups == 1:
        return None
    each = run.classes.tie(along.reshape(groups, -1), 0)
    for name in filter(None, names):
        run.bind(name, {0: each.repeat_interleave(len(along) // groups)})
    return run.ids(node.args[0])  # type: ignore[no-any-return]


def _normalised_within(run: "Analysis", node: fx.Node) -> Tensor | None:
    """Layer norm and RMS norm: what they go over stays or goes as one."""
    ids, names = run.classes.root(run.ids(node.args[0])), [run.constant(a) for a in node.all_input_nodes[1:]]
    last = len(node.args[1])  # type: ignore[arg-type]
    if None in names or not together(run, ids, set(range(ids.dim() - last, ids.dim()))):
        return None
    for name in filter(None, names):
        run.bind(name, {})
    return run.classes.root(ids)


def _halved(run: "Analysis", node: fx.Node) -> Tensor | None:
    """GLU: each channel of the first half is gated by one of the second."""
    if run.constant(node.args[0]) is not None:
        return None
    values, gates = run.ids(node.args[0]).chunk(2, int(argument(node, "dim")))
    run.classes.merge(values, gates)
    return run.classes.root(values)


def _windowed(run: "Analysis", node: fx.Node) -> Tensor | list[Tensor] | None:
    """Pooling, resizing and padding: every channel by itself, over positions that share it."""
    value = node.meta["val"]
    shapes = [tuple(v.shape) for v in ([value] if isinstance(value, Tensor) else value)]
    along = run.tied(node.args[0], 1)
    if along is None or len(node.all_input_nodes) != 1 or any(len(s) < 3 or s[1] != len(along) for s in shapes):
        return None
    made = [spread(along, shape, 1) for shape in shapes]
    return made[0] if isinstance(value, Tensor) else made


def _sampled(run: "Analysis", node: fx.Node) -> Tensor | None:
    """Every channel by itself, at positions that another value says."""
    along = run.tied(node.args[0], 1)
    if along is None or run.constant(node.args[0]) is not None:
        return None
    run.classes.fix(run.ids(node.args[1]))
    return spread(along, shape_of(node), 1)


def _padded(run: "Analysis", node: fx.Node) -> Tensor | list[Tensor] | None:
    pads = argument(node, "pad") or argument(node, "padding")
    touched = {len(shape_of(node)) - 1 - k // 2 for k, amount in enumerate(pads) if amount}
    return None if 1 in touched else _windowed(run, node)


def _reduced_twice(run: "Analysis", node: fx.Node) -> Tensor | list[Tensor] | None:
    """Max and where it was, variance and mean: two answers of one shape; max of two values goes element by element."""
    if isinstance(argument(node, "other"), fx.Node):
        return _elementwise(run, node)
    made = reduced(run, node)
    return made if made is None or isinstance(node.meta["val"], Tensor) else [made, made]


def _convolution(run: "Analysis", node: fx.Node) -> Tensor | None:
    name, along = run.constant(node.args[1]), run.tied(node.args[0], 1)
    if name is None or along is None or run.tensor(name).dim() != len(shape_of(node)):
        return None
    writes, reads = (1, 0) if name_of(node).startswith("conv_transpose") else (0, 1)
    groups = int(argument(node, "groups", 1))
    inside = along.reshape(groups, -1)
    if groups > inside.shape[1]:  # depthwise is the extreme: more groups than channels in one, so that groups go whole
        each = run.classes.tie(inside, 0)
        run.bind(name, {0: each.repeat_interleave(run.tensor(name).shape[0] // groups)})
        run.contract(node, name, 0, None)
        return _shifted(run, node, each.repeat_interleave(shape_of(node)[1] // groups), 1)
    each = run.classes.tie(inside, 1)  # otherwise every group loses the same places
    places = run.classes.tie(run.axis(name, writes).reshape(groups if writes == 0 else 1, -1), 1)
    ids = places.repeat(groups)
    run.bind(name, {reads: each.repeat(groups) if writes else each, writes: places if writes else ids})
    run.contract(node, name, writes, reads)
    return _shifted(run, node, ids, 1)


def _linear(run: "Analysis", node: fx.Node) -> Tensor | None:
    name, along = run.constant(node.args[1]), run.tied(node.args[0], -1)
    if name is None or along is None or run.tensor(name).dim() != 2:
        return None
    ids = run.axis(name, 0)
    run.bind(name, {0: ids, 1: along})
    run.contract(node, name, 0, 1)
    return _shifted(run, node, ids, len(shape_of(node)) - 1)


def _shifted(run: "Analysis", node: fx.Node, ids: Tensor, dim: int) -> Tensor | None:
    """The answer of a contraction, its bias tied to the channels written."""
    bias = argument(node, "bias")
    name = run.constant(bias)
    if bias is not None and name is None:
        return None  # a computed bias
    if name is not None:
        run.bind(name, {0: ids})
    return spread(ids, shape_of(node), dim)


def _embedding(run: "Analysis", node: fx.Node) -> Tensor | None:
    """Rows are looked up by number and stay; each column is a channel."""
    name = run.constant(node.args[0])
    if name is None:
        return None
    run.classes.fix(run.ids(node.args[1]))
    run.bind(name, {1: run.axis(name, 1)})
    return spread(run.axis(name, 1), shape_of(node), len(shape_of(node)) - 1)


def keep_even(run: "Analysis", node: fx.Node) -> None:
    """Merge so that code which takes channels apart in equal parts still does when some are gone."""
    ids = run.found.values.get(node.name)
    for first, *others in _slices(run, node, ids) if isinstance(ids, Tensor) else ():
        for other in others:
            run.classes.merge(first, other)
    if name_of(node) in _PARTING and isinstance(ids, list) and len({tuple(part.shape) for part in ids}) == 1:
        for part in ids[1:]:
            run.classes.merge(ids[0], part)
    elif name_of(node) == "channel_shuffle" and isinstance(ids, Tensor):
        run.classes.tie(run.ids(node.args[0]).unflatten(1, (int(argument(node, "groups")), -1)), 2)
    elif name_of(node) in MOVING and isinstance(ids, Tensor):
        ids = run.classes.root(ids)
        joined = int(argument(node, "dim", 0)) % ids.dim() if name_of(node) in _JOINING else None
        dims = [dim for dim in range(ids.dim()) if varies(ids, dim)]
        if len(dims) > 1:
            run.classes.tie(ids, [dim for dim in dims if dim != joined][-1])


def _slices(run: "Analysis", node: fx.Node, ids: Tensor) -> list[list[Any]]:
    """Ids of the slices that take a value apart, without a rest, in equal parts of a dimension of channels."""
    by_dim: dict[int, dict[int, fx.Node]] = {}
    for user in node.users:
        if name_of(user) == "slice" and user.args[0] is node and argument(user, "step") == 1:
            dim, start = int(argument(user, "dim")) % ids.dim(), argument(user, "start") or 0
            by_dim.setdefault(dim, {}).setdefault(start % max(1, ids.shape[dim]), user)
    found = []
    for dim, parts in by_dim.items():
        size, lengths = ids.shape[dim], {shape_of(part)[dim] for part in parts.values()}
        equal = len(parts) > 1 and len(lengths) == 1 and sorted(parts) == list(range(0, size, max(1, *lengths)))
        if equal and varies(ids, dim):
            found.append([run.ids(parts[start]) for start in sorted(parts)])
    return found


def _looked_up(run: "Analysis", node: fx.Node) -> Tensor | None:
    """A table of biases by position: rows are looked up by number and stay; each column is a channel."""
    name, numbers = run.constant(node.args[0]), node.args[1]
    if name is None or run.tensor(name).dim() != 2 or not isinstance(numbers, list | tuple) or len(numbers) != 1:
        return None
    run.classes.fix(run.ids(numbers[0]))
    run.bind(name, {1: run.axis(name, 1)})
    return spread(run.axis(name, 1), shape_of(node), len(shape_of(node)) - 1)


def _expanded_as(run: "Analysis", node: fx.Node) -> Tensor | None:
    """Repeated over the shape of another value, whose channels it does not touch."""
    return run.ids(node.args[0]).expand(shape_of(node)) if run.constant(node.args[0]) is None else None


def _made_beside(run: "Analysis", node: fx.Node) -> Tensor:
    """Numbers that are made where a value is, of its kind, without a look at it."""
    return whole(shape_of(node))


def _item(run: "Analysis", node: fx.Node) -> Tensor | None:
    parts, number = run.ids(node.args[0]), node.args[1]
    return parts[number] if isinstance(parts, list) and parts and isinstance(number, int) else None


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: Mapping[str, Rule] = {
    **_table(_convolution, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_table(_linear, "linear"),
    **_table(matmul, "matmul bmm mm"),
    **_table(einsum, "einsum"),
    **_table(attention, "scaled_dot_product_attention"),
    **_table(_embedding, "embedding"),
    **_table(_looked_up, "index"),
    **_table(_normalised, "batch_norm _native_batch_norm_legit_no_training instance_norm"),
    **_table(_normalised_together, "group_norm"),
    **_table(_normalised_within, "layer_norm rms_norm"),
    **_table(_sloped, "prelu"),
    **_table(_halved, "glu"),
    **_table(
        _elementwise,
        "add sub rsub mul div maximum minimum pow atan2 where addcmul addcdiv lerp remainder fmod floor_divide "
        "eq ne lt le gt ge logical_and logical_or logical_xor logical_not "
        "relu relu6 sigmoid tanh silu gelu elu selu celu leaky_relu hardtanh hardswish hardsigmoid softplus mish "
        "softsign log_sigmoid hardshrink softshrink tanhshrink threshold clamp clamp_min clamp_max "
        "exp exp2 expm1 log log2 log10 log1p sin cos tan atan erf neg abs sign floor ceil round trunc sqrt rsqrt "
        "square reciprocal dropout feature_dropout alpha_dropout clone contiguous detach to _to_copy alias "
        "lift_fresh_copy masked_fill zeros_like ones_like full_like",
    ),
    **_table(
        _windowed,
        "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
        "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d",
    ),
    **_table(_padded, "constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"),
    **_table(
        reduced,
        "mean sum amax amin prod var std logsumexp argmax argmin any all cumsum cumprod softmax log_softmax _softmax "
        "_log_softmax linalg_vector_norm",
    ),
    **_table(_reduced_twice, "max min median var_mean std_mean cummax cummin"),
    **_table(
        moved,
        "view reshape _unsafe_view flatten unflatten permute transpose t mT numpy_T swapaxes swapdims movedim moveaxis "
        "squeeze unsqueeze slice select narrow unbind split split_with_sizes tensor_split chunk cat concat stack "
        "expand repeat tile repeat_interleave roll flip rot90 pixel_shuffle pixel_unshuffle channel_shuffle",
    ),
    **_table(_sampled, "grid_sampler grid_sampler_2d grid_sampler_3d"),
    **_table(_made_beside, "new_zeros new_ones new_full new_empty"),
    "expand_as": _expanded_as,
    "getitem": _item,
}

MOVING = frozenset(name for name, rule in RULES.items() if rule is moved)
RESHAPING = frozenset(["view", "_unsafe_view", "reshape", "flatten", "unflatten"])
_JOINING = frozenset(["cat", "concat", "stack"])
_PARTING = frozenset(["chunk", "split", "split_with_sizes", "tensor_split"])
