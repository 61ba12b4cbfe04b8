"""The cost rule that picks a convolution's register tile and its share of work per thread."""

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from math import ceil
from typing import Any

from profiles.device import Device

CACHE_BYTES = 1 << 20  # weights up to here are taken to stay in a core's own cache from one row to the next


@dataclass(frozen=True, slots=True)
class Tile:
    """Output values kept in registers: `blocks` channel blocks by `rows` by `columns`, each a vector of lanes.

    A parallel task computes `chunk` tiles of rows, of every channel block or of one of as many `shares` of them.
    """

    blocks: int
    rows: int
    columns: int
    chunk: int = 1
    shares: int = 1

    def __str__(self) -> str:
        return f"{self.blocks}x{self.rows}x{self.columns} {self.chunk}/{self.shares}"

    @classmethod
    def of(cls, annotations: Mapping[str, Any]) -> "Tile":
        """The tile that a kernel's anchor carries."""
        return cls(*(int(size) for size in annotations["tile"]))

    @property
    def registers(self) -> int:
        """For sums, and for a weight of each channel block."""
        return self.blocks * self.rows * self.columns + self.blocks

    def annotations(self, kernel: str) -> dict[str, Any]:
        """What tells the scheduling pass that a computation is the anchor of such a kernel, and its tile."""
        return {"kernel": kernel, "tile": list(astuple(self))}

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Output size rounded up to whole tiles; what is beyond the real output is computed and never stored."""
        return ceil(height / self.rows) * self.rows, ceil(width / self.columns) * self.columns


def convolution_tile(device: Device, blocks: int, height: int, width: int, most_blocks: int = 4) -> Tile:
    """The tile with the fewest estimated cycles for `blocks` output channel blocks of height x width.

    Among equals the tile with more pixels wins: it reads each weight less often.
    """
    return convolution_tiles(device, blocks, height, width, most_blocks)[0]


def convolution_tiles(device: Device, blocks: int, height: int, width: int, most_blocks: int = 4) -> list[Tile]:
    """Every tile that fits into the registers, the one with the fewest estimated cycles first."""
    return sorted(
        _tiles(device, blocks, height, width, most_blocks),
        key=lambda tile: (product_cycles(tile, blocks, height, width), -tile.rows * tile.columns),
    )


def product_cycles(tile: Tile, blocks: int, height: int, width: int) -> float:
    """Estimated cycles to add one input value times its weights to every output, `blocks` blocks of height x width.

    Two fused multiply-adds start each cycle and take four, so eight accumulators must be in flight; each step loads
    `blocks` weight vectors and one input value for each pixel, two loads a cycle. Pixels beyond the output are waste.
    """
    products = tile.blocks * tile.rows * tile.columns
    loads = tile.blocks + tile.rows * tile.columns
    step = max(products / 2, loads / 2, 4.0) + 0.1 * tile.blocks
    rows, columns = tile.padded(height, width)
    return step * (rows * columns / (tile.rows * tile.columns)) * (blocks / tile.blocks)


def with_tasks(tile: Tile, device: Device, blocks: int, height: int, images: int, weight_bytes: int) -> Tile:
    """The same tile with the most rows per parallel task that still leaves every core three tasks, if it can be.

    Where rows alone keep cores idle for more than a tenth of the time, channel blocks are shared out too; each share
    pads the input again, so there are as few as help. Weights that a core's cache cannot hold are the reason to do
    the opposite: a task takes all rows of some channel blocks, so that each weight comes from memory once.
    """
    row_tiles = ceil(height / tile.rows)
    if weight_bytes > CACHE_BYTES:
        enough = [share for share in divisors(blocks // tile.blocks) if images * share >= 3 * device.cores]
        return replace(tile, chunk=row_tiles, shares=min(enough, default=blocks // tile.blocks))
    fits = [size for size in divisors(row_tiles) if images * (row_tiles // size) >= 3 * device.cores]
    tasks = images * (row_tiles // max(fits, default=1))

    def idle(shares: int) -> float:
        turns = ceil(tasks * shares / device.cores)
        return 1 - tasks * shares / (turns * device.cores)

    shares = next((share for share in divisors(blocks // tile.blocks) if idle(share) <= 0.1), 1)
    return replace(tile, chunk=max(fits, default=1), shares=shares)


def sliding_tile(device: Device, height: int, width: int, planes: int) -> Tile:
    """Columns of a channel-wise kernel: the least waste beyond its width, up to half the registers, then the most.

    The chunk is the most rows a task that leaves every core three tasks.
    """
    columns = min(range(1, min(width, device.vector_registers // 2) + 1),
                  key=lambda size: (ceil(width / size) * max(size, 4), -size))
    fits = [size for size in divisors(height) if planes * (height // size) >= 3 * device.cores]
    return Tile(1, 1, columns, max(fits, default=1))


def _tiles(device: Device, blocks: int, height: int, width: int, most_blocks: int) -> Iterator[Tile]:
    for group in (size for size in divisors(blocks) if size <= most_blocks):
        for rows in range(1, min(height, 4) + 1):
            for columns in range(1, width + 1):
                tile = Tile(group, rows, columns)
                if tile.registers < device.vector_registers:
                    yield tile


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
