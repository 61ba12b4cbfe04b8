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

DRONET_WEIGHTS = Path(__file__).parent.parent.parent / "shared" / "inputs" / "dronet" / "dronet.safetensors"


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


class DroNetBlock(nn.Module):
    """PULP-DroNet's residual block: two 3x3 convolutions beside a 1x1 bypass, ReLU6 on both before the sum."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu1 = nn.ReLU6()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu2 = nn.ReLU6()
        self.bypass = nn.Conv2d(channels_in, channels_out, 1, stride=2)
        self.bn_bypass = nn.BatchNorm2d(channels_out)
        self.relu3 = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        main = self.relu1(self.bn1(self.conv1(x)))
        main = self.relu2(self.bn2(self.conv2(main)))
        return main + self.relu3(self.bn_bypass(self.bypass(x)))


class DroNet(nn.Module):
    """PULP-DroNet v2: steering and collision from a (N, 1, 200, 200) grey frame."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 5, stride=2, padding=2)
        self.bn = nn.BatchNorm2d(32)
        self.pool = nn.MaxPool2d(2)
        self.blocks = nn.Sequential(DroNetBlock(32, 32), DroNetBlock(32, 64), DroNetBlock(64, 128))
        self.fc = nn.Linear(6272, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool(torch.clamp(self.bn(self.conv(x)), 0, 6))
        y = self.fc(torch.clamp(self.blocks(x), 0, 6).flatten(1))
        return y[:, :1], torch.sigmoid(y[:, 1:])


class Residual(nn.Module):
    """conv-BN-ReLU twice with a skip."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False), nn.BatchNorm2d(channels_out),
        )
        plain = channels_in == channels_out and stride == 1
        self.skip = nn.Identity() if plain else nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.main(x) + self.skip(x))


class Decoder(nn.Module):
    """Bilinear x2 upsampling with skips, then a head with `out` channels."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.up1 = nn.Sequential(nn.Conv2d(128 + 64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.up2 = nn.Sequential(nn.Conv2d(64 + 32, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Conv2d(32, out, 3, 1, 1)
        self.twice = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        fine, middle, coarse = features
        x = self.up1(torch.cat([self.twice(coarse), middle], 1))
        x = self.up2(torch.cat([self.twice(x), fine], 1))
        return self.twice(self.head(x))


class ScenesLike(nn.Module):
    """A three-task dense prediction network: a shared residual encoder and three decoders, 96x96 RGB."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.stage1 = Residual(32, 32)
        self.stage2 = nn.Sequential(Residual(32, 64, 2), Residual(64, 64))
        self.stage3 = nn.Sequential(Residual(64, 128, 2), Residual(128, 128))
        self.segmentation, self.depth, self.normals = Decoder(13), Decoder(1), Decoder(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.stage1(self.stem(x))
        middle = self.stage2(fine)
        features = [fine, middle, self.stage3(middle)]
        return self.segmentation(features), self.depth(features), self.normals(features)


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


class MobileBlock(nn.Module):
    """Depthwise 3x3 then 1x1, with a sum around both where shapes allow, as small face networks use."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels_in, channels_in, 3, stride, 1, groups=channels_in, bias=False)
        self.pointwise = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels_in), nn.BatchNorm2d(channels_out)])
        self.sums = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self.norms[0](self.depthwise(x)))
        y = self.norms[1](self.pointwise(y))
        return x + y if self.sums else y


class Mobile(nn.Module):
    """Two answers from a depthwise-separable backbone; max-pool with asymmetric padding, 7x7 average, softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2)
        self.blocks = nn.Sequential(
            MobileBlock(32, 64), MobileBlock(64, 64), MobileBlock(64, 96, 2), MobileBlock(96, 96),
        )
        self.last = nn.Sequential(MobileBlock(96, 128, 2), MobileBlock(128, 128))
        self.age, self.gender = nn.Conv2d(128, 1, 1), nn.Conv2d(128, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.pad((x - 0.5) / 0.25, (0, 1, 0, 1))
        x = self.blocks(torch.relu(self.stem(x)))
        x = nn.functional.max_pool2d(nn.functional.pad(x, (0, 1, 0, 1), value=float("-inf")), 3, 2)
        x = nn.functional.avg_pool2d(self.last(x), 7)
        return self.age(x).flatten(1), torch.softmax(self.gender(x).flatten(1), 1)


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
