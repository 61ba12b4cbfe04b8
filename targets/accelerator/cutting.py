"""Which cut of a layer is fastest: the cycle model tells, of those that are expected to be fast."""

from dataclasses import replace

from targets.accelerator import simulator
from targets.accelerator.design import Design
from targets.accelerator.isa import Store, encode
from targets.accelerator.layers import Contraction, Layer
from targets.accelerator.tensors import Place
from targets.accelerator.tiling import Compiler, Cut, cuts
from targets.accelerator.tokens import synchronised

TRIED = 16
"""Cuts whose cycles are counted."""
PATCHES = 8
"""Of so many patches, and of the others in proportion to the latter half of them."""


def fastest(layer: Layer, source: Place, other: Place | None, design: Design) -> Cut | None:
    """The cut that takes the fewest cycles where nothing runs before it; None for a pooling, which has none.

    Raises:
        ProgramError: none fits the buffers.
    """
    if not isinstance(layer, Contraction):
        return None

    def cycles(cut: Cut) -> float:
        return _cycles(layer, source, other, design, cut)

    best = min(cuts(layer, source, other, design)[:TRIED], key=cycles)
    return min([best, *(replace(best, head=head) for head in {1, best.ny // 2} if 0 < head < best.ny)], key=cycles)


def _cycles(layer: Contraction, source: Place, other: Place | None, design: Design, cut: Cut) -> float:
    compiler = Compiler(design)
    places = [
        None if place is None else compiler.place(place.channels, place.height, place.width)
        for place in (source, other)
    ]  # fmt: skip
    assert places[0] is not None
    target = compiler.layer(layer, places[0], places[1], cut, PATCHES)
    program = synchronised(compiler.program(), design, compiler.words)
    times = simulator.timing(encode(program), design)
    patches = cut.patches(target)
    areas = [patch.ny * patch.nx for patch in patches]
    if len(patches) <= PATCHES:
        return times.cycles
    done = [done for one, done in zip(program, times.done, strict=True) if isinstance(one, Store)]
    half, blocks = PATCHES // 2, len(done) // PATCHES
    each = (done[-1] - done[half * blocks - 1]) / sum(areas[half:PATCHES])
    return times.cycles + each * sum(areas[PATCHES:])
