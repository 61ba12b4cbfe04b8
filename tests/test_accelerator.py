"""The accelerator's instructions: their bits, their arithmetic, tiles that answer as the layers, tokens that hold."""

from dataclasses import fields, replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
from accelerated import DESIGNS, SMALL, compiled, contraction, layers, placed, scaling
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from targets.accelerator.arithmetic import Int8, Scaling, Step, requantized
from targets.accelerator.design import Design
from targets.accelerator.errors import ProgramError
from targets.accelerator.isa import (
    KINDS,
    Gemm,
    Instruction,
    Load,
    Memory,
    Post,
    Source,
    Store,
    Unit,
    decode,
    encode,
    layout,
)
from targets.accelerator.layers import Layer, Pooling, Product, Window
from targets.accelerator.simulator import execute
from targets.accelerator.tiling import Compiler
from targets.accelerator.tokens import check, quickly, synchronised
from targets.errors import TargetError


@st.composite
def instructions(draw: st.DrawFn) -> Instruction:
    kind = draw(st.sampled_from(KINDS))
    hints, values = get_type_hints(kind, include_extras=True), {}
    for field in fields(kind):
        low, high = layout(kind)[field.name][1].range
        meaning = get_args(hints[field.name])[0]
        if meaning is not int and meaning is not Unit:
            high = max(meaning)
        values[field.name] = meaning(draw(st.integers(low, high)))
    return kind(**values)


@given(st.lists(instructions(), max_size=4))
def test_instructions_come_back_from_their_bits(program: list[Instruction]) -> None:
    assert list(decode(encode(program))) == program


def test_what_has_no_bits_is_refused() -> None:
    with pytest.raises(TargetError, match=r"Gemm.nx is 1024, but has 10 bits \(0 to 1023\)"):
        encode([Gemm(row=0, weights=0, bank=0, clear=1, nx=1024)])
    with pytest.raises(TargetError, match="not one of whole instructions"):
        list(decode(b"\0" * 17))
    with pytest.raises(TargetError, match="unknown opcode 9"):
        list(decode(b"\x09" + bytes(15)))
    with pytest.raises(TargetError, match="sets bits that Store has not"):
        list(decode(b"\x03" + bytes(14) + b"\x80"))


@given(
    st.integers(-(2**31), 2**31 - 1), st.integers(-(2**24), 2**24), st.floats(1e-7, 30.0), st.booleans(),
    st.integers(-128, 127),
)
def test_requantizing_is_the_nearest_step(total: int, bias: int, factor: float, falls: bool, zero: int) -> None:
    factor = -factor if falls else factor
    step = Step(Scaling.of(np.array([factor]), np.array([float(bias)])), zero)
    answer = int(requantized(np.array([[total]]), step)[0, 0])
    exact = (total + bias) * factor + zero
    if abs(exact) < 1000:
        assert abs(answer - min(127, max(-128, exact))) <= 0.5 + abs(exact - zero) * 2.0**-16 + 1e-9
    else:
        assert answer == (127 if exact > 0 else -128)


def test_halves_are_rounded_to_even() -> None:
    half = Step(Scaling.of(np.array([0.5]), np.zeros(1)), 0)
    assert requantized(np.arange(-5, 6)[:, None], half).ravel().tolist() == [-2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2]


def test_a_scale_or_bias_beyond_the_hardware_is_refused() -> None:
    with pytest.raises(TargetError, match="too large to requantize"):
        Scaling.of(np.array([1e6]), np.zeros(1))
    with pytest.raises(TargetError, match="does not fit an accumulator"):
        Scaling.of(np.ones(1), np.array([3e9]))


def answered(layer: Layer, shape: tuple[int, int, int], design: Design) -> tuple[Int8, Int8]:
    """What the program of one layer answers, and what the layer does."""
    one = compiled(layer, shape, design)
    memory = one.memory.copy()
    execute(one.program, memory, design)
    return one.answer(memory), one.wanted


@given(layers(), st.sampled_from(sorted(DESIGNS)))
@settings(deadline=None, max_examples=80)
def test_programs_answer_as_their_layers(case: tuple[Layer, tuple[int, int, int]], name: str) -> None:
    found, wanted = answered(*case, DESIGNS[name])
    assert np.array_equal(found, wanted)


@given(layers(), st.sampled_from(sorted(DESIGNS)))
@settings(deadline=None, max_examples=40)
def test_tokens_that_are_put_quickly_are_the_same(case: tuple[Layer, tuple[int, int, int]], name: str) -> None:
    compiler, *_ = placed(*case, DESIGNS[name])
    program = compiler.program()
    wanted = encode(synchronised(program, compiler.design, compiler.words))
    assert quickly(encode(program), compiler.design, compiler.words) == wanted


def test_nothing_gets_tokens_that_leaves_a_buffer() -> None:
    for one in (Load(memory=Memory.WEIGHTS, row=250, address=0, nx=7), Store(row=0, address=60, nx=8)):
        with pytest.raises(ProgramError, match="leaves a buffer or the memory"):
            quickly(encode([one]), SMALL, 64)


def test_inputs_that_do_not_fit_are_loaded_in_parts() -> None:
    layer = contraction(np.random.default_rng(0), 200, 20, Window((3, 3), pad=(1, 1, 1, 1)), None)
    found, wanted = answered(layer, (200, 6, 6), SMALL)
    assert np.array_equal(found, wanted)


def test_a_product_of_few_factors_fills_up_a_larger_array_with_zeros() -> None:
    layer = Product(7, Step(scaling(np.random.default_rng(0), 7, 3e4), 3))
    found, wanted = answered(layer, (5, 2, 9), Design(rows=32, columns=32, lanes=8))
    assert np.array_equal(found, wanted)


def test_a_window_too_large_for_the_buffers_is_refused() -> None:
    layer = contraction(np.random.default_rng(0), 8, 8, Window((17, 17)), None)
    with pytest.raises(ProgramError, match=r"Not even one result of a window of \(17, 17\) over 8 channels fits"):
        answered(layer, (8, 20, 20), SMALL)
    pool = Pooling("sum", Window((16, 2)), 0, layer.step)
    with pytest.raises(ProgramError, match=r"A pooling window of \(16, 2\)"):
        answered(pool, (8, 20, 20), Design())


def test_empty_tiles_cost_neither_instruction_nor_memory() -> None:
    layer = contraction(np.random.default_rng(0), 64, 64, Window((3, 3), pad=(1, 1, 1, 1)), None)

    def count(weights: Int8) -> tuple[int, int]:
        compiler = Compiler(Design())
        compiler.layer(replace(layer, weights=weights), compiler.place(64, 8, 8))
        return sum(isinstance(one, Gemm) for one in compiler.program()), sum(raw.size for _, raw in compiler.constants)

    half = layer.weights.copy()
    half[:, 32:] = 0
    (gemms, size), (fewer, smaller) = count(layer.weights), count(half)
    assert fewer * 2 == gemms and size - smaller == layer.weights.size // 2


def chain() -> tuple[list[Instruction], int]:
    """Three layers, each of which reads what the one before it stored."""
    compiler, chance = Compiler(SMALL), np.random.default_rng(0)
    place = compiler.place(16, 9, 9)
    for window in (Window((3, 3), pad=(1, 1, 1, 1)), Window((3, 3), step=(2, 2)), Window()):
        place = compiler.layer(contraction(chance, 16, 16, window, None), place)
    return synchronised(compiler.program(), SMALL, compiler.words), compiler.words


def test_every_token_is_needed() -> None:
    program, words = chain()
    check(program, SMALL, words)
    pairs = [(k, unit) for k, one in enumerate(program) for unit in one.waits]
    assert len(pairs) > 50
    for k, unit in pairs[::7]:
        without = list(program)
        without[k] = replace(without[k], waits=without[k].waits & ~unit)
        with pytest.raises(ProgramError):
            check(without, SMALL, words)


def test_what_no_token_orders_is_named() -> None:
    load = Load(memory=Memory.INPUTS, row=0, address=0, nx=4)
    tile = Load(memory=Memory.WEIGHTS, row=0, address=4, nx=8)
    multiply = Gemm(row=0, weights=0, bank=0, clear=1, nx=4)
    with pytest.raises(ProgramError, match=r"Instruction 2.*no token orders it after an instruction of LOAD"):
        check([load, tile, multiply], SMALL, 64)
    signalling = replace(tile, signals=Unit.GEMM)
    check([load, signalling, replace(multiply, waits=Unit.LOAD)], SMALL, 64)
    with pytest.raises(ProgramError, match="GEMM never takes 1 of the tokens that LOAD gives it"):
        check([load, signalling], SMALL, 64)
    with pytest.raises(ProgramError, match="waits for a token that STORE has not given before it"):
        check([replace(load, waits=Unit.STORE)], SMALL, 64)
    with pytest.raises(ProgramError, match="goes to row 256 of the input buffer, which has 256"):
        check([replace(load, row=253)], SMALL, 64)
    with pytest.raises(ProgramError, match="a loop of no turns never ends"):
        check([replace(load, ny=0)], SMALL, 64)
    with pytest.raises(ProgramError, match="goes to row 64 of the memory buffer, which has 64"):
        check([replace(load, address=61)], SMALL, 64)


def test_pooling_and_adding_at_once_is_refused() -> None:
    post = Post(source=Source.SIDE, row=0, parameters=0, row_out=0, add=1, window_y=2, nx=4)
    with pytest.raises(ProgramError, match="what it adds has to be windows of one row"):
        check([post], SMALL, 64)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"rows": 24}, "'rows' is 24, which is no power of two"),
        ({"rows": 8, "columns": 16}, "'columns' is 16, more than the 8 'rows'"),
        ({"rows": 64, "columns": 64, "lanes": 2}, "'lanes' is 2, not between 'columns' / 16 and 'columns'"),
        ({"weight_rows": 64, "rows": 64}, "'weight_rows' must hold two tiles, which are 128 rows"),
    ],
)
def test_a_design_that_the_circuit_cannot_have_is_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Design(**sizes)


def test_a_bank_is_one_units_at_a_time() -> None:
    multiply = Gemm(row=0, weights=0, bank=1, clear=1, nx=4)
    post = Post(source=Source.ACCUMULATORS, bank=1, row=40, parameters=0, row_out=0, nx=4)
    with pytest.raises(ProgramError, match=r"no token orders it after an instruction of GEMM"):
        check([multiply, post], SMALL, 64)
    check([multiply, replace(post, bank=0)], SMALL, 64)
    assert synchronised([multiply, post], SMALL, 64)[1].waits == Unit.GEMM


def test_sums_that_are_not_written_yet_are_not_read() -> None:
    multiply = Gemm(row=0, weights=0, bank=0, clear=1, nx=8)
    check([multiply, replace(multiply, clear=0), replace(multiply, clear=0, row_out=8)], SMALL, 64)
    with pytest.raises(ProgramError, match="but not from the same row on"):
        check([multiply, replace(multiply, clear=0, row_out=7)], SMALL, 64)


def test_a_program_is_ordered_by_few_tokens_even_where_many_loads_come_first() -> None:
    layer = contraction(np.random.default_rng(0), 1024, 8, Window(), None)
    found, wanted = answered(layer, (1024, 1, 1), Design())
    assert np.array_equal(found, wanted)


def test_tokens_of_units_that_touch_nothing_in_common_are_none() -> None:
    store = Store(row=0, address=0, nx=1)
    post = Post(source=Source.ACCUMULATORS, parameters=0, row_out=8, nx=1)
    program = synchronised([store, post, Load(memory=Memory.SIDE, row=0, address=9, nx=1)], SMALL, 64)
    assert all(not one.waits and not one.signals for one in program)
