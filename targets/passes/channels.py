"""How logical channels lie in a blocked tensor, and how constants and weights are packed to match."""

from dataclasses import dataclass

import numpy as np

from targets.base import Array


@dataclass(frozen=True, slots=True)
class Channels:
    """Segments of channels one after the other, each filled up to whole blocks of `lanes`.

    A convolution's output is one segment; a concatenation keeps the segments of its parts, so that it moves nothing
    within a block.
    """

    segments: tuple[int, ...]
    lanes: int

    @property
    def count(self) -> int:
        """Logical channels."""
        return sum(self.segments)

    @property
    def blocks(self) -> int:
        """Blocks, fillers included."""
        return sum(-(-width // self.lanes) for width in self.segments)

    @property
    def whole(self) -> bool:
        """No lane is a filler."""
        return all(width % self.lanes == 0 for width in self.segments)

    def positions(self) -> Array:
        """Where each logical channel lies, counted in lanes."""
        found, start = [], 0
        for width in self.segments:
            found.append(np.arange(start, start + width))
            start += -(-width // self.lanes) * self.lanes
        return np.concatenate(found)

    def joined(self, other: "Channels") -> "Channels":
        """Channels of a concatenation."""
        return Channels(self.segments + other.segments, self.lanes)

    def pack(self, array: Array, axis: int, fill: float = 0.0) -> Array:
        """`array` with the logical channels along `axis` replaced by (blocks, lanes), fillers set to `fill`."""
        moved = np.moveaxis(array, axis, 0)
        spread = np.full((self.blocks * self.lanes, *moved.shape[1:]), fill, array.dtype)
        spread[self.positions()] = moved
        blocked = spread.reshape(self.blocks, self.lanes, *moved.shape[1:])
        return np.moveaxis(blocked, (0, 1), (axis, axis + 1))


def pack_convolution(weights_OIHW: Array, inputs: Channels, outputs: Channels) -> Array:
    """(O blocks, I blocks, kernel h, kernel w, I lanes, O lanes)."""
    packed = inputs.pack(outputs.pack(weights_OIHW, 0), 2)
    return np.ascontiguousarray(packed.transpose(0, 2, 4, 5, 3, 1))


def whole_groups(weights_OIHW: Array, groups: int, inputs: Channels) -> tuple[Array, int]:
    """The same grouped convolution with neighbouring groups merged until each one's channels are whole blocks.

    Merged groups get zeros where they did not reach; returns weights and how many groups are left, one at worst.
    """
    out_each, in_each = weights_OIHW.shape[0] // groups, weights_OIHW.shape[1]
    sizes = [size for size in range(1, groups) if groups % size == 0]
    fits = [size for size in sizes if size * out_each % inputs.lanes == size * in_each % inputs.lanes == 0]
    merge = min(fits, default=groups) if inputs.whole else groups
    merged = np.zeros((weights_OIHW.shape[0], merge * in_each, *weights_OIHW.shape[2:]), weights_OIHW.dtype)
    for group in range(groups):
        rows = slice(group * out_each, (group + 1) * out_each)
        first = group % merge * in_each
        merged[rows, first : first + in_each] = weights_OIHW[rows]
    return merged, groups // merge
