"""Whatever has no template: fused where that repeats no work, spread over cores, the innermost loop fit for vectors."""

from math import prod
from typing import Any

from tvm import s_tir, tirx

from profiles.device import Device

_WORTH_A_TASK = 16384  # values; below it, waking the other cores costs more than they save


def schedule_other(s: s_tir.Schedule, device: Device) -> None:
    """Schedule every block of a function that holds no anchor."""
    for block in _blocks(s):
        if _is_injective(s, block) and _feeds_one_injective(s, block):
            s.compute_inline(block)
    for block in _blocks(s):
        if _is_injective(s, block):
            _spread(s, s.get_loops(block), device)
        else:
            _reduce(s, block, device)


def _blocks(s: s_tir.Schedule) -> list[Any]:
    return list(s.get_child_blocks(s.get_sblock("root")))


def _is_injective(s: s_tir.Schedule, block: Any) -> bool:
    return all(var.iter_type == tirx.IterVar.DataPar for var in s.get(block).iter_vars)


def _feeds_one_injective(s: s_tir.Schedule, block: Any) -> bool:
    consumers = s.get_consumers(block)
    return len(consumers) == 1 and _is_injective(s, consumers[0])


def _spread(s: s_tir.Schedule, loops: list[Any], device: Device) -> None:
    """Parallel over the outer loops; the last one as vectors when it is whole ones, else left to LLVM."""
    extents = [int(s.get(loop).extent) for loop in loops]
    if not loops:
        return
    inner = len(loops) - 1
    while inner > 0 and prod(extents[inner:]) < device.vector_lanes:
        inner -= 1
    last = s.fuse(*loops[inner:]) if inner < len(loops) - 1 else loops[inner]
    size = prod(extents[inner:])
    if size % device.vector_lanes == 0:
        outside, lane = s.split(last, [None, device.vector_lanes])
        s.vectorize(lane)
        outer = [*loops[:inner], outside]
    else:
        outer = loops[:inner]
    if prod(extents) >= _WORTH_A_TASK and outer:
        s.parallel(s.fuse(*outer))


def _reduce(s: s_tir.Schedule, block: Any, device: Device) -> None:
    """Vectors over the last output axis where neighbours on it are read together, else over the last reduced axis."""
    vars_ = s.get(block).iter_vars
    loops = s.get_loops(block)
    spatial = [loop for loop, var in zip(loops, vars_, strict=True) if var.iter_type == tirx.IterVar.DataPar]
    reduced = [loop for loop, var in zip(loops, vars_, strict=True) if var.iter_type != tirx.IterVar.DataPar]
    lanes = device.vector_lanes
    work = prod(int(s.get(loop).extent) for loop in loops)
    width = int(s.get(spatial[-1]).extent) if spatial else 1
    if width >= lanes and _reads_along(s, block, vars_[len(spatial) - 1]):
        inner = [spatial[-1]]
        outer = spatial[:-1]
        if width % lanes == 0:
            outside, lane = s.split(spatial[-1], [None, lanes])
            s.vectorize(lane)
            inner, outer = [lane], [*outer, outside]
        s.reorder(*outer, *reduced, *inner)
        _share(s, outer, work)
        s.decompose_reduction(block, reduced[0])
    elif int(s.get(reduced[-1]).extent) % lanes == 0 and _reads_along(s, block, vars_[-1]):
        s.reorder(*spatial, *reduced)
        _, lane = s.split(reduced[-1], [None, lanes])
        partial = s.rfactor(lane, len(spatial))  # a vector of partial results, then one result of the vector
        s.vectorize(s.get_loops(partial)[-1])
        _share(s, s.get_loops(partial)[: len(spatial)], work)
        _share(s, s.get_loops(block)[: len(spatial)], work)
    else:
        s.reorder(*spatial, *reduced)
        _share(s, spatial, work)


def _share(s: s_tir.Schedule, loops: list[Any], work: int) -> None:
    if loops and work >= _WORTH_A_TASK:
        s.parallel(s.fuse(*loops))


def _reads_along(s: s_tir.Schedule, block: Any, var: Any) -> bool:
    """Some input is read at neighbouring places as the block's axis `var` advances."""
    regions = s.get(block).reads
    return any(region.region and region.region[-1].min.same_as(var.var) for region in regions)
