"""A network of integer layers: what it answers in numpy, and its program for a design."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from targets.accelerator.arithmetic import Int8
from targets.accelerator.cutting import fastest
from targets.accelerator.design import Design
from targets.accelerator.isa import encode
from targets.accelerator.layers import POINT, Contraction, Layer, Product, Window
from targets.accelerator.ordering import ordered
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
    """A tensor that the network computes or is given: int8 (channels, height, width).

    Attributes:
        last: whether the program's tensor has its channels last, (1, ..., channels), rather than (1, channels, ...).
    """

    name: str
    shape: tuple[int, int, int]
    grid: Grid
    last: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """A layer and the values that it reads and makes.

    Attributes:
        other: what the layer's step adds, or the second operand of a product.
    """

    layer: Layer
    source: str
    result: str
    other: str | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.source,) if self.other is None else (self.source, self.other)


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
    """Multiply-adds of a contraction, its groups' empty blocks left out, or of a product; 0 for a pooling."""
    if isinstance(node.layer, Product):
        return int(np.prod(values[node.source].shape)) * node.layer.channels
    if not isinstance(node.layer, Contraction):
        return 0
    height, width = node.layer.window.results(*values[node.source].shape[1:])
    return node.layer.weights.size // node.layer.groups * height * width


@dataclass(frozen=True, slots=True)
class Executable:
    """A network compiled for a design.

    Attributes:
        program: instructions, tokens placed.
        layers: of each instruction, the number of the node that it is for.
        image: memory before the first run: constants, and room for values.
        places: where each value lies.
        packed: how inputs lie in memory that do so as the windows that their layer reads.
    """

    design: Design
    program: bytes
    layers: Sequence[int]
    image: NDArray[np.uint8]
    places: Mapping[str, Place]
    packed: Mapping[str, "Packing"]

    def write(self, name: str, value: Int8, memory: NDArray[np.uint8]) -> None:
        """Put an input, (channels, height, width), where the program reads it."""
        if name in self.packed:
            value = self.packed[name](value)
        self.places[name].write(value, memory, self.design)

    def read(self, name: str, memory: NDArray[np.uint8]) -> Int8:
        """A value that the program made, (channels, height, width)."""
        return self.places[name].read(memory, self.design)


def compile_network(network: Network, design: Design) -> Executable:
    """Lay out memory and compile layer after layer.

    Raises:
        ProgramError: a layer does not fit the design's buffers.
    """
    return compile_networks([network], design)[0]


def compile_networks(networks: Sequence[Network], design: Design) -> tuple[Executable, ...]:
    """Programs that share one memory: each in its own place, all in every image, so that switching moves nothing.

    Raises:
        ProgramError: a layer does not fit the design's buffers.
    """
    compiler = Compiler(design)
    found = [_compiled(network, compiler) for network in networks]
    image = compiler.image()
    return tuple(replace(one, image=image) for one in found)


def _compiled(network: Network, compiler: Compiler) -> Executable:
    """A network's program, without the memory's image."""
    design, places, packed = compiler.design, dict[str, Place](), dict[str, Packing]()
    readers = {name: [node for node in network.nodes if name in (node.source, node.other)] for name in network.values}
    unpacked, first = dict[str, Node](), len(compiler.groups)
    for name in network.inputs:
        shape = network.values[name].shape
        if len(readers[name]) == 1 and (thin := _packed(readers[name][0], shape[0], design)) is not None:
            packed[name], node = thin
            unpacked[node.result] = node
            shape = len(packed[name].order), *packed[name].window.results(*shape[1:])
        places[name] = compiler.place(*shape)
    for node in network.nodes:
        node = unpacked.get(node.result, node)
        other = None if node.other is None else places[node.other]
        cut = fastest(compiler, node.layer, places[node.source], other)
        places[node.result] = compiler.layer(node.layer, places[node.source], other, cut)
    instructions, layers = zip(*ordered(compiler.groups[first:], design), strict=True)
    program = encode(synchronised(instructions, design, compiler.words))
    return Executable(design, program, [layer - layers[0] for layer in layers], np.zeros(0, np.uint8), places, packed)


@dataclass(frozen=True, slots=True)
class Packing:
    """An input as the windows that its layer reads: a channel for each value of a window that some output needs.

    Attributes:
        fill: what the frame holds.
        order: of each channel, its number in (channels, lines of a window, columns of a window).
    """

    window: Window
    fill: int
    order: NDArray[np.int64]

    def __call__(self, picture: Int8) -> Int8:
        """(channels, lines, columns of results)."""
        seen = self.window.of(picture, self.fill).transpose(0, 3, 4, 1, 2)
        return np.ascontiguousarray(seen.reshape(-1, *seen.shape[3:])[self.order])


def _packed(node: Node, channels: int, design: Design) -> tuple[Packing, Node] | None:
    """A contraction of few channels as one over its windows, where that fills the array better.

    Each block of outputs finds what it needs in as few tiles as hold it; blocks share tiles where they fit together.
    """
    layer = node.layer
    if not isinstance(layer, Contraction) or node.other is not None:
        return None
    taps = layer.weights.shape[2] * layer.weights.shape[3]
    if taps * -(-channels // design.rows) < 2 * -(-channels * taps // design.rows):
        return None
    rows, flat = design.rows, layer.weights.reshape(len(layer.weights), -1)
    tiles: list[list[int]] = []
    homes: list[tuple[slice, list[int], int]] = []
    for first in range(0, len(flat), design.columns):
        block = slice(first, first + design.columns)
        needed = np.flatnonzero(flat[block].any(0)).tolist()
        for start in range(0, len(needed), rows):
            part = needed[start : start + rows]
            fits = [k for k, tile in enumerate(tiles) if len({*tile, *part}) <= rows]
            home = max(fits, key=lambda k: len({*tiles[k]} & {*part}), default=len(tiles))
            if home == len(tiles):
                tiles.append([])
            tiles[home] += [number for number in part if number not in tiles[home]]
            homes.append((block, part, home))
    order = [number for tile in tiles[:-1] for number in (tile + tile[:1] * rows)[:rows]]
    order += tiles[-1] if tiles else [0]
    weights = np.zeros((len(flat), len(order)), np.int8)
    for block, part, home in homes:
        at = [home * rows + tiles[home].index(number) for number in part]
        weights[block, at] = flat[block, part]
    thin = replace(layer, weights=weights[:, :, None, None], window=POINT)
    packing = Packing(layer.window, layer.pad_value, np.array(order))
    return packing, Node(thin, node.source, node.result)
