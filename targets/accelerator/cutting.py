"""Which cut of a layer is fastest: the cycle model tells, of those that are expected to be fast."""

from dataclasses import replace
from functools import cache

from targets.accelerator import native, simulator
from targets.accelerator.isa import Store, encode
from targets.accelerator.layers import Contraction, Layer
from targets.accelerator.patches import Cut
from targets.accelerator.tensors import Place
from targets.accelerator.tiling import Compiler, cuts
from targets.accelerator.tokens import quickly

TRIED = 8
"""Cuts whose cycles are counted."""
HEADS = 3
"""Of these, the fastest are tried with fewer lines at the top."""
BEFORE = 8
"""Groups before the layer that run with it, as both overlap."""
PATCHES = 8
"""Of so many patches, and of the others in proportion to the latter half of them."""


def fastest(compiler: Compiler, layer: Layer, source: Place, other: Place | None) -> Cut | None:
    """The cut that takes the fewest cycles behind what is compiled so far; None for what has no cuts.

    Also None, which leaves it to what is expected, where no compiler is there for the cycle model, as a plan needs no
    tool; the target asks for one before it builds.

    Raises:
        ProgramError: none fits the buffers.
    """
    if not isinstance(layer, Contraction) or not native.available():
        return None

    @cache
    def cycles(cut: Cut) -> float:
        return _cycles(compiler.copy(BEFORE), layer, source, other, cut)

    tried = sorted(cuts(layer, source, other, compiler.design)[:TRIED], key=cycles)
    return min([tried[0], *(replace(cut, head=1) for cut in tried[:HEADS] if cut.ny > 1)], key=cycles)


def _cycles(compiler: Compiler, layer: Contraction, source: Place, other: Place | None, cut: Cut) -> float:
    patches = cut.patches(compiler.layer(layer, source, other, cut, PATCHES))
    program = compiler.program()
    times = simulator.timing(quickly(encode(program), compiler.design, compiler.words), compiler.design)
    areas = [patch.ny * patch.nx for patch in patches]
    if len(patches) <= PATCHES:
        return times.cycles
    done = [done for one, done in zip(program, times.done, strict=True) if isinstance(one, Store)]
    half, blocks = PATCHES // 2, -(-len(layer.weights) // compiler.design.columns)
    each = (done[-1] - done[-1 - half * blocks]) / sum(areas[half:PATCHES])
    return float(times.cycles + each * sum(areas[PATCHES:]))
