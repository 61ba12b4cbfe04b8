"""Into blocked layout and back: (N, C, H, W) to (N, blocks, H, W, L) with the last block filled up with zeros."""

from collections.abc import Sequence
from typing import Any

from tvm import te, tirx


def block(x: te.Tensor, lanes: int) -> te.Tensor:
    """Blocked twin of a planar tensor."""
    n, channels, h, w = (int(size) for size in x.shape)
    blocks = -(-channels // lanes)

    def value(n: Any, c: Any, h: Any, w: Any, lane: Any) -> Any:
        channel = c * lanes + lane
        if channels % lanes == 0:
            return x(n, channel, h, w)
        inside = x(n, tirx.min(channel, channels - 1), h, w)
        return tirx.Select(channel < channels, inside, tirx.const(0, x.dtype))

    return te.compute((n, blocks, h, w, lanes), value, name="block")


def unblock(x: te.Tensor, segments: Sequence[int]) -> te.Tensor:
    """Planar twin of a blocked tensor whose channels lie in segments, each filled up to whole blocks."""
    n, _, h, w, lanes = (int(size) for size in x.shape)

    def value(n: Any, c: Any, h: Any, w: Any) -> Any:
        position, logical, physical = c, 0, 0
        for width in segments:
            position = tirx.Select(c >= logical, c - logical + physical, position) if logical else c
            logical, physical = logical + width, physical + -(-width // lanes) * lanes
        return x(n, position // lanes, h, w, position % lanes)

    return te.compute((n, sum(segments), h, w), value, name="unblock")
