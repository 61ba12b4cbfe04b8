"""The whole accelerator: fetch, four units and their queues, tokens, buffers."""

from typing import Any

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import fifo, wiring
from amaranth.lib.wiring import In, Out

from targets.accelerator.circuit.fetch import Fetch
from targets.accelerator.circuit.gemm import GemmUnit
from targets.accelerator.circuit.load import LoadUnit
from targets.accelerator.circuit.multiplier import Kind
from targets.accelerator.circuit.parts import ADDRESS, ReadPort, Tokens, WritePort, buffer, signal
from targets.accelerator.circuit.post import PostUnit
from targets.accelerator.circuit.store import StoreUnit
from targets.accelerator.design import Design
from targets.accelerator.isa import BITS, Memory


class Accelerator(wiring.Component):
    """Runs the program of `count` instructions at `address` (in bus words) after `start`, until `idle` is high again.

    Programs, activations, weights and parameters come through ports of their own, which a board may join into one.
    `units` says which of LOAD, GEMM, POST and STORE are at work.
    """

    def __init__(self, design: Design, kind: Kind = "plain") -> None:
        self.design, self.kind = design, kind
        super().__init__({
            "start": In(1), "address": In(ADDRESS), "count": In(24), "idle": Out(1), "units": Out(4),
            "program": Out(ReadPort()), "read": Out(ReadPort()), "write": Out(WritePort()),
        })  # fmt: skip

    def elaborate(self, platform: object) -> Module:
        m, d = Module(), self.design
        m.submodules.fetch = fetch = Fetch()
        m.submodules.tokens = tokens = Tokens()
        m.submodules.load = load = LoadUnit(d)
        m.submodules.gemm = gemm = GemmUnit(d, self.kind)
        m.submodules.post = post = PostUnit(d, self.kind)
        m.submodules.store = store = StoreUnit(d)
        busy = Signal(4)
        units: list[tuple[str, Any]] = [("load", load), ("gemm", gemm), ("post", post), ("store", store)]
        for k, (name, unit) in enumerate(units):
            m.submodules[f"{name}_queue"] = queue = fifo.SyncFIFOBuffered(width=BITS, depth=d.queue)
            source = fetch.queues[k]
            m.d.comb += [
                queue.w_data.eq(source.payload), queue.w_en.eq(source.valid & queue.w_rdy),
                source.ready.eq(queue.w_rdy), unit.queue.payload.eq(queue.r_data), unit.queue.valid.eq(queue.r_rdy),
                queue.r_en.eq(unit.queue.ready),
                unit.available.eq(tokens.available[k]), tokens.take[k].eq(unit.take), tokens.give[k].eq(unit.give),
                busy[k].eq(unit.busy | queue.r_rdy | (queue.level != 0)),
            ]  # fmt: skip
        for inner, outer in ((fetch.port, self.program), (load.port, self.read), (store.port, self.write)):
            wiring.connect(m, inner, wiring.flipped(outer))
        m.d.comb += [
            fetch.start.eq(self.start), fetch.address.eq(self.address), fetch.count.eq(self.count),
            self.units.eq(busy), self.idle.eq(~self.start & ~fetch.busy & ~busy.any()),
        ]  # fmt: skip
        self._fill(m, load, gemm, post)
        self._sum(m, gemm, post)
        rows, row = buffer(m, "output_rows", d.columns * 8, d.output_rows, d.lanes * 8)
        parts = d.columns // d.lanes
        m.d.comb += [
            rows.addr.eq(post.write_row), rows.data.eq(post.write_lanes.replicate(parts)),
            rows.en.eq(post.write),
            row.addr.eq(store.output_row), store.outputs.eq(row.data),
        ]  # fmt: skip
        return m

    def _fill(self, m: Module, load: LoadUnit, gemm: GemmUnit, post: PostUnit) -> None:
        """The buffers that LOAD writes and the units that read them."""
        d, fill = self.design, load.fill
        buffers = (
            (Memory.INPUTS, "input_rows", d.rows // 8, d.input_rows, gemm.input_row, gemm.inputs),
            (Memory.WEIGHTS, "weight_rows", d.block_words, d.weight_rows, gemm.weight_row, gemm.weights),
            (Memory.SIDE, "side_rows", d.block_words, d.side_rows, post.side_row, post.side),
            (Memory.PARAMETERS, "parameter_rows", d.lanes, d.parameter_rows, post.parameter_row, post.parameters),
        )
        for which, name, words, depth, address, data in buffers:
            write, read = buffer(m, name, words * 64, depth, 64)
            mine = load.filling & (fill.memory == which)
            row, word, enable = signal(14, "row"), signal(64, "word"), Signal(words)  # of its own, near to each buffer
            m.d.sync += [row.eq(fill.row), word.eq(fill.word)]
            for k in range(words):
                lane, part = divmod(k, d.block_words)
                here = (fill.lane == lane) & (fill.whole | (fill.part == part))
                m.d.sync += enable[k].eq(mine & (here if which is Memory.INPUTS else fill.whole | (fill.part == k)))
            m.d.comb += [
                write.addr.eq(row), write.data.eq(word.replicate(words)), write.en.eq(enable),
                read.addr.eq(address), data.eq(read.data),
            ]  # fmt: skip

    def _sum(self, m: Module, gemm: GemmUnit, post: PostUnit) -> None:
        """The banks of accumulators: while POST reads one, GEMM works on the other."""
        d = self.design
        for bank in range(2):
            write, read = buffer(m, f"sums_{bank}", d.columns * 32, d.accumulator_rows, d.columns * 32)
            m.d.sync += read.addr.eq(Mux(post.reads_sums[bank], post.sums_row, gemm.read_row))
            m.d.comb += [
                write.addr.eq(gemm.write_row), write.data.eq(gemm.write_sums), write.en.eq(gemm.write[bank]),
                gemm.read_sums[bank].eq(read.data), post.sums[bank].eq(read.data),
            ]  # fmt: skip
