"""A layer as instructions: how its results are cut into tiles, and in which order they are computed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from targets.accelerator.arithmetic import Int8, Step
from targets.accelerator.design import WORD_BYTES, Design
from targets.accelerator.errors import ProgramError
from targets.accelerator.isa import Gemm, Instruction, Load, Memory, Post, Reduce, Source
from targets.accelerator.layers import LARGEST_WINDOW, POINT, Contraction, Layer, Pooling, Product
from targets.accelerator.ordering import Group, ordered
from targets.accelerator.parameters import pack
from targets.accelerator.patches import Cut, Patch, framed, held, stored
from targets.accelerator.tensors import Place

Steps = list[tuple[int, int, int]]
"""(tile of input channels, ky, kx)."""

LONGEST_LINE = 1023
"""Rows of a line that GEMM or POST steps over."""

GEMM_SETUP, POST_SETUP, STORE_SETUP = 5, 12, 28
"""Cycles that an instruction takes at least beyond what it moves."""


class Compiler:
    """Collects a program and the constants that it reads; layers are computed in the order they are given."""

    def __init__(self, design: Design) -> None:
        self.design = design
        self.words = 0
        self.constants: list[tuple[int, NDArray[np.uint8]]] = []
        self.groups: list[Group] = []
        self._turns: dict[str, int] = {}

    def copy(self, most: int) -> "Compiler":
        """Another that goes on from here, with the last groups alone."""
        other = Compiler(self.design)
        other.words, other.groups, other._turns = self.words, self.groups[-most:], dict(self._turns)
        return other

    def place(self, channels: int, height: int, width: int) -> Place:
        """Room in memory for a tensor."""
        found = Place(self.words, channels, height, width)
        self.words += found.words(self.design)
        return found

    def constant(self, values: NDArray[np.uint64] | Int8) -> int:
        """The address of these values; int8 whose size is a multiple of a word's."""
        address, raw = self.words, np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self.constants.append((address, raw))
        self.words += raw.size // WORD_BYTES
        return address

    def image(self) -> NDArray[np.uint8]:
        """Memory as it is before the first run."""
        memory = np.zeros(self.words * WORD_BYTES, np.uint8)
        for address, raw in self.constants:
            memory[address * WORD_BYTES : address * WORD_BYTES + raw.size] = raw
        return memory

    def program(self) -> list[Instruction]:
        """All instructions, without tokens."""
        return [one for one, _ in ordered(self.groups, self.design)]

    def layer(
        self, layer: Layer, source: Place, other: Place | None = None, cut: Cut | None = None, most: int | None = None
    ) -> Place:
        """Compute a layer's answer, and where it lies.

        Args:
            other: what the step of a contraction adds, or the second operand of a product.
            cut: one of `cuts`, the first unless given.
            most: patches to be computed, if not all.

        Raises:
            ProgramError: one line of results does not fit the buffers, however it is cut.
        """
        channels = source.channels
        if isinstance(layer, Contraction):
            channels = len(layer.weights)
        elif isinstance(layer, Product):
            channels = layer.channels
        height, width = layer.results(source.height, source.width)
        target = self.place(channels, height, width)
        number = self.groups[-1].layer + 1 if self.groups else 0
        if isinstance(layer, Contraction):
            chosen = cut or cuts(layer, source, other, self.design)[0]
            found = _Contracting(self, layer, source, target, other, chosen).groups(most)
        elif isinstance(layer, Product):
            assert other is not None
            found = _multiplied(self, layer, source, target, other)
        else:
            found = _pooled(self, layer, source, target)
        self.groups += [replace(group, layer=number) for group in found]
        return target

    def turn(self, what: str) -> int:
        """0 and 1 by turns: which half of a buffer is next."""
        self._turns[what] = 1 - self._turns.get(what, 1)
        return self._turns[what]


class _Contracting:
    """One contraction's tiles.

    Results are cut into patches; of each patch, each block of channels is one group. All input channels of a patch are
    loaded once where they fit half of the buffer, else in parts, for each block anew. Weights stay where all of them
    fit half of theirs, else each group loads its own.
    """

    def __init__(
        self, c: Compiler, layer: Contraction, source: Place, target: Place, other: Place | None, cut: Cut
    ) -> None:
        self.compiler, self.layer, self.source, self.target, self.other = c, layer, source, target, other
        d = self.design = c.design
        self.tiles = _tiles(layer.weights, d)
        self.depth = self.tiles.shape[1]  # tiles of input channels
        self.pool, self.window, self.cut = layer.pool, held(layer.window)[0], cut

    def groups(self, most: int | None) -> Iterator[Group]:
        c, d, size = self.compiler, self.design, self.cut.part
        blocks, used = len(self.tiles), (self.tiles != 0).any((4, 5))  # (block, depth, ky, kx)
        parts = [range(first, min(first + size, self.depth)) for first in range(0, self.depth, size)]
        plan = [[_steps(used[n], part) for part in parts] for n in range(blocks)]
        for n in range(blocks):  # a block without weights still answers its biases
            if not any(plan[n]):
                plan[n][0] = [(parts[0][0], 0, 0)]
        weights = [[c.constant(np.stack([self.tiles[n][s] for s in steps])) if steps else 0 for steps in plan[n]]
                   for n in range(blocks)]  # fmt: skip
        stay = self._fixed(plan)
        parameters = _Parameters(c, [self.layer.step.part(n * d.columns, (n + 1) * d.columns) for n in range(blocks)])
        loaded: dict[tuple[int, int], int] = {}
        for patch in self.cut.patches(self.target)[:most]:
            rows = None
            for n in range(blocks):
                group, bank = Group(), c.turn("bank")
                header = parameters.load(n, group)
                clear = 1
                for p, part in enumerate(parts):
                    steps = plan[n][p]
                    if not steps:
                        continue
                    if p and group.work:  # each part's loads run ahead of its own work
                        yield group
                        group = Group()
                    if rows is None or len(parts) > 1:
                        rows = self._inputs(group, patch, part)
                    if (n, p) not in loaded or stay is None:
                        half = d.weight_rows // 2
                        first = stay[n][p] if stay is not None else half * c.turn("weights")
                        loaded[n, p] = first
                        load = Load(memory=Memory.WEIGHTS, row=first, address=weights[n][p], nx=len(steps) * d.rows)
                        group.constants += [load]
                    group.work += self._gemms(patch, steps, rows, part[0], loaded[n, p], bank, clear)
                    clear = 0
                group.work += self._finish(patch, n, bank, header, group)
                yield group

    def _fixed(self, plan: list[list[Steps]]) -> list[list[int]] | None:
        """First rows of all tiles where they fit half of the buffer, so that they are loaded once."""
        rows = self.design.rows
        sizes = [[len(steps) * rows for steps in parts] for parts in plan]
        if sum(map(sum, sizes)) > self.design.weight_rows // 2:
            return None
        at, found = self.design.weight_rows // 2 * self.compiler.turn("weights"), list[list[int]]()
        for parts in sizes:
            found.append([at + sum(parts[:p]) for p in range(len(parts))])
            at += sum(parts)
        return found

    def _inputs(self, group: Group, patch: Patch, part: range) -> int:
        """Load what a patch reads of some tiles of channels; the first row."""
        d, source, half = self.design, self.source, self.design.input_rows // 2
        first = half * self.compiler.turn("inputs")
        patch, window, fill = patch.times(self.pool), self.layer.window, self.layer.pad_value
        height, width = self.window.reach((patch.ny, patch.nx))
        for index, tile in enumerate(part):
            for lane in range(d.blocks):
                block = tile * d.blocks + lane
                if block < source.blocks(d):
                    row = first + index * height * width
                    load = framed(window, fill, source, block, patch, Memory.INPUTS, row, lane, d)
                    group.inputs.append(load)
        return first

    def _gemms(
        self, patch: Patch, steps: Steps, rows: int, first: int, weights: int, bank: int, clear: int
    ) -> Iterator[Gemm]:
        window, patch = self.window, patch.times(self.pool)
        height, width = window.reach((patch.ny, patch.nx))
        for index, (tile, ky, kx) in enumerate(steps):
            corner = ky * window.spread[0] * width + kx * window.spread[1]
            yield Gemm(
                row=rows + (tile - first) * height * width + corner, weights=weights + index * self.design.rows,
                bank=bank, clear=clear if index == 0 else 0, ny=patch.ny, nx=patch.nx,
                step_y=window.step[0] * width, step_x=window.step[1],
            )  # fmt: skip

    def _finish(self, patch: Patch, n: int, bank: int, header: int, group: Group) -> Iterator[Instruction]:
        c, d = self.compiler, self.design
        row = d.output_rows // 2 * c.turn("outputs")
        side = 0
        if self.other is not None:
            side = d.side_rows // 2 * c.turn("side")
            group.inputs.append(framed(POINT, 0, self.other, n, patch, Memory.SIDE, side, 0, d))
        yield Post(
            source=Source.ACCUMULATORS, bank=bank, parameters=header, row_out=row, ny=patch.ny, nx=patch.nx,
            add=int(self.other is not None), side=side, window_y=self.pool[0], window_x=self.pool[1],
            line=patch.nx * self.pool[1], step_y=self.pool[0] * patch.nx * self.pool[1], step_x=self.pool[1],
        )  # fmt: skip
        yield stored(patch, n, row, self.target, d)


def cuts(layer: Contraction, source: Place, other: Place | None, design: Design) -> list[Cut]:
    """All that fit the buffers, by the cycles that they are expected to take; all patches of a cut are as high.

    Raises:
        ProgramError: there is none.
    """
    d, tiles, window, found = design, _tiles(layer.weights, design), held(layer.window)[0], list[tuple[int, Cut]]()
    target = layer.results(source.height, source.width)
    most = min(d.output_rows // 2, *([d.side_rows // 2] if other is not None else [2**20]))
    used, (blocks, depth, *taps) = int((tiles != 0).any((4, 5)).sum()), tiles.shape[:4]
    for ny, nx, part in product(*map(_divisions, (*target, depth))):
        pooled = ny * layer.pool[0], nx * layer.pool[1]
        height, width = window.reach(pooled)
        rows = pooled[0] * pooled[1]
        fits = ny * nx <= most and rows <= d.accumulator_rows and pooled[1] <= LONGEST_LINE
        fits = fits and height * width * part <= d.input_rows // 2
        if not fits or taps[0] * taps[1] * part * d.rows > min(d.weight_rows // 2, 4095):
            continue
        count = -(-target[0] // ny) * -(-target[1] // nx)
        again = blocks if part < depth else 1
        multiply = used * max(rows, d.rows + GEMM_SETUP) * count
        patch = height * width * source.blocks(d) * d.block_words
        weights = used * d.rows * d.block_words
        load = count * again * patch + weights * (1 if used * d.rows <= d.weight_rows // 2 else count)
        groups = count * blocks
        post = groups * (max(ny * nx * (d.columns // d.lanes), rows) + POST_SETUP)
        store = groups * (ny * (1 + nx * d.block_words) + STORE_SETUP)
        fetch = 2 * used * count
        ends = patch + (weights + post // count) // blocks + fetch // 4
        found.append((max(multiply, load, post, store, fetch) + ends, Cut(ny, nx, part, ny)))
    if not found:
        raise ProgramError(
            f"Not even one result of a window of {layer.window.size} over {source.channels} channels "
            "fits the buffers of this design."
        )
    return [cut for _, cut in sorted(found, key=lambda one: one[0])]


class _Parameters:
    """The requantization of a layer's blocks; all stay loaded where they fit half of the buffer."""

    def __init__(self, compiler: Compiler, steps: Sequence[Step]) -> None:
        self.compiler, d = compiler, compiler.design
        self.address = [compiler.constant(pack(step, d)) for step in steps]
        self.stay = len(steps) * d.parameter_block <= d.parameter_rows // 2
        self.base = d.parameter_rows // 2 * compiler.turn("parameters") if self.stay else 0
        self.loaded: dict[int, int] = {}

    def load(self, block: int, group: Group) -> int:
        """The header's row, once the group's loads are done."""
        d = self.compiler.design
        if block in self.loaded and self.stay:
            return self.loaded[block]
        half = d.parameter_rows // 2
        row = self.base + block * d.parameter_block if self.stay else half * self.compiler.turn("parameters")
        load = Load(memory=Memory.PARAMETERS, row=row, address=self.address[block], nx=d.parameter_block)
        group.constants.append(load)
        self.loaded[block] = row
        return row


def _pooled(c: Compiler, layer: Pooling, source: Place, target: Place) -> Iterator[Group]:
    d = c.design
    cuts = []
    for ny, nx in product(_divisions(target.height), _divisions(target.width)):
        height, width = layer.window.reach((ny, nx))
        if ny * nx <= d.output_rows // 2 and height * width <= d.side_rows // 2 and width <= LONGEST_LINE:
            cuts.append((-ny * nx, (ny, nx)))
    odd = layer.window.spread != (1, 1) or max(*layer.window.size, *layer.window.step) > LARGEST_WINDOW
    if not cuts or odd:
        raise ProgramError(f"A pooling window of {layer.window.size} does not fit the side buffer of this design.")
    blocks = target.blocks(d)
    parameters = _Parameters(c, [layer.step.part(n * d.columns, (n + 1) * d.columns) for n in range(blocks)])
    kind = Reduce.LARGEST if layer.kind == "largest" else Reduce.SUM
    window, _ = held(layer.window)
    ny, nx = min(cuts)[1]
    for patch in Cut(ny, nx, 1, ny).patches(target):
        _, width = window.reach((patch.ny, patch.nx))
        for n in range(blocks):
            group = Group()
            header = parameters.load(n, group)
            side, row = d.side_rows // 2 * c.turn("side"), d.output_rows // 2 * c.turn("outputs")
            load = framed(layer.window, layer.pad_value, source, n, patch, Memory.SIDE, side, 0, d)
            group.inputs.append(load)
            group.work.append(Post(
                source=Source.SIDE, reduce=kind, parameters=header, row_out=row, ny=patch.ny, nx=patch.nx, side=side,
                window_y=layer.window.size[0], window_x=layer.window.size[1], line=width,
                step_y=window.step[0] * width, step_x=window.step[1],
            ))  # fmt: skip
            group.work.append(stored(patch, n, row, target, d))
            yield group


def _multiplied(c: Compiler, layer: Product, source: Place, target: Place, other: Place) -> Iterator[Group]:
    """A line of the source after the other; what it is multiplied by is loaded as weights are, from where it lies."""
    d = c.design
    depth, blocks = -(-source.channels // d.rows), target.blocks(d)
    rows, half = depth * d.rows, d.weight_rows // 2
    nx = min(d.input_rows // 2 // depth, d.accumulator_rows, d.output_rows // 2, source.width, LONGEST_LINE)
    if rows > half or nx < 1:
        raise ProgramError(f"A product of {source.channels} factors each does not fit the buffers of this design.")
    stays, missing = blocks * rows <= half, rows - source.channels
    zeros = c.constant(np.zeros((missing, d.columns), np.int8))  # weights of channels that the source has not
    parameters = _Parameters(c, [layer.step.part(n * d.columns, (n + 1) * d.columns) for n in range(blocks)])
    for y in range(source.height):
        loaded: dict[int, int] = {}
        at = half * c.turn("weights") if stays else 0
        for x in range(0, source.width, nx):
            patch, inputs = Patch(y, x, 1, min(nx, source.width - x)), d.input_rows // 2 * c.turn("inputs")
            for n in range(blocks):
                group, bank = Group(), c.turn("bank")
                header = parameters.load(n, group)
                if n == 0:
                    for block in range(source.blocks(d)):
                        tile, lane = divmod(block, d.blocks)
                        row = inputs + tile * patch.nx
                        group.inputs.append(framed(POINT, 0, source, block, patch, Memory.INPUTS, row, lane, d))
                if n not in loaded or not stays:
                    loaded[n] = at + n * rows if stays else half * c.turn("weights")
                    real = loaded[n], other.at(n, y, 0, d), source.channels
                    group.inputs += [
                        Load(memory=Memory.WEIGHTS, row=row, address=address, nx=count)
                        for row, address, count in (real, (loaded[n] + source.channels, zeros, missing)) if count
                    ]  # fmt: skip
                group.work += [
                    Gemm(row=inputs + t * patch.nx, weights=loaded[n] + t * d.rows, bank=bank, clear=int(t == 0),
                         nx=patch.nx)
                    for t in range(depth)
                ]  # fmt: skip
                row = d.output_rows // 2 * c.turn("outputs")
                post = Post(source=Source.ACCUMULATORS, bank=bank, parameters=header, row_out=row, nx=patch.nx)
                group.work += [post, stored(patch, n, row, target, d)]
                yield group


def _tiles(weights: Int8, d: Design) -> Int8:
    """(blocks of outputs, tiles of inputs, ky, kx, rows, columns), filled up with zeros."""
    out, into, height, width = weights.shape
    blocks, depth = -(-out // d.columns), -(-into // d.rows)
    whole = np.zeros((blocks * d.columns, depth * d.rows, height, width), np.int8)
    whole[:out, :into] = weights
    shape = blocks, d.columns, depth, d.rows, height, width
    return np.ascontiguousarray(whole.reshape(shape).transpose(0, 2, 4, 5, 3, 1))


def _steps(used: NDArray[np.bool_], part: range) -> Steps:
    """Those tiles that are not empty."""
    return [(int(t) + part.start, int(ky), int(kx)) for t, ky, kx in np.argwhere(used[part.start : part.stop])]


def _divisions(size: int) -> list[int]:
    """Sizes that cut so much into parts about equal, each the largest for its number of parts."""
    return sorted({-(-size // parts) for parts in range(1, size + 1)})
