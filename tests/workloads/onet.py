"""MTCNN's O-Net: face probability, box and landmarks, with the published checkpoint's parameter names; no data.

Source: Zhang et al., "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional Networks", 2016.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from compressor.workload import Batch, Split, Task


class ONetwork(nn.Module):
    """(N, 3, 48, 48) in [-1, 1] -> face (N, 2) softmax, box (N, 4), landmarks (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.pool3 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.pool3(self.prelu3(self.conv3(x)))
        x = self.prelu4(self.conv4(x)).permute(0, 3, 2, 1).flatten(1)
        x = self.prelu5(self.dense5(x))
        return self.dense6_1(x).softmax(1), self.dense6_2(x), self.dense6_3(x)


class ONet:
    tasks = (Task("face", output=0), Task("box", output=1), Task("landmarks", output=2))
    normalisation = "RGB, minus 127.5, divided by 128."

    def build(self) -> nn.Module:
        return ONetwork()

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (_images(1, 0),)

    def batches(self, split: Split, seed: int) -> Iterable[Batch]:
        return [Batch((_images(8, 1 + seed),))]

    def losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        return {}

    def metrics(self) -> Mapping[str, Metric]:
        return {}


def _images(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, 48, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1
