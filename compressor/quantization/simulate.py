"""A quantized network in floating point: its trace, batch norms folded, values and weights rounded to their grids.

Rounding lets gradients through where it does not clip (the straight-through estimator; Jacob et al., "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018), so that the same graph serves
for scores, for fine-tuning and, once what is constant in it is computed, for cutting and for export.
"""


from typing import Any

import torch
from torch import Tensor, fx

from compressor.graph import argument, name_of, tensor_of, with_argument
from compressor.quantization.grids import ACCUMULATOR, HIGHEST, LARGEST_WEIGHT, LOWEST, Grid, Quantization
from compressor.quantization.points import PRODUCTS, WEIGHTED

aten = torch.ops.aten
_ATTENTION = "scaled_dot_product_attention"


def folded(network: fx.GraphModule) -> fx.GraphModule:
    """The trace with every batch norm that alone reads a convolution or linear layer computed into its weights.

    Attention that is one operator becomes the products and the softmax that it is made of, where it has no mask.
    Weights stay the parameters they are: the folding is part of the graph, so that they can be trained through it.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(network.graph, {}))
    for norm in [node for node in graph.nodes if node.op == "call_function" and name_of(node) == "batch_norm"]:
        layer = norm.args[0]
        if _foldable(layer, norm):
            _fold(graph, layer, norm)
    for node in [node for node in graph.nodes if node.op == "call_function" and name_of(node) == _ATTENTION]:
        if not any(argument(node, name) for name in ("attn_mask", "dropout_p", "is_causal", "enable_gqa")):
            _spell_out(graph, node)
    graph.eliminate_dead_code()
    return fx.GraphModule(_held(network, graph), graph)


def quantized(network: fx.GraphModule, how: Quantization) -> fx.GraphModule:
    """A folded trace with its values and weights rounded to their grids; what belongs to no node of it is left out."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(network.graph, {}))
    nodes = {node.name: node for node in graph.nodes}
    tensors = _held(network, graph)
    for name, grid in how.values.items():
        if (node := nodes.get(name)) is None:
            continue  # of a task that this trace has not
        with graph.inserting_after(node):
            rounded = graph.call_function(
                aten.fake_quantize_per_tensor_affine.default, (node, grid.scale, grid.zero_point, LOWEST, HIGHEST)
            )
        node.replace_all_uses_with(rounded, lambda user, rounded=rounded: user is not rounded)
        _describe(rounded, node)
    for name, scale in how.scales.items():
        if name in nodes:
            _round_weight(graph, nodes[name], scale, tensors)
    for name, offset in how.offsets.items():
        if name in nodes:
            _shift(graph, nodes[name], offset, tensors)
    for name, scale in how.scales.items():
        if name in nodes and argument(nodes[name], "bias") is not None:
            _round_bias(graph, nodes[name], scale, tensors)
    return fx.GraphModule(tensors, graph)


def weight_of(node: fx.Node) -> fx.Node:
    """The operand of a contraction that is the same for every input."""
    first_two: Any = node.args[:2]
    return [n for n in first_two if isinstance(n, fx.Node) and constant(n)][-1]


def constant(node: fx.Node) -> bool:
    """Is a value computed of weights alone?"""
    if node.op == "call_function":
        return bool(node.all_input_nodes) and all(map(constant, node.all_input_nodes))
    return node.op == "get_attr"


def channel_dim(node: fx.Node) -> int | None:
    """The dimension of a contraction's weight that its answer's channels are written along; None where there is none.

    A transposed convolution in groups has none: each index writes a channel of every group.
    """
    name = name_of(node)
    if name not in WEIGHTED:
        return None
    if "transpose" in name:
        return 1 if int(argument(node, "groups", 1)) == 1 else None
    return 0


def computed(network: fx.GraphModule) -> fx.GraphModule:
    """The graph with all that depends on no input computed, under the name of the first tensor it is computed of."""
    values: dict[fx.Node, Tensor] = {}
    for node in network.graph.nodes:
        if node.op == "get_attr":
            values[node] = tensor_of(network, str(node.target))
        elif node.op == "call_function" and node.all_input_nodes and all(n in values for n in node.all_input_nodes):
            with torch.no_grad():
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    graph, tensors = fx.Graph(), dict[str, Tensor]()
    new: dict[fx.Node, fx.Node] = {}
    for node in network.graph.nodes:
        if node not in values:
            new[node] = graph.node_copy(node, new.__getitem__)
        elif any(user not in values for user in node.users):
            name = _origin(node)
            while name in tensors and tensors[name] is not values[node]:
                name += "_"
            tensors[name] = values[node]
            new[node] = graph.create_node("get_attr", name, name=node.name)
            new[node].meta = {"val": values[node]}
    return fx.GraphModule(tensors, graph)


def _foldable(layer: object, norm: fx.Node) -> bool:
    """Does a batch norm with fixed statistics follow a layer of constant weights whose answer nothing else reads?"""
    if not isinstance(layer, fx.Node) or layer.op != "call_function" or name_of(layer) not in WEIGHTED:
        return False
    tensors: tuple[Any, ...] = (layer.args[1], argument(layer, "bias"))
    return (
        set(layer.users) == {norm}
        and not argument(norm, "training")
        and all(n is None or n.op == "get_attr" for n in tensors)
        and channel_dim(layer) is not None
    )


def _fold(graph: fx.Graph, layer: Any, norm: Any) -> None:
    """weight * g / sqrt(var + eps) and shift + (bias - mean) * g / sqrt(var + eps), as nodes before the layer."""
    gain, shift, mean, var = (argument(norm, n) for n in ("weight", "bias", "running_mean", "running_var"))
    weight, bias = layer.args[1], argument(layer, "bias")
    dims = int(weight.meta["val"].dim())
    lead = 1 if "transpose" in name_of(layer) else 0
    with graph.inserting_before(layer):
        factor = graph.call_function(aten.rsqrt.default, (graph.call_function(aten.add.Scalar, (var, norm.args[7])),))
        if gain is not None:
            factor = graph.call_function(aten.mul.Tensor, (factor, gain))
        spread = graph.call_function(aten.view.default, (factor, [-1 if d == lead else 1 for d in range(dims)]))
        wide = graph.call_function(aten.mul.Tensor, (weight, spread))
        moved = graph.call_function(aten.sub.Tensor, (bias, mean)) if bias is not None else None
        moved = moved or graph.call_function(aten.neg.default, (mean,))
        offset = graph.call_function(aten.mul.Tensor, (moved, factor))
        if shift is not None:
            offset = graph.call_function(aten.add.Tensor, (shift, offset))
    for made, like in ((wide, weight), (offset, mean)):
        _describe(made, like)
    layer.args = (layer.args[0], wide, *layer.args[2:])
    layer.args = with_argument(layer, "bias", offset)
    layer.kwargs = {key: value for key, value in layer.kwargs.items() if key != "bias"}
    norm.replace_all_uses_with(layer)
    graph.erase_node(norm)


def _spell_out(graph: fx.Graph, attention: fx.Node) -> None:
    """softmax(q * scale @ k^T) @ v, as nodes in place of the one."""

    def call(operator: Any, *args: Any) -> fx.Node:
        node = graph.call_function(operator, args)
        node.meta = {key: value for key, value in attention.meta.items() if key == "nn_module_stack"}
        node.meta["val"] = operator(*(one.meta["val"] if isinstance(one, fx.Node) else one for one in args))
        return node

    q, k, v = (argument(attention, name) for name in ("query", "key", "value"))
    scale = argument(attention, "scale")
    if scale is None:
        scale = q.meta["val"].shape[-1] ** -0.5
    with graph.inserting_before(attention):
        turned = call(aten.transpose.int, k, -2, -1)
        scores = call(aten.matmul.default, call(aten.mul.Scalar, q, scale), turned)
        seen = call(aten.matmul.default, call(aten.softmax.int, scores, -1), v)
    attention.replace_all_uses_with(seen)
    graph.erase_node(attention)


def _describe(node: fx.Node, like: fx.Node) -> None:
    """What tracing knows of a value of the same shape."""
    node.meta = {key: value for key, value in like.meta.items() if key in ("val", "nn_module_stack")}


def _round_weight(graph: fx.Graph, node: fx.Node, scale: Tensor, tensors: dict[str, Tensor]) -> None:
    weight, limits = weight_of(node), (-LARGEST_WEIGHT, LARGEST_WEIGHT)
    args: tuple[Any, ...]
    with graph.inserting_before(node):
        if len(scale) == 1:
            call, args = aten.fake_quantize_per_tensor_affine.default, (weight, float(scale), 0, *limits)
        else:
            at = f"_scale_{node.name}"
            tensors[at], tensors[f"{at}_zero"] = scale, torch.zeros_like(scale, dtype=torch.int32)
            grid = graph.get_attr(at), graph.get_attr(f"{at}_zero"), channel_dim(node)
            call, args = aten.fake_quantize_per_channel_affine.default, (weight, *grid, *limits)
        node.replace_input_with(weight, graph.call_function(call, args))


def _shift(graph: fx.Graph, node: fx.Node, offset: Tensor, tensors: dict[str, Tensor]) -> None:
    """Add to a layer's bias, which it may not have."""
    at, bias = f"_offset_{node.name}", argument(node, "bias")
    tensors[at] = offset
    with graph.inserting_before(node):
        added = graph.get_attr(at)
        if bias is not None:
            added = graph.call_function(aten.add.Tensor, (bias, added))
    node.args = with_argument(node, "bias", added)
    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "bias"}


def _round_bias(graph: fx.Graph, node: fx.Node, scale: Tensor, tensors: dict[str, Tensor]) -> None:
    """Onto the steps of the accumulators, which are those of the inputs times those of the weights."""
    bias: Any = argument(node, "bias")
    grid = grid_of(node.args[0])
    at, size = f"_step_{node.name}", int(bias.meta["val"].shape[0]) if "val" in bias.meta else len(scale)
    tensors[at] = (scale * grid.scale).expand(size).contiguous()
    tensors[f"{at}_zero"] = torch.zeros(size, dtype=torch.int32)
    with graph.inserting_before(node):
        steps = graph.get_attr(at), graph.get_attr(f"{at}_zero"), 0, *ACCUMULATOR
        rounded = graph.call_function(aten.fake_quantize_per_channel_affine.default, (bias, *steps))
    node.args = with_argument(node, "bias", rounded)
    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "bias"}


def grid_of(value: Any) -> Grid:
    """The grid that a value of a quantized graph lies on, which moving it keeps."""
    while value.target is not aten.fake_quantize_per_tensor_affine.default:
        value = value.args[0]
    return Grid(value.args[1], value.args[2])


def layer_names(network: fx.GraphModule) -> dict[str, str]:
    """What a person calls each contraction: the module whose weight it reads, or else the node itself."""
    found = {}
    for node in network.graph.nodes:
        if node.op == "call_function" and name_of(node) in WEIGHTED | PRODUCTS:
            held = [n for n in node.args[:2] if constant(n)]
            found[node.name] = _origin(held[-1]).removesuffix(".weight") if held else node.name
    return found


def _held(network: fx.GraphModule, graph: fx.Graph) -> dict[str, Tensor]:
    return {str(n.target): tensor_of(network, str(n.target)) for n in graph.nodes if n.op == "get_attr"}


def _origin(node: fx.Node) -> str:
    """The first tensor that a constant is computed of."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)
