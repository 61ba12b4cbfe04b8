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
        """Vectors a channel, no border."""
        return self.rows * self.columns

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


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor of channels over regions, each with a border of pixels that belong to its neighbours.

    Where there is a border, it and what is beyond the plane hold what a window reads there: the neighbours' values, and
    zeros outside the plane.

    Attributes:
        border: rows above, columns left, rows below, columns right.
    """

    regions: Regions
    border: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def down(self) -> int:
        """Rows of a region with its border."""
        return self.regions.rows + self.border[0] + self.border[2]

    @property
    def across(self) -> int:
        """Columns of a region with its border."""
        return self.regions.columns + self.border[1] + self.border[3]

    @property
    def vectors(self) -> int:
        """Vectors a channel."""
        return self.down * self.across

    def size(self, channels: int) -> int:
        """Values of a flat tensor, slack included."""
        return (channels * self.vectors + 2) * self.regions.lanes

    def pixels(self) -> tuple[Array, Array]:
        """Row and column, (vectors, lanes), of the pixel that lies at each place."""
        top, left, bottom, right = self.border
        return self.regions.pixels(Window((top + bottom + 1, left + right + 1), padding=self.border))

    def places(self, y: Array, x: Array) -> Array:
        """Where in a channel pixels lie, each in its own region, counted in values; -1 for those not in the plane."""
        regions = self.regions
        inside = (y >= 0) & (y < regions.height) & (x >= 0) & (x < regions.width)
        y, x = np.where(inside, y, 0), np.where(inside, x, 0)
        lane = y // regions.rows * regions.grid_columns + x // regions.columns
        row, column = y % regions.rows + self.border[0], x % regions.columns + self.border[1]
        return np.where(inside, (row * self.across + column) * regions.lanes + lane, -1)

    def copies(self) -> tuple[Array, Array, Array]:
        """Vectors that are not the region's own: which, where each starts that it repeats, and which lanes count."""
        places = self.places(*self.pixels())
        if not any(self.border):
            places = places[:0]
        own = np.arange(places.size).reshape(places.shape)
        which = np.flatnonzero((places != own).any(1))
        found = shifts(places[which])
        assert found is not None, "neighbouring regions lie in neighbouring lanes"
        return which.astype(np.int32), *found

    def covers(self, other: "Layout") -> bool:
        """Whether a reader of the other layout may read this one in its place."""
        wide_enough = all(mine >= its for mine, its in zip(self.border, other.border, strict=True))
        return self.regions == other.regions and wide_enough


def shifts(places: Array) -> tuple[Array, Array] | None:
    """For each vector of (vectors, lanes) places one start, and which lanes count, where lanes read neighbours.

    None where the lanes of some vector do not lie one beside the other.
    """
    counts = places >= 0
    starts = np.where(counts, places - np.arange(places.shape[1]), np.iinfo(np.int32).max).min(1)
    starts = np.where(counts.any(1), starts, 0).astype(np.int32)
    beside = ~counts | (places == starts[:, None] + np.arange(places.shape[1]))
    return (starts, counts) if beside.all() else None
