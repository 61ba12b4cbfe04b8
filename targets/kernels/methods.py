"""A dense convolution's candidates: directly, or by Winograd's transforms, with the register tiles worth a try."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import numpy as np
from tvm import te

from profiles.device import Device
from targets.base import Array
from targets.kernels.convolution import convolution
from targets.kernels.phases import phase_blocks, phase_weights, phase_window
from targets.kernels.tile import CACHE_BYTES, Tile, convolution_tiles, divisors, product_cycles, with_tasks
from targets.kernels.window import Window
from targets.kernels.winograd import Transforms, tiles_of, transforms_for, winograd, winograd_weights

_TILES = 8  # register tiles of each method that are worth a try
_MEMORY_BYTES = 3.5  # a cycle, of weights that come from beyond the core's own cache, as each inference's do
_GATHER = 1.5  # cycles of a value of planar input that is put into its lane
_TRANSFORM = 1.6  # a transform's cycles beside its additions at two a cycle: loads, stores, too few registers


@dataclass(frozen=True, slots=True)
class ConvolutionLayer:
    """A dense convolution in blocked layout.

    Attributes:
        source: (N, I, H, W, lanes), or (N, channels, H, W) where the input is planar.
        weights: (O, I, kernel h, kernel w, input lanes, lanes), I of one group.
        height, width: of the output.
        exact: whether sums are to be the definition's, where float32 holds those, as a quantized network's have to be.
    """

    source: tuple[int, ...]
    weights: tuple[int, ...]
    window: Window
    height: int
    width: int
    exact: bool = False

    @property
    def blocks_per_group(self) -> int:
        """Blocks of outputs that read the same inputs."""
        return self.weights[0] * self.weights[1] // self.source[1]

    @property
    def macs(self) -> int:
        """Multiply-adds of the direct method, fillers included."""
        return self.source[0] * self.height * self.width * prod(self.weights)

    @property
    def key(self) -> str:
        """What records know it by."""
        def text(sizes: tuple[int, ...]) -> str:
            return "x".join(map(str, sizes))

        window = self.window
        geometry = f"s{text(window.strides)} p{text(window.padding)} d{text(window.dilation)}"
        what = "exact convolution" if self.exact else "convolution"
        return f"{what} {text(self.source)} by {text(self.weights)} {geometry} to {self.height}x{self.width}"

    def candidates(self, device: Device) -> "list[Direct | Winograd]":
        """Every method and tile worth a try."""
        found: list[Direct | Winograd] = [Direct(self, tile) for tile in self._direct_tiles(device)]
        window, grouped = self.window, self.blocks_per_group != self.weights[0]
        [taps, *others] = set(phase_window(window).kernel)
        if self.exact or others or grouped or len(set(window.strides)) > 1 or max(window.dilation) > 1:
            return found
        for transforms in transforms_for(taps):
            if min(self.height, self.width) >= transforms.outputs:
                tiles = self._winograd_tiles(device, transforms)
                found += [Winograd(self, transforms, tile, device.cores) for tile in tiles]
        return found

    def _direct_tiles(self, device: Device) -> Iterator[Tile]:
        tiles = convolution_tiles(device, self.blocks_per_group, self.height, self.width)
        if len(self.source) == 4:  # kernel columns are unrolled, and the pixels that they share stay in registers too
            tiles = [tile for tile in tiles if tile.registers + tile.rows * tile.columns <= device.vector_registers]
        for tile in tiles[:_TILES]:
            yield with_tasks(tile, device, self.weights[0], self.height, self.source[0], 4 * prod(self.weights))

    def _winograd_tiles(self, device: Device, transforms: Transforms) -> Iterator[Tile]:
        down, across = ceil(self.height / transforms.outputs), ceil(self.width / transforms.outputs)
        for tile in convolution_tiles(device, self.weights[0], down, across)[:_TILES]:
            rows = ceil(down / tile.rows)
            tasks = [
                replace(tile, chunk=chunk, shares=shares)
                for chunk in divisors(rows) for shares in divisors(self.weights[0] // tile.blocks)
                if shares <= device.cores
            ]
            yield from sorted(tasks, key=lambda one: Winograd(self, transforms, one, device.cores).cycles)[:3]


@dataclass(frozen=True, slots=True)
class Direct:
    """Every product of the definition."""

    layer: ConvolutionLayer
    tile: Tile

    @property
    def name(self) -> str:
        return f"direct {self.tile}"

    @property
    def cycles(self) -> float:
        layer = self.layer
        inputs = prod(layer.weights[1:5])
        per_image = inputs * product_cycles(self.tile, layer.weights[0], layer.height, layer.width)
        return layer.source[0] * per_image + _weight_cycles(4 * prod(layer.weights), 1)

    def pack(self, weights_OIHWLL: Array) -> Array:
        """Weights as the kernel reads them."""
        return weights_OIHWLL

    def kernel(self, x: te.Tensor, weights: te.Tensor) -> te.Tensor:
        """The convolution, for packed weights."""
        layer, about = self.layer, _about(self.layer, "direct", self.layer.macs)
        return convolution(x, weights, layer.window, layer.height, layer.width, self.tile, about)

    def trial(self) -> tuple[Any, list[Array]]:
        return _trial(self.layer, self.kernel, self.layer.weights)


@dataclass(frozen=True, slots=True, eq=False)
class Winograd:
    """F(m x m, r x r), over the phases of the input where there is a stride."""

    layer: ConvolutionLayer
    transforms: Transforms
    tile: Tile
    cores: int

    @property
    def name(self) -> str:
        return f"winograd {self.transforms.outputs} {self.tile}"

    @property
    def _packed(self) -> tuple[int, ...]:
        """Shape of transformed weights, (tile rows, tile columns, O, I, lanes of I, lanes)."""
        layer, size = self.layer, self.transforms.size
        outputs, lanes = layer.weights[0], layer.weights[5]
        return (size, size, outputs, *phase_blocks(layer.source, layer.window, lanes), lanes)

    @property
    def cycles(self) -> float:
        layer, tile, transforms = self.layer, self.tile, self.transforms
        down, across = tiles_of(transforms.outputs, layer.height, layer.width, tile)
        size, _, blocks, in_blocks, in_lanes, lanes = self._packed
        in_channels = in_blocks * in_lanes
        tasks = layer.source[0] * down // (tile.rows * tile.chunk) * tile.shares
        products = size**2 * in_channels * product_cycles(tile, blocks, down, across)
        inputs = tile.shares * in_blocks * 2 * size * np.count_nonzero(transforms.of_inputs)
        sums = blocks * (size + transforms.outputs) * np.count_nonzero(transforms.of_sums)
        arithmetic = layer.source[0] * (products + down * across * (inputs + sums) / 2 * _TRANSFORM)
        if len(layer.source) == 4:
            arithmetic += layer.source[0] * down * across * transforms.outputs**2 * in_channels * tile.shares * _GATHER
        weight_bytes = 4 * prod(self._packed)
        between = 4 * size**2 * (in_blocks + blocks // tile.shares) * lanes * down * across
        each = between / (down // (tile.rows * tile.chunk))
        pace = 24 if each > 2 * CACHE_BYTES else 48 if each > CACHE_BYTES // 2 else 128
        memory = _weight_cycles(weight_bytes, tasks // tile.shares) + layer.source[0] * 2 * between * tile.shares / pace
        total = arithmetic + memory
        idle = self.cores * ceil(tasks / self.cores) / tasks  # time with all cores, beside a fair share of the work
        return total * (1 + idle) / 2

    def pack(self, weights_OIHWLL: Array) -> Array:
        """Weights as the kernel reads them."""
        return winograd_weights(
            phase_weights(weights_OIHWLL, self.layer.window, *self._packed[3:5]), self.transforms
        )

    def kernel(self, x: te.Tensor, weights: te.Tensor) -> te.Tensor:
        """The convolution, for packed weights."""
        layer = self.layer
        tiles = prod(tiles_of(self.transforms.outputs, layer.height, layer.width, self.tile))
        about = _about(layer, f"winograd {self.transforms.outputs}", layer.source[0] * tiles * prod(self._packed))
        return winograd(x, weights, self.transforms, layer.window, layer.height, layer.width, self.tile, about)

    def trial(self) -> tuple[Any, list[Array]]:
        return _trial(self.layer, self.kernel, self._packed)


def _weight_cycles(weight_bytes: int, reads: int) -> float:
    """Cycles to bring weights into a core, `reads` times if its cache cannot hold them."""
    return weight_bytes / _MEMORY_BYTES * (reads if weight_bytes > CACHE_BYTES else 1)


def _about(layer: ConvolutionLayer, method: str, work: int) -> dict[str, Any]:
    return {"layer": layer.key, "method": method, "work": work}


def _trial(layer: ConvolutionLayer, kernel: Callable[..., Any], weights: tuple[int, ...]) -> tuple[Any, list[Array]]:
    given = [te.placeholder(layer.source, name="x"), te.placeholder(weights, name="weights")]
    made = kernel(*given)
    shapes = layer.source, weights, tuple(int(size) for size in made.shape)
    rng = np.random.default_rng(0)
    return te.create_prim_func([*given, made]), [rng.standard_normal(shape, np.float32) for shape in shapes]
