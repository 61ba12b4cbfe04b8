"""Layers that a contraction takes in: sums of its answer with another value, and poolings of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from targets.accelerator.arithmetic import Addition, Scaling, Step
from targets.accelerator.layers import LARGEST_WINDOW, POINT, Contraction, Pooling
from targets.accelerator.network import Node, Value


@dataclass(frozen=True, slots=True)
class Sum:
    """Two values added; clamped as a step's addition is."""

    source: str
    other: str
    result: str
    low: int
    high: int


def summed(nodes: Sequence[Node | Sum], values: Mapping[str, Value], outputs: Sequence[str]) -> list[Node]:
    """Sums as steps of contractions: of the later one that nothing else reads, or else of one that changes nothing."""
    readers = Counter(name for node in nodes for name in (node.source, node.other))
    alone = {
        node.result: node for node in nodes
        if isinstance(node, Node) and isinstance(node.layer, Contraction) and readers[node.result] == 1
        and node.result not in outputs
    }  # fmt: skip
    order = {node.result: number for number, node in enumerate(nodes)}
    found, taken = list[Node](), set[str]()
    for node in nodes:
        if isinstance(node, Node):
            found.append(node)
            continue
        names = sorted((node.source, node.other), key=lambda name: (name in alone, order.get(name, -1)))
        other, own = names if names[0] != names[1] else (names[0], names[0])
        grids = [values[name].grid for name in (own, other, node.result)]
        factors = grids[0].scale / grids[2].scale, grids[1].scale / grids[2].scale
        addition = Addition.of(*factors, grids[1].zero, grids[2].zero, node.low, node.high)
        maker = alone.get(own) or Node(_same(values[own]), own, own)
        assert isinstance(maker.layer, Contraction)
        layer = replace(maker.layer, step=replace(maker.layer.step, addition=addition))
        found.append(Node(layer, maker.source, node.result, other))
        taken |= {own} & set(alone)
    return [node for node in found if node.result not in taken]


def pooled(nodes: Sequence[Node], values: Mapping[str, Value], outputs: Sequence[str]) -> list[Node]:
    """Contractions that take in the pooling of their answers, where windows lie side by side and nothing else reads."""
    readers = Counter(name for node in nodes for name in (node.source, node.other))
    makers = {
        node.result: node for node in nodes
        if isinstance(node.layer, Contraction) and readers[node.result] == 1 and node.result not in outputs
        and node.layer.step.addition is None and (node.layer.step.scaling.multiplier >= 0).all()
    }  # fmt: skip
    found, taken = list[Node](), set[str]()
    for node in nodes:
        maker, layer = makers.get(node.source), node.layer
        if maker is None or not isinstance(layer, Pooling) or not _side_by_side(layer, node, values):
            found.append(node)
            continue
        assert isinstance(maker.layer, Contraction)
        found.append(Node(replace(maker.layer, pool=layer.window.size), maker.source, node.result))
        taken.add(node.source)
    return [node for node in found if node.result not in taken]


def _side_by_side(layer: Pooling, node: Node, values: Mapping[str, Value]) -> bool:
    """Is it the largest of windows that neither overlap nor leave the picture, on the same grid?"""
    window, same = layer.window, values[node.source].grid == values[node.result].grid
    whole = same and (layer.step.low, layer.step.high) == (-128, 127) and layer.kind == "largest"
    return whole and window.size == window.step and not any(window.pad) and max(window.size) <= LARGEST_WINDOW


def _same(value: Value) -> Contraction:
    """Answers what it is given."""
    count, zero = value.shape[0], value.grid.zero
    step = Step(Scaling.of(np.ones(count), np.full(count, -float(zero))), zero)
    return Contraction(np.eye(count, dtype=np.int8)[:, :, None, None], POINT, zero, step)
