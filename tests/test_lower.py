"""Every supported operator against ONNX Runtime, plainly and through the cpu target; what is refused, and how."""

from dataclasses import dataclass, field
from typing import Any

import networks
import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper, shape_inference
from workloads.age_gender import AgeGenderNetwork
from workloads.onet import ONetwork

from examples.dronet.network import DroNetV2
from examples.scenes.network import SceneNet
from targets import lower
from targets.base import Array, Program
from targets.errors import TargetError

TOLERANCE = 2e-5


def weight(*shape: int, seed: int = 1) -> Array:
    return networks.example(*shape, seed=seed) * np.float32(0.3)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def scalar(value: float) -> Array:
    return np.array(value, np.float32)


@dataclass(frozen=True)
class Case:
    """One node: an operator, the program inputs or constants it reads ("" for one left out), and its attributes."""

    operator: str
    inputs: tuple[str | Array, ...] = ("x",)
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1


# Inputs: x (2, 20, 9, 7) of any sign, p like x but positive, m (2, 5, 24), t (2, 24, 6).
INPUTS = {"x": (2, 20, 9, 7), "p": (2, 20, 9, 7), "m": (2, 5, 24), "t": (2, 24, 6)}
CASES = {
    **{name: Case(name) for name in (
        "Neg", "Abs", "Exp", "Erf", "Relu", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Selu",
        "Softplus", "Mish", "Softmax", "LogSoftmax", "GlobalAveragePool", "GlobalMaxPool", "Identity", "Flatten",
    )},
    **{name: Case(name, ("p",)) for name in ("Sqrt", "Log", "Reciprocal")},
    **{f"{name} of two": Case(name, ("x", "p")) for name in ("Add", "Sub", "Mul", "Div", "Min", "Max")},
    **{f"{name} by channel": Case(name, ("x", weight(20, 1, 1) + 2)) for name in ("Add", "Sub", "Mul", "Div", "Max")},
    "Pow": Case("Pow", ("p", scalar(1.5))),
    "Gelu": Case("Gelu"),
    "PRelu by channel": Case("PRelu", ("x", weight(20, 1, 1))),
    "PRelu by one": Case("PRelu", ("x", weight(1))),
    "Clip": Case("Clip", ("x", scalar(-0.5), scalar(0.25))),
    "Clip below": Case("Clip", ("x", scalar(-0.5))),
    "Clip above": Case("Clip", ("x", "", scalar(0.25))),
    "Softmax over channels": Case("Softmax", attributes={"axis": 1}),
    "Conv": Case("Conv", ("x", weight(18, 20, 3, 3), weight(18)), {"pads": [1, 1, 1, 1]}),
    "Conv 1D": Case("Conv", ("m", weight(4, 5, 3), weight(4)), {"pads": [1, 1]}),
    "Conv same": Case("Conv", ("x", weight(18, 20, 3, 3)), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "Conv grouped": Case("Conv", ("x", weight(10, 4, 3, 3)), {"group": 5}),
    "Conv depthwise": Case("Conv", ("x", weight(20, 1, 3, 2)), {"group": 20, "strides": [2, 1]}),
    "ConvTranspose": Case(
        "ConvTranspose", ("x", weight(20, 6, 4, 4), weight(6)), {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    ),
    "ConvTranspose 3/2": Case(
        "ConvTranspose", ("x", weight(20, 3, 3, 3)), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}
    ),
    "ConvTranspose grouped": Case("ConvTranspose", ("x", weight(20, 2, 2, 2)), {"strides": [2, 2], "group": 4}),
    "MatMul": Case("MatMul", ("m", "t")),
    "MatMul by weights": Case("MatMul", ("m", weight(24, 40))),
    "MatMul by few weights": Case("MatMul", ("m", weight(24, 3))),
    "BatchNormalization": Case(
        "BatchNormalization", ("x", weight(20), weight(20), weight(20), np.abs(weight(20)) + np.float32(0.5))
    ),
    "LayerNormalization": Case("LayerNormalization", ("m", weight(24), weight(24))),
    "InstanceNormalization": Case("InstanceNormalization", ("x", weight(20), weight(20))),
    "MaxPool": Case("MaxPool", attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 0, 1]}),
    "MaxPool ceiling": Case("MaxPool", attributes={"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    "AveragePool": Case("AveragePool", attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "AveragePool with padding": Case(
        "AveragePool", attributes={"kernel_shape": [3, 2], "pads": [1, 1, 1, 0], "count_include_pad": 1}
    ),
    **{
        f"{name} over pixels": Case(name, ("x", ints(2, 3)))
        for name in ("ReduceMean", "ReduceMax", "ReduceSum", "ReduceMin")
    },
    "ReduceMean over lanes": Case("ReduceMean", ("m", ints(-1)), {"keepdims": 0}),
    "Resize nearest": Case("Resize", ("x", "", np.array([1, 1, 2, 2], np.float32)), {
        "mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    "Resize linear": Case("Resize", ("x", "", "", ints(2, 20, 18, 20)), {"mode": "linear"}),
    "Resize corners": Case("Resize", ("x", "", "", ints(2, 20, 13, 20)), {
        "mode": "linear", "coordinate_transformation_mode": "align_corners"}),
    "Resize cubic": Case("Resize", ("x", "", "", ints(2, 20, 18, 14)), {"mode": "cubic"}),
    "Resize by a part": Case("Resize", ("x", "", np.array([1, 1, 1.5, 1.7], np.float32)), {"mode": "linear"}),
    "Resize nearest by a part": Case("Resize", ("x", "", np.array([1, 1, 1.5, 1.7], np.float32)), {
        "mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    "DepthToSpace": Case("DepthToSpace", attributes={"blocksize": 2, "mode": "CRD"}),
    "SpaceToDepth": Case("SpaceToDepth", (weight(1, 3, 4, 6),), {"blocksize": 2}),
    "Pad": Case("Pad", ("x", ints(0, 0, 1, 2, 0, 0, 0, 1), scalar(0.5))),
    "Pad channels": Case("Pad", ("x", ints(0, 1, 0, 0, 0, 3, 0, 0))),
    "Pad reflect": Case("Pad", ("x", ints(0, 0, 1, 2, 0, 0, 0, 1)), {"mode": "reflect"}),
    "Concat": Case("Concat", ("x", "p"), {"axis": 1}),
    "Concat lanes": Case("Concat", ("x", "p"), {"axis": 3}),
    "Split": Case("Split", ("x", ints(7, 13)), {"axis": 1}, outputs=2),
    "Slice": Case("Slice", ("x", ints(1, 1), ints(9, 7), ints(2, 3), ints(2, 3))),
    "Gather": Case("Gather", ("x", ints(3, 1, 1)), {"axis": 1}),
    "Reshape": Case("Reshape", ("x", ints(2, -1, 21))),
    "Transpose": Case("Transpose", attributes={"perm": [0, 3, 2, 1]}),
    "Squeeze": Case("Squeeze", (weight(1, 4, 1), ints(0))),
    "Unsqueeze": Case("Unsqueeze", ("m", ints(1))),
    "Expand": Case("Expand", (weight(1, 4, 1), ints(3, 4, 5))),
    "Gemm": Case("Gemm", (weight(3, 24), weight(7, 24, seed=2), weight(7)), {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    "Cast": Case("Cast", attributes={"to": onnx.TensorProto.FLOAT}),
    "Constant": Case("Constant", (), {"value": numpy_helper.from_array(weight(2, 2))}),
    "Dropout": Case("Dropout"),
}


def graph_of(cases: dict[str, Case], after_convolution: bool) -> Program:
    """All cases in one program, a task each, reading x and p as given or as convolutions make them (blocked)."""
    nodes, weights, tasks = [], {"zero": scalar(0.0)}, []
    made_of = {"x": "x", "p": "p"}
    if after_convolution:
        weights |= {"mix": weight(20, 20, 1, 1), "half": scalar(0.5)}
        nodes = [
            helper.make_node("Conv", ["x", "mix"], ["mixed_x"]),
            helper.make_node("Conv", ["p", "mix"], ["mixed_p"]),
            helper.make_node("Sigmoid", ["mixed_p"], ["share"]),
            helper.make_node("Add", ["share", "half"], ["positive"]),
        ]
        made_of = {"x": "mixed_x", "p": "positive"}
    for index, (name, case) in enumerate(cases.items()):
        reads = []
        for place, given in enumerate(case.inputs):
            if isinstance(given, str):
                reads.append(made_of.get(given, given))
            else:
                weights[f"w{index}_{place}"] = given
                reads.append(f"w{index}_{place}")
        made = [f"v{index}_{place}" for place in range(case.outputs)]
        nodes.append(helper.make_node(case.operator, reads, made, **case.attributes))
        for place, value in enumerate(made):
            tasks.append(name if place == 0 else f"{name} {place}")
            # Of an input, so that answers of constants alone are computed too.
            nodes.append(helper.make_node("ReduceMax", ["x"], [f"{value}_x"], keepdims=0))
            nodes.append(helper.make_node("Mul", [f"{value}_x", "zero"], [f"{value}_0"]))
            nodes.append(helper.make_node("Add", [value, f"{value}_0"], [tasks[-1]]))
    used = {name for node in nodes for name in node.input}
    inputs = {name: shape for name, shape in INPUTS.items() if name in used}
    graph = helper.make_graph(
        nodes, "operators",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(task, onnx.TensorProto.FLOAT, None) for task in tasks],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return Program("operators", shape_inference.infer_shapes(model, strict_mode=True, data_prop=True), tuple(tasks))


def inputs_of(program: Program) -> list[Array]:
    made = {name: networks.example(*shape, seed=index) for index, (name, shape) in enumerate(INPUTS.items())}
    made["p"] = np.abs(made["p"]) + np.float32(0.5)
    return [made[spec.name] for spec in lower.signature(program)]


def assert_close(found: dict[str, Array], wanted: dict[str, Array]) -> None:
    wrong = {}
    for task, want in wanted.items():
        assert found[task].shape == want.shape, task
        error = np.abs(found[task] - want).max()
        if not error <= TOLERANCE * max(1.0, float(np.abs(want).max())):
            wrong[task] = float(error)
    assert not wrong


@pytest.mark.compile
def test_every_case_through_the_reference() -> None:
    program = graph_of(CASES, after_convolution=False)
    inputs = inputs_of(program)
    assert_close(lower.reference(program)(*inputs), networks.answers(program, *inputs))


@pytest.mark.compile
@pytest.mark.parametrize(("bits", "after_convolution"), [(512, False), (512, True), (256, True), (128, True)])
def test_every_case_through_the_cpu_target(bits: int, after_convolution: bool) -> None:
    if bits > networks.host_bits():
        pytest.skip(f"this processor has no {bits}-bit vectors")
    program = graph_of(CASES, after_convolution)
    inputs = inputs_of(program)
    found = networks.run_built(program, networks.cpu_device(bits=bits), *inputs)
    assert_close(found, networks.answers(program, *inputs))


NETWORKS = {
    "dronet": (DroNetV2, (1, 1, 200, 200), 1),
    "scenes": (SceneNet, (2, 3, 96, 96), 3),
    "onet": (ONetwork, (3, 3, 48, 48), 3),
    "age-gender": (AgeGenderNetwork, (1, 3, 112, 112), 2),
    "unet": (networks.UNet, (1, 3, 36, 44), 2),
    "transformer": (networks.VisionTransformer, (2, 3, 40, 48), 2),
}


@pytest.mark.compile
@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks(name: str) -> None:
    network, shape, tasks = NETWORKS[name]
    torch.manual_seed(0)
    module = networks.settle(network())
    program = networks.to_program(module, (torch.zeros(shape),), tuple("abc"[:tasks]), name)
    x = networks.example(*shape)
    found = networks.run_built(program, networks.cpu_device(bits=networks.host_bits()), x)
    assert_close(found, networks.answers(program, x))


@pytest.mark.compile
@pytest.mark.parametrize("built", [False, True])
def test_rounding_to_a_grid_is_onnxs(built: bool) -> None:
    """A pair and constants by channel, as quantized programs have them; half steps go to the even one."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["v"], axis=1),
        helper.make_node("Mul", ["d", "v"], ["y"]),
    ]
    weights = {
        "s": np.array(0.25, np.float32), "z": np.array(-7, np.int8),
        "w": np.arange(-10, 10, dtype=np.int8).reshape(1, 20, 1, 1), "zw": np.zeros(20, np.int8),
        "sw": np.linspace(0.1, 0.9, 20, dtype=np.float32),
    }
    program = networks.node_program(nodes, {"x": (1, 20, 9, 7)}, {"y": (1, 20, 9, 7)}, weights)
    halves = (np.arange(1260, dtype=np.float32).reshape(1, 20, 9, 7) - 630) / 8  # and far outside the grid
    device = networks.cpu_device(bits=networks.host_bits())
    found = networks.run_built(program, device, halves) if built else lower.reference(program)(halves)
    assert np.array_equal(found["y"], networks.answers(program, halves)["y"])


def test_every_supported_operator_has_a_case() -> None:
    covered = {case.operator for case in CASES.values()} | {"QuantizeLinear", "DequantizeLinear"}
    assert covered == lower.SUPPORTED


def refusal(program: Program) -> str:
    with pytest.raises(TargetError) as caught:
        lower.lower(program)
    return str(caught.value)


def test_unsupported_operators_are_all_named() -> None:
    nodes = [
        helper.make_node("Hardmax", ["x"], ["a"]), helper.make_node("CumSum", ["a", "axis"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    program = networks.node_program(nodes, {"x": (1, 4)}, {"y": (1, 4)}, {"axis": np.array(1, np.int64)}, "odd")
    wanted = "Program 'odd' uses operators that no target compiles: CumSum, Hardmax. Supported: Abs, Add, "
    assert refusal(program).startswith(wanted)


def test_a_custom_domain_is_not_taken_for_the_standard_one() -> None:
    program = networks.node_program([helper.make_node("Relu", ["x"], ["y"])], {"x": (1, 4)}, {"y": (1, 4)})
    program.model.graph.node[0].domain = "com.example"
    assert "com.example.Relu" in refusal(program)


def test_a_dynamic_shape_is_refused() -> None:
    program = networks.node_program([helper.make_node("Relu", ["x"], ["y"])], {"x": (1, 4)}, {"y": (1, 4)})
    program.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    assert "Tensor 'x' of program 'graph' has no static shape: (-1, 4)." in refusal(program)


def test_answers_that_are_not_the_tasks_are_refused() -> None:
    program = networks.node_program([helper.make_node("Relu", ["x"], ["y"])], {"x": (1, 4)}, {"y": (1, 4)})
    renamed = Program("graph", program.model, ("depth",))
    assert refusal(renamed) == "Program 'graph' answers ('y',), but its tasks are ('depth',)."


def test_an_answer_that_nothing_computes_is_refused() -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Relu", ["x"], ["z"])]
    program = networks.node_program(nodes, {"x": (1, 4)}, {"y": (1, 4), "z": (1, 4)})
    assert refusal(program) == "Task 'y' of program 'graph' answers with an input or a constant."


def test_what_the_importer_refuses_names_the_program(capfd: pytest.CaptureFixture[str]) -> None:
    nodes = [
        helper.make_node("Cast", ["widths"], ["pads"], to=onnx.TensorProto.INT64),
        helper.make_node("Pad", ["x", "pads"], ["y"]),
    ]
    program = networks.node_program(nodes, {"x": (1, 4), "widths": (4,)}, {"y": (1, 4)})
    assert refusal(program) == "Program 'graph' cannot be imported: Dynamic pads are not supported yet."
    assert capfd.readouterr().out == ""
