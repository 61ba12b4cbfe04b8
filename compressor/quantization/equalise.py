"""Equalisation: channels that reach far are made smaller, and the weights that read them larger, by powers of two.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.1,
with the ranges of values instead of those of the weights that write them (Xiao et al., "SmoothQuant", ICML 2023,
equation 4, at a half): a value has one grid for all its channels, a weight one for each channel that it writes.

Which tensors write a channel, and which read it, is what the channel analysis says. Between them a factor gets through
ReLU, pooling and sums, but not through a sigmoid or a norm; nothing is known here about operators, so every group of
channels is tried, and taken only where the network answers as it did.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from compressor.channels import FIXED, Axis
from compressor.graph import argument, name_of
from compressor.groups import Prunable
from compressor.model import MultiTaskModel
from compressor.trace import trace

FURTHEST = 4
"""Binary digits that a channel is moved at most: a factor of 16."""
SAMPLES = 8
"""Inputs of each batch that ranges are taken from."""
SAME = 1e-5
"""Of the largest answer: powers of two leave no other difference than that of sums in another order."""


def equalised(model: MultiTaskModel, batches: Sequence[tuple[Tensor, ...]]) -> tuple[MultiTaskModel, int]:
    """A copy that answers the same, and how many of its channels were moved.

    Args:
        batches: what the values' ranges are taken from.
    """
    network, prunable = trace(model), Prunable.of(model)
    digits = _digits(network, prunable, batches, model.inputs)
    writes, undone = _writers(network, prunable)
    found, moved = model.clone(), 0
    with torch.no_grad():
        wanted = model.answers(*batches[0])
        for group in prunable.groups:
            mine = torch.zeros_like(digits)
            mine[group.classes] = digits[group.classes]
            if not mine.any():
                continue
            tried = found.clone()
            _scale(tried, prunable, mine, writes, undone)
            if _same(tried.answers(*batches[0]), wanted):
                found, moved = tried, moved + int((mine != 0).sum())
    return found, moved


def _digits(
    network: fx.GraphModule, prunable: Prunable, batches: Sequence[tuple[Tensor, ...]], examples: tuple[Tensor, ...]
) -> Tensor:
    """By class: binary digits by which its values should be smaller; none of a class that is nowhere, or everywhere."""
    value_C, weight_C = (torch.zeros(prunable.class_count) for _ in range(2))
    ids = prunable.channels.values
    read = {c.node for c in prunable.channels.contractions if c.reads is not None}
    sources = {node.args[0].name for node in network.graph.nodes if node.name in read}

    class Watching(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            result, classes = super().run_node(node), ids.get(node.name)
            if node.name in sources and isinstance(result, Tensor) and isinstance(classes, Tensor):
                value_C.scatter_reduce_(0, classes.reshape(-1), result.abs().reshape(-1).float().cpu(), "amax")
            return result

    with torch.no_grad():
        for inputs in _samples(batches, examples):
            Watching(network).run(*inputs)
        state = dict(network.state_dict())
        for axis in prunable.reads():
            weight = state[axis.tensor].detach().float().cpu()
            largest = weight.abs().movedim(axis.dim, 0).flatten(1).amax(1)
            weight_C.scatter_reduce_(0, prunable.channels.axes[axis], largest, "amax")
    found = torch.zeros(prunable.class_count)
    for group in prunable.groups:
        classes = group.classes[(value_C[group.classes] > 0) & (weight_C[group.classes] > 0)]
        if len(classes):
            reach = (value_C[classes] / weight_C[classes]).log2() / 2
            found[classes] = (reach - reach.median()).round().clamp(-FURTHEST, FURTHEST)
    found[FIXED] = 0
    return found


def _samples(
    batches: Sequence[tuple[Tensor, ...]], examples: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor, ...]]:
    """A few of each batch, in the shapes of the examples, which the analysis is for."""
    size = len(examples[0])
    for inputs in batches:
        for first in range(0, min(len(inputs[0]), SAMPLES * size), size):
            sample = tuple(x[first : first + size] for x in inputs)
            if all(x.shape == example.shape for x, example in zip(sample, examples, strict=True)):
                yield sample


def _writers(network: fx.GraphModule, prunable: Prunable) -> tuple[set[Axis], set[Axis]]:
    """Axes that grow with the values they write, and those of depthwise weights, which take it back for a norm."""
    nodes = {node.name: node for node in network.graph.nodes}
    writes, undone = set[Axis](), set[Axis]()
    for contraction in prunable.channels.contractions:
        node = nodes[contraction.node]
        norm = next((user for user in node.users if name_of(user) == "batch_norm"), None)
        if norm is not None:
            writes |= {Axis(name, 0) for name in _parameters(norm)}
            if contraction.reads is None:
                undone.add(contraction.writes)
            continue
        if contraction.reads is not None:
            writes.add(contraction.writes)
        writes |= {Axis(name, 0) for name in _parameters(node) if name != contraction.weight}
    return writes, undone


def _parameters(node: fx.Node) -> list[str]:
    given = (argument(node, name) for name in ("weight", "bias"))
    return [str(one.target) for one in given if isinstance(one, fx.Node) and one.op == "get_attr"]


def _scale(model: MultiTaskModel, prunable: Prunable, digits: Tensor, writes: set[Axis], undone: set[Axis]) -> None:
    """In place: divide what writes a class by two to its digits, and multiply what reads it."""
    state, reads = model.module.state_dict(), set(prunable.reads())
    for axis, ids in prunable.channels.axes.items():
        sign = 1 if axis in reads or axis in undone else -1 if axis in writes else 0
        if sign and bool((digits[ids] != 0).any()):
            tensor = state[axis.tensor]
            shape = [-1 if dim == axis.dim else 1 for dim in range(tensor.dim())]
            tensor.mul_(torch.exp2(sign * digits[ids]).reshape(shape).to(tensor))


def _same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return all(
        bool(((found[name] - wanted[name]).abs().max() <= SAME * wanted[name].abs().max()).item()) for name in wanted
    )
