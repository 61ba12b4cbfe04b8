"""Products of computed matrices, softmax and layer normalisation against float64, over odd sizes and odd values."""

from importlib import import_module

import networks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from targets.base import Array, Program
from targets.passes.forms import convolutions

pytestmark = pytest.mark.compile
compiled = settings(max_examples=20, deadline=None, derandomize=True)

SIZES = st.sampled_from([1, 2, 5, 8, 15, 16, 17, 33, 48, 100])
BITS = st.sampled_from([bits for bits in (512, 256, 128) if bits <= networks.host_bits()])


def run(program: Program, bits: int, *inputs: Array) -> Array:
    return networks.run_built(program, networks.cpu_device(bits=bits, cores=2), *inputs)["y"]


@compiled
@given(st.sampled_from([(), (1,), (2,), (2, 3)]), SIZES, SIZES, SIZES, BITS, st.booleans())
def test_product(batch: tuple[int, ...], rows: int, depth: int, columns: int, bits: int, follows: bool) -> None:
    shapes = {"a": (*batch, rows, depth), "b": (*batch, depth, columns)}
    nodes = [helper.make_node("MatMul", ["a", "b"], ["m" if follows else "y"])]
    if follows:
        nodes += [helper.make_node("Mul", ["m", "half"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    weights = {"half": np.full((), 0.5, np.float32)} if follows else {}
    program = networks.node_program(nodes, shapes, {"y": (*batch, rows, columns)}, weights)
    a, b = (networks.example(*shape, seed=k) for k, shape in enumerate(shapes.values()))
    wanted = a.astype(np.float64) @ b.astype(np.float64)
    wanted = np.maximum(wanted * 0.5, 0) if follows else wanted
    np.testing.assert_allclose(run(program, bits, a, b), wanted, rtol=1e-5, atol=2e-6 * np.sqrt(depth) * 4)


@compiled
@given(st.sampled_from([(), (3,), (2, 3), (2, 1, 5)]), SIZES, BITS, st.floats(0.1, 30))
def test_softmax(outer: tuple[int, ...], size: int, bits: int, scale: float) -> None:
    shape = (*outer, 2, size)
    program = networks.node_program([helper.make_node("Softmax", ["x"], ["y"], axis=-1)], {"x": shape}, {"y": shape})
    x = networks.example(*shape) * np.float32(scale)
    exact = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    np.testing.assert_allclose(run(program, bits, x), exact / exact.sum(-1, keepdims=True), rtol=2e-5, atol=2e-7)


@compiled
@given(st.sampled_from([(), (3,), (2, 3)]), SIZES, BITS, st.floats(-50, 50))
def test_layer_norm(outer: tuple[int, ...], size: int, bits: int, mean: float) -> None:
    shape = (*outer, 2, size)
    node = helper.make_node("LayerNormalization", ["x", "g", "b"], ["y"], axis=-1, epsilon=1e-3)
    weights = {"g": networks.example(size, seed=1), "b": networks.example(size, seed=2)}
    program = networks.node_program([node], {"x": shape}, {"y": shape}, weights)
    x = networks.example(*shape) + np.float32(mean)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(run(program, bits, x), exact * weights["g"] + weights["b"], rtol=1e-4, atol=1e-3)


@compiled
@given(st.sampled_from([(20,), (2, 17), (3, 1, 40)]), SIZES, SIZES, BITS, st.integers(0, 99))
def test_sparse_dense_layers(outer: tuple[int, ...], inputs: int, outputs: int, bits: int, seed: int) -> None:
    """Two of them with bias and activation between; always sparse, whether it pays or not."""
    chance = np.random.default_rng(seed)
    hidden = chance.choice([3, 16, 30])
    weights = {
        "a": networks.example(inputs, hidden) * (chance.random((inputs, hidden)) < 0.3).astype(np.float32),
        "b": networks.example(hidden, seed=1),
        "c": networks.example(hidden, outputs, seed=2) * (chance.random((hidden, outputs)) < 0.3).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["s"]),
        helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("MatMul", ["r", "c"], ["y"]),
    ]
    program = networks.node_program(nodes, {"x": (*outer, inputs)}, {"y": (*outer, outputs)}, weights)
    x = networks.example(*outer, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("targets.passes.columns"), "_pays", lambda *_: True)
        patch.setattr(import_module("targets.passes.sparse"), "sparse_layers", lambda module, *_: convolutions(module))
        found = run(program, bits, x)
    wanted = np.maximum(x.astype(np.float64) @ weights["a"] + weights["b"], 0) @ weights["c"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-6 * np.sqrt(inputs * hidden) * 4)


def test_values_that_are_not_numbers_stay_in_their_row() -> None:
    shape = (4, 19)
    nodes = [
        helper.make_node("Softmax", ["x"], ["s"], axis=-1),
        helper.make_node("LayerNormalization", ["x", "g", "b"], ["n"], axis=-1),
    ]
    weights = {"g": np.ones(19, np.float32), "b": np.zeros(19, np.float32)}
    program = networks.node_program(nodes, {"x": shape}, {"s": shape, "n": shape}, weights)
    x = networks.example(*shape)
    x[1, 18], x[2, 3] = np.nan, -np.inf
    found = networks.run_built(program, networks.cpu_device(bits=networks.host_bits()), x)
    np.testing.assert_array_equal(np.isnan(found["s"]).any(1), [False, True, False, False])
    assert found["s"][2, 3] == 0 and abs(found["s"][2].sum() - 1) < 1e-6
    np.testing.assert_array_equal(np.isnan(found["n"]).any(1), [False, True, True, False])
