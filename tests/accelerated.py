"""Layers of any shape, compiled for the accelerator: what several tests of it run."""

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from targets.accelerator.arithmetic import Addition, Int8, Scaling, Step
from targets.accelerator.design import Design
from targets.accelerator.isa import encode
from targets.accelerator.layers import Contraction, Layer, Pooling, Product, Window
from targets.accelerator.tensors import Place
from targets.accelerator.tiling import Compiler
from targets.accelerator.tokens import check, synchronised

SMALL = Design(rows=8, columns=8, lanes=2, input_rows=256, weight_rows=256, accumulator_rows=64, side_rows=128,
               output_rows=64, parameter_rows=32)  # fmt: skip
LUTS = SMALL.model_copy(update={"array_in": "luts"})
DESIGNS = {"16 x 8": Design(), "8 x 8, small": SMALL, "16 x 16": Design(rows=16, columns=16, lanes=8),
           "8 x 8, in look-up tables": LUTS}  # fmt: skip


def scaling(chance: np.random.Generator, channels: int, reach: float) -> Scaling:
    """Answers that mostly lie inside int8 for sums of about `reach`; of some channels turned over, as by batch norm."""
    sign = np.where(chance.random(channels) < 0.2, -1, 1)
    factor = sign * chance.uniform(20, 60, channels) / reach
    return Scaling.of(factor, np.rint(chance.normal(0, reach / 3, channels)))


def contraction(
    chance: np.random.Generator, into: int, out: int, window: Window, addition: Addition | None
) -> Contraction:
    weights = chance.integers(-127, 128, (out, into, *window.size), np.int8)
    reach = 40 * 73 * (into * window.size[0] * window.size[1]) ** 0.5
    return Contraction(weights, window, 7, Step(scaling(chance, out, reach), -11, -128, 127, addition))


@dataclass(frozen=True)
class Compiled:
    """A layer's program, memory with random inputs, and the answer that the layer itself gives."""

    design: Design
    program: bytes
    memory: NDArray[np.uint8]
    target: Place
    wanted: Int8

    def answer(self, memory: NDArray[np.uint8]) -> Int8:
        return self.target.read(memory, self.design)


def placed(layer: Layer, shape: tuple[int, int, int], design: Design) -> tuple[Compiler, Place, Place | None, Place]:
    """One layer without tokens: what it reads, what that is added to or multiplied with, and what it makes."""
    compiler = Compiler(design)
    source = compiler.place(*shape)
    results = layer.results(*shape[1:])
    other: Place | None = None
    if layer.step.addition is not None and isinstance(layer, Contraction):
        other = compiler.place(len(layer.weights), *results)
    if isinstance(layer, Product):
        other = compiler.place(layer.channels, shape[1], shape[0])
    return compiler, source, other, compiler.layer(layer, source, other)


def compiled(layer: Layer, shape: tuple[int, int, int], design: Design, seed: int = 0) -> Compiled:
    """The program of one layer, its tokens checked."""
    chance = np.random.default_rng(seed)
    compiler, source, other, target = placed(layer, shape, design)
    program = synchronised(compiler.program(), design, compiler.words)
    check(program, design, compiler.words)
    memory = compiler.image()
    x = chance.integers(-128, 128, shape, np.int8)
    source.write(x, memory, design)
    added = None
    if other is not None:
        added = chance.integers(-128, 128, (other.channels, other.height, other.width), np.int8)
        other.write(added, memory, design)
    return Compiled(design, encode(program), memory, target, layer(x, added))


@st.composite
def layers(draw: st.DrawFn) -> tuple[Layer, tuple[int, int, int]]:
    """Any window over any small picture, or a product; some weights, whole tiles of them too, are zero."""
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.integers(0, 4)) == 0:
        factors, heads, rows, channels = (draw(st.integers(1, most)) for most in (70, 4, 40, 40))
        step = Step(scaling(chance, channels, 73 * 73 * factors**0.5), -11, -120, 127)
        return Product(channels, step), (factors, heads, rows)
    size, step, spread = (tuple(draw(st.integers(1, n)) for _ in range(2)) for n in (4, 3, 2))
    pools = draw(st.booleans())
    pad = tuple(draw(st.integers(0, size[k % 2] - 1)) for k in range(4))
    window = Window(size, step, (1, 1) if pools else spread, pad)  # type: ignore[arg-type]
    least = window.reach((1, 1))
    shape = draw(st.integers(1, 40)), least[0] + draw(st.integers(0, 12)), least[1] + draw(st.integers(0, 12))
    if pools:
        kind = draw(st.sampled_from(("largest", "sum")))
        reach = 256 * 60 * (size[0] * size[1] if kind == "sum" else 1)
        fill = -128 if kind == "largest" else 3
        return Pooling(kind, window, fill, Step(scaling(chance, shape[0], reach), 5, -100, 101)), shape
    addition = Addition.of(0.5, 0.8, -7, 3, 3, 127) if draw(st.booleans()) else None
    layer = contraction(chance, shape[0], draw(st.integers(1, 40)), window, addition)
    layer.weights[chance.random(layer.weights.shape) < draw(st.sampled_from((0.0, 0.9, 0.999, 1.0)))] = 0
    found = layer.results(*shape[1:])
    pool = (1, 1) if addition else tuple(draw(st.integers(1, min(3, size))) for size in found)
    return replace(layer, pool=pool), shape
