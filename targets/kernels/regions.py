"""The layout of sparse convolutions: a plane is cut into as many regions as a vector has lanes, one region a lane.

A step to the next pixel of every region is then a step to the next vector, so that a kernel element at any offset reads
whole, aligned vectors. A tensor of channels is flat: `lanes` values of slack, the vectors of each channel's region
row by row, and slack again; slack lets a vector that was shifted by a few lanes be read without asking.
"""

from dataclasses import dataclass

import numpy as np

from targets.base import Array
from targets.kernels.window import Window


@dataclass(frozen=True, slots=True)
class Regions:
    """A plane of height x width as grid_rows x grid_columns regions of one size, the last ones partly beyond it."""

    height: int
    width: int
    grid_rows: int
    grid_columns: int

    @classmethod
    def of(cls, height: int, width: int, lanes: int) -> "Regions":
        """The cut with the fewest vectors a channel, and among equals the one with the smallest border."""
        cuts = [cls(height, width, lanes // across, across) for across in range(1, lanes + 1) if lanes % across == 0]
        return min(cuts, key=lambda cut: (cut.positions, (cut.rows + 2) * (cut.columns + 2)))

    @property
    def lanes(self) -> int:
        """Regions, one in each lane of a vector."""
        return self.grid_rows * self.grid_columns

    @property
    def rows(self) -> int:
        """Rows of a region."""
        return -(-self.height // self.grid_rows)

    @property
    def columns(self) -> int:
        """Columns of a region."""
        return -(-self.width // self.grid_columns)

    @property
    def positions(self) -> int:
        """Vectors a channel."""
        return self.rows * self.columns

    def size(self, channels: int) -> int:
        """Values of a flat tensor, slack included."""
        return (channels * self.positions + 2) * self.lanes

    def pixels(self, window: Window) -> tuple[Array, Array]:
        """Row and column, (vectors, lanes), of the input pixels that each lane reads for its region of outputs.

        Pixels outside the picture are the window's padding, or belong to outputs beyond the plane.
        """
        down, across = np.divmod(np.arange(self.lanes), self.grid_columns)
        found = []
        for axis, (count, first) in enumerate(((self.rows, down * self.rows), (self.columns, across * self.columns))):
            reach = np.arange(window.reach(count, axis))
            found.append(reach[:, None] + first[None, :] * window.strides[axis] - window.padding[axis])
        rows, columns = found
        shape = (len(rows), len(columns), self.lanes)
        y, x = np.broadcast_to(rows[:, None], shape), np.broadcast_to(columns[None], shape)
        return y.reshape(-1, self.lanes), x.reshape(-1, self.lanes)

    def places(self, y: Array, x: Array) -> Array:
        """Where in a channel of this layout the pixels lie, counted in values; -1 for those outside the plane."""
        inside = (y >= 0) & (y < self.height) & (x >= 0) & (x < self.width)
        y, x = np.where(inside, y, 0), np.where(inside, x, 0)
        lane = y // self.rows * self.grid_columns + x // self.columns
        return np.where(inside, (y % self.rows * self.columns + x % self.columns) * self.lanes + lane, -1)


def shifts(places: Array) -> tuple[Array, Array] | None:
    """For each vector of (vectors, lanes) places one start, and which lanes count, where lanes read neighbours.

    None where the lanes of some vector do not lie one beside the other.
    """
    counts = places >= 0
    starts = np.where(counts, places - np.arange(places.shape[1]), np.iinfo(np.int32).max).min(1)
    starts = np.where(counts.any(1), starts, 0).astype(np.int32)
    beside = ~counts | (places == starts[:, None] + np.arange(places.shape[1]))
    return (starts, counts) if beside.all() else None
