"""Kernels over rows of values that lie together: softmax and layer normalisation, a row at a time in a core's cache."""

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import s_tir, te, tirx

from targets.kernels.epilogue import inline_beside

_WORTH_A_TASK = 8192  # values; fewer are not worth waking another core

def softmax(x_RN: te.Tensor, lanes: int) -> te.Tensor:
    """Softmax of each row; a row with NaN is NaN."""
    rows, size = (int(extent) for extent in x_RN.shape)
    padded = _padded(x_RN, lanes, -np.inf)
    largest = _reduced(padded, te.max, "largest")
    power = te.compute(padded.shape, lambda r, k, lane: tirx.exp(padded(r, k, lane) - largest(r)), name="power")
    total = _reduced(power, te.sum, "total")
    share = te.compute((rows,), lambda r: tirx.const(1, "float32") / total(r), name="share")
    return te.compute(
        (rows, size), lambda r, n: power(r, n // lanes, n % lanes) * share(r), name="softmax", attrs={"kernel": "rows"}
    )


def layer_norm(x_RN: te.Tensor, scale_N: te.Tensor, shift_N: te.Tensor, epsilon: float, lanes: int) -> te.Tensor:
    """(x - mean) / sqrt(variance + epsilon) * scale + shift; the variance from the differences to the mean."""
    rows, size = (int(extent) for extent in x_RN.shape)
    padded, share = _padded(x_RN, lanes, 0.0), tirx.const(1 / size, "float32")
    total = _reduced(padded, te.sum, "total")

    def difference(r: Any, k: Any, lane: Any) -> Any:
        value = padded(r, k, lane) - total(r) * share
        zero = tirx.const(0, "float32")
        return value if size % lanes == 0 else tirx.Select(k * lanes + lane < size, value, zero)

    apart = te.compute(padded.shape, difference, name="apart")
    square = te.compute(padded.shape, lambda *at: apart(*at) * apart(*at), name="square")
    spread = _reduced(square, te.sum, "spread")
    factor = te.compute(
        (rows,), lambda r: tirx.const(1, "float32") / tirx.sqrt(spread(r) * share + tirx.const(epsilon, "float32")),
        name="factor",
    )
    return te.compute(
        (rows, size),
        lambda r, n: apart(r, n // lanes, n % lanes) * factor(r) * scale_N(n) + shift_N(n),
        name="layer_norm",
        attrs={"kernel": "rows"},
    )


def schedule_rows(s: s_tir.Schedule, anchor: Any) -> None:
    """Everything of a row is computed in the task of the row, as vectors; the last one is partly beyond it."""
    own = {str(s.get(block).name_hint) for block in [anchor, *_before(s, anchor)]}
    final = anchor
    while consumers := s.get_consumers(final):
        s.compute_inline(final)
        [final] = consumers
    inline_beside(s, final, own)
    row, n = s.get_loops(final)
    width = int(s.get(n).extent)
    lanes, partial = 1, []
    for block in _before(s, final):
        s.compute_at(block, row, preserve_unit_loops=True)
        kinds = [var.iter_type == tirx.IterVar.DataPar for var in s.get(block).iter_vars[1:]]
        loops = s.get_loops(block)[-len(kinds) :] if kinds else []
        across = [loop for loop, parallel in zip(loops, kinds, strict=True) if parallel]
        if across:
            lanes = int(s.get(across[-1]).extent)
            if not all(kinds):
                s.reorder(*(loop for loop, parallel in zip(loops, kinds, strict=True) if not parallel), across[-1])
                partial.append(block)
            s.vectorize(across[-1])
            if s.get(block).name_hint == "pad":
                s.annotate(across[0], "pragma_loop_partition_hint", True)
    n, lane = s.split(n, [None, lanes])
    s.annotate(n, "pragma_loop_partition_hint", True)
    s.vectorize(lane)
    if int(s.get(row).extent) * width >= _WORTH_A_TASK:
        s.parallel(row)
    for block in partial:
        s.decompose_reduction(block, s.get_loops(block)[-2])


def _padded(x_RN: te.Tensor, lanes: int, fill: float) -> te.Tensor:
    """(R, vectors, L); what is beyond the row is `fill`."""
    rows, size = (int(extent) for extent in x_RN.shape)

    def value(r: Any, k: Any, lane: Any) -> Any:
        at = k * lanes + lane
        if size % lanes == 0:
            return x_RN(r, at)
        return tirx.if_then_else(at < size, x_RN(r, tirx.min(at, size - 1)), tirx.const(fill, x_RN.dtype))

    return te.compute((rows, -(-size // lanes), lanes), value, name="pad")


def _reduced(x_RKL: te.Tensor, reduce: Callable[..., Any], name: str) -> te.Tensor:
    """(R,): first a vector for each row, then across it."""
    rows, vectors, lanes = (int(extent) for extent in x_RKL.shape)
    k, across = te.reduce_axis((0, vectors), "k"), te.reduce_axis((0, lanes), "lane")
    partial = te.compute((rows, lanes), lambda r, lane: reduce(x_RKL(r, k, lane), axis=[k]), name=f"{name}_by_lane")
    return te.compute((rows,), lambda r: reduce(partial(r, across), axis=[across]), name=name)


def _before(s: s_tir.Schedule, block: Any) -> list[Any]:
    """All that a block is computed from, each after everything that reads it."""
    def name(one: Any) -> str:
        return str(s.get(one).name_hint)

    found = {name(block): block}
    while ready := [
        producer for reader in found.values() for producer in s.get_producers(reader)
        if name(producer) not in found and all(name(consumer) in found for consumer in s.get_consumers(producer))
    ]:
        found[name(ready[0])] = ready[0]
    return list(found.values())[1:]
