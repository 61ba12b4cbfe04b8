"""Small networks the target tests compile, and the one way they become a `Program`."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxsim
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from profiles.device import Device
from targets.base import Array, Program


def cpu_device(cores: int = 2, bits: int = 512, mcpu: str = "", **changes: object) -> Device:
    """A CPU device for tests; without `mcpu` the code runs on any x86-64-v4 machine or, at 256 bits, x86-64-v3."""
    mcpu = mcpu or ("x86-64-v4" if bits == 512 else "x86-64-v3")
    settings: dict[str, object] = {
        "name": "test-cpu",
        "kind": "cpu",
        "description": "the machine the tests run on",
        "target": {"kind": "llvm", "mcpu": mcpu},
        "cores": cores,
        "vector_bits": bits,
        "vector_registers": 32 if bits == 512 else 16,
        "channel_multiple": bits // 32,
    }
    return Device(**(settings | changes))


def host_bits() -> int:
    """Width of the widest float vectors this machine runs, as far as the tests need to know."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return 512 if "avx512f" in flags else 256


def to_program(module: nn.Module, inputs: tuple[Tensor, ...], tasks: tuple[str, ...], name: str = "net") -> Program:
    """Export through torch.export and onnxsim, outputs named after `tasks`."""
    exported = torch.export.export(module.eval(), inputs)
    result = torch.onnx.export(exported, (), dynamo=True, verify=False, output_names=list(tasks), verbose=False)
    assert result is not None
    model, _ = onnxsim.simplify(result.model_proto)
    onnx.checker.check_model(model)
    return Program(name=name, model=model, tasks=tasks)


def answers(program: Program, *inputs: Array) -> dict[str, Array]:
    """What ONNX Runtime says without its optimiser, which answers wrongly where a Pad precedes a MaxPool (1.31)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(program.model.SerializeToString(), options, ["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    outputs = session.run(list(program.tasks), dict(zip(names, inputs, strict=True)))
    return dict(zip(program.tasks, outputs, strict=True))


def example(*shape: int, seed: int = 0) -> Array:
    """Normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def settle(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms statistics and affine values that matter, as a trained network has; returns the module."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.copy_(torch.randn(part.num_features, generator=generator) * 0.1)
            part.running_var.copy_(torch.rand(part.num_features, generator=generator) + 0.5)
            part.weight.data.copy_(torch.rand(part.num_features, generator=generator) + 0.5)
            part.bias.data.copy_(torch.randn(part.num_features, generator=generator) * 0.1)
    return module.eval()


def node_program(
    nodes: list[onnx.NodeProto], inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]],
    weights: dict[str, Array] | None = None, name: str = "graph",
) -> Program:
    """A program straight from ONNX nodes; its tasks are the outputs."""
    def value(label: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(label, onnx.TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes, name, [value(*item) for item in inputs.items()], [value(*item) for item in outputs.items()],
        [numpy_helper.from_array(array, label) for label, array in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return Program(name=name, model=model, tasks=tuple(outputs))


def run_built(program: Program, device: Device, *inputs: Array, threads: int = 2) -> dict[str, Array]:
    """Plan, build, load and run once."""
    from targets.cpu import CpuTarget

    target = CpuTarget()
    with tempfile.TemporaryDirectory() as folder:
        artifact = target.build(target.plan(program, device), Path(folder) / "artifact", {}, {})
        return target.load(artifact, threads)(*inputs)


class UNet(nn.Module):
    """Odd widths, both kinds of transposed convolution, concatenation, squeeze-excitation, pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 20, 3, 1, 1), nn.Conv2d(20, 40, 3, 2, 1), nn.Conv2d(40, 72, 3, 2, 1)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(72, 40, 2, 2), nn.ConvTranspose2d(40, 20, 4, 2, 1)])
        self.mix = nn.ModuleList([nn.Conv2d(80, 40, 3, 1, 1), nn.Conv2d(40, 20, 3, 1, 1)])
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(72, 18, 1), nn.ReLU(), nn.Conv2d(18, 72, 1), nn.Sigmoid()
        )
        self.norm, self.head = nn.BatchNorm2d(20), nn.Conv2d(20, 12, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = nn.functional.silu(self.down[0](x))
        middle = torch.relu(self.down[1](fine))
        coarse = nn.functional.hardswish(self.down[2](middle))
        coarse = coarse * self.gate(coarse)
        y = nn.functional.leaky_relu(self.mix[0](torch.cat([self.up[0](coarse), middle], 1)))
        y = self.norm(torch.relu(self.mix[1](torch.cat([fine, self.up[1](y)], 1))))
        return nn.functional.pixel_shuffle(self.head(y), 2), y.mean((2, 3))


class VisionTransformer(nn.Module):
    """Two encoder layers over 8x8 patches."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 3, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.whole, self.each = nn.Linear(width, 10), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.whole(tokens.mean(1)), self.each(tokens)
