"""Whole vectors of flat buffers, for kernels written loop by loop; squares of them are transposed in registers."""

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T


def argument(name: str, size: int, dtype: str = "float32") -> Any:
    """A flat buffer of a kernel, at least one value long."""
    return T.arg(name, T.buffer((max(size, 1),), dtype))


def span(start: Any, lanes: int) -> Any:
    """The places of one vector."""
    return tirx.Ramp(start, 1, lanes)


def room(lanes: int) -> Any:
    """A buffer for a square and for log2(lanes) squares more that lead to its transpose."""
    return T.alloc_buffer((lanes.bit_length() * lanes * lanes,), "float32", scope="local")


def select(condition: Any, vector: Any, lanes: int) -> Any:
    """A vector under a scalar condition, else zero."""
    return tirx.Select(tirx.Broadcast(condition, lanes), vector, tirx.Broadcast(tirx.const(0, "float32"), lanes))


def store_where(condition: Any, always: bool, buffer: Any, value: Any, at: list[Any]) -> None:
    """Emit a store that happens under a condition, or always."""
    if always:
        T.buffer_store(buffer, value, at)
        return
    with T.If(condition), T.Then():
        T.buffer_store(buffer, value, at)


def transposed(square: Any, lanes: int) -> list[Any]:
    """Rows of the transpose of a buffer's first `lanes` vectors; it has room for log2(lanes) such squares more."""
    step, level = 1, 0
    while step < lanes:
        given, made = level * lanes * lanes, (level + 1) * lanes * lanes
        low = [k if not k & step else lanes + k - step for k in range(lanes)]
        high = [k + step if not k & step else lanes + k for k in range(lanes)]
        for row in (row for row in range(lanes) if not row & step):
            pair = [square[span(given + r * lanes, lanes)] for r in (row, row + step)]
            for target, order in ((row, low), (row + step, high)):
                mixed = tirx.Shuffle(pair, [tirx.const(k, "int32") for k in order])
                T.buffer_store(square, mixed, [span(made + target * lanes, lanes)])
        step, level = 2 * step, level + 1
    return [square[span(level * lanes * lanes + row * lanes, lanes)] for row in range(lanes)]
