"""What the passes leave: no batch norm, few conversions, no unscheduled kernel, and plans pinned as golden text."""

import re

import networks
import numpy as np
import pytest
import torch
import tvm
from conftest import Golden
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper
from tvm import relax, te, tirx

from examples.dronet.network import DroNetV2
from profiles.device import load
from targets.base import Array, Program
from targets.cpu import Lowered
from targets.lower import lower
from targets.passes.channels import Channels, pack_convolution, whole_groups
from targets.passes.fold import fold
from targets.passes.pattern import correct_patterns
from targets.passes.walk import array_of, bindings, operator
from targets.registry import target

pytestmark = pytest.mark.compile


def operators(module: tvm.IRModule) -> list[str]:
    return [operator(binding.value) for binding in bindings(module) if operator(binding.value)]


def kernels(program: Program, bits: int = 512) -> dict[str, str]:
    """Scheduled kernels by name, as text."""
    plan = target("cpu").plan(program, networks.cpu_device(bits=bits))
    assert isinstance(plan.lowered, Lowered)
    return {
        variable.name_hint: function.script()
        for variable, function in plan.lowered.module.functions.items() if isinstance(function, tirx.PrimFunc)
    }


def normed_convolution(with_bias: bool, read_twice: bool) -> Program:
    weights: dict[str, Array] = {"w": networks.example(4, 3, 3, 3), "b": networks.example(4, seed=1)}
    weights |= {name: networks.example(4, seed=2 + i) for i, name in enumerate(("gamma", "beta", "mean"))}
    weights["variance"] = np.abs(networks.example(4, seed=9)) + np.float32(0.5)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"] if with_bias else ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "variance"], ["n"]),
        helper.make_node("Relu", ["n"], ["y"]),
    ]
    outputs = {"y": (1, 4, 6, 6)}
    if read_twice:
        nodes.append(helper.make_node("Sigmoid", ["c"], ["z"]))
        outputs["z"] = (1, 4, 6, 6)
    return networks.node_program(nodes, {"x": (1, 3, 8, 8)}, outputs, weights)


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_batch_norm_goes_into_the_convolution_before_it(with_bias: bool) -> None:
    folded = fold(lower(normed_convolution(with_bias, read_twice=False)))
    assert operators(folded) == ["relax.nn.conv2d", "relax.add", "relax.nn.relu"]


def test_a_convolution_that_others_read_keeps_its_weights() -> None:
    program = normed_convolution(with_bias=True, read_twice=True)
    folded = fold(lower(program))
    assert operators(folded).count("relax.multiply") == 1
    convolution = next(b.value for b in bindings(folded) if operator(b.value) == "relax.nn.conv2d")
    np.testing.assert_array_equal(array_of(convolution.args[1]), networks.example(4, 3, 3, 3))
    x = networks.example(1, 3, 8, 8)
    for task, want in networks.answers(program, x).items():
        found = networks.run_built(program, networks.cpu_device(bits=networks.host_bits()), x)
        np.testing.assert_allclose(found[task], want, rtol=1e-4, atol=1e-5)


def test_dronet_is_blocked_from_its_first_convolution_to_its_last() -> None:
    program = networks.to_program(networks.settle(DroNetV2()), (torch.zeros(1, 1, 200, 200),), ("both",))
    found = kernels(program)
    assert not [name for name in found if name.startswith("block")]
    assert len([name for name in found if "unblock" in name]) == 1
    convolutions = [text for text in found.values() if re.search('"kernel": "(convolution|winograd)"', text)]
    assert len(convolutions) == 10
    assert all("T.parallel" in text and "T.vectorized" in text for text in convolutions)
    assert not [name for name in found if "maximum" in name and "convolution" not in name]  # ReLU6 is an epilogue
    assert len([name for name in found if name.startswith("fused_convolution") and "add" in name]) == 10


def test_blocked_lanes_are_the_devices() -> None:
    program = normed_convolution(with_bias=True, read_twice=False)
    for bits in (512, 256, 128):
        text = "\n".join(kernels(program, bits).values())
        assert f"T.vectorized(T.int64({bits // 32}))" in text


def test_no_heavy_kernel_is_left_serial() -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]), helper.make_node("MatMul", ["x", "t"], ["m"]),
        helper.make_node("Softmax", ["m"], ["s"]), helper.make_node("MatMul", ["s", "x"], ["y"]),
    ]
    program = networks.node_program(nodes, {"x": (2, 128, 64)}, {"y": (2, 128, 64)})
    for name, text in kernels(program).items():
        assert "T.parallel" in text, name


def test_equal_layers_share_one_kernel() -> None:
    nodes, weights = [], {}
    for layer in range(3):
        weights[f"w{layer}"] = networks.example(16, 16, 3, 3, seed=layer)
        source = f"v{layer - 1}" if layer else "x"
        nodes.append(helper.make_node("Conv", [source, f"w{layer}"], [f"v{layer}"], pads=[1, 1, 1, 1]))
    program = networks.node_program(nodes, {"x": (1, 16, 8, 8)}, {"v2": (1, 16, 8, 8)}, weights)
    assert len([name for name in kernels(program) if "convolution" in name]) == 1


def test_what_changes_a_shape_is_not_elementwise() -> None:
    def padded_at_the_end(x: te.Tensor) -> te.Tensor:
        return te.compute((4, 6), lambda i, j: tirx.if_then_else(i < 3, x[tirx.min(i, 2), j], tirx.const(0, "float32")))

    x = relax.Var("x", relax.TensorType((3, 6), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_te(lambda x: te.compute((3, 6), lambda i, j: x[i, j] + tirx.const(1, "float32")), x,
                                primfunc_name_hint="keeps", primfunc_attrs={"op_pattern": 0})
            z = builder.emit_output(builder.emit_te(padded_at_the_end, y, primfunc_name_hint="pads",
                                                    primfunc_attrs={"op_pattern": 0}))
        builder.emit_func_output(z)
    corrected = correct_patterns(builder.get())
    assert int(corrected["keeps"].attrs["op_pattern"]) == 0
    assert int(corrected["pads"].attrs["op_pattern"]) == 2


SEGMENTS = st.lists(st.integers(1, 20), min_size=1, max_size=4).map(tuple)


@given(SEGMENTS, st.sampled_from([4, 8, 16]))
def test_channels_keep_their_order_and_never_share_a_lane(segments: tuple[int, ...], lanes: int) -> None:
    channels = Channels(segments, lanes)
    positions = channels.positions()
    assert len(positions) == channels.count == sum(segments)
    assert (np.diff(positions) > 0).all()
    assert positions[-1] < channels.blocks * lanes
    packed = channels.pack(np.arange(1, channels.count + 1), 0).reshape(-1)
    np.testing.assert_array_equal(packed[positions], np.arange(1, channels.count + 1))
    assert packed.sum() == np.arange(1, channels.count + 1).sum()  # fillers are zero
    starts = np.cumsum((0, *segments[:-1]))
    assert all(positions[start] % lanes == 0 for start in starts)


@given(SEGMENTS, st.integers(1, 20), st.sampled_from([4, 8, 16]))
def test_packed_weights_multiply_as_plain_ones(segments: tuple[int, ...], outputs: int, lanes: int) -> None:
    inputs, out = Channels(segments, lanes), Channels((outputs,), lanes)
    weights = networks.example(outputs, inputs.count, 1, 1)
    x = networks.example(inputs.count)
    packed_x = inputs.pack(x, 0, fill=7.0)  # fillers of activations are arbitrary
    product = np.einsum("oihwab,ia->ob", pack_convolution(weights, inputs, out), packed_x)
    np.testing.assert_allclose(product.reshape(-1)[out.positions()], weights[:, :, 0, 0] @ x, rtol=1e-4, atol=1e-5)


@given(st.sampled_from([2, 3, 4, 8, 16, 32]), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 16]))
def test_merged_groups_multiply_as_before(groups: int, ins: int, outs: int) -> None:
    weights = networks.example(groups * outs, ins, 1, 1)
    x = networks.example(groups * ins)
    merged, left = whole_groups(weights, groups, Channels((groups * ins,), 8))
    assert left == 1 or (merged.shape[1] % 8 == 0 and merged.shape[0] // left % 8 == 0)

    def multiply(w: Array, count: int) -> Array:
        return np.einsum("goi,gi->go", w.reshape(count, -1, w.shape[1]), x.reshape(count, -1)).reshape(-1)

    np.testing.assert_allclose(multiply(merged, left), multiply(weights, groups), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["x86-64-v4", "raspberry-pi-5", "jetson-orin-nano"])
def test_plans_are_pinned(device: str, golden: Golden) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Clip", ["c", "low", "high"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    weights = {
        "w": networks.example(20, 3, 3, 3), "b": networks.example(20, seed=1),
        "low": np.array(0, np.float32), "high": np.array(6, np.float32),
    }
    program = networks.node_program(nodes, {"x": (1, 3, 25, 25)}, {"y": (1, 20, 6, 6)}, weights, "pinned")
    profile = load(device)
    plan = target(profile.kind).plan(program, profile)
    golden(f"plan-{device}.txt", "\n".join((*plan.commands, "", plan.files["model.tir"].decode())))
