"""Kernels over odd shapes against ONNX Runtime, and the cost rule that picks their tiles."""

from math import ceil, erf, floor

import networks
import numpy as np
import pytest
import torch
import tvm
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper

from profiles.device import load, names
from targets.base import Array, Program
from targets.kernels.methods import ConvolutionLayer, Winograd
from targets.kernels.resize import taps
from targets.kernels.sliding import window_counts
from targets.kernels.tile import convolution_tile, sliding_tile, with_tasks
from targets.kernels.transposed import Phases
from targets.kernels.window import Window
from targets.passes.channels import Channels, pack_convolution
from targets.tune import kernel_of

pytestmark = pytest.mark.compile
compiled = settings(max_examples=25, deadline=None, derandomize=True)

CHANNELS = st.sampled_from([1, 2, 3, 7, 16, 17, 24, 32, 40])
SIZES = st.sampled_from([1, 3, 5, 7, 13, 16, 25])
BITS = st.sampled_from([bits for bits in (512, 256, 128) if bits <= networks.host_bits()])


def check(program: Program, bits: int, cores: int, *inputs: Array) -> None:
    """The compiled program answers as ONNX Runtime does."""
    found = networks.run_built(program, networks.cpu_device(bits=bits, cores=cores), *inputs)
    for task, want in networks.answers(program, *inputs).items():
        np.testing.assert_allclose(found[task], want, rtol=1e-4, atol=2e-5 * max(1.0, float(np.abs(want).max())))


@st.composite
def windows(draw: st.DrawFn, most: int = 4) -> Window:
    """Any window up to `most`, padding below its size, every side its own."""
    kernel = (draw(st.integers(1, most)), draw(st.integers(1, most)))
    padding = tuple(draw(st.integers(0, kernel[side % 2] - 1)) for side in range(4))
    strides = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    return Window(kernel, strides, padding, dilation)


def output_size(window: Window, size: tuple[int, int], round_: type = floor) -> tuple[int, int]:
    """What the window leaves of an input; zero or less if it does not fit."""
    found = [
        round_((given + window.padding[axis] + window.padding[axis + 2] - window.reach(1, axis)) / window.strides[axis])
        for axis, given in enumerate(size)
    ]
    return found[0] + 1, found[1] + 1


@compiled
@given(st.integers(1, 2), CHANNELS, CHANNELS, SIZES, SIZES, windows(), BITS, st.sampled_from([1, 2, 4]), st.booleans())
def test_convolution_of_any_geometry(
    n: int, inputs: int, outputs: int, h: int, w: int, window: Window, bits: int, cores: int, twice: bool
) -> None:
    height, width = output_size(window, (h, w))
    assume(height > 0 and width > 0)
    attributes = {
        "kernel_shape": window.kernel, "strides": window.strides, "pads": window.padding, "dilations": window.dilation,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], **attributes),
        helper.make_node("Sigmoid", ["c"], ["s"]),
        helper.make_node("Mul", ["c", "s"], ["m" if twice else "y"]),
    ]
    weights = {
        "w": networks.example(outputs, inputs, *window.kernel) * np.float32(0.3), "b": networks.example(outputs, seed=2)
    }
    if twice:  # a second convolution reads the first one's blocked answer, fillers and all
        nodes.append(helper.make_node("Conv", ["m", "v"], ["y"]))
        weights["v"] = networks.example(5, outputs, 1, 1, seed=3) * np.float32(0.3)
    shape = (n, 5 if twice else outputs, height, width)
    program = networks.node_program(nodes, {"x": (n, inputs, h, w)}, {"y": shape}, weights)
    check(program, bits, cores, networks.example(n, inputs, h, w, seed=4))


@compiled
@given(st.integers(1, 2), CHANNELS, CHANNELS, st.integers(2, 23), st.integers(2, 23), st.data())
def test_every_method_of_a_dense_convolution(
    n: int, inputs: int, outputs: int, h: int, w: int, data: st.DataObject
) -> None:
    """Against float64; whichever method and tile a record may pick, blocked or planar input."""
    bits, kernel, stride = data.draw(BITS), data.draw(st.integers(2, 7)), data.draw(st.sampled_from([1, 2, 3]))
    padding, lanes = data.draw(st.integers(0, kernel // 2)), bits // 32
    window = Window((kernel, kernel), (stride, stride), (padding, padding, min(padding, 1), padding))
    height, width = output_size(window, (h, w))
    assume(min(height, width) > 0)
    device = networks.cpu_device(bits=bits, cores=data.draw(st.sampled_from([1, 2])))
    planar = inputs < lanes and data.draw(st.booleans())
    given_, made = Channels((inputs,), 1 if planar else lanes), Channels((outputs,), lanes)
    source = (n, inputs, h, w) if planar else (n, given_.blocks, h, w, lanes)
    shape = (made.blocks, given_.blocks, kernel, kernel, given_.lanes, lanes)
    layer = ConvolutionLayer(source, shape, window, height, width)
    methods = layer.candidates(device)
    winograd = [method for method in methods if isinstance(method, Winograd)]
    assert winograd or min(height, width) < 5 or kernel > 5 * stride or kernel <= stride
    method = data.draw(st.sampled_from(winograd or methods))
    x, weights = networks.example(n, inputs, h, w), networks.example(outputs, inputs, kernel, kernel, seed=1)
    run, (_, _, y) = kernel_of(method, device)
    packed = method.pack(pack_convolution(weights, given_, made))
    tensors = [tvm.runtime.tensor(array.copy()) for array in (
        x if planar else np.moveaxis(given_.pack(x, 1), 2, -1), packed, np.full_like(y, np.nan)
    )]
    run(*tensors)
    found = np.moveaxis(tensors[2].numpy(), -1, 2).reshape(n, -1, height, width)[:, :outputs]
    wanted = torch.nn.functional.conv2d(
        torch.nn.functional.pad(torch.tensor(x, dtype=torch.float64), (padding, padding, padding, window.padding[2])),
        torch.tensor(weights, dtype=torch.float64), stride=stride,
    ).numpy()
    scale = kernel * np.sqrt(inputs) * max(1, np.abs(wanted).max())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * scale)


def test_what_is_added_may_be_a_sum_itself() -> None:
    """A sum of two values that only an epilogue reads is fused into the kernel, beside its anchor."""
    shape, flat = (1, 16, 12, 13), (2, 78, 16)
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["m", "shape"], ["z"]),
        helper.make_node("Add", ["d", "z"], ["s"]),
        helper.make_node("Add", ["c", "s"], ["picture"]),
        helper.make_node("MatMul", ["m", "g"], ["t"]),
        helper.make_node("Softmax", ["t"], ["r"]),
        helper.make_node("Add", ["t", "m"], ["u"]),
        helper.make_node("Add", ["r", "u"], ["rows"]),
        helper.make_node("MatMul", ["t", "g"], ["e"]),
        helper.make_node("Mul", ["t", "k"], ["f"]),
        helper.make_node("Add", ["e", "f"], ["dense"]),
    ]
    weights = {
        "w": networks.example(16, 16, 3, 3), "v": networks.example(16, 16, 1, 1, seed=1),
        "k": networks.example(*flat, seed=2), "g": networks.example(16, 16, seed=3), "shape": np.array(shape, np.int64),
    }
    outputs = {"picture": shape, "rows": flat, "dense": flat}
    program = networks.node_program(nodes, {"x": shape, "m": flat}, outputs, weights)
    check(program, networks.host_bits(), 2, networks.example(*shape, seed=4), networks.example(*flat, seed=5))


@pytest.mark.parametrize(("source", "weights", "window", "size", "picked"), [
    ((1, 4, 56, 56, 16), (4, 4, 3, 3, 16, 16), Window((3, 3), padding=(1, 1, 1, 1)), 56, "winograd 4"),
    ((1, 4, 56, 56, 16), (4, 4, 5, 5, 16, 16), Window((5, 5), padding=(2, 2, 2, 2)), 56, "winograd 2"),
    ((1, 3, 224, 224), (4, 3, 7, 7, 1, 16), Window((7, 7), (2, 2), (3, 3, 3, 3)), 112, "winograd 3"),
    ((1, 3, 224, 224), (2, 3, 3, 3, 1, 16), Window((3, 3), (2, 2), (1, 1, 1, 1)), 112, "direct"),
    ((1, 4, 56, 56, 16), (4, 4, 3, 3, 16, 16), Window((3, 3), (2, 2), (1, 1, 1, 1)), 28, "direct"),
    ((1, 4, 56, 56, 16), (4, 4, 3, 3, 16, 16), Window((3, 3), (1, 1), (2, 2, 2, 2), (2, 2)), 56, "direct"),
])
def test_untuned_winograd_is_taken_where_it_saves_much(
    source: tuple[int, ...], weights: tuple[int, ...], window: Window, size: int, picked: str
) -> None:
    candidates = ConvolutionLayer(source, weights, window, size, size).candidates(networks.cpu_device())
    assert min(candidates, key=lambda one: one.cycles).name.startswith(picked)
    exact = ConvolutionLayer(source, weights, window, size, size, exact=True).candidates(networks.cpu_device())
    assert all(candidate.name.startswith("direct") for candidate in exact)


@compiled
@given(st.sampled_from([2, 3, 4, 6, 8]), st.integers(1, 9), st.integers(1, 9), SIZES, windows(3), BITS)
def test_grouped_convolution(groups: int, ins: int, outs: int, size: int, window: Window, bits: int) -> None:
    height, width = output_size(window, (size, size))
    assume(height > 0 and width > 0)
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["c"]),
        helper.make_node("Conv", ["c", "w"], ["y"], group=groups, strides=window.strides, pads=window.padding,
                         dilations=window.dilation),
    ]
    weights = {
        "v": networks.example(groups * ins, 3, 1, 1), "w": networks.example(groups * outs, ins, *window.kernel, seed=1)
    }
    program = networks.node_program(
        nodes, {"x": (1, 3, size, size)}, {"y": (1, groups * outs, height, width)}, weights
    )
    check(program, bits, 2, networks.example(1, 3, size, size, seed=2))


@compiled
@given(CHANNELS, SIZES, SIZES, windows(3), st.sampled_from(["MaxPool", "AveragePool"]), st.booleans(), st.booleans())
def test_pooling_of_any_geometry(
    channels: int, h: int, w: int, window: Window, operator: str, ceiling: bool, include: bool
) -> None:
    padding = tuple(min(size, window.kernel[side % 2] // 2) for side, size in enumerate(window.padding))
    flat = Window(window.kernel, window.strides, padding)
    if ceiling:
        flat = Window(flat.kernel, flat.strides, (*flat.padding[:2], *flat.padding[:2]))
    height, width = output_size(flat, (h, w), ceil if ceiling else floor)
    # Whether a last window wholly in the padding counts is not agreed on.
    assume((height - 1) * flat.strides[0] < h + flat.padding[0] and (width - 1) * flat.strides[1] < w + flat.padding[1])
    assume(min(height, width) > 0 and min(output_size(flat, (h, w))) > 0)
    attributes = {"kernel_shape": flat.kernel, "strides": flat.strides, "pads": flat.padding, "ceil_mode": int(ceiling)}
    if operator == "AveragePool":
        attributes["count_include_pad"] = int(include and not ceiling)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node(operator, ["c"], ["y"], **attributes)]
    program = networks.node_program(
        nodes, {"x": (1, 2, h, w)}, {"y": (1, channels, height, width)}, {"w": networks.example(channels, 2, 1, 1)}
    )
    check(program, networks.host_bits(), 2, networks.example(1, 2, h, w, seed=1))


@compiled
@given(CHANNELS, st.integers(1, 20), st.integers(1, 5), st.integers(1, 3), SIZES, st.data())
def test_transposed_convolution(
    inputs: int, outputs: int, kernel: int, stride: int, size: int, data: st.DataObject
) -> None:
    padding = data.draw(st.integers(0, kernel - 1))
    more = data.draw(st.integers(0, stride - 1))
    length = (size - 1) * stride + kernel - 2 * padding + more
    assume(0 < length <= 60)
    node = helper.make_node(
        "ConvTranspose", ["x", "w", "b"], ["y"], strides=[stride] * 2, pads=[padding] * 4, output_padding=[more] * 2
    )
    weights = {"w": networks.example(inputs, outputs, kernel, kernel) * np.float32(0.3), "b": networks.example(outputs)}
    program = networks.node_program(
        [node], {"x": (1, inputs, size, size)}, {"y": (1, outputs, length, length)}, weights
    )
    check(program, networks.host_bits(), 2, networks.example(1, inputs, size, size, seed=1))


@settings(compiled, max_examples=8)
@given(rows=st.sampled_from([1, 2, 5, 33]), depth=st.sampled_from([1, 15, 16, 100]),
       outputs=st.sampled_from([1, 2, 10, 16, 17, 200]))
@pytest.mark.parametrize("bits", [bits for bits in (512, 256, 128) if bits <= networks.host_bits()])
def test_dense_of_any_size(bits: int, rows: int, depth: int, outputs: int) -> None:
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["g"]), helper.make_node("Relu", ["g"], ["y"])]
    weights = {"w": networks.example(depth, outputs), "b": networks.example(outputs, seed=1)}
    program = networks.node_program(nodes, {"x": (rows, depth)}, {"y": (rows, outputs)}, weights)
    check(program, bits, 2, networks.example(rows, depth, seed=2))


@pytest.mark.parametrize("name", [name for name in names("cpu") if name != "host"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 7, 13, 25, 53, 96])
def test_tiles_fit_the_registers_and_waste_little(name: str, blocks: int, size: int) -> None:
    device = load(name)
    tile = convolution_tile(device, blocks, size, size)
    held = tile.blocks * tile.rows * tile.columns
    assert held + tile.blocks + 1 <= device.vector_registers
    assert blocks % tile.blocks == 0
    rows, columns = tile.padded(size, size)
    assert rows * columns <= 1.2 * size * size
    if size > 1:
        assert held >= 7  # about as many multiply-adds in flight as the pipelines are long


def test_chunks_leave_every_core_work_where_there_is_enough() -> None:
    device = networks.cpu_device(cores=4)
    for height in (7, 24, 48, 96):
        tile = with_tasks(convolution_tile(device, 8, height, height), device, 8, height, 1, 1000)
        tasks = ceil(height / tile.rows) / tile.chunk
        assert tasks == int(tasks)
        assert tasks >= min(12, ceil(height / tile.rows))
        assert 8 // tile.blocks % tile.shares == 0
        assert tasks * tile.shares / (ceil(tasks * tile.shares / 4) * 4) >= 0.9


def test_weights_larger_than_a_cache_are_read_once() -> None:
    device = networks.cpu_device(cores=2)
    tile = with_tasks(convolution_tile(device, 32, 7, 7), device, 32, 7, 1, 9 << 20)
    assert tile.chunk == ceil(7 / tile.rows)
    assert tile.shares >= 6


@pytest.mark.parametrize("width", [1, 5, 7, 13, 25, 53, 101])
def test_channelwise_tiles_waste_little(width: int) -> None:
    tile = sliding_tile(networks.cpu_device(), 8, width, 4)
    assert tile.padded(8, width)[1] <= 1.2 * width


def test_counts_of_an_average_leave_out_what_no_input_or_padding_fills() -> None:
    window = Window((3, 3), (2, 2), (1, 1, 1, 1))
    np.testing.assert_array_equal(window_counts(window, (4, 4), (3, 3), include_pad=False)[0], [4, 6, 2])
    np.testing.assert_array_equal(window_counts(window, (4, 4), (3, 3), include_pad=True)[2], [6, 6, 4])


def test_phases_cover_every_output_once() -> None:
    for kernel, stride, padding, outputs in [(2, 2, 0, 10), (4, 2, 1, 9), (3, 2, 1, 8), (5, 3, 4, 7), (1, 2, 0, 5)]:
        phases = Phases(kernel, stride, padding, outputs)
        reached = {(o + padding) // stride - phases.first for o in range(outputs)}
        assert reached == set(range(phases.count))
        assert phases.taps * stride >= kernel


def test_weights_of_a_resize_sum_to_one() -> None:
    for method in ("nearest_neighbor", "linear", "cubic"):
        for transform in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"):
            table = taps(7, 17, method, transform, "floor", -0.75)
            assert table is not None
            np.testing.assert_allclose(table.weight.sum(0), 1, atol=1e-6)
            assert table.index.min() >= 0 and table.index.max() <= 6
    assert taps(7, 17, "linear", "tf_crop_and_resize", "floor", -0.75) is None


def test_elementary_functions_are_accurate_and_keep_nan() -> None:
    exact = {
        "Exp": np.exp, "Sigmoid": lambda x: 1 / (1 + np.exp(-x)), "Tanh": np.tanh, "Erf": np.vectorize(erf),
    }
    x = np.concatenate([np.linspace(-87, 88, 7001), np.linspace(-1, 1, 2001), [np.nan, np.inf, -np.inf]])
    x = x.astype(np.float32).reshape(1, -1)
    nodes = [helper.make_node(name, ["x"], [name]) for name in exact]
    program = networks.node_program(nodes, {"x": x.shape}, dict.fromkeys(exact, x.shape))
    found = networks.run_built(program, networks.cpu_device(bits=networks.host_bits()), x)
    with np.errstate(over="ignore"):
        for name, function in exact.items():
            wanted, slack = function(x.astype(np.float64)), 6e-7 if name == "Erf" else 2e-7
            np.testing.assert_allclose(found[name], wanted, rtol=3e-7, atol=slack, err_msg=name)
