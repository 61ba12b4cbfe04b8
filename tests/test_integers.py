"""Quantized networks on the accelerator: read from Relax, bit-exact on every level, within a step of ONNX Runtime."""

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import tvm
from accelerated import SMALL
from onnx import TensorProto, helper
from plain import Plain, setup, task
from torch import Tensor, nn
from tvm import relax

from compressor.export import run, session, to_program
from compressor.pathway import extract
from compressor.stages.quantize import Quantize
from compressor.workload import Task
from targets.accelerator import simulator
from targets.accelerator.arithmetic import Int8
from targets.accelerator.circuit import simulate
from targets.accelerator.design import Design
from targets.accelerator.layers import Contraction, Product
from targets.accelerator.network import Network, compile_network, macs_of
from targets.accelerator.partition import Partition, partition
from targets.accelerator.reading import read
from targets.base import Program
from targets.errors import TargetError
from targets.lower import lower


class Mixed(nn.Module):
    """Few input channels, groups, dilation, residuals of two kinds, three poolings, and clipping."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 12, 5, 2, 2), nn.ReLU6())
        self.first = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=3), nn.ReLU())
        self.second = nn.Conv2d(12, 12, 3, padding=2, dilation=2)
        self.third = nn.Sequential(nn.Conv2d(12, 20, 3, 2, 1), nn.ReLU())
        self.short = nn.Conv2d(12, 20, 1, 2)
        self.deep = nn.Sequential(nn.Conv2d(20, 20, 3, padding=1, groups=20), nn.ReLU())
        self.last = nn.Conv2d(20, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = nn.functional.max_pool2d(x, 3, 1, 1)
        x = torch.relu(self.second(self.first(x)) + x)
        x = self.third(x) + self.short(x)
        x = nn.functional.avg_pool2d(x, 2) + nn.functional.max_pool2d(x, 2)
        return self.last(self.deep(x) * 1.0)


INPUT = torch.randn(1, 1, 20, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    model, bench = setup(Mixed, (INPUT,), tmp_path_factory.mktemp("quantized"))
    found = Quantize(kind="quantize", batches=2, most_kept=0.0).run(model, bench)
    return to_program(extract(found, ["t"]), found.inputs)[1]


@pytest.fixture(scope="module")
def network(program: Program) -> Network:
    (found,) = read(lower(program, integers=True)["main"]).networks
    return found


def by_onnx_runtime(program: Program, x: np.ndarray) -> dict[str, Int8]:
    """What every QuantizeLinear answers, by the name that Relax, which keeps their order, has for it."""
    bindings = lower(program, integers=True)["main"].body.blocks[0].bindings
    calls = [one for one in bindings if isinstance(one.value, relax.Call)]
    called = [one.var.name for one in calls if one.value.op.name == "relax.quantize"]
    model = onnx.ModelProto.FromString(program.model.SerializeToString())
    names = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.INT8, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    found = session.run(names, {session.get_inputs()[0].name: x})
    return {name: value[0] for name, value in zip(called, found, strict=True)}


def test_every_convolution_is_read(network: Network) -> None:
    found = [node.layer for node in network.nodes if isinstance(node.layer, Contraction)]
    assert [layer.groups for layer in found if layer.groups > 1] == [3, 20]
    assert sum(layer.step.addition is not None for layer in found) == 3
    assert len(network.inputs) == 1 and len(network.outputs) == 1


def test_every_layer_answers_as_onnx_runtime_does(program: Program, network: Network) -> None:
    """Each of what ONNX Runtime gives it."""
    for seed in range(4):
        x = torch.randn(INPUT.shape, generator=torch.Generator().manual_seed(seed)).numpy()
        given = by_onnx_runtime(program, x)
        for node in network.nodes:
            answer = node.layer(given[node.source], None if node.other is None else given[node.other])
            wanted = given.setdefault(node.result, answer)  # a pooling that keeps its grid is in no QuantizeLinear
            assert np.array_equal(answer, wanted), node.result


@pytest.mark.parametrize("design", [SMALL, Design()], ids=["8 x 8, small", "16 x 8"])
def test_programs_answer_every_value_as_the_reference_does(network: Network, design: Design) -> None:
    chance = np.random.default_rng(0)
    built = compile_network(network, design)
    (name,), memory = network.inputs, built.image.copy()
    for _ in range(2):  # a second frame finds the memory as the first left it
        x = chance.integers(-128, 128, network.values[name].shape, np.int8)
        wanted = network({name: x})
        built.write(name, x, memory)
        simulator.execute(built.program, memory, design)
        for node in network.nodes:
            assert np.array_equal(built.read(node.result, memory), wanted[node.result]), node.result


@pytest.mark.slow
def test_the_circuit_answers_as_the_reference_does(network: Network) -> None:
    built = compile_network(network, SMALL)
    (name,), memory = network.inputs, built.image.copy()
    x = np.random.default_rng(0).integers(-128, 128, network.values[name].shape, np.int8)
    built.write(name, x, memory)
    expected = memory.copy()
    cycles = simulator.execute(built.program, expected, SMALL).cycles
    assert simulate.run(built.program, memory, SMALL) == cycles
    assert np.array_equal(memory, expected)


def test_an_input_of_few_channels_fills_the_array(network: Network) -> None:
    built = compile_network(network, Design())
    place = built.places[network.inputs[0]]
    assert (place.channels, place.height, place.width) == (25, 10, 12)


@pytest.mark.parametrize(("size", "step", "pad"), [(3, 2, 0), (2, 2, 0), (3, 2, 1)])
def test_the_largest_of_windows_that_end_outside_is_the_accelerators(
    size: int, step: int, pad: int, tmp_path: Path
) -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.slope = nn.Conv2d(1, 8, 3, padding=1), nn.PReLU(8)
            self.pool, self.last = nn.MaxPool2d(size, step, pad, ceil_mode=True), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.pool(self.slope(self.first(x)))).relu() * 1.0

    x = torch.randn(1, 1, 20, 24, generator=torch.Generator().manual_seed(0))[:, :, :, :21]
    model, bench = setup(Up, (x,), tmp_path)
    found = Quantize(kind="quantize", batches=2, most_kept=0.0, answers="int8").run(model, bench)
    program = to_program(extract(found, ["t"]), found.inputs)[1]
    networks = partition(lower(program, integers=True), "up.").networks
    kinds = [type(node.layer).__name__ for network in networks for node in network.nodes]
    assert kinds == ["Contraction", "Pooling", "Contraction"]
    chance = np.random.default_rng(0)
    network = networks[1]
    built, (name,) = compile_network(network, SMALL), network.inputs
    memory, given = built.image.copy(), chance.integers(-128, 128, network.values[name].shape, np.int8)
    built.write(name, given, memory)
    simulator.execute(built.program, memory, SMALL)
    node = next(node for node in network.nodes if type(node.layer).__name__ == "Pooling")
    answer = built.read(node.result, memory)
    steps = torch.from_numpy(given.astype(np.float32))
    assert np.array_equal(answer, model.module.pool(steps[None])[0].numpy())  # type: ignore[operator, union-attr]


def test_values_that_are_always_zero_have_a_scale_that_can_be_requantized_with(tmp_path: Path) -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 1)
            nn.init.constant_(self.first.bias, -1e3)  # type: ignore[arg-type]

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.first(x)))

    model, bench = setup(Dead, (INPUT,), tmp_path)
    found = Quantize(kind="quantize", batches=2, most_kept=0.0).run(model, bench)
    program = to_program(extract(found, ["t"]), found.inputs)[1]
    (network,) = read(lower(program, integers=True)["main"]).networks
    assert network.nodes
    assert torch.allclose(found.answers(INPUT)["t"], model.answers(INPUT)["t"], atol=0.01)


def test_a_network_that_is_not_quantized_is_refused() -> None:
    workload = Plain(Mixed, (INPUT,), (task(),))
    model, _ = setup(Mixed, (INPUT,), Path(), *workload.tasks)
    program = to_program(extract(model, ["t"]), model.inputs)[1]
    with pytest.raises(TargetError, match="it needs int8, so quantize it"):
        read(lower(program, integers=True)["main"])


class Between(nn.Module):
    """What the accelerator does not compute lies between what it does, and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.one, self.two = nn.Conv2d(8, 2, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        small = nn.functional.max_pool2d(x, 2)
        y = self.third(torch.sigmoid(self.second(small)))
        wide = nn.functional.interpolate(y, scale_factor=2.0) + x
        return {"one": self.one(wide), "two": self.two(small.mean((2, 3)))}


def split(module: type[nn.Module], folder: Path, *names: str) -> tuple[Program, Partition]:
    tasks = [Task(name, output=name, metric="mae", higher_is_better=False) for name in names]
    model, bench = setup(module, (INPUT,), folder, *tasks)
    found = Quantize(kind="quantize", batches=2, most_kept=0.0).run(model, bench)
    program = to_program(extract(found, list(names)), found.inputs)[1]
    return program, partition(lower(program, integers=True), f"test.{module.__name__}.")


class Joined(nn.Module):
    """The host splits and joins what runs of the accelerator make: tuples lie between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(4, 4, 3)
        self.third, self.last = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        left, right = self.first(x).relu().split(4, 1)
        both = torch.cat([self.second(left).relu(), torch.sigmoid(self.second(right))], 1)
        return {"one": self.last(self.third(both).relu()), "two": both.amax((2, 3))}


class Attention(nn.Module):
    """A block of a vision transformer: 30 tokens, two heads of 12 channels; a task of them all, and one of each."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.qkv, self.out = nn.Conv2d(1, 24, 4, 4), nn.Linear(24, 72), nn.Linear(24, 24)
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 40), nn.Linear(40, 24)
        self.one, self.two = nn.Linear(24, 3), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).reshape(-1, 30, 3, 2, 12).permute(2, 0, 3, 1, 4).unbind(0)
        seen = self.seen(q, k, v)
        x = x + self.out(seen.transpose(1, 2).reshape(-1, 30, 24))
        x = x + self.down(self.up(x).relu())
        return {"one": self.one(x.mean(1)), "two": self.two(x)}


    @staticmethod
    def seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (0.3 * q @ k.transpose(2, 3)).softmax(-1) @ v


class Fused(Attention):
    """The same, its attention one operator."""

    @staticmethod
    def seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)


@pytest.mark.parametrize("module", [Attention, Fused])
def test_products_of_two_values_are_the_accelerators(module: type[nn.Module], tmp_path: Path) -> None:
    _, parts = split(module, tmp_path, "one", "two")
    products = [node for network in parts.networks for node in network.nodes if isinstance(node.layer, Product)]
    shapes = [[network.values[name].shape for name in (node.source, node.other or "")]
              for network in parts.networks for node in network.nodes if node in products]  # fmt: skip
    assert shapes == [[(12, 2, 30), (30, 2, 12)], [(30, 2, 30), (12, 2, 30)]]
    macs = sum(macs_of(node, network.values) for network in parts.networks for node in network.nodes)
    assert macs == 30 * (16 * 24 + 24 * 72 + 2 * 30 * 24 + 24 * 24 + 2 * 24 * 40)
    assert {grid.grid.zero for network in parts.networks for node in network.nodes if node in products
            for grid in (network.values[node.source], network.values[node.other or ""])} == {0}  # fmt: skip


@pytest.mark.compile
@pytest.mark.parametrize(("module", "runs"), [(Between, 2), (Joined, 3), (Attention, 5)])
def test_host_and_accelerator_answer_together_as_onnx_runtime(
    module: type[nn.Module], runs: int, tmp_path: Path
) -> None:
    program, parts = split(module, tmp_path, "one", "two")
    assert len(parts.networks) == runs, "what follows the host's work has to wait for it"

    def accelerate(network: Network, *tensors: tvm.runtime.Tensor) -> None:
        given = {name: one.numpy()[0] for name, one in zip(network.inputs, tensors, strict=False)}
        built = compile_network(network, SMALL)
        memory = built.image.copy()
        for name, value in given.items():
            built.write(name, value, memory)
        simulator.execute(built.program, memory, SMALL)
        wanted = network(given)
        for name, answer in zip(network.outputs, tensors[len(given) :], strict=True):
            assert np.array_equal(built.read(name, memory), wanted[name])
            answer.copyfrom(wanted[name][None])

    for k, network in enumerate(parts.networks):
        tvm.register_global_func(parts.name(k), partial(accelerate, network), override=True)
    machine = relax.VirtualMachine(tvm.compile(parts.host, tvm.target.Target({"kind": "llvm"})), tvm.cpu())
    peer = session(program.model, optimised=False)
    for seed in range(3):
        x = torch.randn(INPUT.shape, generator=torch.Generator().manual_seed(seed)).numpy()
        found = machine["main"](tvm.runtime.tensor(x))
        for answer, wanted in zip(found, run(peer, (x,)).values(), strict=True):
            if module is Attention:  # between whose grids the host computes a softmax in floating point
                assert np.abs(answer.numpy() - wanted).max() < 0.03 * np.abs(wanted).max()
            else:
                assert np.array_equal(answer.numpy(), wanted)
