"""Age and gender from a face: a small network of separable convolutions, with the checkpoint's names; no data."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from compressor.workload import Batch, Split, Task


class Separable(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.pw = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw(self.dw(x))


class Reduction(nn.Module):
    """Half the size: two separable convolutions and a max-pool beside a 1x1 convolution of stride 2."""

    def __init__(self, inputs: int, outputs: int, *, first: bool = False) -> None:
        super().__init__()
        self.first = first
        self.c0, self.c1 = Separable(inputs, outputs), Separable(outputs, outputs)
        self.ex = nn.Conv2d(inputs, outputs, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        main = self.c1(F.relu(self.c0(x if self.first else F.relu(x))))
        padded = F.pad(main, (0, 1, 0, 1), value=float("-inf"))  # TensorFlow's "same" for an even size
        return F.max_pool2d(padded, 3, 2) + self.ex(x)


class Main(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c0, self.c1, self.c2 = (Separable(channels, channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c2(F.relu(self.c1(F.relu(self.c0(F.relu(x))))))


class AgeGenderNetwork(nn.Module):
    """(N, 3, 112, 112) in 0..255 -> age (N, 1) and gender (N, 2) softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.conv_in = nn.Conv2d(3, 32, 3, stride=2)
        self.r0, self.r1 = Reduction(32, 64, first=True), Reduction(64, 128)
        self.m0, self.m1 = Main(128), Main(128)
        self.r2, self.sep = Reduction(128, 256), Separable(256, 512)
        self.age, self.gender = nn.Linear(512, 1), nn.Linear(512, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.pad((x - self.mean) / 255, (0, 1, 0, 1))
        x = self.r1(self.r0(F.relu(self.conv_in(x))))
        x = F.relu(self.sep(self.r2(self.m1(self.m0(x)))))
        x = F.avg_pool2d(x, 7).flatten(1)
        return {"age": self.age(x), "gender": self.gender(x).softmax(1)}


class AgeGender:
    tasks = (Task("age", output="age"), Task("gender", output="gender"))
    normalisation = "BGR or RGB as the checkpoint has it, 0 to 255; the network subtracts its own mean."

    def build(self) -> nn.Module:
        return AgeGenderNetwork()

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (_images(1, 0),)

    def batches(self, split: Split, seed: int) -> Iterable[Batch]:
        return [Batch((_images(4, 1 + seed),))]

    def losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        return {}

    def metrics(self) -> Mapping[str, Metric]:
        return {}


def _images(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(seed)) * 255
