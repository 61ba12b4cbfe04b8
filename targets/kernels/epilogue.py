"""What follows a kernel's anchor in its function: bias, activation, residual sum, the crop of a tile's waste."""

from collections.abc import Collection
from typing import Any

from tvm import s_tir


def gather_epilogue(s: s_tir.Schedule, anchor: Any, scope: str = "local") -> Any:
    """Inline all that follows the anchor into the function's last block and return that; make a copy where none is.

    The anchor's own result then lives in `scope`: "local" for registers.
    """
    if not s.get_consumers(anchor):
        return s.cache_write(anchor, 0, scope)
    following = s.get_consumers(anchor)
    while inner := [block for block in following if s.get_consumers(block)]:
        s.compute_inline(inner[0])
        following = s.get_consumers(anchor)
    inline_beside(s, following[0], {str(s.get(anchor).name_hint)})
    s.set_scope(anchor, 0, scope)
    return following[0]


def inline_beside(s: s_tir.Schedule, final: Any, own: Collection[str]) -> None:
    """Inline what else the last block reads, such as a residual that is a sum; `own` names the kernel's own blocks."""
    while others := [block for block in s.get_producers(final) if s.get(block).name_hint not in own]:
        s.compute_inline(others[0])


def pull_padding(s: s_tir.Schedule, anchor: Any, loop: Any, planar: bool = False) -> None:
    """Compute the anchor's padded input inside `loop`, as much of it as one turn reads; blocked input lane-wise.

    Rows and columns are split where the border ends, so that the inside is copied without asking.
    """
    for pad in s.get_producers(anchor):
        s.compute_at(pad, loop, preserve_unit_loops=True)
        rows, columns, *lane = s.get_loops(pad)[-(len(s.get(pad).iter_vars) - 2) :]
        for axis in (rows, columns):
            s.annotate(axis, "pragma_loop_partition_hint", True)
        for loop_ in lane:
            (s.unroll if planar else s.vectorize)(loop_)


def store_by_vectors(s: s_tir.Schedule, final: Any, unrolled: int) -> None:
    """Vectorise the last loop of the storing block and unroll as many before it."""
    *outer, lane = s.get_loops(final)
    s.vectorize(lane)
    for loop in outer[-unrolled:]:
        s.unroll(loop)
