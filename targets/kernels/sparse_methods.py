"""A sparse convolution's candidates: how its outputs are tiled, and how its inputs are taken in chunks."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from profiles.device import Device
from targets.base import Array
from targets.kernels.regions import Layout, Regions
from targets.kernels.sparse import Grid, SparseConvolution, sparse_convolution
from targets.kernels.tile import CACHE_BYTES
from targets.kernels.window import Window

_TEAMS = (1, 2, 4)  # outputs that may be summed together
_SPLITS = 6  # of a layer, that are worth a try
_NONZERO = 2.0  # cycles of one more weight with its place, from memory
_SHARED_BYTES = 5  # a cycle, that a core reads from another's cache
_FAR_STORE = 6.0  # cycles of an output vector that the core's own cache does not hold


@dataclass(frozen=True)
class SparseLayer:
    """A convolution of one picture as a sparse kernel sees it; weights, (O, I of a group, h, w), as in the network."""

    inputs: int
    size: tuple[int, int]
    weights: Array
    window: Window
    groups: int
    height: int
    width: int

    @property
    def outputs(self) -> int:
        """Channels."""
        return int(self.weights.shape[0])

    @cached_property
    def nonzeros(self) -> int:
        """Weights that are not zero."""
        return int(np.count_nonzero(self.weights))

    @property
    def macs(self) -> int:
        """Multiply-adds by definition, zeros included."""
        return self.weights.size * self.height * self.width

    @property
    def key(self) -> str:
        """What records know it by; the density is rounded, as times depend little on which weights are zero."""
        def text(sizes: tuple[int, ...]) -> str:
            return "x".join(map(str, sizes))

        window, (height, width) = self.window, self.size
        geometry = f"s{text(window.strides)} p{text(window.padding)} d{text(window.dilation)} g{self.groups}"
        density = f"{self.nonzeros / max(1, self.weights.size):.2g}"
        if self.outputs % 4 == 0 and self.nonzeros > 2 * self.places(4):
            density += " in blocks"
        return f"sparse {self.inputs}x{height}x{width} by {text(self.weights.shape)} {geometry}, density {density}"

    @property
    def border(self) -> tuple[int, int, int, int] | None:
        """The border that lets it read its input as it lies; None if it cannot, as input and output differ in size."""
        window = self.window
        top, left = window.padding[:2]
        bottom, right = ((window.kernel[axis] - 1) * window.dilation[axis] - window.padding[axis] for axis in (0, 1))
        same = self.size == (self.height, self.width) and window.strides == (1, 1)
        return (top, left, bottom, right) if same and bottom >= 0 and right >= 0 else None

    def convolution(self, made: Layout, given: Layout | None) -> SparseConvolution:
        """What a kernel is generated for, for an input that lies so, or, without one, as its own window reads it."""
        window, regions = self.window, made.regions
        if given is None:
            grid = Grid(window.reach(regions.rows, 0), window.reach(regions.columns, 1))
        else:
            row, column = given.border[0] - window.padding[0], given.border[1] - window.padding[1]
            grid = Grid(given.down, given.across, row, column)
        return SparseConvolution(self.inputs, self.outputs, grid, made, window, groups=self.groups)

    def candidates(self, device: Device) -> "list[Sparse]":
        """The tiles and chunks worth a try."""
        made = Layout(Regions.of(self.height, self.width, device.vector_lanes))
        given = None if self.border is None else Layout(made.regions, self.border)
        whole = self.convolution(made, given)
        teams = [team for team in _TEAMS if self.outputs // self.groups % team == 0]
        splits = dict.fromkeys(split for team in teams for split in replace(whole, team=team).splits(device))
        return sorted((Sparse(self, split, device) for split in splits), key=lambda one: one.cycles)[:_SPLITS]

    def places(self, team: int) -> int:
        """Weights that are not zero, those of a team of neighbouring outputs at one place counted once."""
        if team not in self._places:
            by_team = self.weights.reshape(self.outputs // team, team, -1)
            self._places[team] = int((by_team != 0).any(1).sum())
        return self._places[team]

    @cached_property
    def _places(self) -> dict[int, int]:
        return {}


@dataclass(frozen=True)
class Sparse:
    """A sparse kernel with one tile and chunk."""

    layer: SparseLayer
    split: SparseConvolution
    device: Device

    @property
    def name(self) -> str:
        rows, columns = self.split.tile
        team = f" teams of {self.split.team}" if self.split.team > 1 else ""
        return f"sparse {rows}x{columns} {min(self.split.chunk, self.split.inputs)}{team}"

    @property
    def cycles(self) -> float:
        """Estimate of the kernel alone: sums, weights and their places from memory, outputs to it if they are many."""
        vectors = self.layer.outputs * self.split.made.vectors
        stores = vectors * (_FAR_STORE if 4 * self.split.lanes * vectors > CACHE_BYTES else 1.0)
        places, others = self.layer.places(self.split.team), self.device.cores - 1
        shared = others * 4 * self.split.input_size / _SHARED_BYTES / 2  # each core reads all inputs, when all work
        return shared + self.split.cycles(places) + places * (1 + self.split.team) / 2 * _NONZERO + stores

    def trial(self) -> tuple[Any, list[Array]]:
        conv, layer = self.split, self.layer
        tables = conv.weights(layer.weights)
        function = sparse_convolution(conv, len(tables[1]), self.device, {})
        x = np.random.default_rng(0).standard_normal(conv.input_size, np.float32)
        bias, y = (np.zeros(size, np.float32) for size in (layer.outputs, conv.made.size(layer.outputs)))
        return function, [x, *tables, bias, y]
