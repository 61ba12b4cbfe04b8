"""Rectangles of results: which a layer is cut into, what they read of memory, and where they go."""

from dataclasses import dataclass, replace

from targets.accelerator.design import Design
from targets.accelerator.isa import Load, Memory, Store
from targets.accelerator.layers import Window
from targets.accelerator.tensors import Place


@dataclass(frozen=True, slots=True)
class Patch:
    """A rectangle of results."""

    y: int
    x: int
    ny: int
    nx: int

    def times(self, pool: tuple[int, int]) -> "Patch":
        """What is pooled into it."""
        return Patch(self.y * pool[0], self.x * pool[1], self.ny * pool[0], self.nx * pool[1])


@dataclass(frozen=True, slots=True)
class Cut:
    """How a contraction's results are computed: patches of at most so many lines and columns.

    Attributes:
        part: tiles of input channels that are loaded together.
        head: lines of the patches at the top; each row of patches has twice as many as the one above it, up to `ny`.
    """

    ny: int
    nx: int
    part: int
    head: int

    def patches(self, target: Place) -> list[Patch]:
        """All results, those at the top first."""
        found, y, height = list[Patch](), 0, self.head
        while y < target.height:
            end = min(y + height, target.height)
            found += [Patch(y, x, end - y, min(self.nx, target.width - x)) for x in range(0, target.width, self.nx)]
            y, height = end, min(2 * height, self.ny)
        return found


def framed(
    window: Window, fill: int, source: Place, block: int, patch: Patch, memory: Memory, row: int, lane: int, d: Design
) -> Load:
    """Load what a patch reads of a block of channels, with the part of the frame that it reads.

    Lines that windows of a single line step over are left out (`held`).
    """
    seen, lines = held(window)
    height, width = seen.reach((patch.ny, patch.nx))
    y, x = patch.y * window.step[0] - window.pad[0], patch.x * window.step[1] - window.pad[1]
    top, left = max(0, -y), max(0, -x)
    bottom = max(0, y + (height - 1) * lines + 1 - source.height)
    right = max(0, x + width - source.width)
    return Load(
        memory=memory, lane=lane, row=row, address=source.at(block, y + top, x + left, d),
        ny=height - top - bottom, nx=width - left - right, stride=lines * source.width * d.block_words,
        top=top, left=left, bottom=bottom, right=right, pad=fill,
    )  # fmt: skip


def held(window: Window) -> tuple[Window, int]:
    """The window over what lies in the buffer, and how many lines of the picture lie between two of the buffer."""
    if window.size[0] > 1 or window.pad[0] or window.pad[2]:
        return window, 1
    return replace(window, step=(1, window.step[1])), window.step[0]


def stored(patch: Patch, block: int, row: int, target: Place, d: Design) -> Store:
    """Store a patch of a block of channels."""
    return Store(
        row=row, address=target.at(block, patch.y, patch.x, d), ny=patch.ny, nx=patch.nx,
        stride=target.width * d.block_words,
    )  # fmt: skip
