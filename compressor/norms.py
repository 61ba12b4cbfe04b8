"""Operators that normalise over channels, cut: statistics over what is left, as the module's code takes them then.

A layer norm of fewer channels answers otherwise than one of which some channels are zero, so that channels under one
stay unless a caller asks for these rules. Then the network that a cut is compared with takes the same statistics.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from compressor.graph import argument, name_of, shape_of, tensors_of, with_argument
from compressor.ids import varies, whole

if TYPE_CHECKING:
    from compressor.channels import Analysis, ChannelMap

_SIZED = frozenset(["layer_norm", "rms_norm"])
_NORMS = _SIZED | {"group_norm"}
SHRINKING = _NORMS | {"mean", "var", "std"}
"""Operators that can go over fewer channels."""

_select, _copy, _zeros = torch.index_select, torch.index_copy, torch.zeros_like


def over_channels(run: "Analysis", node: fx.Node) -> Tensor | None:
    """A norm or mean over one dimension of channels, and nothing else that tells channels apart: they stay free."""
    names = [run.constant(a) for a in node.all_input_nodes]
    if names[0] is not None or None in names[1:]:
        return None
    ids = run.classes.root(run.ids(node.args[0]))
    told = [d for d in range(ids.dim()) if varies(ids, d)]
    if len(told) != 1 or told[0] not in _over(node, ids.dim()) or not isinstance(node.meta["val"], Tensor):
        return None
    along = run.classes.tie(ids, told[0])
    for name in filter(None, names):
        run.bind(name, {0: along})
    run.found.norms[node.name] = told[0], along
    return run.classes.root(ids) if name_of(node) in _NORMS else whole(shape_of(node))


def _over(node: fx.Node, dims: int) -> set[int]:
    """The dimensions that an operator goes over."""
    if name_of(node) == "group_norm":
        return {1} if int(argument(node, "num_groups")) == 1 else set()
    if name_of(node) in _SIZED:
        return {dims - 1} if len(argument(node, "normalized_shape")) == 1 else set()
    given = argument(node, "dim")
    listed = given if isinstance(given, list | tuple) else [] if given is None else [given]
    return {d % dims for d in listed} or set(range(dims))


def over_what_is_left(network: fx.GraphModule, channels: "ChannelMap", keep: Tensor) -> fx.GraphModule:
    """The network with such operators going over the classes that are kept; where a norm's answer is gone it is 0.

    Args:
        keep: bool by class.
    """
    graph, tensors = fx.Graph(), tensors_of(network)
    known: dict[fx.Node, fx.Node] = {}
    for node in network.graph.nodes:
        dim, along = channels.norms.get(node.name, (0, None))
        if along is None or bool(keep[along].all()):
            known[node] = graph.node_copy(node, known.__getitem__)
            continue
        name = f"left_of_{node.name}"
        tensors[name] = keep[along].nonzero().flatten()
        left, given = graph.get_attr(name), known[node.args[0]]
        chosen = {a: graph.call_function(_select, (known[a], 0, left)) for a in node.all_input_nodes[1:]}
        chosen[node.args[0]] = graph.call_function(_select, (given, dim, left))
        found = known[node] = graph.node_copy(node, chosen.__getitem__)
        if name_of(node) in _SIZED:
            found.args, found.kwargs = with_argument(found, "normalized_shape", [len(tensors[name])]), {}
        if name_of(node) in _NORMS:
            known[node] = graph.call_function(_copy, (graph.call_function(_zeros, (given,)), dim, left, found))
    return fx.GraphModule(tensors, graph)
