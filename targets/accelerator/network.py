"""A network of integer layers: what it answers in numpy, and its program for a design."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from targets.accelerator.arithmetic import Int8
from targets.accelerator.design import Design
from targets.accelerator.isa import encode
from targets.accelerator.layers import POINT, Contraction, Layer, Window
from targets.accelerator.tensors import Place
from targets.accelerator.tiling import Compiler
from targets.accelerator.tokens import synchronised


@dataclass(frozen=True, slots=True)
class Grid:
    """Real values (q - zero) * scale of int8 q."""

    scale: float
    zero: int


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that the network computes or is given: int8 (channels, height, width)."""

    name: str
    shape: tuple[int, int, int]
    grid: Grid


@dataclass(frozen=True, slots=True)
class Node:
    """A layer and the values that it reads and makes.

    Attributes:
        other: what the layer's step adds.
    """

    layer: Layer
    source: str
    result: str
    other: str | None = None


@dataclass(frozen=True, slots=True)
class Network:
    """Layers in an order in which each finds its inputs made.

    Attributes:
        values: all of them by name.
        inputs, outputs: names of those that the host gives and takes.
    """

    values: Mapping[str, Value]
    nodes: Sequence[Node]
    inputs: Sequence[str]
    outputs: Sequence[str]

    def __call__(self, given: Mapping[str, Int8]) -> dict[str, Int8]:
        """Every value, inputs too: the reference that programs and circuit are held to."""
        found = dict(given)
        for node in self.nodes:
            found[node.result] = node.layer(found[node.source], None if node.other is None else found[node.other])
        return found

    @property
    def macs(self) -> int:
        """Multiply-adds of its contractions, those with weights that are zero too."""
        return sum(macs_of(node, self.values) for node in self.nodes)


def macs_of(node: Node, values: Mapping[str, Value]) -> int:
    """Multiply-adds of a contraction, its groups' empty blocks left out; 0 for a pooling."""
    if not isinstance(node.layer, Contraction):
        return 0
    _, height, width = values[node.result].shape
    return node.layer.weights.size // node.layer.groups * height * width


@dataclass(frozen=True, slots=True)
class Executable:
    """A network compiled for a design.

    Attributes:
        program: instructions, tokens placed.
        image: memory before the first run: constants, and room for values.
        places: where each value lies.
        packed: inputs that lie in memory as the windows that their layer reads, one channel for each value of a window.
    """

    design: Design
    program: bytes
    image: NDArray[np.uint8]
    places: Mapping[str, Place]
    packed: Mapping[str, tuple[Window, int]]

    def write(self, name: str, value: Int8, memory: NDArray[np.uint8]) -> None:
        """Put an input, (channels, height, width), where the program reads it."""
        if name in self.packed:
            value = windows_of(value, *self.packed[name])
        self.places[name].write(value, memory, self.design)

    def read(self, name: str, memory: NDArray[np.uint8]) -> Int8:
        """A value that the program made, (channels, height, width)."""
        return self.places[name].read(memory, self.design)


def compile_network(network: Network, design: Design) -> Executable:
    """Lay out memory and compile layer after layer.

    Raises:
        ProgramError: a layer does not fit the design's buffers.
    """
    compiler, places, packed = Compiler(design), dict[str, Place](), dict[str, tuple[Window, int]]()
    readers = {name: [node for node in network.nodes if name in (node.source, node.other)] for name in network.values}
    unpacked = dict[str, Node]()
    for name in network.inputs:
        shape = network.values[name].shape
        if len(readers[name]) == 1 and (thin := _thin(readers[name][0], shape[0], design)) is not None:
            node = readers[name][0]
            packed[name] = node.layer.window, node.layer.pad_value
            unpacked[node.result] = Node(thin, node.source, node.result, node.other)
            shape = thin.weights.shape[1], *node.layer.window.results(*shape[1:])
        places[name] = compiler.place(*shape)
    for node in network.nodes:
        node = unpacked.get(node.result, node)
        other = None if node.other is None else places[node.other]
        places[node.result] = compiler.layer(node.layer, places[node.source], other)
    program = synchronised(compiler.program(), design, compiler.words)
    return Executable(design, encode(program), compiler.image(), places, packed)


def _thin(node: Node, channels: int, design: Design) -> Contraction | None:
    """A contraction of few channels as one over its windows, where that fills the array better."""
    layer = node.layer
    if not isinstance(layer, Contraction) or node.other is not None:
        return None
    taps = layer.weights.shape[2] * layer.weights.shape[3]
    before, after = taps * -(-channels // design.rows), -(-channels * taps // design.rows)
    if before < 2 * after:
        return None
    return Contraction(layer.weights.reshape(len(layer.weights), -1, 1, 1), POINT, layer.pad_value, layer.step)


def windows_of(picture: Int8, window: Window, fill: int) -> Int8:
    """(channels * taps, lines, columns): what a window reads, as channels."""
    seen = window.of(picture, fill).transpose(0, 3, 4, 1, 2)
    return np.ascontiguousarray(seen).reshape(-1, *seen.shape[3:])
